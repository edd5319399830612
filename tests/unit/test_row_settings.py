"""What a row sets in place of the shared settings, and the emission that suits row and data."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import AdaptiveClip
from pyro_avrnn import data
from pyro_avrnn.autoregressive import AutoregressiveEmission, CausalNetwork, MaskedNetwork
from pyro_avrnn.cli import main, runs
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.options import options_of
from pyro_avrnn.cli.parts import Parts, build
from pyro_avrnn.cli.rows import parse
from pyro_avrnn.cli.runs import Task
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training
from pyro_avrnn.data import Dataset, Sequences
from tests.unit.corpora import by_region, folder_of

SHARED = Settings(steps=10, batch_size=5, h_dim=4, z_dim=2, lr=0.01, average=0.5, num_particles=3)
#: options of a row that stand in place of shared ones: the text, and what it means
OWN: dict[str, tuple[str, Any]] = {
    "batch_size": ("3", 3),
    "batches": ("sorted-rest", "sorted-rest"),
    "lr": ("0.5", 0.5),
    "lr_decay": ("cosine", "cosine"),
    "clip_norm": ("7", "7"),
    "average": ("0", 0.0),
    "weight_decay": ("0.25", 0.25),
    "z_dim": ("3", 3),
    "h_dim": ("6", 6),
}


def test_every_option_of_rows_and_of_all_is_in_the_list_above() -> None:
    assert options_of(Training).keys() & options_of(Settings).keys() == OWN.keys()


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (row, name)
        for row in ("rnn", "elbo-annealed", "conditional+kl")
        for name in OWN
        if (row, name) != ("rnn", "z_dim")  # which it has not
    ],
)
def test_a_rows_own_setting_stands_in_place_of_the_shared_one(row: str, name: str) -> None:
    text, value = OWN[name]
    assert parse(row).settings(SHARED) == SHARED
    found = asdict(parse(f"{row}:{name}={text}").settings(SHARED))
    assert found == asdict(SHARED) | {name: value} and found != asdict(SHARED)


class _Asked(Exception):
    """In place of a training: what ``fit`` was called with."""


@pytest.fixture
def waves() -> Dataset:
    """Thirteen series of 1 to 13 frames."""
    generator = torch.Generator().manual_seed(0)
    series = [torch.randn(n, 3, generator=generator) for n in range(1, 14)]
    parts = (Sequences.from_list(s, dtype=torch.float64) for s in (series, series[:2], series[:2]))
    return Dataset("waves", *parts)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """SVI, batches and options with which a row is trained."""

    def fit(svi: Any, batches: Any, **options: Any) -> None:
        raise _Asked(svi, batches, options)

    def run(text: str, dataset: Dataset, **changes: Any) -> Any:
        settings = Settings(**asdict(SHARED) | changes)
        with pytest.raises(_Asked) as stopped:
            runs.run(Task(parse(text), 3, tmp_path), dataset, settings, lambda steps: None)
        return stopped.value.args

    monkeypatch.setattr(runs, "fit", fit)
    return run


def music(**options: Any) -> Dataset:
    part = Sequences.from_list([[[0.0, 1.0, 0.0]] * 3] * 4)
    return Dataset("rolls", part, part, part, kind="binary", **options)


def sizes(batches: Any) -> list[int]:
    return sorted(len(x) for x, _ in batches)


def test_a_rows_settings_reach_its_training(waves: Dataset, asked: Callable[..., Any]) -> None:
    text = "elbo:" + ",".join(f"{name}={text}" for name, (text, _) in OWN.items())
    svi, batches, options = asked(text, waves)
    assert sizes(batches) == [1, 3, 3, 3, 3]  # a small rest, of 13
    assert svi.optim.pt_optim_constructor is torch.optim.AdamW
    assert svi.optim.pt_optim_args == {"lr": 0.5, "weight_decay": 0.25}
    assert (options["clip_norm"], options["average"], options["steps"]) == (7.0, None, 10)
    assert options["lr_schedule"](1.0) == pytest.approx(0.01)
    assert (svi.model.z_dim, svi.model.h_dim) == (3, 6)


def test_without_its_own_a_row_is_trained_as_all_are(
    waves: Dataset, asked: Callable[..., Any]
) -> None:
    svi, batches, options = asked("elbo", waves)
    assert sizes(batches) == [4, 4, 5]  # alike
    assert svi.optim.pt_optim_constructor is torch.optim.Adam
    assert svi.optim.pt_optim_args == {"lr": 0.01}
    assert (options["clip_norm"], options["average"]) == (AdaptiveClip(10.0), 0.5)
    assert [options["lr_schedule"](at) for at in (0.0, 1.0)] == [1.0, 1.0]
    assert (svi.model.z_dim, svi.model.h_dim) == (2, 4)


@pytest.mark.parametrize(
    ("batches", "expected", "bucketed"),
    [
        ("shuffled", [4, 4, 5], False),
        ("sorted", [4, 4, 5], True),
        ("shuffled-rest", [3, 5, 5], False),
        ("sorted-rest", [3, 5, 5], True),
    ],
)
def test_batches_are_alike_in_size_or_in_length(
    waves: Dataset, asked: Callable[..., Any], batches: str, expected: list[int], bucketed: bool
) -> None:
    found = asked(f"elbo:batches={batches}", waves)[1]
    assert sizes(found) == expected
    spreads = [
        int(lengths.max() - lengths.min()) + 1 == len(lengths)
        for lengths in (mask.sum(dim=1) for _, mask in found)
    ]
    assert all(spreads) == bucketed


def test_windows_warm_up_and_transposition_are_shared(
    waves: Dataset, asked: Callable[..., Any]
) -> None:
    shared = {"window": 4, "lr_warmup": 0.5, "batch_size": 99}
    _, batches, options = asked("elbo", waves, **shared)
    assert sizes(batches) == [sum(-(-n // 4) for n in range(1, 14))] and batches.augment is None
    assert options["lr_schedule"](0.25) == 0.5
    _, batches, _ = asked("elbo:batch_size=4", music(augment=lambda roll, _: 1.0 - roll))
    ((x, mask),) = batches
    assert x[mask].unique(dim=0).tolist() == [[1.0, 0.0, 1.0]]


# ---- --clip-norm ----


def built(text: str, dataset: Dataset, **changes: Any) -> Parts:
    row = parse(text)
    return build(row, dataset, row.settings(Settings(**asdict(SHARED) | changes)))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5", 5.0),
        ("10x", AdaptiveClip(10.0)),
        ("1.5x", AdaptiveClip(1.5)),
        ("none", None),
    ],
)
def test_texts_of_a_limit_on_the_gradient(waves: Dataset, text: str, limit: Any) -> None:
    assert built("elbo", waves, clip_norm=text).clip_norm == limit
    assert built(f"elbo:clip_norm={text}", waves, clip_norm="3").clip_norm == limit


@pytest.mark.parametrize(
    "text", ["", "x", "tight", "0.5x", "0", "-1", "nan", "inf", "infx", "10X"]
)
def test_other_texts_of_a_limit_are_refused(waves: Dataset, text: str) -> None:
    words = "--clip-norm must be a number above 0, a multiple of the running median .*, or none, "
    with pytest.raises(ValueError, match=f"{words}got '{text}'"):
        built("elbo", waves, clip_norm=text)


# ---- readers ----


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A folder of TIMIT, with an utterance of 50 frames of 20 samples for each split."""
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    return folder_of(tmp_path / "timit", by_region())


