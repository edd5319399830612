"""``fit(truncate=)``: windows of one batch, the state that goes from one to the next."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Size, Tensor

from inference import (
    ELBO,
    FIVO,
    IWAE,
    Adversarial,
    Alternating,
    Records,
    fit,
    seeded,
    spectral,
    wasserstein,
)
from inference.objectives import Objective
from inference.particles import Bootstrap
from inference.resampling import systematic
from pyro_avrnn import recipes
from pyro_avrnn.models.lgssm import LGSSM
from pyro_avrnn.recipes import Recipe
from tests.reference import kalman
from tests.reference.unbiased import deviation
from tests.unit.table import (
    assert_all_close,
    assert_close,
    build,
    observations,
    parameters,
    prefix_mask,
)
from tests.unit.test_resume import (
    ADAM,
    Run,
    adversary,
    compared,
    interrupt_at,
    plain_guide,
    plain_model,
    process,
    resumed,
    sequences,
)

Batch = tuple[Tensor, Tensor]
T, B = 7, 3
WHOLE = (T,) * B
RAGGED = (T, 2, 5)


def data(recipe: Recipe, lengths: tuple[int, ...] = WHOLE, padding: int = 0) -> Batch:
    mask = prefix_mask((*lengths, max(lengths) + padding))[:-1]
    x = observations(recipe, len(lengths), mask.shape[1])
    return torch.where(mask[..., None], x, math.nan), mask


class Still(PyroOptim):
    """Moves nothing; keeps every step's gradients by name, zeros where there is none."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.recipe, self.steps = recipe, list[dict[str, Tensor]]()

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.steps.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in parameters(self.recipe).items()
            }
        )
        super().__call__(params, *args, **kwargs)


class Kept:
    """What an objective made at each of its calls."""

    def __init__(self, loss: Objective) -> None:
        self.bounds, self.densities = list[Tensor](), list[Any]()
        objective, draw = loss.objective, loss.draw

        def kept_objective(densities: Any, kl_weight: float) -> Tensor:
            self.bounds.append(objective(densities, kl_weight))
            return self.bounds[-1]

        def kept_draw(*args: Any, **given: Any) -> Any:
            self.densities.append(draw(*args, **given))
            return self.densities[-1]

        loss.objective, loss.draw = kept_objective, kept_draw  # type: ignore[method-assign]

    def total(self) -> Tensor:
        """The sum over calls, ``(B,)``."""
        return torch.stack(self.bounds).sum(dim=0).detach()


def windows(
    recipe: Any, loss: Objective, batch: Any, truncate: int | None, steps: int
) -> tuple[Kept, list[dict[str, Tensor]]]:
    """What every step of ``fit`` made of a batch, parameters at rest, and its gradients."""
    kept, still = Kept(loss), Still(recipe)
    with pyro.get_param_store().scope():
        svi = SVI(recipe.model, recipe.guide, still, loss)
        fit(svi, [batch], steps=steps, truncate=truncate, seed=0, progress=False)
    return kept, still.steps


def by_hand(recipe: Any, x: Tensor, mask: Tensor, particles: int, truncate: int) -> list[Tensor]:
    """Each window's ELBO loss from the model's functions, states detached at the cuts."""
    model, guide = recipe.model, recipe.guide
    x = torch.where(mask[..., None], x, model.padding)
    state = model.init(Size((particles, len(x))))
    losses = []
    with seeded(0):
        for a in range(0, int(mask.sum(dim=1).max()), truncate):
            part, seen = x[:, a : a + truncate], mask[:, a : a + truncate]
            if a:
                state = type(state)(*(s.detach() for s in state))
            total = torch.zeros(())
            begun = {"start": state} if a and model.features_go_on else {}
            c = guide.encode(part, seen, **begun)
            for t in range(part.shape[1]):
                q = guide.proposal(state, c[:, t])
                z_t = q.rsample()
                log_weight = model.transition(state).log_prob(z_t) - q.log_prob(z_t)
                log_weight = log_weight + model.emission(z_t, state).log_prob(part[:, t])
                total = total - torch.where(seen[:, t], log_weight, 0.0).mean(dim=0).sum()
                state = model.advance(state, z_t, part[:, t])
            losses.append(total)
    return losses


