"""``avrnn compare`` as a person meets it: what it writes, and what it says of bad input."""

import json
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from inference.files import write_json
from pyro_avrnn import data, recipes
from pyro_avrnn.cli import compare, main
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.options import options_of
from pyro_avrnn.cli.parts import build
from pyro_avrnn.cli.rows import ROWS, parse
from pyro_avrnn.cli.runs import row_folder
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training

TINY = ["--steps", "6", "--h-dim", "8", "--z-dim", "2", "--particles", "25", "--jobs", "1"]
PICTURES = ("learning_curves", "critic_curves", "rate", "sequences", "posterior", "filter")
FILES = ("results.json", "metrics.csv", "table.md", "learning.md", "posterior.nc") + tuple(
    f"{name}.png" for name in PICTURES
)
KEYS = {
    *("row", "model", "objective", "view", "schedule", "seed", "data", "split", "commit"),
    *("iwae_per_frame", "elbo_per_frame", "reconstruction_per_frame", "kl_per_frame"),
    *("fivo_per_frame", "fivo_per_frame_se", "fivo_particles", "filter_ess"),
    *("num_particles", "frames", "seconds", "standardisation", "min_scale"),
    *("rise", "still_rising", "clipped_share", "gradient_norms", "dead_units"),
}


def small_npz(path: Path, **arrays: Any) -> Path:
    """Twelve series of at most 6 frames of 3 noisy waves, or the arrays given."""
    random = np.random.default_rng(0)
    x = np.sin(np.arange(6)[:, None] + random.uniform(0, 6, size=(12, 1, 3)))
    content = {"x": x + 0.1 * random.normal(size=x.shape), "lengths": np.arange(12) % 4 + 3}
    np.savez(path, **(arrays or content))
    return path