@pytest.mark.parametrize(
    ("changes", "whole"), [({}, False), ({"window": 9}, True), ({"truncate": 9}, True)]
)
def test_windows_of_speech_are_cut_from_whole_utterances(
    speech: Path, changes: dict[str, int], whole: bool
) -> None:
    comparison = Comparison(data=str(speech), segment=20, frame=20)
    options = comparison.reader_options(Settings(**changes))
    dataset = data.load(speech, **options)
    assert dataset.train.lengths.tolist() == ([50] if whole else [20, 20, 10])
    assert dataset.test.lengths.tolist() == dataset.valid.lengths.tolist() == [20, 20, 10]
    default = Comparison(data=str(speech)).reader_options(Settings(**changes))
    assert default == {"segment": 100} | ({"whole": True} if whole else {})
    # other data have no segments unless they are asked for
    assert Comparison(data="a.mat").reader_options(Settings(window=9)) == {}


@pytest.mark.parametrize("source", ["vowels", "own.npz", "rolls.mat", "speech"])
@pytest.mark.parametrize(
    ("flag", "kinds"),
    [
        ("--transpose=2", ("rolls.mat",)),
        ("--pcm=16", ("speech",)),
        ("--frame=20", ("speech",)),
        ("--mu-law=16", ("speech",)),
        ("--segment=5", ("speech", "rolls.mat")),
    ],
)
def test_an_option_of_other_data_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    flag: str,
    kinds: tuple[str, ...],
) -> None:
    (tmp_path / "speech").mkdir()  # with nothing in it, which is said later
    given = str(tmp_path / source) if source == "speech" else source
    assert main(["compare", "--data", given, "--out", str(tmp_path / "out"), flag]) == 2
    said = capsys.readouterr().err
    assert (f"{flag.split('=')[0]} is for " in said) == (source not in kinds)
    if source not in kinds:
        assert said.endswith(f", got --data {given}\n") and said.count("\n") == 1