def restart(self: Objective, model: Any, densities: Any) -> Any:
    """A planted fault: every window starts from the model's own state."""
    return model.init(densities.z.shape[1:3])


# ---- one window ----


def critic_run() -> tuple[Any, Objective, list[Any]]:
    recipe, adversarial = adversary()
    return recipe, ELBO(penalties=[adversarial]), [adversarial.update]


ONE_WINDOW: dict[str, Callable[[], tuple[Any, Objective, list[Any]]]] = {
    "elbo": lambda: (build("vrnn"), ELBO(num_particles=2), []),
    "dropout": lambda: (build("vrnn", dropout=0.5), ELBO(), []),
    "iwae": lambda: (build("dmm"), IWAE(num_particles=3, doubly_reparameterised=True), []),
    "fivo": lambda: (build("dsae"), FIVO(num_particles=3, criterion="always"), []),
    "critic": critic_run,
}


@pytest.mark.parametrize("truncate", [T + 1, 1000])
@pytest.mark.parametrize("name", ONE_WINDOW)
def test_a_window_that_holds_the_batch_changes_nothing(name: str, truncate: int) -> None:
    found = []
    for value in (None, truncate):
        with pyro.get_param_store().scope(), seeded(3):
            recipe, loss, hooks = ONE_WINDOW[name]()
            svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), loss)
            batches = [data(recipe, RAGGED, padding=1), data(recipe)]
            options: dict[str, Any] = {"hooks": hooks, "seed": 0, "progress": False}
            rows = fit(
                svi, batches, steps=4, truncate=value, records=Records(every=1), **options
            ).rows
            found.append((rows, {k: p.detach() for k, p in parameters(recipe).items()}))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 4
    assert all(torch.equal(found[0][1][k], p) for k, p in found[1][1].items())


# ---- two and more ----

POINTWISE = {  # nothing in c depends on later steps
    name: partial(build, name, guide="filtering") for name in ("vrnn", "storn", "dmm", "srnn")
}


