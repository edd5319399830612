"""Calls that gave a wrong number in silence once: each is refused at the door, in one sentence."""

# ruff: noqa: E501 - a table

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from inference import (
    ELBO,
    FIVO,
    Adversarial,
    Alternating,
    Checkpointing,
    Clock,
    Ramp,
    Records,
    calibrate,
    clip,
    evaluate,
    fit,
    fivo,
    gradient_penalty,
    iwae,
    particle_filter,
    seeded,
    step_densities,
    to_arviz,
    wasserstein,
)
from inference.validation import Validation
from pyro_avrnn import plots, recipes
from pyro_avrnn.critics import FeedForwardCritic
from pyro_avrnn.data import Dataset, Sequences, log_mel, mu_law, npz
from pyro_avrnn.generation import generate
from pyro_avrnn.guides import SmoothingGuide
from pyro_avrnn.networks import RecurrentEncoder
from pyro_avrnn.recipes import Recipe
from tests.unit.table import prefix_mask

X, Z, H = 3, 2, 5
MASK = prefix_mask((5, 2, 4, 3))


def made() -> tuple[Any, Any, Any, Tensor]:
    """Model, guide, critic and data."""
    with seeded(0):
        r = recipes.avrnn(X, Z, H)
        return r.model, r.guide, r.critic, torch.randn(4, 5, X)


def careless_model(x: Tensor, mask: Tensor) -> None:
    with pyro.plate("sequences", len(x), dim=-1):
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t + 1}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{t + 1}", dist.Normal(z, 1.0), obs=x[:, t, 0])


def careless_guide(x: Tensor, mask: Tensor) -> None:
    with pyro.plate("sequences", len(x), dim=-1):
        for t in range(x.shape[1]):
            pyro.sample(f"z_{t + 1}", dist.Normal(x[:, t, 0] / 2, 0.7))


def train(loss: Any = None, batches: Any = None, lr: float = 1e-3, **options: Any) -> Any:
    m, g, _, x = made()
    svi = SVI(m, g, pyro.optim.Adam({"lr": lr}), ELBO() if loss is None else loss)
    given = {"steps": 3, "progress": False} | options
    return fit(svi, [(x, MASK)] if batches is None else batches, **given)


def critic_of(m: Any, c: Any, **options: Any) -> Adversarial:
    return Adversarial(c, **options)


def parameters_of(m: Any) -> Any:
    return torch.optim.SGD(m.parameters(), lr=0.1)


def numbers_of_size(path: Path, size: float) -> Any:
    np.savez(path / "e.npz", x=np.random.RandomState(0).randn(10, 5, 3) * size)
    return npz(path / "e.npz")


def diverged() -> Any:
    m, g, _, _ = made()
    for p in m.parameters():
        p.data.fill_(math.nan)
    return m, g


