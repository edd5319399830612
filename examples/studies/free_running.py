"""Do refined priors generate better? Free runs against held-out recordings.

    python examples/studies/free_running.py runs/timit/refined --data timit.zip

Reads what ``avrnn refine`` wrote. Each model generates twice as many sequences as the test set
has, with its refined prior and with the base of it. Two numbers say how far they are from the
recordings:

* the accuracy of a classifier that tells windows of free runs from windows of recordings
  (Lopez-Paz and Oquab 2017, https://arxiv.org/abs/1610.06545): 0.5 is perfect. It is fitted on the
  training recordings and one half of the free runs, and judged on the test recordings, whose
  speakers may be others, and the other half;
* the log-spectral distance to the test recordings: root mean square, over frequencies, of the
  difference between average log power spectra, in decibels. Only sound has it; that of the
  training recordings is shown next to it.

A window is told by mean and deviation, in time, of each band or feature, and the deviation of its
changes. The first seed of each row is written as sound, with its spectrograms.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import synthetic
import torch
from common import Row, by_label, markdown, mean, publish
from torch import Tensor
from tqdm import tqdm

from inference import seeded
from inference.files import write_json
from pyro_avrnn import data, plots, recipes
from pyro_avrnn.cli import main as avrnn
from pyro_avrnn.cli.runs import commit, row_folder
from pyro_avrnn.data import Dataset, Sequences, log_mel
from pyro_avrnn.generation import generate
from pyro_avrnn.media import write_wav

WINDOW_SECONDS, WINDOW_STEPS = 0.5, 16  # of sound, and of all else
FFT, HOP, BANDS = 512, 256, 40


class Heard(NamedTuple):
    """Sequences as a judge reads them."""

    windows: np.ndarray  # (N, D)
    spectrum: np.ndarray | None  # (F,), average log power, decibels


def hear(sequences: list[np.ndarray], rate: int | None) -> Heard:
    """Cut waveforms (S,), or features (T, X) where the rate is None, into windows."""
    frames, length = sequences, WINDOW_STEPS
    if rate is not None:
        sizes = {"sample_rate": rate, "window": FFT, "hop": HOP, "n_mels": BANDS}
        frames = [log_mel(wave, **sizes) for wave in sequences]
        length = round(WINDOW_SECONDS * rate / HOP)
    length = min(length, *map(len, frames))
    windows = []
    for x in frames:
        for start in range(0, len(x) - length + 1, length):
            piece = x[start : start + length]
            change = np.diff(piece, axis=0) if length > 1 else np.zeros_like(piece)
            windows.append(np.concatenate([piece.mean(0), piece.std(0), change.std(0)]))
    return Heard(np.array(windows), _spectrum(sequences, rate))


def _spectrum(waves: list[np.ndarray], rate: int | None) -> np.ndarray | None:
    if rate is None:
        return None
    pieces = np.concatenate([w[: len(w) // FFT * FFT].reshape(-1, FFT) for w in waves])
    power = np.square(np.abs(np.fft.rfft(pieces * np.hanning(FFT), axis=1)))
    return (10 * np.log10(power + 1e-6)).mean(axis=0)


def told_apart(fitted: tuple[Heard, Heard], judged: tuple[Heard, Heard]) -> float:
    """Balanced accuracy of a classifier of (recordings, free runs) on two others."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # an extra

    windows = [heard.windows for heard in fitted]
    judge = HistGradientBoostingClassifier(
        max_iter=50, max_leaf_nodes=7, class_weight="balanced", random_state=0
    ).fit(np.concatenate(windows), np.repeat([0, 1], [*map(len, windows)]))
    right = [(judge.predict(h.windows) == label).mean() for label, h in enumerate(judged)]
    return float(np.mean(right))


def distance(real: Heard, other: Heard) -> float | None:
    """Log-spectral distance, decibels; None of what is no sound."""
    if real.spectrum is None or other.spectrum is None:
        return None
    return float(np.sqrt(np.square(real.spectrum - other.spectrum).mean()))


def raw(x: Tensor, dataset: Dataset) -> np.ndarray:
    """One sequence as a waveform from -1 to 1, or as it is."""
    if dataset.sample_rate is None:
        return x.double().numpy()
    if dataset.in_levels:
        return dataset.samples(x).reshape(-1) / 32768.0
    return ((x * dataset.std + dataset.mean).double().numpy() / 32768.0).reshape(-1)


def recordings(split: Sequences, dataset: Dataset) -> list[np.ndarray]:
    """All sequences of a split."""
    return [raw(split.sequence(i), dataset) for i in range(len(split))]


