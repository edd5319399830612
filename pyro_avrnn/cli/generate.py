"""``avrnn generate``: sequences drawn from a trained model, as sound, music or numbers."""

import json
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inference import seeded
from inference.files import atomically
from pyro_avrnn import data, media, plots, recipes
from pyro_avrnn.cli.options import option
from pyro_avrnn.cli.report import validation_bound
from pyro_avrnn.cli.runs import Result, row_folder
from pyro_avrnn.data import Dataset
from pyro_avrnn.generation import continue_from, generate

_STEP_SECONDS = 0.5  # of music, if the data do not tell: quarter notes at 120 a minute


@dataclass(frozen=True)
class Generation:
    """Options of ``avrnn generate``."""

    run: Path = option(MISSING, "folder of an avrnn compare")
    data: str = option("vowels", "data of that comparison")
    row: str | None = option(None, "row of the table (default: best by the validation bound)")
    count: int = option(2, "sequences of each kind", "at least 1")
    length: int | None = option(
        None, "steps of a sequence (default: median of the test sequences)", "at least 1"
    )
    prefix: int | None = option(
        None,
        "steps of a test sequence that are given (default: a quarter of --length)",
        "at least 1",
    )
    seed: int = option(0, "seed of all draws")
    out: Path | None = option(None, "folder to write (default: RUN/generated)")


def generate_files(options: Generation) -> list[Path]:
    """Draw sequences, freely and after the beginning of a test sequence, and write them.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no such run or data.
        ValueError: an unknown row, other data, or a beginning that leaves no step to draw.
    """
    result = _chosen(options.run, options.row)
    if options.data == "vowels" and result["data"] != "vowels":
        raise ValueError(
            f"--data must be the data of the comparison, {result['data']}, got 'vowels'"
        )
    dataset = data.load(options.data, **(result.get("reader") or {}))  # older files have none
    folder = row_folder(options.run, result["row"], result["seed"])
    recipe = recipes.load(folder / "parameters.pt")
    if (dataset.name, dataset.x_dim) != (result["data"], recipe.model.x_dim):
        raise ValueError(
            f"--data {options.data} is {dataset.name} with {dataset.x_dim} features, but the row "
            f"was trained on {result['data']} with {recipe.model.x_dim}; give the data of the "
            "comparison"
        )
    made = _draw(recipe, dataset, options)
    out = options.run / "generated" if options.out is None else options.out
    out.mkdir(parents=True, exist_ok=True)
    return _write(out, made, dataset, f"{result['row']}, seed {result['seed']}")


def _chosen(run: Path, label: str | None) -> Result:
    """The finished training with the best validation bound, of one row or of all."""
    path = run / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; give the folder of an avrnn compare")
    results = [r for r in json.loads(path.read_text()) if not r["error"]]
    known = list(dict.fromkeys(r["row"] for r in results))
    if label is not None and label not in known:
        raise ValueError(f"--row must be one of {'; '.join(known)}, got {label!r}")
    if not results:
        raise ValueError(f"{path} has no training that went to its end")
    return max((r for r in results if label in (None, r["row"])), key=validation_bound)


def _draw(recipe: recipes.Recipe, dataset: Dataset, options: Generation) -> dict[str, Tensor]:
    """Sequences by name, ``(T, X)`` each: an observed one, those it begins, and free ones."""
    test, count = dataset.test, options.count
    length = options.length or int(test.lengths.median())
    prefix = options.prefix or max(length // 4, 1)
    index = _median_sequence(test.lengths, prefix, length)
    observed = test.sequence(index)[:length]
    begun = observed[:prefix].unsqueeze(0)
    with seeded(options.seed):
        free = generate(recipe.model, count, length)
        after = continue_from(
            recipe.model, recipe.guide, begun, steps=length - prefix, num_continuations=count
        )[:, 0]
    continued = torch.cat([begun.expand(count, -1, -1), after], dim=1)
    made = {f"observed, {test.names[index]}": observed}
    for kind, drawn in ((f"begun by {prefix} observed steps", continued), ("free", free)):
        made |= {f"{kind} {i + 1}" if count > 1 else kind: x for i, x in enumerate(drawn)}
    return made


def _median_sequence(lengths: Tensor, prefix: int, length: int) -> int:
    """Index of the sequence of median length, among those of at least ``prefix`` steps."""
    if prefix >= length:
        raise ValueError(f"--prefix must be below --length, {length}, got {prefix}")
    enough = [i for i in lengths.argsort().tolist() if int(lengths[i]) >= prefix]
    if not enough:
        raise ValueError(f"--prefix must fit into a test sequence, got {prefix}; take fewer steps")
    return enough[len(enough) // 2]


def _write(out: Path, made: dict[str, Tensor], dataset: Dataset, title: str) -> list[Path]:
    """Write MIDI, sound or numbers in the data's own units, and one picture."""
    if dataset.kind == "binary" and dataset.x_dim == 88:
        rolls = {name: x.numpy() for name, x in made.items()}
        files = _files(out, rolls, ".mid")
        for path, roll in files.items():
            media.write_midi(path, roll, step_seconds=dataset.frame_seconds or _STEP_SECONDS)
        return [*files, plots.piano_rolls(rolls, out / "rolls.png", title=title)]
    raw = {name: _raw(x, dataset) for name, x in made.items()}
    if (rate := dataset.sample_rate) is not None:
        waves = {name: x.reshape(-1) / 32768.0 for name, x in raw.items()}
        files = _files(out, waves, ".wav")
        for path, wave in files.items():
            media.write_wav(path, wave, rate)
        picture = out / "spectrograms.png"
        return [*files, plots.spectrograms(waves, picture, sample_rate=rate, title=title)]
    files = _files(out, raw, ".csv")
    for path, x in files.items():
        atomically(path, partial(np.savetxt, X=x, delimiter=",", fmt="%.6g"))
    seconds = dataset.frame_seconds
    picture = plots.features(raw, out / "generated.png", frame_seconds=seconds, title=title)
    return [*files, picture]


def _files(out: Path, made: dict[str, np.ndarray], suffix: str) -> dict[Path, np.ndarray]:
    """Sequences by the file of their name."""
    safe = {name: "".join(c if c.isalnum() else "_" for c in name) for name in made}
    return {out / f"{safe[name]}{suffix}": content for name, content in made.items()}


def _raw(x: Tensor, dataset: Dataset) -> np.ndarray:
    """In the units of the recording; levels as samples of 16 bits."""
    if dataset.in_levels:
        return dataset.samples(x).astype("float64")
    mean, std = torch.as_tensor(dataset.mean), torch.as_tensor(dataset.std)
    return (x * std + mean).double().numpy()