@pytest.mark.parametrize("lengths", [WHOLE, RAGGED])
@pytest.mark.parametrize("name", POINTWISE)
def test_the_windows_add_up_to_the_whole(
    name: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = POINTWISE[name]()
    batch = data(recipe, lengths)
    whole, _ = windows(recipe, ELBO(num_particles=2), batch, None, 1)
    for truncate in (1, 3, 4):  # draws are made step by step, so they are the same
        steps = math.ceil(T / truncate)
        parts, _ = windows(recipe, ELBO(num_particles=2), batch, truncate, steps)
        torch.testing.assert_close(parts.total(), whole.total(), rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(Objective, "carry", restart)
    faulty, _ = windows(recipe, ELBO(num_particles=2), batch, 3, 3)
    assert (faulty.total() - whole.total()).abs()[0] > 1e-3


@pytest.mark.parametrize("lengths", [WHOLE, RAGGED])
@pytest.mark.parametrize("name", ["vrnn", "storn", "dmm", "srnn"])  # two have smoothing guides
def test_gradients_are_those_of_states_detached_at_the_cut(
    name: str, lengths: tuple[int, ...]
) -> None:
    recipe = build(name)
    batch = data(recipe, lengths)
    kept, gradients = windows(recipe, ELBO(num_particles=2), batch, 4, 2)
    named, whole = parameters(recipe), by_hand(recipe, *batch, 2, T)
    for i, loss in enumerate(by_hand(recipe, *batch, 2, 4)):
        assert_close(-kept.bounds[i].sum(), loss, "loss")
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        zeros = [torch.zeros_like(p) for p in named.values()]
        wanted = [z if g is None else g for z, g in zip(zeros, found, strict=True)]
        assert_all_close(gradients[i], dict(zip(named, wanted, strict=True)))
    # and not those of the whole, which reach further back
    uncut = torch.autograd.grad(whole[0], list(named.values()), allow_unused=True)
    summed = {k: sum(step[k] for step in gradients) for k in named}
    assert any(
        g is not None and (summed[k] - g).abs().max() > 1e-3
        for k, g in zip(named, uncut, strict=True)
    )


def test_the_model_without_latents_goes_on_too() -> None:
    recipe = build("rnn")
    batch = data(recipe, RAGGED)
    whole, _ = windows(recipe, ELBO(), batch, None, 1)
    parts, _ = windows(recipe, ELBO(), batch, 2, 4)
    torch.testing.assert_close(parts.total(), whole.total(), rtol=1e-10, atol=1e-10)


def test_batches_follow_each_other_and_windows_of_padding_are_skipped() -> None:
    recipe = build("vrnn")
    short, long = data(recipe, (3, 1), padding=5), data(recipe, RAGGED)
    kept, still = Kept(loss := ELBO()), Still(recipe)
    svi = SVI(recipe.model, recipe.guide, still, loss)
    history = fit(
        svi, [short, long], steps=9, truncate=2, records=Records(every=1), progress=False
    )
    assert [len(d.z) for d in kept.densities] == [2, 2, 2, 2, 2, 1, 2, 2, 2]
    seen = [int(d.mask.sum()) for d in kept.densities]
    assert seen == [3, 1, 6, 4, 3, 1, 3, 1, 6]  # frames: 2 and 1, 1; then 3 sequences of RAGGED
    assert [row["step"] for row in history.rows] == [*range(1, 10)]
    initial = recipe.model.init(Size((1, 2)))
    for i in (0, 2, 6, 8):  # each batch begins anew
        first = next(iter(kept.densities[i].states))[0]
        assert torch.equal(first[:, :2], initial[0])
    assert not torch.equal(kept.densities[1].states[0][0], initial[0])


@pytest.mark.parametrize(("steps", "inside"), [(1, True), (2, False), (3, True), (4, False)])
def test_a_run_ends_with_a_state_only_inside_a_batch(steps: int, inside: bool) -> None:
    recipe = build("vrnn")
    svi = SVI(recipe.model, recipe.guide, Still(recipe), ELBO())
    batch = data(recipe)
    history = fit(svi, [batch], steps=steps, truncate=math.ceil(T / 2), progress=False)
    assert (history.carried is not None) == inside


def test_validation_is_not_cut() -> None:
    bounds = []
    for truncate in (None, 2):
        with pyro.get_param_store().scope():
            recipe = build("vrnn")
            svi = SVI(recipe.model, recipe.guide, Still(recipe), ELBO())
            batch = data(recipe, RAGGED)
            options: dict[str, Any] = {"steps": 1, "seed": 0, "progress": False}
            history = fit(svi, [batch], validation=batch, truncate=truncate, **options)
            bounds.append(history.best_bound)
    assert bounds[0] == bounds[1]


def test_x_alone_is_cut_as_well() -> None:
    recipe = build("vrnn")
    x, mask = data(recipe)
    alone, _ = windows(recipe, ELBO(), (x,), 3, 3)
    none, _ = windows(recipe, ELBO(), (x, None), 3, 3)
    masked, _ = windows(recipe, ELBO(), (x, mask), 3, 3)
    assert torch.equal(alone.total(), masked.total())
    assert torch.equal(none.total(), masked.total())


@pytest.mark.parametrize("loss", [ELBO(num_particles=2), IWAE(num_particles=3)])
def test_what_is_carried_is_a_constant_of_its_own(loss: Objective) -> None:
    for recipe in (build("dsae"), build("storn")):
        svi = SVI(recipe.model, recipe.guide, Still(recipe), loss)
        with pyro.get_param_store().scope():
            svi.step(*data(recipe), carry=True)
            state = loss.after
            assert not any(tensor.requires_grad for tensor in state)
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in state)  # no more is kept
            svi.step(*data(recipe), start=state)
            assert loss.after is None


def test_memory_saved_and_windows_go_together() -> None:
    recipe = build("vrnn")
    batch = data(recipe, RAGGED)
    plain = windows(recipe, IWAE(num_particles=3), batch, 5, 2)
    saving = windows(recipe, IWAE(num_particles=3, recompute=2), batch, 5, 2)
    assert_close(saving[0].total(), plain[0].total(), "bound")
    for a, b in zip(saving[1], plain[1], strict=True):
        assert_all_close(a, b)


# ---- weights ----


class Waves:
    """An LGSSM with its own transition as guide: with three particles weights differ widely."""

    PARTS = {"a": 0.95, "q": 0.5, "r": 0.5, "s0": 1.0}

    def __init__(self, length: int, copies: int) -> None:
        self.model = LGSSM.scalar(**self.PARTS)
        self.guide = Bootstrap(self.model)
        x = 0.3 + 0.3 * torch.arange(length)
        self.batch = (x.expand(copies, -1)[..., None], prefix_mask((length,) * copies))

    def log_evidence(self) -> float:
        squares = {k: torch.tensor([[v**2]]).numpy() for k, v in self.PARTS.items()}
        one = torch.ones(1, 1).numpy()
        return kalman.log_evidence(
            self.batch[0][0].numpy(),
            self.PARTS["a"] * one,
            squares["q"],
            one,
            squares["r"],
            0.0 * one[0],
            squares["s0"],
        )

    def deviation(self, loss: Objective, truncate: int) -> float:
        """How far the mean of exp(sum of the windows' bounds) is off, in standard errors."""
        steps = math.ceil(self.batch[0].shape[1] / truncate)
        kept, _ = windows(self, loss, self.batch, truncate, steps)
        return deviation(kept.total(), self.log_evidence())


def unweighed(self: Objective, densities: Any) -> None:
    """A planted fault: all particles go on, and what they weighed is forgotten."""


WEIGHED: dict[str, Callable[[], Objective]] = {
    "iwae": lambda: IWAE(num_particles=3),
    "fivo-adaptive": lambda: FIVO(num_particles=3),
    "fivo-always": lambda: FIVO(num_particles=3, criterion="always", resampler="multinomial"),
    "fivo-never": lambda: FIVO(num_particles=3, criterion="never", resampler="stratified"),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_the_bounds_of_the_windows_are_an_unbiased_estimate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves = Waves(length=6, copies=20_000)
    loss = WEIGHED[name]()
    assert abs(waves.deviation(loss, 3)) < 4.0
    assert abs(waves.deviation(WEIGHED[name](), 1)) < 4.0
    monkeypatch.setattr(type(loss), "survivors", unweighed)
    assert abs(waves.deviation(WEIGHED[name](), 3)) > 10.0


@pytest.mark.parametrize("criterion", ["always", "never"])
def test_a_filter_resamples_by_the_weights_it_has_not_spent(criterion: str) -> None:
    asked: list[Tensor] = []

    def resampler(log_weight: Tensor) -> Tensor:
        asked.append(log_weight)
        return systematic(log_weight)

    recipe = build("vrnn")
    loss = FIVO(num_particles=3, criterion=criterion, resampler=resampler)
    kept = Kept(loss)
    svi = SVI(recipe.model, recipe.guide, Still(recipe), loss)
    svi.step(*data(recipe, RAGGED), carry=True)
    (densities,) = kept.densities
    assert len(asked) == (T if criterion == "always" else 1)  # at the end whatever it says
    for b, length in enumerate(RAGGED):
        begin = length - 1 if criterion == "always" else 0
        weights = densities.log_weight[begin:length, :, b].sum(dim=0)
        torch.testing.assert_close(asked[-1][:, b], weights.log_softmax(dim=0))


def test_the_sum_lies_below_the_evidence() -> None:
    waves = Waves(length=6, copies=2_000)
    for make in WEIGHED.values():
        bound = windows(waves, make(), waves.batch, 3, 2)[0].total()
        error = float(bound.std()) / math.sqrt(len(bound))
        assert float(bound.mean()) < waves.log_evidence() - 5.0 * error


@pytest.mark.parametrize("name", WEIGHED)
def test_every_particle_goes_on_with_all_of_its_state(name: str) -> None:
    recipe, loss = build("dsae"), WEIGHED[name]()
    svi = SVI(recipe.model, recipe.guide, Still(recipe), loss)
    kept = Kept(loss)
    svi.step(*data(recipe), carry=True)
    (densities,) = kept.densities
    last = type(densities.states)(*(tensor[-1] for tensor in densities.states))
    state = recipe.model.advance(last, densities.z[-1], densities.x[-1])
    for b in range(B):
        before = torch.cat([tensor[:, b] for tensor in state], dim=-1)
        after = torch.cat([tensor[:, b] for tensor in loss.after], dim=-1)
        assert all(any(torch.equal(one, other) for other in before) for one in after)


@pytest.mark.parametrize("loss", [ELBO(num_particles=3), IWAE(num_particles=1), FIVO()])
def test_random_numbers_are_drawn_for_particles_that_are_weighed(loss: Objective) -> None:
    recipe = build("vrnn")
    svi = SVI(recipe.model, recipe.guide, Still(recipe), loss)
    states = []
    for carry in (False, True):
        torch.manual_seed(0)
        svi.step(*data(recipe), carry=carry)
        states.append(torch.get_rng_state())
    assert torch.equal(*states) == (not isinstance(loss, FIVO))


# ---- a latent that all steps share ----


def test_a_shared_latent_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build("dsae", guide="mean_field_frame")
    model, guide = recipe.model, recipe.guide
    batch = data(recipe, RAGGED)
    kept, _ = windows(recipe, ELBO(num_particles=2), batch, 3, 3)
    first, *later = kept.densities
    assert all(d.f is None and torch.equal(d.states.f[0], first.f) for d in later)
    x, mask = torch.where(batch[1][..., None], batch[0], 0.0), batch[1]
    q_f = guide.proposal_f(x[:, :3], mask[:, :3])  # has seen the first window
    expected = model.prior_f(Size((B,))).log_prob(first.f) - q_f.log_prob(first.f)
    state, z = model.condition(model.init(Size((2, B))), first.f), [d.z for d in kept.densities]
    c = guide.encode(x, mask)
    for t, z_t in enumerate(torch.cat(z)):
        term = model.transition(state).log_prob(z_t) + model.emission(z_t, state).log_prob(x[:, t])
        term = term - guide.proposal(state, c[:, t]).log_prob(z_t)
        expected = expected + torch.where(mask[:, t], term, 0.0)
        state = model.advance(state, z_t, x[:, t])
    torch.testing.assert_close(kept.total(), expected.mean(dim=0), rtol=1e-10, atol=1e-10)
    draw = ELBO.draw
    monkeypatch.setattr(ELBO, "draw", lambda self, *args, start=None: draw(self, *args))
    faulty, _ = windows(recipe, ELBO(num_particles=2), batch, 3, 3)  # f anew in each window
    assert all(d.f is not None for d in faulty.densities)
    assert (faulty.total() - expected.mean(dim=0)).abs().max() > 1e-3


# ---- hooks ----


def test_a_critic_is_trained_on_the_states_of_its_window() -> None:
    recipe, adversarial = adversary()
    seen: list[Any] = []
    adversarial.improve = lambda densities: seen.append(densities) or {}  # type: ignore
    for loss in (ELBO(), IWAE(num_particles=3)):
        seen.clear()
        batch = data(recipe)
        kept = Kept(loss)
        svi = SVI(recipe.model, recipe.guide, Still(recipe), loss)
        options: dict[str, Any] = {"steps": 4, "truncate": 3, "progress": False}
        fit(svi, [batch], hooks=[adversarial.update], **options)
        assert [len(d.z) for d in seen] == [3, 3, 1, 3]
        for i, (own, critic) in enumerate(zip(kept.densities, seen, strict=True)):
            here, there = own.states[0][0], critic.states[0][0]
            assert torch.equal(here if i % 3 else here[:1], there)
        assert not torch.equal(kept.densities[1].states[0][0], kept.densities[0].states[0][0])


# ---- refusals ----


def svi_of(loss: Any, recipe: Any = None) -> SVI:
    recipe = recipe or build("vrnn")
    return SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), loss)