def read(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run the command; the one sentence on stderr."""
    try:
        code = main(["compare", *arguments])
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == status, said
    assert "Traceback" not in said
    lines = [line for line in re.split(r"[\r\n]+", said) if "error" in line]
    assert len(lines) == 1 and len(lines[0]) < 700, said
    return lines[0]


@pytest.mark.fast_path
def test_a_comparison_in_worker_processes_writes_everything(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    command = [sys.executable, "-m", "pyro_avrnn", "compare", *TINY]
    command += ["--rows", "elbo", "conditional+kl", "--out", str(out), "--split", "valid"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    for name in FILES:
        assert (out / name).stat().st_size > 0, name
        assert str(out / name) in done.stdout
    assert (out / "table.md").read_text().strip() in done.stdout
    assert "**A short run** (6 steps a row, 1 seed)" in done.stdout
    assert "no evidence that one row beats another" in done.stdout
    results = read(out)
    assert [r["row"] for r in results] == ["elbo", "conditional+kl"]
    for r in results:
        assert set(r) > KEYS and r["error"] is None and r["steps"] == 6
        assert r["frames"] == data.vowels().valid.num_frames and r["split"] == "valid"
        assert r["iwae_per_frame"] > r["elbo_per_frame"] and r["num_particles"] == 25
        difference = r["reconstruction_per_frame"] - r["kl_per_frame"]
        assert r["elbo_per_frame"] == pytest.approx(difference, rel=1e-5)
        assert len(r["standardisation"]["mean"]) == len(r["standardisation"]["std"]) == 12
        folder = row_folder(out, r["row"], 0)
        loaded = recipes.load(folder / "parameters.pt")
        parts = (loaded.model, loaded.guide)
        assert sum(p.numel() for m in parts for p in m.parameters()) == r["parameters"]
        assert (folder / "metrics.csv").read_text().startswith("step,loss,")
    assert results[1]["critic_distance_per_frame"] is not None
    assert not list(out.rglob("*.tmp"))


def test_all_kinds_of_rows_resume_and_extend(
    tmp_path: Path, serial: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small_npz(tmp_path / "waves.npz")
    base = [*TINY, "--data", str(source), "--out", str(tmp_path / "out")]
    rows = ["rnn", "elbo-annealed", "alternating", "joint:constraint=gradient_penalty,critic=lstm"]
    assert main(["compare", *base, "--rows", *rows]) == 0
    first = read(tmp_path / "out")
    assert [r["row"] for r in first] == rows and {r["data"] for r in first} == {"waves"}
    assert main(["compare", *base, "--rows", *rows, "elbo", "--seeds", "2", "--resume"]) == 0
    second = read(tmp_path / "out")
    assert [(r["row"], r["seed"]) for r in second] == [
        (row, s) for row in (*rows, "elbo") for s in (0, 1)
    ]
    kept = [r for r in second if r["row"] in rows and r["seed"] == 0]
    assert kept == first  # seconds and all: nothing was trained again
    assert "2 seeds (0, 1)" in capsys.readouterr().out
    # fewer rows than before: none is lost
    assert main(["compare", *base, "--rows", "elbo", "--resume"]) == 0
    assert len(read(tmp_path / "out")) == len(second)
    # other settings, or other data under the same name: refused, nothing is touched
    capsys.readouterr()
    said = refused([*base, "--rows", "elbo", "--resume", "--lr", "0.01"], capsys)
    assert "made from other data or with other settings" in said
    small_npz(source, x=np.random.default_rng(1).normal(size=(12, 6, 3)))
    said = refused([*base, "--rows", "elbo", "--resume"], capsys)
    assert "made from other data or with other settings" in said
    assert len(read(tmp_path / "out")) == len(second)
    # with neither flag the folder is not touched; a new start sets the earlier results aside
    assert "start anew by --overwrite" in refused([*base, "--rows", "elbo"], capsys)
    assert len(read(tmp_path / "out")) == len(second)
    assert main(["compare", *base, "--rows", "elbo", "--overwrite"]) == 0
    assert len(read(tmp_path / "out")) == 1
    assert len(json.loads((tmp_path / "out" / "results.previous.json").read_text())) == len(second)


def test_the_same_command_gives_the_same_numbers(tmp_path: Path, serial: None) -> None:
    source = small_npz(tmp_path / "waves.npz")
    found = []
    for name in ("a", "b"):
        base = [*TINY, "--data", str(source), "--out", str(tmp_path / name)]
        assert main(["compare", *base, "--rows", "conditional"]) == 0
        (row,) = read(tmp_path / name)
        found.append({k: v for k, v in row.items() if k not in ("seconds", "command")})
    assert found[0] == found[1]


def understood(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Comparison, Settings]:
    """What the command is asked to do, without doing it."""
    asked: list[tuple[Comparison, Settings]] = []
    monkeypatch.setattr(compare, "compare", lambda *given: asked.append(given[:2]) or 0)
    assert main(["compare", *arguments]) == 0
    return asked[0]


def test_without_rows_the_default_ones_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    for given in ([], ["--schedules", "joint", "--views", "marginal"]):
        comparison, _ = understood(given, monkeypatch)
        asked.append([training.label for training in comparison.trainings()])
    assert asked[0][:4] == ["rnn", "elbo", "elbo-annealed", "alternating"]
    assert asked[0][4:] == ["conditional", "conditional+kl", "joint", "joint+kl"]
    assert asked[1] == ["rnn", "marginal", "marginal+kl"]


def test_a_segments_length_goes_to_the_reader(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, int]] = []
    cases = (["rolls.mat"], ["ROLLS.MAT", "7"], ["t.zip"], [str(tmp_path), "7"], ["vowels"])
    for source, *segment in cases:
        given = ["--segment", *segment] if segment else []
        comparison, settings = understood(["--data", source, *given], monkeypatch)
        asked.append(comparison.reader_options(settings))
    assert asked == [{}, {"segment": 7}, {"segment": 100}, {"segment": 7}, {}]


def test_rows_with_other_bounds_stand_in_the_table(
    tmp_path: Path, serial: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = small_npz(tmp_path / "waves.npz"), tmp_path / "out"
    base = [*TINY, "--data", str(source), "--out", str(out), "--validate-by", "fivo"]
    assert main(["compare", *base, "--rows", "iwae:dropout=0.2", "fivo"]) == 0
    rows = read(out)
    assert [r["objective"] for r in rows] == ["IWAE-4", "FIVO-4"]
    assert all(set(r) > KEYS | {"validation_fivo_per_frame"} for r in rows)
    said = capsys.readouterr().out
    assert "| FIVO-25 |" in said and "Best parameters by the validation FIVO-16" in said
    for r in rows:
        assert re.search(rf"^\| {r['row']} +\| {r['fivo_per_frame']:.2f} ", said, re.MULTILINE)


def test_long_series_are_cut_and_recomputed(
    tmp_path: Path,
    serial: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare.report, "write", lambda *_: None)  # tables are tested elsewhere
    source = small_npz(tmp_path / "waves.npz")
    base = [*TINY, "--data", str(source), "--rows", "conditional+kl", "fivo"]
    found = {}
    for name, given in {
        "whole": [],
        "saving": ["--recompute", "2"],
        "cut": ["--truncate", "2"],
    }.items():
        out = tmp_path / name
        assert main(["compare", *base, "--out", str(out), *given]) == 0
        found[name] = read(out)
        assert all(r["steps"] == 6 and r["error"] is None for r in found[name])
        if given:  # another training than the whole one, and said to be
            key = given[0].removeprefix("--")
            assert {r["settings"][key] for r in found[name]} == {2}
            capsys.readouterr()
            said = refused([*base, "--out", str(out), "--resume"], capsys)
            assert "made from other data or with other settings" in said
    assert {r["settings"]["truncate"] for r in found["whole"]} == {None}
    for whole, saving, cut in zip(found["whole"], found["saving"], found["cut"], strict=True):
        assert saving["elbo_per_frame"] == pytest.approx(whole["elbo_per_frame"], rel=1e-3)
        assert cut["elbo_per_frame"] != pytest.approx(whole["elbo_per_frame"], rel=1e-3)


def test_how_to_compute_goes_to_the_objective() -> None:
    settings = Settings(recompute=7, compile=True)
    for row in ("rnn", "iwae", "conditional"):
        objective = build(parse(row), data.vowels(), settings).objective
        assert objective.options == {"recompute": 7, "compile": True}
        assert build(parse(row), data.vowels(), Settings()).objective.options == {}


def test_flags_of_long_series_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ([], ["--truncate", "5", "--recompute", "6", "--compile"])
    asked = [understood(given, monkeypatch)[1] for given in cases]
    assert [(s.truncate, s.recompute, s.compile) for s in asked] == [
        (None, None, False),
        (5, 6, True),
    ]


def test_piano_rolls(tmp_path: Path, serial: None, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    cells: dict[str, Any] = {}
    for split, count in (("train", 8), ("valid", 2), ("test", 2)):
        rolls = np.empty((1, count), dtype=object)
        for i in range(count):
            rolls[0, i] = (random.uniform(size=(4 + i % 3, 88)) < 0.05).astype(np.uint8)
        cells[f"{split}data"] = rolls
    scipy.io.savemat(tmp_path / "rolls.mat", cells)
    out = tmp_path / "out"
    base = [*TINY, "--data", str(tmp_path / "rolls.mat"), "--out", str(out)]
    # a floor under a normal's scale says nothing of 0/1 data
    assert main(["compare", *base, "--rows", "elbo", "--min-scale", "0.5"]) == 0
    (row,) = read(out)
    assert row["min_scale"] is None and row["data"] == "rolls"
    said = capsys.readouterr().out
    assert "densities of 0/1 data" in said and "Independent Bernoullis" in said
    assert "scale floor" not in said
    short = ["compare", *base, "--overwrite", "--rows", "rnn", "--segment"]
    assert main([*short, "2"]) == 0
    (row,) = read(out)
    assert row["sequences"] == 2 and row["frames"] == 4 + 5  # the test pieces stay whole
    assert main([*short, "0"]) == 2
    assert "segment must be at least 1" in capsys.readouterr().err


def test_timit(tmp_path: Path, serial: None, data_folder: Path) -> None:
    whole = data_folder / "timit.zip"
    if not whole.is_file():
        pytest.skip(f"no {whole}")
    source = tmp_path / "timit.zip"  # a sentence for each split
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(source, "w") as chosen:
        audio = [name for name in archive.namelist() if name.lower().endswith(".wav")]
        for region in (1, 7, 8):
            names = [n for n in audio if re.search(rf"/dr{region}[-/]", n, re.IGNORECASE)]
            for name in names[:2]:
                chosen.writestr(name, archive.read(name))
    base = [*TINY, "--data", str(source), "--out", str(tmp_path / "out"), "--segment", "20"]
    assert main(["compare", *base, "--rows", "elbo"]) == 0
    (row,) = read(tmp_path / "out")
    assert row["data"] == "timit" and row["min_scale"] == 0.01


@pytest.mark.parametrize("lr", ["1e6", "1e20"])  # 1e20: what is left scores as NaN, too
def test_a_training_that_stops_keeps_its_parameters_and_the_other_rows(
    tmp_path: Path, serial: None, capsys: pytest.CaptureFixture[str], lr: str
) -> None:
    source, out = small_npz(tmp_path / "waves.npz"), tmp_path / "out"
    base = [*TINY, "--data", str(source), "--out", str(out), "--lr", lr, "--clip-norm", "1e9"]
    assert main(["compare", *base, "--rows", "elbo"]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("elbo, seed 0: training stopped at step ") and "clip_norm" in line
    assert re.search(r"step \d+: (\S+ is (nan|-?inf)|.* are not numbers)", line)
    (row,) = read(out)
    assert row["error"] == line.removeprefix("elbo, seed 0: ")
    loaded = recipes.load(row_folder(out, "elbo", 0) / "parameters.pt")
    assert all(p.isfinite().all() for p in loaded.model.parameters())
    for name in ("results.json", "metrics.csv", "table.md", "rate.png"):
        assert (out / name).is_file()


def mistakes(folder: Path) -> None:
    """Data that a person might point at by mistake."""
    folder.mkdir()
    good = small_npz(folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(good[: len(good) // 2])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.npz").write_text("x, y\n1, 2\n")
    (folder / "table.csv").write_text("x, y\n1, 2\n")
    (folder / "text.mat").write_text("no matrix")
    (folder / "text.zip").write_text("no archive")
    (folder / "no_audio").mkdir()
    with zipfile.ZipFile(folder / "no_audio.zip", "w") as archive:
        archive.writestr("readme.txt", "no audio")
    x = np.random.default_rng(0).normal(size=(12, 6, 3))
    small_npz(folder / "rank.npz", x=x[0, 0])
    small_npz(folder / "other.npz", y=x)
    small_npz(folder / "none.npz", x=x[:0])
    small_npz(folder / "two.npz", x=x[:2])
    small_npz(folder / "words.npz", x=np.array([["a", "b"]]))
    small_npz(folder / "lengths.npz", x=x, lengths=np.full(12, 7))
    small_npz(folder / "objects.npz", x=np.array([{}], dtype=object))
    x[4, 2, 1] = np.nan
    small_npz(folder / "nan.npz", x=x, split=np.array([0] * 8 + [1, 1, 2, 2]))
    x[4, 2, 1] = 0.0
    x[:, :, 1] = 3.0
    small_npz(folder / "constant.npz", x=x)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.npz", "does not exist"),
        ("truncated.npz", "damaged, cut short or of another format"),
        ("empty.npz", "is an empty file"),
        ("text.npz", ".npz archive"),
        ("table.csv", "neither a known name or extension nor a folder"),
        ("text.mat", "cannot be read as a MATLAB 5 file"),
        ("text.zip", "cannot be read as a .zip archive"),
        ("no_audio.zip", "no recordings"),
        ("no_audio", "no recordings"),
        ("rank.npz", r"x must have shape \(N, T, X\) or \(frames, X\), got \(3,\)"),
        ("other.npz", "no array 'x'; found y"),
        ("none.npz", "at least 3 sequences"),
        ("two.npz", "at least 3 sequences"),
        ("words.npz", "must hold real numbers"),
        ("lengths.npz", "lengths must be 12 numbers of at most 6"),
        ("objects.npz", "object array, which is refused"),
        ("nan.npz", r"sequence 4 \('x\[4\]'\) has a NaN or an infinity in frame 2"),
        ("constant.npz", r"dimension 1 \(counted from 0\) constant over the training frames"),
    ],
)
def test_bad_data_is_one_sentence(
    tmp_path: Path, single: None, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    mistakes(tmp_path / "data")
    source = str(tmp_path / "data" / name)
    said = refused([*TINY, "--data", source, "--out", str(tmp_path / "out")], capsys)
    assert re.search(words, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "elbow"], "a row must be one of rnn, elbo, .*, got 'elbow'"),
        (["--rows", "elbo:k=1"], "an option of row 'elbo' must be one of view, kl, .*got 'k=1'"),
        (["--rows", "elbo:kl"], "written key=value, got 'kl'"),
        (["--rows", "elbo:kl=much"], "option kl must be of kind weight such as .*, got 'much'"),
        (["--rows", "joint:critic_steps=1.5"], "critic_steps must be of kind int, got '1.5'"),
        (["--rows", "joint:standardise=maybe"], "standardise must be of kind bool"),
        (["--rows", "joint:view=sideways"], "view must be one of marginal, .*, got 'sideways'"),
        (["--rows", "joint:constraint=none"], "constraint must be one of spectral, "),
        (["--rows", "joint:on=x"], "on must be one of z, all, got 'x'"),
        (["--rows", "elbo:guide=smooth"], "guide must be one of filtering, residual, flow, "),
        (["--rows", "elbo:prior=flat"], "prior must be one of conditional, standard, gated, "),
        (["--rows", "elbo:model=hmm"], "model must be one of vae, storn, vrnn, srnn, dmm, "),
        (["--rows", "rnn:model=vrnn"], "model must be one of rnn, got 'vrnn'"),
        (["--rows", "elbo:model=dmm,cell=lstm"], "cell is no part of the model 'dmm', got 'lstm'"),
        (["--rows", "elbo:guide=residual,prior=flow"], "corrects the prior's mean, which a "),
        (["--frame", "9"], r"--frame is for speech \(.*\) and spoken digits, got --data vowels"),
        (["--mu-law", "16"], r"--mu-law is for speech \(TIMIT, LibriSpeech\), got --data vowels"),
        (["--rows", "elbo:cell=rnn"], "cell must be one of gru, lstm, got"),
        (["--rows", "joint:critic=cnn"], "critic must be one of lstm, feedforward, got"),
        (["--views", "sideways"], "a row must be one of .*, got 'sideways'"),
        (["--schedules", "sometimes"], "invalid choice: 'sometimes'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--h-dim", "0"], "--h-dim must be at least 1, got 0"),
        (["--z-dim", "-1"], "--z-dim must be at least 1, got -1"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--min-scale", "-1"], "--min-scale must be at least 0, got -1"),
        (["--min-scale", "nan"], "--min-scale must be at least 0, got nan"),
        (["--lr", "0"], "--lr must be more than 0, got 0"),
        (["--clip-norm", "-5"], "--clip-norm must be a number above 0, .*, got '-5'"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0, got -1"),
        (["--data", ""], "source must be 'vowels'"),
        (
            ["--segment", "5"],
            r"--segment is for speech \(.*\) and piano rolls \(\.mat\), got --data vowels",
        ),
        (["--data", "a.npz", "--segment", "5"], r"--segment is for .*, got --data a\.npz"),
        (["--validate-by", "elbo"], "invalid choice: 'elbo'"),
        (["--particles", "0"], "--particles must be at least 1, got 0"),
        (["--rows", "elbo:bound=elbow"], "bound must be one of elbo, iwae, fivo, got 'elbow'"),
        (["--truncate", "0"], "--truncate must be at least 1, got 0"),
        (["--recompute", "-2"], "--recompute must be at least 1, got -2"),
        (["--validate-every", "0"], "--validate-every must be at least 1, got 0"),
        (["--patience", "0"], "--patience must be at least 1, got 0"),
        (["--first-seed", "-1"], "--first-seed must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_one_sentence(
    tmp_path: Path,
    single: None,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    said = refused([*TINY, "--out", str(tmp_path / "out"), *arguments], capsys)
    assert said.startswith(("avrnn: error: ", "avrnn compare: error: ")) or "error: " in said
    assert re.search(words, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "joint:critic=lstm"], "spectral normalisation does not bound an LSTM critic"),
        (["--rows", "elbo:kl=0>1@2"], r"over must be a fraction of the run in \(0, 1\], got 2"),
        (["--rows", "joint:critic_steps=-1"], "critic_steps must be at least 0, got -1"),
        (
            ["--schedules", "joint", "alternating", "--truncate", "3"],
            "row 'alternating' cannot be truncated, .*; leave it out, as --schedules elbo joint",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_one_sentence(
    tmp_path: Path,
    serial: None,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    source = small_npz(tmp_path / "waves.npz")
    base = [*TINY, "--data", str(source), "--out", str(tmp_path / "out")]
    assert re.search(words, refused([*base, *arguments], capsys))


def test_an_error_in_a_worker_process_is_one_sentence_too(
    tmp_path: Path, single: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small_npz(tmp_path / "waves.npz")
    base = [*TINY, "--data", str(source), "--out", str(tmp_path / "out")]
    said = refused([*base, "--rows", "joint:critic_steps=-1"], capsys)
    assert said == "avrnn: error: critic_steps must be at least 0, got -1"


@pytest.mark.parametrize("inside", [False, True])
def test_an_output_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, single: None, capsys: pytest.CaptureFixture[str], inside: bool
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "runs" if inside else tmp_path / "file"
    source = small_npz(tmp_path / "waves.npz")
    said = refused([*TINY, "--data", str(source), "--out", str(out)], capsys)
    assert f"--out {out} is not a folder that can be written to" in said
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "content", ["no json", '{"accuracy": 1.0}', '[{"accuracy": 1.0}]', "[1, 2]", '"text"', "3"]
)
def test_resuming_on_a_foreign_results_file_is_one_sentence(
    tmp_path: Path, single: None, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    source, out = small_npz(tmp_path / "waves.npz"), tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(content)
    said = refused([*TINY, "--data", str(source), "--out", str(out), "--resume"], capsys)
    assert "results.json is not a results file of this command; remove it" in said
    assert (out / "results.json").read_text() == content


def test_a_finished_training_is_named_in_the_bar() -> None:
    row = {"row": "elbo", "seed": 3}
    assert compare.summary({**row, "iwae_per_frame": None}) == "elbo seed 3: stopped"
    assert compare.summary({**row, "iwae_per_frame": -1.23456}) == "elbo seed 3: -1.235"


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path,
    single: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield {}

    monkeypatch.setattr(compare, "train", interrupted)
    source = small_npz(tmp_path / "waves.npz")
    base = [*TINY, "--data", str(source), "--out", str(tmp_path / "out")]
    assert main(["compare", *base]) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted: no training has finished") and "--resume goes on" in said


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_command_is_needed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "compare" in said and "Traceback" not in said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name, row in ROWS.items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(row.summary)}$", said, re.MULTILINE)
    for option in ("--data", "--rows", "--seeds", "--steps", "--out", "--resume", "--jobs"):
        assert option in said
    for option in options_of(Training):
        assert len(re.findall(rf"^  {option} +\w", said, re.MULTILINE)) == 1, option
    for example in re.findall(r"^  (avrnn .*?)(?:  |$)", said, re.MULTILINE):
        assert example.startswith("avrnn compare")
    assert "examples:" in said and "options of a row" in said


def test_the_rows_that_help_shows_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = re.findall(r"[^\s']+:\w+=[^\s:']+", capsys.readouterr().out)
    assert shown
    vowels = data.vowels()
    for text in shown:
        assert build(parse(text), vowels, Settings()).recipe.model.x_dim == 12


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyro_avrnn", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "compare" in done.stdout and not done.stderr
    assert "usage: avrnn" in done.stdout


def test_results_hold_no_number_that_json_lacks(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, -math.inf, 1.0], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": [None, None, 1.0],
        "b": {"c": None},
    }