Call = Callable[[Any, Any, Any, Tensor], Any]
CALLS: dict[str, tuple[Call, str]] = {
    "two models": (lambda m, g, c, x: evaluate(m, m, x, MASK), "the guide observes data"),
    "two guides": (lambda m, g, c, x: evaluate(g, g, x, MASK), "the model observes no data"),
    "a recipe": (
        lambda m, g, c, x: evaluate(Recipe(m, g), g, x),
        "model must be .*give its model",
    ),
    "a class": (lambda m, g, c, x: evaluate(type(m), g, x), "model must be .*the class VRNN"),
    "a mask ignored": (
        lambda m, g, c, x: evaluate(careless_model, careless_guide, x, MASK),
        "model must leave out the steps that mask leaves out",
    ),
    "a batch for batches": (
        lambda m, g, c, x: train(batches=(x, MASK)),
        "batches must be an iter",
    ),
    "a clock that runs backwards": (
        lambda m, g, c, x: Clock(total=-5),
        "total must be at least 1",
    ),
    "calls below zero": (lambda m, g, c, x: Clock(calls=-1), "calls must be at least 0"),
    "a ramp below zero": (lambda m, g, c, x: Ramp(-1.0, 1.0), "start must be at least 0"),
    "a weight that is not a number": (
        lambda m, g, c, x: ELBO(kl_weight=math.nan),
        "kl_weight must",
    ),
    "a weight that is text": (
        lambda m, g, c, x: ELBO(kl_weight="0.5"),
        "kl_weight must be a numb",
    ),
    "an infinite price": (
        lambda m, g, c, x: Adversarial(c, weight=math.inf),
        "weight must be fini",
    ),
    "free bits without end": (
        lambda m, g, c, x: ELBO(free_bits=math.inf),
        "free_bits must be fini",
    ),
    "a clip of nan": (lambda m, g, c, x: clip(math.nan), "bound must be"),
    "a reward for slopes": (
        lambda m, g, c, x: gradient_penalty(-1.0),
        "weight must be at least 0",
    ),
    "a constraint not called": (
        lambda m, g, c, x: wasserstein(clip),
        "constraint must be .*funct",
    ),
    "an infinite step": (
        lambda m, g, c, x: Alternating(
            Adversarial(c), m.prior.parameters(), g.parameters(), lr=math.inf
        ),
        "lr must be finite",
    ),
    "another's optimiser": (
        lambda m, g, c, x: Adversarial(c, optim=parameters_of(m)),
        "optim must hold the critic's parameters",
    ),
    "a resampler of bools": (
        lambda m, g, c, x: particle_filter(
            m, g, x, num_particles=4, criterion="always", resampler=lambda w: w > 0
        ),
        "resampler must give indices",
    ),
    "a resampler of one row": (
        lambda m, g, c, x: FIVO(criterion="always", resampler=lambda w: w[:1].long())(m, g, x),
        "resampler must give indices",
    ),
    "indices out of range": (
        lambda m, g, c, x: FIVO(criterion="always", resampler=lambda w: w.long() * 0 + 9)(m, g, x),
        "resampler must give indices from 0 to 3",
    ),
    "a criterion of numbers": (
        lambda m, g, c, x: FIVO(criterion=lambda w: w[0])(m, g, x),
        "criterion must give bool",
    ),
    "favour of minus infinity": (
        lambda m, g, c, x: particle_filter(
            m,
            g,
            x,
            num_particles=4,
            auxiliary=lambda s, x: torch.full((4, 4), -math.inf),
        ),
        "auxiliary must give finite log-weights",
    ),
    "times of resampling as numbers": (
        lambda m, g, c, x: fivo(torch.zeros(3, 2, 4), torch.full((2, 4), 0.7)),
        "resampled must be",
    ),
    "weights without particles": (
        lambda m, g, c, x: iwae(torch.zeros(5, 4)),
        "log_weight must be",
    ),
    "a schedule below zero": (
        lambda m, g, c, x: train(lr_schedule=lambda at: -1.0),
        "the factor of lr_schedule must be at least 0",
    ),
    "a metric that is there": (
        lambda m, g, c, x: train(hooks=[lambda *batch: {"step": 0.0}]),
        "metric 'step' is there already",
    ),
    "two penalties of a name": (
        lambda m, g, c, x: ELBO(penalties=[Adversarial(c), Adversarial(made()[2])]),
        "penalties must have names of their own",
    ),
    "a penalty without its list": (
        lambda m, g, c, x: ELBO(penalties=Adversarial(c)),  # type: ignore[arg-type]
        "penalties must be a list",
    ),
    "a threshold of nan": (
        lambda m, g, c, x: evaluate(m, g, x, active_above=math.nan),
        "active_above must be",
    ),
    "half a seed": (lambda m, g, c, x: evaluate(m, g, x, seed=1.5), "seed must be a whole number"),
    "time that stands still": (
        lambda m, g, c, x: to_arviz(m, g, x[0], draws=3, frame_seconds=0.0),
        "frame_seconds must be",
    ),
    "integer sound": (
        lambda m, g, c, x: log_mel(np.arange(2000, dtype=np.int16)),
        "samples must be floating numbers",
    ),
    "grey in black and white": (
        lambda m, g, c, x: Dataset("a", *[Sequences.from_list([[[0.3]]])] * 3, kind="binary"),
        "train must hold 0 and 1 only",
    ),
    "sequences of nan": (
        lambda m, g, c, x: Sequences(torch.full((1, 2, 1), math.nan), prefix_mask((2,)), ("a",)),
        "x must be finite",
    ),
    "no width": (
        lambda m, g, c, x: FeedForwardCritic(2, 5, 0, view="conditional"),
        "critic_dim must be at least 1",
    ),
    "true bits": (lambda m, g, c, x: mu_law([1, 2], bits=True), "bits must be from 1 to 16"),
    "a quantity of the name that is taken": (
        lambda m, g, c, x: calibrate(
            m,
            g,
            MASK,
            num_simulations=10,
            num_draws=1,
            num_bins=2,
            quantities=lambda z, x, m: {"log p(x, z)": z[0, ..., 0]},
        ),
        "quantities must not be named",
    ),
    "a critic without a frame": (
        lambda m, g, c, x: ELBO(penalties=[Adversarial(c)])(m, g, x, MASK & False),
        "mask must observe a frame",
    ),
    "draws of another shape": (
        lambda m, g, c, x: Adversarial(c).penalty(step_densities(m, g, x), torch.zeros(2)),
        "posterior must have the shape of z",
    ),
    "particles of other sequences": (
        lambda m, g, c, x: m.rollout(g, x, select=lambda t, *terms: torch.zeros(2, 2).long()),
        "parents must be indices",
    ),
    "a kind in capitals": (
        lambda m, g, c, x: plots.sequences({}, "a.png", kind="Binary", title="t"),
        "kind must be one of",
    ),
    "a critic that is dropped": (
        lambda m, g, c, x: recipes.avrnn(X, Z, H, critic=lambda *a: nn.Linear(2, 1)),
        "critic must be one of",
    ),
    "a guide left in float32": (
        lambda m, g, c, x: evaluate(m, g.float(), x),
        "guide must be torch.float64 as the model is",
    ),
    "a diverged model drawn from": (
        lambda m, g, c, x: generate(diverged()[0], 2, 3),
        "model has a",
    ),
    "a diverged model in ArviZ": (
        lambda m, g, c, x: to_arviz(*diverged(), x[0], draws=3),
        "model has a parameter that is not finite",
    ),
    "validation without a frame": (
        lambda m, g, c, x: Validation((x, MASK & False)),
        "data must observe a frame",
    ),
    "a critic to keep without its list": (
        lambda m, g, c, x: train(keep=c),
        "keep must be a list of modules",
    ),
    "a path for a checkpoint": (
        lambda m, g, c, x: train(checkpoint="run.pt"),
        "checkpoint must be a Checkpointing",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_refused_in_one_sentence(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{message}") as raised:
        call(*made())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [1e160, 1e-170, 1e39, 1e-46])
def test_numbers_beyond_float32_are_refused(size: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must fit into float32"):
        numbers_of_size(tmp_path, size)
    assert float(numbers_of_size(tmp_path, 1.0).train.x.abs().max()) < 5.0


def test_a_checkpoint_and_records_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "same"
    with pytest.raises(ValueError, match="checkpoint and records must have files of their own"):
        train(checkpoint=Checkpointing(path), records=Records(path))


OPTIONS: dict[str, Callable[[], Recipe]] = {
    "numpy's numbers": lambda: recipes.vrnn(X, Z, H, prior_options={"hidden": (np.int64(4),)}),
    "a module": lambda: recipes.vrnn(X, Z, H, guide_options={"encoder": RecurrentEncoder(H, 4)}),
    "no call": lambda: Recipe(*made()[:2]),
    "another guide": lambda: Recipe(
        (r := recipes.vrnn(X, Z, H)).model, SmoothingGuide(r.model), config=r.config
    ),
    "two kinds of numbers": lambda: mixed(),
}


def mixed() -> Recipe:
    r = recipes.vrnn(X, Z, H)
    r.model.prior.float()
    return r


@pytest.mark.parametrize("name", OPTIONS)
def test_a_recipe_is_written_so_that_it_can_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^recipe cannot be written so that it can be read again"):
        recipes.save(OPTIONS[name](), tmp_path / "r.pt")
    assert not list(tmp_path.iterdir())
    r, before = recipes.vrnn(X, Z, H), torch.get_rng_state()
    recipes.save(r, tmp_path / "r.pt")
    assert torch.equal(torch.get_rng_state(), before)  # the trial consumes no draws


def test_a_set_in_half_precision_is_summed_in_single() -> None:
    r = recipes.rnn(X, H)
    x = torch.randn(300, 100, X)
    right = evaluate(r.model.float(), r.guide.float(), x.float())
    half = evaluate(r.model.half(), r.guide.half(), x.half())
    for name in ("iwae_per_frame", "elbo_per_frame", "reconstruction_per_frame"):
        assert getattr(half, name) == pytest.approx(getattr(right, name), abs=0.01), name