def test_what_cannot_be_cut_is_refused_in_one_sentence() -> None:
    recipe, adversarial = adversary()
    alternating = Alternating(adversarial, recipe.model.prior.parameters(), [])
    batch = data(build("vrnn"))
    tried: list[tuple[SVI, list[Any], type[Exception], str]] = [
        (svi_of(Trace_ELBO()), [], TypeError, "a loss that carries the state .*, got Trace_ELBO;"),
        (
            svi_of(lambda *args: ELBO()(*args)),
            [],
            TypeError,
            "a loss that carries the state .*, got <lambda>;",
        ),
        (
            SVI(plain_model, plain_guide, pyro.optim.Adam(ADAM), ELBO()),
            [],
            TypeError,
            r"a model with rollout\(guide, x, mask, start=\) and advance, which plain_model lacks",
        ),
        (
            svi_of(ELBO(), recipe),
            [adversarial.update, alternating.update],
            NotImplementedError,
            r"hooks that take start=, .*but Alternating \(hooks\[1\]\) would start every window",
        ),
        (
            svi_of(ELBO(), recipe),
            [lambda model, guide, *args: {}],
            NotImplementedError,
            r"hooks that take start=, .*but <lambda> \(hooks\[0\]\) would start every window",
        ),
    ]
    for svi, hooks, kind, words in tried:
        with pytest.raises(kind, match=words):
            fit(svi, [batch], steps=1, truncate=3, hooks=hooks, progress=False)
        assert not svi.optim.optim_objs  # nothing was done
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"truncate must be at least 1, got {value}"):
            fit(svi_of(ELBO()), [batch], steps=1, truncate=value, progress=False)


