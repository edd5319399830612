"""How a step is captured, what it depends on, and when the plain loop is taken instead.

Models and guides here are a user's own: a VRNN or a filtering guide with one thing changed. The
plain loop is the reference throughout.
"""

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from pyro_avrnn.engine import capture, front, scanning
from pyro_avrnn.engine.capture import nodes_for
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.models import VRNN
from pyro_avrnn.networks import Cell, diagonal_normal
from pyro_avrnn.recipes import Recipe
from tests.unit.table import assert_all_close, build, gradients, observations
from tests.unit.test_engine import (
    ALWAYS,
    LENGTH,
    NEVER,
    Found,
    assert_captured,
    bounded,
    captured_from,
    captures,
    filtered,
    mixed,
    rolled,
)

pytestmark = pytest.mark.fast_path
B = 2


def own(model: type[VRNN] = VRNN, guide: Any = "filtering", **parts: Any) -> Recipe:
    """A VRNN with the functions of a user's class."""
    pyro.clear_param_store()
    recipe = build("vrnn", guide=guide, **parts)
    recipe.model.__class__ = model
    return recipe


def agree(recipe: Recipe) -> Found:
    """The fast path, and whatever it falls back to, is the loop; gives what both said."""
    x = observations(recipe, B, LENGTH)
    looped = rolled(recipe, x, NEVER)
    assert_all_close(rolled(recipe, x, ALWAYS), looped)
    return looped


def differ(one: Found, other: Found) -> bool:
    return any(not torch.allclose(one[name], other[name], rtol=1e-6) for name in one)


# ---- regions without gradients ----


class Silent(VRNN):
    """Reads z without a gradient, and half of its gradient goes through the memory."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        with torch.no_grad():
            quiet = 2 * z_t.tanh()
        after = super().advance(state, z_t.detach() + quiet, x_t)
        return after._replace(memory=after.memory + 0.5 * state.memory.detach() * z_t[..., :1])


class Loud(VRNN):
    """The same with all gradients."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        after = super().advance(state, z_t + 2 * z_t.tanh(), x_t)
        return after._replace(memory=after.memory + 0.5 * state.memory * z_t[..., :1])


class QuietPrior(VRNN):
    """A transition that gives no gradient to the state, for a guide that reads its mean."""

    def transition(self, state: Any) -> dist.Distribution:
        with torch.no_grad():
            memory = state.memory * 2
        return super().transition(state._replace(memory=memory))