def free(model: Any, dataset: Dataset, seed: int) -> list[np.ndarray]:
    """Twice as many free runs as there are test sequences, of their median length."""
    length = int(dataset.test.lengths.median())
    with seeded(seed):
        return [raw(x, dataset) for x in generate(model, 2 * len(dataset.test), length)]


def judged(result: Row, run: Path, dataset: Dataset, known: Heard, asked: Heard) -> Row:
    """Judge base and refined prior of one row and seed."""
    recipe = recipes.load(row_folder(run, result["row"], result["seed"]) / "parameters.pt")
    model: Any = recipe.model
    model.prior.num_candidates = max(map(int, result["after"]))
    refined, waves = model.prior, {}
    found: Row = {name: result[name] for name in ("row", "seed")}
    for name, prior in (("base", refined.base), ("refined", refined)):
        model.prior = prior
        waves[name] = free(model, dataset, result["seed"])
        half = len(waves[name]) // 2
        first, second = (
            hear(w, dataset.sample_rate) for w in (waves[name][:half], waves[name][half:])
        )
        found[f"{name}_accuracy"] = told_apart((known, first), (asked, second))
        found[f"{name}_distance"] = distance(asked, second)
    if dataset.sample_rate is not None and result["seed"] == 0:
        folder = run / "free_running" / row_folder(run, result["row"], 0).name
        shown = {"test recording": raw(dataset.test.sequence(0), dataset)}
        shown |= {f"{name} prior": drawn[0] for name, drawn in waves.items()}
        folder.mkdir(parents=True, exist_ok=True)
        for name, wave in shown.items():
            write_wav(folder / f"{name.replace(' ', '_')}.wav", wave, dataset.sample_rate)
        plots.spectrograms(shown, folder / "spectrograms.png", sample_rate=dataset.sample_rate)
    return found


def table(rows: list[Row], limit: float | None) -> str:
    """A line a row, mean and deviation over seeds; last the distance of training recordings."""
    head = ["row", "told apart: base", "refined", "seed by seed"]
    sound = limit is not None
    head += ["spectral distance: base", "refined"] if sound else []
    lines: list[list[str]] = []
    for label, mine in by_label(rows).items():
        pairs = [(r["base_accuracy"], r["refined_accuracy"]) for r in mine]
        line = [f"`{label}`", *(mean(column, 3) for column in zip(*pairs, strict=True))]
        line.append(", ".join(f"{b - a:+.3f}" for a, b in pairs))
        if sound:
            line += [mean([r[f"{k}_distance"] for r in mine], 1) for k in ("base", "refined")]
        lines.append(line)
    lines += [["training recordings", "", "", "", f"{limit:.1f}", ""]] if sound else []
    return markdown(head, lines)


def smoke(folder: Path) -> tuple[Path, Path]:
    """A short training with its prior refined, and its data."""
    source = synthetic.timit(folder)
    small = ["--z-dim", "2", "--h-dim", "4", "--steps", "2", "--particles", "2", "--jobs", "1"]
    run = ["--data", str(source), "--out", str(folder / "run"), "--rows", "elbo"]
    avrnn(["compare", *run, *small, "--validate-every", "1"])
    avrnn(["refine", str(folder / "run"), "--data", str(source), "--steps", "2"])
    return folder / "run" / "refined", source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="folder that avrnn refine wrote")
    parser.add_argument("--data", help="data of the comparison")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if None in (args.run, args.data) and not args.smoke:
        parser.error("a folder that avrnn refine wrote and --data are needed (or --smoke)")
    with tempfile.TemporaryDirectory() as folder:
        run, source = smoke(Path(folder)) if args.smoke else (args.run, args.data)
        if not (run / "refined.json").is_file():
            parser.error(f"no {run / 'refined.json'}; give the folder that avrnn refine wrote")
        judge(run, source)


def judge(run: Path, source: Path | str) -> None:
    """Judge all rows of a folder, and write the table."""
    results = json.loads((run / "refined.json").read_text())
    dataset = data.load(str(source), **(results[0].get("reader") or {}))
    torch.set_num_threads(1)
    splits = (dataset.train, dataset.test)
    known, asked = (hear(recordings(part, dataset), dataset.sample_rate) for part in splits)
    limit = distance(asked, known)
    bar = tqdm(results, "free runs", unit="row")
    rows = [judged(r, run, dataset, known, asked) for r in bar]
    record = {"commit": commit(), "training_recordings": limit, "rows": rows}
    write_json(run / "free_running.json", record)
    publish(run, "free_running.md", table(rows, limit), "free_running.json")


if __name__ == "__main__":
    main()