def test_a_hook_of_ones_own_may_take_the_start() -> None:
    starts: list[Any] = []

    def hook(model: Any, guide: Any, x: Tensor, mask: Tensor, **given: Any) -> dict[str, float]:
        starts.append(given.get("start"))
        return {}

    options: dict[str, Any] = {"truncate": 5, "hooks": [hook], "progress": False}
    fit(svi_of(ELBO()), [data(build("vrnn"))], steps=3, **options)
    assert [start is None for start in starts] == [True, False, True]


def test_a_mask_whose_hole_lies_between_windows_is_refused() -> None:
    x, mask = data(build("vrnn"))
    mask[1, 2:4] = False  # each window alone is a prefix
    with pytest.raises(ValueError, match="mask must be a prefix"):
        fit(svi_of(ELBO()), [(x, mask)], steps=1, truncate=4, progress=False)


# ---- resuming ----


def filtered_dsae() -> Run:
    recipe = recipes.dsae(2, 2, 3, f_dim=2)
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), FIVO(num_particles=3))
    return Run(svi, sequences(), {"truncate": 2})


def weighted_lstm() -> Run:
    recipe = recipes.vrnn(2, 2, 3, cell="lstm", dropout=0.3)
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), IWAE(num_particles=3))
    return Run(svi, sequences(), {"truncate": 1})