SILENT: dict[str, tuple[Callable[[], Recipe], Callable[[], Recipe]]] = {
    "no_grad and detach in advance": (lambda: own(Silent), lambda: own(Loud)),
    "a residual guide that stops": (
        lambda: own(guide="residual", prior_gradient=False),
        lambda: own(guide="residual"),
    ),
    "no_grad in transition": (
        lambda: own(QuietPrior, guide="residual"),
        lambda: own(QuietPrior, guide="residual", prior_gradient=False),
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_regions_without_gradients_are_kept(case: str) -> None:
    silent, loud = (make() for make in SILENT[case])
    found = agree(silent)
    assert_captured(silent)
    pyro.clear_param_store()
    assert differ(found, rolled(loud, observations(loud, B, LENGTH), NEVER))  # it does matter


def test_the_comparison_rejects_a_capture_that_forgets_such_regions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = own(Silent)
    monkeypatch.setattr(capture, "_NoGradientMarks", nullcontext)
    monkeypatch.setattr(scanning, "check", lambda *args: None)
    with pytest.raises(AssertionError):
        agree(recipe)


# ---- what cannot be captured ----


class Scaled(FilteringGuide):
    """A guide with an attribute of every kind that its step reads."""

    scale: float = 1.0
    _hidden: float = 1.0
    options: dict[str, Any] | None = None
    function: Callable[[Tensor], Tensor] | None = None

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        loc, scale = self.network.parameters_of(c_t, self.hidden(state))
        loc = loc if self.function is None else self.function(loc)
        factor = 1.0 if self.options is None else self.options["factor"]
        return diagonal_normal(loc, self.scale * self._hidden * factor * scale)


class Branching(Scaled):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        return q if state.memory.sum() > 0 else super().proposal(state, 2 * c_t)


class Reading(Scaled):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        self_scale = 1.0 + state.memory.abs().mean().item()
        q = super().proposal(state, c_t)
        return diagonal_normal(q.mean, q.stddev * self_scale)


class Noisy(VRNN):
    """Draws with probabilities of its own state."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        return super().advance(state, z_t * torch.bernoulli(z_t.detach().sigmoid()), x_t)


class Reversal(torch.autograd.Function):
    """The identity, whose gradient changes its sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Adversarial(VRNN):
    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        return super().advance(state, Reversal.apply(z_t), x_t)


class Hooked(VRNN):
    """Doubles a gradient on its way."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        z_t = 1.0 * z_t
        if z_t.requires_grad:
            z_t.register_hook(lambda gradient: 2 * gradient)
        return super().advance(state, z_t, x_t)


UNCAPTURED: dict[str, tuple[Callable[[], Recipe], str]] = {
    "a branch that depends on the data": (lambda: own(guide=Branching), "Data-dependent"),
    "a number read out of a tensor": (lambda: own(guide=Reading), "reads a number"),
    "draws that depend on the state": (lambda: own(Noisy), "draws what depends on the step"),
    "a user's backward pass": (lambda: own(Adversarial), "other values or gradients"),
    "a hook on a tensor": (lambda: own(Hooked), "cannot register a hook"),
}


@pytest.mark.parametrize("case", UNCAPTURED)
def test_what_cannot_be_captured_runs_step_by_step_and_the_log_says_why(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = UNCAPTURED[case]
    recipe = make()
    with caplog.at_level(logging.INFO, logger=scanning.__name__):
        agree(recipe)
        agree(recipe)
    assert not any(captures(recipe))
    (record,) = [r for r in caplog.records if r.name == scanning.__name__]  # said once
    assert record.levelno == logging.INFO
    assert (
        f"{type(recipe.guide).__name__} with {type(recipe.model).__name__} run step by step: "
        in record.getMessage()
    )
    assert reason in record.getMessage()


def test_where_dynamo_does_not_work_the_loop_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile(*args: Any, **options: Any) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    monkeypatch.setattr(torch, "compile", compile)
    with caplog.at_level("INFO"):
        assert_all_close(rolled(recipe, x, ALWAYS), looped)
    assert not captures(recipe) and "not supported on Python 3.99" in caplog.text


def test_a_reversed_gradient_is_not_the_plain_one() -> None:
    reversed_, plain = (agree(own(model)) for model in (Adversarial, VRNN))
    assert differ(reversed_, plain)


@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_that_is_no_parameter_gets_its_gradient(leaf: bool) -> None:
    weight = torch.tensor([0.5, 2.0], requires_grad=True)
    factor = weight if leaf else 2 * weight

    class Borrowing(VRNN):
        def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
            return super().advance(state, factor * z_t, x_t)

    recipe = own(Borrowing)
    x = observations(recipe, B, LENGTH)
    found = []
    for least in (NEVER, ALWAYS):
        torch.manual_seed(3)
        with captured_from(least):
            total = mixed(recipe.model.rollout(recipe.guide, x))
            (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
            found.append(gradients(recipe, total) | {"weight": gradient})
    assert found[0]["weight"].abs().min() > 0
    assert_all_close(found[1], found[0])


class Counting(VRNN):
    """Keeps a running mean in a buffer, as batch normalisation does."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        self.seen.mul_(0.5).add_(z_t.detach().mean())
        return super().advance(state, z_t, x_t)


def test_a_buffer_that_the_step_changes_is_changed_as_often_as_by_the_loop() -> None:
    found = []
    for least in (NEVER, ALWAYS):
        recipe = own(Counting)
        recipe.model.register_buffer("seen", torch.zeros(()))
        rolled(recipe, observations(recipe, B, LENGTH), least)
        found.append(recipe.model.seen)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0.0)


def test_spectral_normalisation_iterates_as_often_as_in_the_loop() -> None:
    found = []
    for least in (NEVER, ALWAYS):
        recipe = own()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            parametrizations.spectral_norm(recipe.guide.network.net[0])
        rolled(recipe, observations(recipe, B, LENGTH), least)
        found.append(dict(recipe.guide.named_buffers()))
    assert_all_close(found[1], found[0])


# ---- a user's steps that are captured ----


class InPlace(VRNN):
    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        memory = 1.0 * super().advance(state, z_t, x_t).memory
        memory.mul_(0.5)
        memory += 1.0
        return state._replace(memory=torch.relu_(memory) - 1.0)


class Assigning(VRNN):
    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        memory = torch.zeros_like(state.memory)
        memory[..., :2] = z_t
        memory[..., 3] += z_t[..., 0]
        after = super().advance(state, z_t, x_t)
        return after._replace(memory=after.memory + memory.clamp_(min=-1.0))


class Elman(Cell):
    """``h = f(W x + U h)``: the new state is what its own gradient is computed from."""

    def __init__(self, in_dim: int, h_dim: int, function: Callable[..., Tensor]) -> None:
        super().__init__(in_dim, h_dim)
        self.read, self.recur = nn.Linear(in_dim, h_dim), nn.Linear(h_dim, h_dim)
        self.function = function

    def initial(self, batch_shape: Size) -> Tensor:
        return self.recur.weight.new_zeros(*batch_shape, self.h_dim)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        return self.function(self.read(inputs) + self.recur(memory))

    def output(self, memory: Tensor) -> Tensor:
        return memory


def elman(function: Callable[..., Tensor], model: str = "vrnn") -> Recipe:
    pyro.clear_param_store()
    return build(model, cell=lambda in_dim, h_dim: Elman(in_dim, h_dim, function))


class Window(NamedTuple):
    memory: Tensor
    past: Tensor  # the last three z, (*batch, 3, Z)


class Remembering(VRNN):
    """A state with an event of two dimensions, and one part that z alone sets."""

    def init(self, batch_shape: Size) -> Any:
        memory = super().init(batch_shape).memory
        return Window(memory, memory.new_zeros(*batch_shape, 3, self.z_dim))

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        after: Any = super().advance(state, z_t + state.past[..., 0, :], x_t)
        past = torch.cat([state.past[..., 1:, :], z_t.unsqueeze(-2)], dim=-2)
        return Window(after.memory, past)

    def hidden(self, state: Any) -> Tensor:
        return self.cell.output(state.memory)


class Centred(VRNN):
    """Operations along dimensions, which all steps together have one more of."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        memory = super().advance(state, z_t, x_t).memory
        memory = memory - memory.mean(dim=-1, keepdim=True)
        outer = torch.einsum("...i,...j->...ij", memory, memory).softmax(dim=-1)
        quiet = (x_t > 0).any(dim=-1, keepdim=True)
        return state._replace(memory=(memory + outer.sum(dim=-2)).masked_fill(quiet, 0.5))


class Laplacian(Scaled):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        return dist.Laplace(q.mean, q.stddev, validate_args=False).to_event(1)


class Positive(Scaled):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        return dist.LogNormal(0.1 * q.mean, 0.1 * q.stddev, validate_args=False).to_event(1)


class Normalised(VRNN):
    """Layer normalisation, sorting and a linear system: operations that give several tensors."""

    def advance(self, state: Any, z_t: Tensor, x_t: Tensor) -> Any:
        memory = self.norm(super().advance(state, z_t, x_t).memory)
        ordered, _ = memory.sort(dim=-1)
        matrix = torch.eye(5) + 0.1 * ordered.unsqueeze(-1)
        solved = torch.linalg.solve(matrix, memory.unsqueeze(-1)).squeeze(-1)
        return state._replace(memory=(solved + memory.topk(2)[0].sum(dim=-1, keepdim=True)).tanh())


def normalised(norm: nn.Module) -> Recipe:
    recipe = own(Normalised)
    recipe.model.norm = norm
    return recipe


class Flat(nn.BatchNorm1d):
    """Batch normalisation of whatever leading dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class Correlated(Scaled):
    """Takes two draws a step."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        factor = q.mean.unsqueeze(-1)
        return dist.LowRankMultivariateNormal(q.mean, factor, q.stddev, validate_args=False)


CAPTURED: dict[str, Callable[[], Recipe]] = {
    "in-place operations": lambda: own(InPlace),
    "an Elman cell": lambda: elman(torch.tanh),
    "an Elman cell of relu": lambda: elman(torch.relu),
    "an Elman cell without latents": lambda: elman(torch.sigmoid, "rnn"),
    "an Elman cell of exp": lambda: elman(lambda a: (-a.square()).exp(), "storn"),
    "a window of the past": lambda: own(Remembering),
    "operations along dimensions": lambda: own(Centred),
    "a Laplace proposal": lambda: own(guide=Laplacian),
    "a log-normal proposal": lambda: own(guide=Positive),
    "a proposal of two draws": lambda: own(guide=Correlated),
    "layer normalisation": lambda: normalised(nn.LayerNorm(5)),
    "batch normalisation that has learnt": lambda: normalised(Flat(5).eval()),
}


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("case", CAPTURED)
def test_steps_of_ones_own_are_captured(case: str, particles: int) -> None:
    recipe = CAPTURED[case]()
    x = observations(recipe, B, LENGTH)
    looped = rolled(recipe, x, NEVER, num_particles=particles)
    assert_all_close(rolled(recipe, x, ALWAYS, num_particles=particles), looped)
    assert_captured(recipe)


@pytest.mark.parametrize("case", ["an Elman cell", "a window of the past", "a Laplace proposal"])
def test_steps_of_ones_own_go_through_a_filter(case: str) -> None:
    recipe = CAPTURED[case]()
    x = observations(recipe, B, LENGTH)
    looped = bounded(recipe, x, NEVER, filtered())
    assert_all_close(bounded(recipe, x, ALWAYS, filtered()), looped)
    assert_captured(recipe)


def test_assignments_to_parts_of_a_tensor() -> None:
    agree(own(Assigning))  # captured or not


# ---- hooks, and other ways of looking on ----

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "full_backward": nn.Module.register_full_backward_hook,
    "full_backward_pre": nn.Module.register_full_backward_pre_hook,
    "all modules' forward": lambda module, hook: register_module_forward_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_a_module_see_every_step(kind: str) -> None:
    recipe = own()
    agree(recipe)  # a capture that was made before there is a hook
    x = observations(recipe, B, LENGTH)
    seen: list[nn.Module] = []

    def look(module: nn.Module, *args: Any) -> None:
        if module is recipe.model.cell:
            seen.append(module)

    handle = HOOKS[kind](recipe.model.cell, look)
    try:
        calls = []
        for least in (NEVER, ALWAYS):
            seen.clear()
            rolled(recipe, x, least)
            calls.append(len(seen))
    finally:
        handle.remove()
    assert calls == [LENGTH - 1, LENGTH - 1]  # nothing needs the state after the last step


def test_a_hook_that_changes_an_output_is_obeyed() -> None:
    recipe = own()
    before = agree(recipe)
    with recipe.guide.network.register_forward_hook(
        lambda module, args, out: diagonal_normal(out.mean + 1.0, out.stddev)
    ):
        assert differ(agree(recipe), before)
    assert_all_close(agree(recipe), before)


def test_autocast_takes_the_plain_loop() -> None:
    made = build("vrnn")
    model, guide = made.model.float(), made.guide.float()
    x = observations(made, B, LENGTH).float()
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for least in (NEVER, ALWAYS):
            torch.manual_seed(3)
            with captured_from(least), torch.no_grad():
                found.append(model.rollout(guide, x).log_weight)
    assert torch.equal(*found) and not captures(made)


# ---- what a capture depends on ----


def _frozen(recipe: Recipe) -> None:
    recipe.model.cell.requires_grad_(False)


def _replaced(recipe: Recipe) -> None:
    layer = recipe.guide.network.net[0]
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def _updated(recipe: Recipe) -> None:
    with torch.no_grad():
        for parameter in recipe.model.parameters():
            parameter.mul_(1.5)


def _switched(recipe: Recipe) -> None:
    recipe.model.encode_z = nn.Sequential(copy.deepcopy(recipe.model.encode_z), nn.Tanh())


def _in_place(recipe: Recipe) -> None:
    recipe.guide.options["factor"] = 2.0


def _in_training(recipe: Recipe) -> None:
    recipe.model.train()
    recipe.guide.train()


def _tied(recipe: Recipe) -> None:
    recipe.model.prior.net[2].bias = recipe.guide.network.net[2].bias


CHANGES: dict[str, Callable[[Recipe], Any]] = {
    "a number": lambda r: setattr(r.guide, "scale", 2.0),
    "a number of ours to change": lambda r: setattr(r.guide, "_hidden", 2.0),
    "a function": lambda r: setattr(r.guide, "function", torch.tanh),
    "a dictionary": lambda r: setattr(r.guide, "options", {"factor": 2.0}),
    "an entry of a dictionary": _in_place,
    "training mode": _in_training,
    "a cell without gradients": _frozen,
    "a parameter replaced": _replaced,
    "a parameter shared": _tied,
    "parameters updated": _updated,
    "a module replaced": _switched,
    "other functions": lambda r: setattr(r.model, "__class__", Loud),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_seen(change: str) -> None:
    recipe = own(guide=Scaled, dropout=0.5)
    recipe.guide.options = {"factor": 1.0}
    recipe.model.eval()
    recipe.guide.eval()
    x = observations(recipe, B, LENGTH)
    before = rolled(recipe, x, ALWAYS)
    assert_captured(recipe)
    CHANGES[change](recipe)
    after = _all_gradients(recipe, x, ALWAYS)
    assert_all_close(after, _all_gradients(recipe, x, NEVER))
    assert differ({n: after[n] for n in after.keys() & before.keys()}, before) or (
        after.keys() != before.keys()
    )


@pytest.mark.parametrize("model", ["vrnn", "storn", "srnn"])
def test_dropout_is_drawn_for_all_steps_at_once(model: str) -> None:
    recipe = build(model, dropout=0.5)
    x = observations(recipe, B, LENGTH)
    found = _all_gradients(recipe, x, ALWAYS)
    assert_captured(recipe)
    assert_all_close(found, _all_gradients(recipe, x, NEVER))
    recipe.model.eval()
    recipe.guide.eval()
    assert differ(found, _all_gradients(recipe, x, ALWAYS))


def _all_gradients(recipe: Recipe, x: Tensor, least: int) -> Found:
    """As ``rolled``, but of parameters that take a gradient; the others' is a zero."""
    pyro.clear_param_store()
    torch.manual_seed(3)
    with captured_from(least):
        total = mixed(recipe.model.rollout(recipe.guide, x, None, 3))
        named = {
            f"{part}.{name}": p
            for part, module in (("model", recipe.model), ("guide", recipe.guide))
            for name, p in module.named_parameters()
        }
        free = {name: p for name, p in named.items() if p.requires_grad}
        found = torch.autograd.grad(total, list(free.values()), allow_unused=True)
    made = {name: torch.zeros_like(p) for name, p in named.items()}
    for name, gradient in zip(free, found, strict=True):
        made[name] = made[name] if gradient is None else gradient
    return {"total": total.detach()} | made


def test_functions_that_come_and_go_are_not_mistaken_for_each_other() -> None:
    recipe = own(guide=Scaled)

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda loc: factor * loc

    for factor in range(1, 9):
        recipe.guide.function = None  # so that the next may lie where the last one was
        recipe.guide.function = times(factor)
        agree(recipe)


def test_a_copy_goes_its_own_way() -> None:
    recipe = own(guide=Scaled)
    x = observations(recipe, B, LENGTH)
    before = rolled(recipe, x, ALWAYS)
    model, guide = copy.deepcopy((recipe.model, recipe.guide))
    twin = Recipe(model, guide)
    pyro.clear_param_store()
    assert_all_close(rolled(twin, x, ALWAYS), before)
    _updated(twin)
    agree(twin)
    pyro.clear_param_store()
    assert_all_close(rolled(recipe, x, ALWAYS), before)


def test_a_state_dict_goes_round() -> None:
    recipe = own(guide=Scaled)
    x = observations(recipe, B, LENGTH)
    before = rolled(recipe, x, ALWAYS)
    kept = copy.deepcopy((recipe.model.state_dict(), recipe.guide.state_dict()))
    _updated(recipe)
    changed = rolled(recipe, x, ALWAYS)
    assert differ(changed, before)
    recipe.model.load_state_dict(kept[0])
    recipe.guide.load_state_dict(kept[1])
    assert_all_close(rolled(recipe, x, ALWAYS), before)
    assert recipe.model.state_dict().keys() == kept[0].keys()
    assert len(captures(recipe)) == 1  # values are no reason for another


def test_captures_of_a_guide_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_KEPT", 3)
    recipe = own()
    for size in (1, 2, 3, 4, 2, 5, 2, 1):
        x = observations(recipe, size, 3)
        assert_all_close(rolled(recipe, x, ALWAYS), rolled(recipe, x, NEVER))
        assert 1 <= len(captures(recipe)) <= 3


class Bound(Scaled):
    """Keeps a method of its own as an attribute."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, (5,))
        self.function = self.doubled

    def doubled(self, loc: Tensor) -> Tensor:
        return 2 * loc


@pytest.mark.parametrize("guide", ["filtering", "smoothing_flow", Bound])
def test_captures_go_with_their_guide(guide: Any) -> None:
    recipe = own(guide=guide)
    agree(recipe)
    seen = weakref.ref(recipe.guide), weakref.ref(recipe.model)
    pyro.clear_param_store()
    del recipe
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


# ---- derivatives that the fast path does not write ----


def test_a_second_derivative_is_right_or_refused() -> None:
    recipe = own()
    x = observations(recipe, B, LENGTH)
    weight = recipe.model.encode_z[0].weight  # of the recurrence, and of the emission too
    found = []
    for least in (NEVER, ALWAYS):
        torch.manual_seed(3)
        with captured_from(least):
            total = mixed(recipe.model.rollout(recipe.guide, x))
            try:
                (first,) = torch.autograd.grad(total, weight, create_graph=True)
                found.append(torch.autograd.grad(first.square().sum(), weight)[0])
            except NotImplementedError as error:
                assert least == ALWAYS and "no second derivatives" in str(error)
                return
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_functional_gradients_are_right() -> None:
    recipe = own()
    x = observations(recipe, B, LENGTH)

    def total(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return mixed(recipe.model.rollout(recipe.guide, x))

    found = []
    for least in (NEVER, ALWAYS):
        with captured_from(least):
            found.append(torch.func.grad(total)(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")  # torch's, of itself
def test_a_forward_derivative_is_right_or_refused() -> None:
    recipe = own()
    x = observations(recipe, B, LENGTH)
    found = []
    for least in (NEVER, ALWAYS):
        torch.manual_seed(3)
        with captured_from(least), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            try:
                total = mixed(recipe.model.rollout(recipe.guide, dual))
            except NotImplementedError as error:
                assert least == ALWAYS and "jvp" in str(error)
                return
            found.append(torch.autograd.forward_ad.unpack_dual(total).tangent)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


# ---- the loop contains what recurs, and nothing else ----

X, Z, H = 7, 3, 11  # all sizes that a product can have are different
SIZES = {"x_dim": X, "z_dim": Z, "h_dim": H}


def products(nodes: Any) -> Counter[tuple[int, int]]:
    """Matrix products among nodes: (columns read, columns given) of each."""
    aten = torch.ops.aten
    shapes = [
        tuple(n.args[-1].meta["value"].shape)
        for n in nodes
        if n.target in (aten.mm.default, aten.addmm.default)
    ]
    return Counter(shapes)


def the_loop(recipe: Recipe) -> tuple[Any, list[fx.Node]]:
    """The loop of the one capture, and the operations of its forward pass."""
    rolled(recipe, observations(recipe, B, LENGTH), ALWAYS)
    (found,) = captures(recipe)
    loop = found.loop
    needed = nodes_for([*loop.outputs, *loop.saved], loop.local.values())
    return loop, [n for n in loop.graph.graph.nodes if n in needed]


@pytest.mark.parametrize("guide", ["filtering", "smoothing"])
def test_the_loop_of_a_vrnn_has_five_products_of_which_none_reads_x(guide: str) -> None:
    loop, nodes = the_loop(build("vrnn", guide=guide, guide_options={"hidden": (13,)}, **SIZES))
    # h to the guide's hidden layer, that to mean and scale; z to phi(z); phi(z), h to the gates
    expected = [(H, 13), (13, 2 * Z), (Z, H), (H, 3 * H), (H, 3 * H)]
    assert products(nodes) == Counter(expected)
    # backwards, each product's gradient goes to its input, and none to a weight
    backwards = Counter((out, into) for into, out in expected)
    assert products(loop.late) == backwards
    assert loop.sums == [] and len(loop.deferred) > 0


def test_the_loop_of_a_guide_that_reads_no_state_has_no_proposal() -> None:
    loop, nodes = the_loop(build("vrnn", guide="mean_field", **SIZES))
    assert products(nodes) == Counter([(H, 3 * H)])  # z of all steps is known before
    assert loop.sums == []


@pytest.mark.parametrize("guide", ["filtering", "mean_field"])
def test_a_model_whose_state_is_its_last_draw(guide: str) -> None:
    recipe = build("dmm", guide=guide, guide_options={"hidden": (13,)}, **SIZES)
    if guide == "filtering":
        loop, nodes = the_loop(recipe)
        assert products(nodes) == Counter([(Z, 13), (13, 2 * Z)]) and loop.sums == []
    else:  # nothing recurs
        agree(recipe)
        assert captures(recipe)[0].loop is None


def test_a_filter_computes_the_densities_in_the_loop_but_differentiates_the_path_alone() -> None:
    recipe = build("vrnn", guide_options={"hidden": (13,)}, **SIZES)
    bounded(recipe, observations(recipe, B, LENGTH), ALWAYS, filtered())
    (found,) = captures(recipe)
    expected = [(H, 13), (13, 2 * Z), (Z, H), (H, 3 * H), (H, 3 * H)]
    assert products(found.loop.late) == Counter((out, into) for into, out in expected)
    assert found.loop.sums == []


def test_a_process_can_be_told_to_run_steps_as_written() -> None:
    program = (
        "import torch\n"
        "from pyro_avrnn.engine import scan\n"
        "def step(state, x):\n    return state + x, 2 * x\n"
        "print(scan(step, (), torch.zeros(1), torch.ones(20, 1)) is None)\n"
    )
    for told, expected in (("0", "False\n"), ("1", "True\n")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "PYRO_AVRNN_PLAIN_LOOP": told,
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == expected, done.stderr
