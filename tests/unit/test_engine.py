"""The fast path: a captured step run for all steps is the plain loop, values and gradients.

Here every model and guide goes through it: whole, in compiled chunks, in segments, in a particle
filter. How a step is captured, and when it is not, is in ``test_engine_capture.py``.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, fx

from inference import ELBO, FIVO, evaluate, to_arviz
from inference.densities import StepDensities
from inference.objectives import Objective
from pyro_avrnn.engine import batched, capture, compiled, loops, recurrence
from pyro_avrnn.recipes import Recipe
from tests.unit.table import (
    ALL,
    assert_all_close,
    assert_close,
    build,
    gradients,
    observations,
    pairwise,
    prefix_mask,
)

LENGTH = 5
NEVER, ALWAYS = 10**9, 1  # the shortest sequence whose step is captured
TERMS = ("log_prior", "log_emission", "log_proposal", "z", "h")
COVER = {"-".join(call.values()): call for call in pairwise()}
#: the other half of the cases is slow
HALF = [pytest.param(c, marks=pytest.mark.slow if i % 2 else ()) for i, c in enumerate(COVER)]
Found = dict[str, Tensor]


@contextmanager
def captured_from(steps: int) -> Iterator[None]:
    """Sequences of so many steps and longer take the fast path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "LEAST_STEPS", steps)
        yield


def captures(recipe: Recipe) -> list[Any]:
    """What was captured of the recipe's guide; None stands for a step that could not be."""
    return [found for found, *_ in recurrence._CACHE.get(recipe.guide, {}).values()]


def assert_captured(recipe: Recipe) -> None:
    assert captures(recipe) and None not in captures(recipe), "the plain loop was taken"


def mixed(d: StepDensities) -> Tensor:
    """One random linear function of everything, in which no error hides behind another."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for name in TERMS:
        term = getattr(d, name)
        total = total + (torch.randn(term.shape, generator=generator) * term).sum()
    return total


def rolled(recipe: Recipe, x: Tensor, least: int, **options: Any) -> Found:
    """Values and gradients of a rollout, and the random number that comes next."""
    torch.manual_seed(3)
    with captured_from(least):
        d = recipe.model.rollout(recipe.guide, x, **{"num_particles": 3, **options})
        next_number = torch.rand(())
        found = gradients(recipe, mixed(d))
    values = {name: getattr(d, name).detach() for name in TERMS}
    return {"torch.rand": next_number} | values | found


def bounded(recipe: Recipe, x: Tensor, least: int, loss: Objective) -> Found:
    """Value and gradients of a loss, and the random number that comes next."""
    torch.manual_seed(3)
    with captured_from(least):
        value = loss(recipe.model, recipe.guide, x, None)
        next_number = torch.rand(())
        found = gradients(recipe, value)
    return {"value": value.detach(), "torch.rand": next_number} | found


def filtered(**options: Any) -> FIVO:
    """A loss in which particles change places after every step."""
    return FIVO(num_particles=3, criterion="always", resampler="multinomial", **options)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two steps, the very ones that would be compiled, without a compiler."""
    monkeypatch.setattr(compiled, "STEPS", 2)
    monkeypatch.setattr(compiled, "compiled", lambda function, examples: function)


# ---- every model and guide ----


@pytest.mark.parametrize("case", ALL)
def test_the_fast_path_is_the_loop(case: str, uncompiled: None) -> None:
    recipe = ALL[case]()
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    assert not captures(recipe)
    assert_all_close(rolled(recipe, x, ALWAYS), looped)
    assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)
    assert_captured(recipe)
    (found,) = captures(recipe)
    assert found.loop is None or isinstance(found.driver, compiled.Chunks)


@pytest.mark.parametrize("case", HALF)
def test_filters_and_segments_of_the_fast_path_are_those_of_the_loop(case: str) -> None:
    recipe = build(**COVER[case])
    x = observations(recipe, 2, LENGTH)
    looped = bounded(recipe, x, NEVER, filtered())
    assert_all_close(bounded(recipe, x, ALWAYS, filtered()), looped)
    assert_all_close(bounded(recipe, x, ALWAYS, filtered(recompute=2)), looped)
    looped = bounded(recipe, x, NEVER, ELBO(num_particles=3))
    assert_all_close(bounded(recipe, x, ALWAYS, ELBO(num_particles=3, recompute=2)), looped)
    assert_captured(recipe)


@pytest.mark.parametrize("case", ["vae-logistic", "vrnn-logistic", "rnn-mixture"])
def test_a_filter_of_emissions_that_work_in_blocks_or_without_latents(case: str) -> None:
    recipe = ALL[case]()
    x = observations(recipe, 2, LENGTH)
    looped = bounded(recipe, x, NEVER, filtered())
    assert_all_close(bounded(recipe, x, ALWAYS, filtered()), looped)
    assert_captured(recipe)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4, 7])