def critic_between_windows() -> Run:
    recipe = recipes.avrnn(2, 2, 3, critic="feedforward", critic_dim=4, lipschitz="all")
    assert recipe.critic is not None
    adversarial = Adversarial(recipe.critic, divergence=wasserstein(spectral()))
    loss = ELBO(penalties=[adversarial], num_particles=2)
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), loss)
    options = {"hooks": [adversarial.update], "keep": [recipe.critic], "truncate": 2}
    return Run(svi, sequences(), options)


@pytest.mark.parametrize("case", [filtered_dsae, weighted_lstm, critic_between_windows])
def test_a_run_interrupted_between_windows_ends_as_one_that_was_not(
    case: Callable[[], Run], tmp_path: Path
) -> None:
    whole = process(case, tmp_path / "whole.pt")
    positions = set()
    for step in (1, 2, 3, 5, 6):
        path = tmp_path / f"{step}.pt"
        with pytest.raises(KeyboardInterrupt):
            process(case, path, every=1, progress=interrupt_at(step))
        at = torch.load(path, weights_only=True)["batches"]
        positions.add((at["given"], at["start"] is not None))
        found = process(case, path, new=True, resume=True, every=1)
        assert not compared(whole, found)
    assert len(positions) > 2 and {going for _, going in positions} == {True, False}
    assert not compared(whole, resumed(case, tmp_path / "twice.pt", 2, 5, every=1))


@pytest.mark.parametrize("part", ["given", "start"])
def test_the_comparison_sees_a_place_that_was_not_kept(part: str, tmp_path: Path) -> None:
    whole, path = process(filtered_dsae, tmp_path / "whole.pt"), tmp_path / "parts.pt"
    for step in range(1, 9):
        with pytest.raises(KeyboardInterrupt):
            process(filtered_dsae, path, every=1, progress=interrupt_at(step))
        content = torch.load(path, weights_only=True)
        if content["batches"]["start"] is not None:
            break
    content["batches"][part] = None if part == "start" else 1000
    torch.save(content, path)
    found = process(filtered_dsae, path, new=True, resume=True, every=1)
    assert f"history/rows/{step}/loss" in compared(whole, found)


def test_other_windows_are_another_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        process(filtered_dsae, tmp_path / "a.pt", every=1, progress=interrupt_at(2))
    with pytest.raises(ValueError, match="is of a run with truncate 2, here None"):
        process(filtered_dsae, tmp_path / "a.pt", resume=True, truncate=None)
