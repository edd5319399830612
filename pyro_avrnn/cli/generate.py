"""``avrnn generate``: what a trained row makes up, as sound, music or numbers, and pictures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import seeded
from pyro_avrnn import data, media, plots, recipes
from pyro_avrnn.cli.runs import row_folder
from pyro_avrnn.data import Dataset
from pyro_avrnn.generation import continue_from, generate

_STEP_SECONDS = 0.5  # of music, whose data do not say: quarter notes at 120 a minute


def generate_from(
    run: Path,
    source: str,
    *,
    row: str | None = None,
    count: int = 2,
    length: int | None = None,
    prefix: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> list[Path]:
    """Free runs of a row's model, and what follows the beginning of a test sequence.

    Args:
        run: the folder of a comparison.
        source: the data it was made from, for units, and for the beginning.
        row: by its label in the table; None for the best by the validation bound.
        count: sequences of each kind.
        length: steps of a free run, and of beginning and continuation together; None for the
            median of the test sequences.
        prefix: steps of the beginning; None for a quarter of ``length``.
        seed: of all draws.
        out: folder to write; None for ``generated`` in ``run``.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no such run or data.
        ValueError: an unknown row, numbers below 1, a beginning that leaves no step.
    """
    best = _chosen(run, row)
    dataset = data.load(source, **_reader(best, source))
    recipe = recipes.load(row_folder(run, best["row"], best["seed"]) / "parameters.pt")
    if (dataset.name, dataset.x_dim) != (best["data"], recipe.model.x_dim):
        raise ValueError(
            f"--data {source} is {dataset.name} with {dataset.x_dim} features, but the row was "
            f"trained on {best['data']} with {recipe.model.x_dim}; give the data of the comparison"
        )
    test = dataset.test
    length = int(test.lengths.median()) if length is None else length
    prefix = max(length // 4, 1) if prefix is None else prefix
    for name, value in (("count", count), ("length", length), ("prefix", prefix)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if prefix >= length:
        raise ValueError(f"--prefix must be below --length, {length}, got {prefix}")
    enough = [i for i in test.lengths.argsort().tolist() if int(test.lengths[i]) >= prefix]
    if not enough:
        raise ValueError(f"--prefix must fit into a test sequence, got {prefix}; take fewer steps")
    index = enough[len(enough) // 2]
    observed = test.sequence(index)[:length]
    recipe.model.eval()
    with seeded(seed):
        free = generate(recipe.model, count, length)
        begun = observed[:prefix].unsqueeze(0)
        after = continue_from(
            recipe.model, recipe.guide, begun, steps=length - prefix, num_continuations=count
        )[:, 0]
    continued = torch.cat([begun.expand(count, -1, -1), after], dim=1)
    numbered = [f" {i + 1}" if count > 1 else "" for i in range(count)]
    made = {f"observed, {test.names[index]}": observed}
    made |= {
        f"begun by {prefix} observed steps{n}": x for n, x in zip(numbered, continued, strict=True)
    }
    made |= {f"free{n}": x for n, x in zip(numbered, free, strict=True)}
    out = run / "generated" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    return _write(out, made, dataset, f"{best['row']}, seed {best['seed']}")


def _chosen(run: Path, label: str | None) -> dict[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; give the folder of an avrnn compare")
    results = [r for r in json.loads(path.read_text()) if not r["error"]]
    known = list(dict.fromkeys(r["row"] for r in results))
    if label is not None and label not in known:
        raise ValueError(f"--row must be one of {'; '.join(known)}, got {label!r}")
    rows = [r for r in results if label in (None, r["row"])]
    if not rows:
        raise ValueError(f"{path} has no training that went to its end")

    def validation(result: dict[str, Any]) -> float:
        by = result["settings"].get("validate_by", "iwae")
        value = result[f"validation_{by}_per_frame"]
        return -math.inf if value is None else value

    return max(rows, key=validation)


def _reader(best: dict[str, Any], source: str) -> dict[str, Any]:
    """The options the comparison's data were read with; none where its file does not say."""
    if source == "vowels" and best["data"] != "vowels":
        raise ValueError(
            f"--data must be the data of the comparison, {best['data']}, got {source!r}"
        )
    return best.get("reader") or {}


def _write(out: Path, made: dict[str, Tensor], dataset: Dataset, title: str) -> list[Path]:
    """Sound, MIDI or numbers in the data's own units, and one picture."""
    files = [out / f"{_safe(name)}" for name in made]
    if dataset.kind == "binary" and dataset.x_dim == 88:
        rolls = {name: x.numpy() for name, x in made.items()}
        step = dataset.frame_seconds or _STEP_SECONDS
        for file, roll in zip(files, rolls.values(), strict=True):
            media.write_midi(file.with_suffix(".mid"), roll, step_seconds=step)
        picture = plots.piano_rolls(rolls, out / "rolls.png", title=title)
        return [*(file.with_suffix(".mid") for file in files), picture]
    raw = {name: _raw(x, dataset) for name, x in made.items()}
    if dataset.sample_rate is not None:
        waves = {name: x.reshape(-1) / 32768.0 for name, x in raw.items()}
        for file, wave in zip(files, waves.values(), strict=True):
            media.write_wav(file.with_suffix(".wav"), wave, dataset.sample_rate)
        picture = plots.spectrograms(
            waves, out / "spectrograms.png", sample_rate=dataset.sample_rate, title=title
        )
        return [*(file.with_suffix(".wav") for file in files), picture]
    for file, x in zip(files, raw.values(), strict=True):
        np.savetxt(file.with_suffix(".csv"), x, delimiter=",", fmt="%.6g")
    picture = plots.features(
        raw, out / "generated.png", frame_seconds=dataset.frame_seconds, title=title
    )
    return [*(file.with_suffix(".csv") for file in files), picture]


def _raw(x: Tensor, dataset: Dataset) -> np.ndarray:
    """In the units of the recording; mu-law levels as samples of 16 bits."""
    if dataset.kind == "mu-law":
        assert dataset.bits is not None
        return data.mu_law_decode(x, dataset.bits).astype("float64")
    scale = (torch.as_tensor(dataset.std), torch.as_tensor(dataset.mean))
    return (x * scale[0] + scale[1]).double().numpy()


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