def test_any_number_of_steps_and_padding(length: int, compile: bool, uncompiled: None) -> None:
    recipe = build("vrnn", guide="smoothing", cell="lstm")
    mask = prefix_mask((length, 1, (length + 1) // 2))
    x = observations(recipe, 3, length).where(mask[..., None], torch.nan)
    looped = rolled(recipe, x, NEVER, mask=mask)
    assert_all_close(rolled(recipe, x, ALWAYS, mask=mask, compile=compile), looped)
    assert_captured(recipe)


def test_the_data_get_their_gradient() -> None:
    recipe = build("vrnn", guide="smoothing")
    x = observations(recipe, 2, LENGTH).requires_grad_()
    found = []
    for least in (NEVER, ALWAYS):
        torch.manual_seed(3)
        with captured_from(least):
            total = mixed(recipe.model.rollout(recipe.guide, x, None, 2))
            found.append(torch.autograd.grad(total, x)[0])
    assert_close(found[1], found[0])
    assert_captured(recipe)


def test_without_gradients_nothing_is_kept_for_them() -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    found = []
    for least in (NEVER, ALWAYS):
        torch.manual_seed(3)
        with captured_from(least), torch.no_grad():
            found.append(recipe.model.rollout(recipe.guide, x, None, 2).log_weight)
    assert_close(found[1], found[0])
    assert_captured(recipe)
    assert not found[1].requires_grad and not captures(recipe)[0].loop.saved


# ---- the comparisons reject planted faults ----
#
# A capture is checked on two steps before it is used, and one that fails is not used; the faults
# are therefore planted with and without that check.


def keeping(gradient: Tensor, parents: Tensor | None) -> None:
    """The gradient stays with the particle that went on, and is not given to its parent."""


def forgetful(formula: Any, known: dict[fx.Node, Tensor], total: Any = loops.total) -> Tensor:
    """Products of all steps but the first."""
    if formula[0] != "mm":
        return total(formula, known)
    left, right = (loops.seen(n, known)[1:].flatten(0, 1) for n in formula[1:])
    return left.t() @ right


def late(node: fx.Node, source: Tensor, *, copies: bool = False, view: Any = None) -> Tensor:
    """Views that begin with the second step."""
    made = (view or batched.over_time)(node, source, copies=copies)
    return torch.cat([made[1:], made[:1]])


def swapped(graph: fx.GraphModule, node: fx.Node, bias: Any, right: fx.Node, *rest: Any) -> None:
    """Products are split with the rows of the matrix in reverse order."""
    with graph.graph.inserting_before(node):
        turned = graph.graph.call_function(torch.ops.aten.flip.default, (right, [0]))
    turned.meta["value"] = right.meta["value"].flip(0)
    kind = rest[-1]
    kind[turned] = kind[right]
    split(graph, node, bias, turned, *rest)


split, drawn, back = capture._split, recurrence.Recurrence._drawn, compiled.Chunks._backward


def backwards(self: Any, length: int) -> dict[fx.Node, Tensor]:
    """The last step gets the noise of the first."""
    return {node: rows.flip(0) for node, rows in drawn(self, length).items()}


def short(self: compiled.Chunks, size: int, *inputs: Tensor) -> list[Tensor]:
    """Sums over the steps of a chunk that leave out what came from later chunks."""
    count = len(self.loop.before)
    carry = [torch.zeros_like(c) for c in inputs[len(inputs) - count :]]
    return back(self, size, *inputs[: len(inputs) - count], *carry)


#: where, what, by what, and the options of a rollout in which it is seen
FAULTS: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "sums that forget a step": (loops, "total", forgetful, {}),
    "views one step late": (batched, "over_time", None, {}),
    "products split in another order": (capture, "_split", swapped, {}),
    "noise in another order": (recurrence.Recurrence, "_drawn", backwards, {}),
    "chunks that do not go on": (compiled.Chunks, "_backward", short, {"compile": True}),
}


def plant(patch: pytest.MonkeyPatch, fault: str) -> dict[str, Any]:
    place, name, by, options = FAULTS[fault]
    if by is None:
        view = getattr(place, name)
        by = lambda *args, **given: late(*args, **given, view=view)  # noqa: E731
    patch.setattr(place, name, by)
    return options


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_rejects_a_fault_in_the_fast_path(
    fault: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build("vrnn", guide="residual")
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    options = plant(monkeypatch, fault)
    monkeypatch.setattr(recurrence, "check", lambda *args: None)
    found = rolled(recipe, x, ALWAYS, **options)
    assert_captured(recipe)
    with pytest.raises(AssertionError):
        assert_all_close(found, looped)


@pytest.mark.parametrize("fault", [name for name in FAULTS if not name.startswith("chunks")])
def test_a_fault_in_the_fast_path_is_seen_before_it_is_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = build("vrnn", guide="residual")
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    plant(monkeypatch, fault)
    with caplog.at_level("INFO"):
        assert_all_close(rolled(recipe, x, ALWAYS), looped)
    assert captures(recipe) == [None]
    assert "as a graph it gives other values or gradients" in caplog.text


def test_the_comparison_rejects_gradients_that_stay_with_their_particle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    looped = bounded(recipe, x, NEVER, filtered())
    monkeypatch.setattr(loops, "give_back", keeping)
    found = bounded(recipe, x, ALWAYS, filtered())
    assert_captured(recipe)
    assert_close(found["value"], looped["value"])  # the value does not tell
    with pytest.raises(AssertionError):
        assert_all_close(found, looped)


# ---- segments ----


def kept_bytes(function: Callable[[], Any]) -> int:
    """Bytes of all memory that autograd keeps for a backward pass, each counted once."""
    storages: dict[int, Any] = {}  # kept alive, so that no address is used a second time

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("least", [NEVER, ALWAYS], ids=["loop", "fast path"])
def test_segments_keep_less_and_give_the_same(least: int) -> None:
    recipe = build("vrnn", h_dim=16)
    x = observations(recipe, 2, 400)

    def kept(recompute: int | None) -> int:
        with captured_from(least):
            rollout = recipe.model.rollout
            return kept_bytes(lambda: rollout(recipe.guide, x, None, 2, recompute=recompute))

    kept(None)  # a capture keeps nothing of what it tries, but is not to be counted either
    assert kept(20) * 4 < kept(None)
    whole, cut = (rolled(recipe, x, least, recompute=s, num_particles=2) for s in (None, 20))
    assert_all_close(cut, whole)


@pytest.mark.parametrize("recompute", [1, 2, 5, 99])
@pytest.mark.parametrize("case", ["vrnn-conditional-residual", "dsae-flow-flow", "rnn-lstm"])
def test_segments_of_any_length(case: str, recompute: int) -> None:
    recipe = ALL[case]()
    x = observations(recipe, 2, LENGTH)
    whole = rolled(recipe, x, NEVER)
    assert_all_close(rolled(recipe, x, NEVER, recompute=recompute), whole)


def test_segments_keep_the_normals_and_no_emission() -> None:
    recipe = build("vrnn")
    whole, cut = (seeded_rollout(recipe, recompute=recompute) for recompute in (None, 2))
    for one, other in ((cut.prior, whole.prior), (cut.proposal, whole.proposal)):
        assert_close(one.mean, other.mean)
        assert_close(one.stddev, other.stddev)
    assert cut.emission is None
    flows = seeded_rollout(build("vrnn", prior="flow", guide="flow"), recompute=2)
    assert flows.emission is None and flows.prior is None and flows.proposal is None


def seeded_rollout(recipe: Recipe, **options: Any) -> StepDensities:
    pyro.clear_param_store()
    torch.manual_seed(3)
    return recipe.model.rollout(recipe.guide, observations(recipe, 2, LENGTH), None, 2, **options)


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_segments_are_evaluated_and_arviz_says_what_it_needs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build("vrnn") if family == "normal" else build("vrnn", prior="flow", guide="flow")
    x, mask = observations(recipe, 2, LENGTH), prefix_mask((LENGTH, 3))
    whole = evaluate(recipe.model, recipe.guide, x, mask, num_particles=25).as_dict()
    rollout = partial(recipe.model.rollout, recompute=2)
    monkeypatch.setattr(recipe.model, "rollout", rollout)
    cut = evaluate(recipe.model, recipe.guide, x, mask, num_particles=25).as_dict()
    assert {k: v is None for k, v in cut.items()} == {k: v is None for k, v in whole.items()}
    told = {name: value for name, value in whole.items() if value is not None}
    assert {name: cut[name] for name in told} == pytest.approx(told, rel=1e-10)
    with pytest.raises(NotImplementedError, match="emission must be given as one distribution"):
        to_arviz(recipe.model, recipe.guide, x[0], draws=3)


@pytest.mark.parametrize("recompute", [0, -3])
def test_a_segment_has_a_step(recompute: int) -> None:
    recipe = build("vrnn")
    sentence = f"recompute must be at least 1, got {recompute}"
    with pytest.raises(ValueError, match=sentence):
        recipe.model.rollout(recipe.guide, observations(recipe, 2, 3), recompute=recompute)
    with pytest.raises(ValueError, match=sentence):
        ELBO(recompute=recompute)


# ---- a series that goes on ----


def after(recipe: Recipe, d: StepDensities) -> Any:
    """The state after the last step of a rollout."""
    last = type(d.states)(*(tensor[-1] for tensor in d.states))
    return recipe.model.advance(last, d.z[-1], d.x[-1])


@pytest.mark.parametrize("least", [NEVER, ALWAYS], ids=["loop", "fast path"])
@pytest.mark.parametrize("recompute", [None, 2])
@pytest.mark.parametrize("model", ["vrnn", "storn", "dmm", "rnn"])
def test_two_halves_are_the_whole(model: str, recompute: int | None, least: int) -> None:
    recipe = build(model) if model == "rnn" else build(model, guide="filtering")
    x, options = observations(recipe, 2, LENGTH), {"num_particles": 3, "recompute": recompute}
    with captured_from(least):
        torch.manual_seed(3)
        whole = recipe.model.rollout(recipe.guide, x, **options)
        torch.manual_seed(3)
        one = recipe.model.rollout(recipe.guide, x[:, :2], **options)
        start = after(recipe, one)
        two = recipe.model.rollout(recipe.guide, x[:, 2:], start=start, **options)
        joined = {name: torch.cat([getattr(d, name) for d in (one, two)]) for name in TERMS}
        assert_all_close(joined, {name: getattr(whole, name) for name in TERMS})
        found = gradients(recipe, mixed(whole._replace(**joined)))
        assert_all_close(found, gradients(recipe, mixed(whole)))
        cut = recipe.model.rollout(  # a window of a series: no gradient comes from the one before
            recipe.guide, x[:, 2:], start=type(start)(*(s.detach() for s in start)), **options
        )
        stopped = gradients(recipe, mixed(one) + mixed(cut))
    with pytest.raises(AssertionError):
        assert_all_close(stopped, found)


@pytest.mark.parametrize("least", [NEVER, ALWAYS], ids=["loop", "fast path"])
def test_a_latent_that_all_steps_share_goes_on_in_the_state(least: int) -> None:
    recipe = build("dsae", guide="factorised")
    x = observations(recipe, 2, LENGTH)
    with captured_from(least):
        whole = recipe.model.rollout(recipe.guide, x, None, 3)
        start = type(whole.states)(*(tensor[2] for tensor in whole.states))
        torch.manual_seed(4)
        two = recipe.model.rollout(recipe.guide, x[:, 2:], None, 3, start=start)
        scored = recipe.model.rollout(recipe.guide, x[:, 2:], z=whole.z[2:], start=start)
    assert two.f is None and two.prior_f is None and two.proposal_f is None
    for name in TERMS[:3]:  # f was counted at step 1
        assert_close(getattr(scored, name), getattr(whole, name)[2:], name)
    assert torch.equal(two.states.f, start.f.expand_as(two.states.f))


def test_a_start_of_other_shapes_is_refused() -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    start = recipe.model.init(torch.Size((3, 2)))
    recipe.model.rollout(recipe.guide, x, None, 3, start=start)
    sentence = r"start must be a VRNNState of tensors \(K, B, \.\.\.\) of shapes "
    for wrong, got in (
        (recipe.model.init(torch.Size((1, 2))), r"VRNNState \[\(1, 2, 5\)\]"),
        (recipe.model.init(torch.Size((2,))), r"VRNNState \[\(2, 5\)\]"),
        (build("storn").model.init(torch.Size((3, 2))), r"\w+ \[.*\]"),
        ((start.memory,), r"tuple \[\(3, 2, 5\)\]"),
    ):
        with pytest.raises(ValueError, match=sentence + r"\[\(3, 2, 5\)\], got " + got):
            recipe.model.rollout(recipe.guide, x, None, 3, start=wrong)


# ---- compiled chunks ----


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")  # torch's, of itself
def test_compiled_chunks_are_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    monkeypatch.setattr(compiled, "STEPS", 2)
    made = []
    function = compiled.compiled
    monkeypatch.setattr(
        compiled, "compiled", lambda *given: made.append(function(*given)) or made[-1]
    )
    assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)
    assert len(made) == 2  # forward and backward, once each


def test_without_a_compiler_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such compiler\nof many lines")

    monkeypatch.setattr("torch._inductor.compile", fails)
    monkeypatch.setattr(compiled, "STEPS", 2)
    compiled.warn.cache_clear()  # said once for each reason
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)
    assert_captured(recipe)
    (warning,) = said
    assert str(warning.message).startswith("compile=True has no effect")
    assert "no such compiler" in str(warning.message)
    assert "of many lines" not in str(warning.message)