# ---- emissions ----


def levels(path: Path, **options: int) -> Dataset:
    return data.load(path, frame=20, segment=10, **options)


def decoder(parts: Parts) -> Any:
    return parts.recipe.model.decoder


def loss_of(parts: Parts, dataset: Dataset) -> Tensor:
    part = dataset.train.to(dtype=torch.float64)
    return parts.objective(parts.recipe.model, parts.recipe.guide, part.x[:3], part.mask[:3])


@pytest.mark.parametrize("row", ["rnn:", "elbo:", "conditional:weight=1,"])
@pytest.mark.parametrize("kind", ["real", "binary"])
def test_features_with_places_are_read_through_masks(waves: Dataset, row: str, kind: str) -> None:
    dataset, text = waves if kind == "real" else music(), f"{row}emission=autoregressive"
    parts = built(f"{text},width=7,lags=2", dataset, min_scale=0.125)
    emission = decoder(parts)
    assert isinstance(emission, AutoregressiveEmission)
    assert type(emission.network) is MaskedNetwork and emission.network.read.out_features == 7
    assert type(emission.base) is type(decoder(built(row, dataset)))
    assert kind == "binary" or emission.base.min_scale == 0.125
    assert loss_of(parts, dataset).isfinite()
    # as wide as the other hidden layers, if nothing is said
    wide = decoder(built(f"{text},h_dim=9", dataset))
    assert wide.network.read.out_features == 9


@pytest.mark.parametrize(
    ("options", "of", "components"), [({}, 2, 1), ({"mu_law": 8}, 3, 4), ({"pcm": 16}, 3, 4)]
)
def test_samples_are_read_by_a_causal_network(
    speech: Path, options: dict[str, int], of: int, components: int
) -> None:
    dataset = levels(speech, **options)
    text = "elbo:emission=autoregressive,width=7,lags=5,components=4"
    parts = built(text, dataset, min_scale=0.125)
    emission, plain = decoder(parts), decoder(built("elbo:components=4", dataset))
    assert type(emission.network) is CausalNetwork and emission.network.lags == 5
    assert emission.network.read.out_features == 7 and type(emission.base) is type(plain)
    # a location and a scale of each normal; a weight, a location and a scale of each logistic
    assert emission.outputs == of * components == plain.net.out_dim // 20
    assert loss_of(parts, dataset).isfinite()
    assert decoder(built("elbo:emission=autoregressive", dataset)).network.lags == 32


@pytest.mark.parametrize("options", [{"mu_law": 8}, {"pcm": 16}])
@pytest.mark.parametrize("emission", ["normal", "mixture", "bernoulli"])
def test_levels_are_not_scored_by_densities(
    speech: Path, options: dict[str, int], emission: str
) -> None:
    dataset = levels(speech, **options)
    words = "levels are scored by emission=logistic or autoregressive, got"
    with pytest.raises(ValueError, match=f"{words} '{emission}', whose densities are no bits"):
        built(f"elbo:emission={emission}", dataset)
    own = built("elbo:emission=logistic,components=3", dataset)
    assert decoder(own).net.out_dim == 3 * 3 * 20
    assert own.recipe.config["emission_options"]["bits"] == dataset.bits


def test_another_emission_takes_the_options_it_knows(waves: Dataset) -> None:
    parts = built("elbo:emission=mixture", waves)
    assert parts.recipe.config["emission_options"] is None and loss_of(parts, waves).isfinite()
    assert decoder(built("elbo:emission=logistic,components=3", waves)).net.out_dim == 3 * 3 * 3
