"""The fast path: a captured step run for all steps is the plain loop, values and gradients.

Here every model and guide goes through it: whole, in compiled chunks, in segments, in a particle
filter. How a step is captured, and when it is not, is in ``test_engine_capture.py``.
"""

import ctypes
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, fx

from inference import ELBO, FIVO, IWAE, Ramp, evaluate, fit, to_arviz
from inference.densities import StepDensities
from inference.objectives import Objective
from pyro_avrnn import engine
from pyro_avrnn.engine import batched, c_writer, loops, native, parts, recurrence, scanning
from pyro_avrnn.engine.c_code import GRAM_LEAD, GRAM_ROWS, built
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

pytestmark = pytest.mark.fast_path
LENGTH = 5
NEVER, ALWAYS = 10**9, 1  # the shortest sequence whose step is captured
TERMS = ("log_prior", "log_emission", "log_proposal", "z", "h")
COVER = {"-".join(call.values()): call for call in pairwise()}
Found = dict[str, Tensor]
in_c = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler"
)


def every(step: int, first: int = 0, of: Iterable[str] = COVER, also: str = "") -> list[Any]:
    """All cases; those between are slow, as to capture a step takes a second, but for one."""
    slow = pytest.mark.slow
    quick = [i % step == first or c == also for i, c in enumerate(of)]
    return [pytest.param(c, marks=() if q else slow) for c, q in zip(of, quick, strict=True)]


@contextmanager
def captured_from(steps: int) -> Iterator[None]:
    """Sequences of so many steps and longer take the fast path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "LEAST_STEPS", steps)
        yield


def captures(recipe: Recipe) -> list[Any]:
    """What was captured of the recipe's guide; None stands for a step that could not be."""
    return engine.captures(recipe.guide)


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


# ---- every model and guide ----


@pytest.mark.parametrize("case", every(13, of=ALL))
def test_the_fast_path_is_the_loop(case: str) -> None:
    recipe = ALL[case]()
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    assert not captures(recipe)
    assert_all_close(rolled(recipe, x, ALWAYS), looped)
    assert_captured(recipe)


@in_c
@pytest.mark.parametrize("case", [*every(17, 5), "dsae-mixture-full"])
def test_the_loop_in_c_is_the_loop(case: str) -> None:
    recipe = build(**COVER[case]) if case in COVER else ALL[case]()
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)
    (found,) = captures(recipe)
    assert isinstance(found.native, native.Native)


@in_c
@pytest.mark.parametrize("case", [*every(11), "dsae-mixture-full", "dsae-normal"])
def test_bounds_in_c_are_those_of_the_loop(case: str) -> None:
    recipe = build(**COVER[case]) if case in COVER else ALL[case]()
    x, loss = observations(recipe, 2, LENGTH), IWAE if "flow" in case else ELBO
    looped = bounded(recipe, x, NEVER, loss(num_particles=3))
    assert_all_close(bounded(recipe, x, ALWAYS, loss(num_particles=3, compile=True)), looped)
    found = captures(recipe)[-1]
    assert found.loop is None or isinstance(found.native, native.Native)


@in_c
@pytest.mark.parametrize("case", every(13, 6))
@pytest.mark.filterwarnings("ignore:compile=True has no effect here")
def test_filters_in_c_are_those_of_the_loop(case: str) -> None:
    recipe = build(**COVER[case])
    x = observations(recipe, 2, LENGTH)
    looped = bounded(recipe, x, NEVER, filtered())
    assert_all_close(bounded(recipe, x, ALWAYS, filtered(compile=True)), looped)
    found = captures(recipe)[-1]
    unknown = any(
        name in case for name in ("categorical", "dmm-flow", "srnn-flow", "mixture-full")
    )
    assert (found.native is None) == unknown
    assert unknown or found.native.loop is not found.loop


@in_c
@pytest.mark.parametrize("loss", [ELBO, IWAE, FIVO])
def test_a_training_in_c_is_that_of_the_loop(loss: Any) -> None:
    """Where the KL has no weight yet, the prior has no gradient, and Adam passes over it."""
    found = []
    for least, compile in ((NEVER, False), (ALWAYS, True)):
        pyro.clear_param_store()
        recipe = build("vrnn")
        bound = loss(num_particles=3, kl_weight=Ramp(0, 1, over=0.5), compile=compile)
        optimiser = pyro.optim.Adam({"lr": 1e-2})
        svi = SVI(recipe.model, recipe.guide, optimiser, bound)
        with captured_from(least):
            fit(svi, [observations(recipe, 2, LENGTH)], steps=6, seed=0, progress=False)
        parts = (recipe.model, recipe.guide)
        found.append({n: p.detach() for part in parts for n, p in part.named_parameters()})
    assert_all_close(found[1], found[0])


@in_c
def test_what_looks_at_distributions_gets_them() -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    looped = bounded(recipe, x, NEVER, ELBO(analytic_kl=True))
    assert_all_close(bounded(recipe, x, ALWAYS, ELBO(analytic_kl=True, compile=True)), looped)

    class Own(ELBO):
        def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
            assert densities.prior is not None
            return super().objective(densities, kl_weight)

    bounded(recipe, x, ALWAYS, Own(compile=True))


@pytest.mark.parametrize("case", every(17, 2))
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
def test_any_number_of_steps_and_padding(length: int, compile: bool) -> None:
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


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=in_c)])
def test_without_gradients_nothing_is_kept_for_them(compile: bool) -> None:
    recipe = build("vrnn")
    x = observations(recipe, 2, LENGTH)
    found = []
    for least in (NEVER, ALWAYS):
        torch.manual_seed(3)
        with captured_from(least), torch.no_grad():
            found.append(
                recipe.model.rollout(recipe.guide, x, None, 2, compile=compile).log_weight
            )
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


def swapped(self: Any, matrix: fx.Node, chosen: list[int]) -> fx.Node:
    """Products are split with the rows of the matrix in reverse order."""
    found: fx.Node = rows_of(self, matrix, chosen)
    turned: fx.Node = self._call(torch.ops.aten.flip.default, found, [0])
    return turned


rows_of, drawn = parts._Split._rows, recurrence.Recurrence._noise
source = native.prelude


def backwards(self: Any, length: int) -> dict[fx.Node, Tensor]:
    """The last step gets the noise of the first."""
    return {node: rows.flip(0) for node, rows in drawn(self, length).items()}


def forgetting(double: bool) -> str:
    """C code of which every product forgets its bias."""
    return source(double).replace("if (add)", "if (0)")


#: where, what, by what, and the options of a rollout in which it is seen
FAULTS: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "sums that forget a step": (loops, "total", forgetful, {}),
    "views one step late": (batched, "over_time", None, {}),
    "products split in another order": (parts._Split, "_rows", swapped, {}),
    "noise in another order": (recurrence.Recurrence, "_noise", backwards, {}),
    "products in C without a bias": (native, "prelude", forgetting, {"compile": True}),
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
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build("vrnn", guide="residual")
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    options = plant(monkeypatch, fault)
    monkeypatch.setattr(scanning, "check", lambda *args: None)
    found = rolled(recipe, x, ALWAYS, **options)
    assert_captured(recipe)
    with pytest.raises(AssertionError):
        assert_all_close(found, looped)


@pytest.mark.parametrize("fault", [name for name in FAULTS if "in C" not in name])
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


# ---- the loop in C ----


@in_c
@pytest.mark.parametrize("case", ["vrnn-conditional-smoothing", "dsae-flow-flow", "srnn-lstm"])
def test_of_large_matrices_only_what_recurs_is_in_c(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence, "_CACHED", 0)
    recipe = ALL[case]()
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)
    (found,) = captures(recipe)
    assert found.native is not None and found.native.loop is found.loop


@in_c
def test_single_precision_is_as_good_in_c() -> None:
    recipe = build("vrnn", guide="smoothing", cell="lstm", activation="silu")
    recipe.model.float()
    recipe.guide.float()
    x = observations(recipe, 7, 40).float()
    exact = {n: t.double() for n, t in rolled(recipe, x, NEVER).items()}
    errors = []
    for compile in (False, True):
        found = rolled(recipe, x, ALWAYS, compile=compile)
        errors.append({n: float((found[n] - exact[n]).abs().max()) for n in exact})
    assert_captured(recipe)
    for name, scale in exact.items():
        assert errors[1][name] <= 4 * errors[0][name] + 1e-6 * float(scale.abs().max()), name


def test_without_a_compiler_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = build("vrnn", h_dim=6)
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recurrence.warn.cache_clear()  # said once for each reason
    with pytest.warns(UserWarning) as said:
        for _ in range(2):
            assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)
    assert_captured(recipe)
    (warning,) = said
    assert str(warning.message).startswith("compile=True has no effect")
    assert "no-such-compiler" in str(warning.message)


@in_c
def test_an_operation_that_c_does_not_know_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = build("vrnn", h_dim=6)
    x = observations(recipe, 2, LENGTH)
    looped = rolled(recipe, x, NEVER)
    monkeypatch.delitem(c_writer.EACH, torch.ops.aten.tanh.default)
    recurrence.warn.cache_clear()
    with pytest.warns(UserWarning, match="aten.tanh.default"):
        assert_all_close(rolled(recipe, x, ALWAYS, compile=True), looped)


@in_c
@pytest.mark.parametrize("double", [False, True])
def test_products_of_any_size_in_c(double: bool) -> None:
    dtype, real = (torch.float64, ctypes.c_double) if double else (torch.float32, ctypes.c_float)
    call = """
void run(long M, long N, long K, REAL *a, REAL *b, REAL *p, REAL *c, long ldc, int add) {
  pack(K, N, b, 1, K, p);
  gemm(M, N, K, a, K, p, c, ldc, add);
}
"""
    library = built(source(double) + call)
    sizes = [(m, n, k) for m in range(1, 26) for n, k in ((1, 1), (5, 33), (31, 1), (64, 17))]
    for m, n, k in sizes:
        a, b, wide = (
            torch.randn(m, k, dtype=dtype),
            torch.randn(n, k, dtype=dtype),
            -(-n // 32) * 32,
        )
        packed, c = torch.zeros(k * wide, dtype=dtype), torch.randn(m, wide, dtype=dtype)
        expected = [(a @ b.t()), c[:, :n] + a @ b.t()]
        for add in (1, 0):
            pointers = [ctypes.cast(t.data_ptr(), ctypes.POINTER(real)) for t in (a, b, packed, c)]
            library.run(*map(ctypes.c_long, (m, n, k)), *pointers, ctypes.c_long(wide), add)
            torch.testing.assert_close(c[:, :n], expected[add], rtol=1e-5, atol=1e-5)


@in_c
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 255, 256, 257, 700])
def test_products_of_all_rows_in_c(rows: int, double: bool) -> None:
    dtype, real = (torch.float64, ctypes.c_double) if double else (torch.float32, ctypes.c_float)
    call = """
void run(long M, long N, long K, REAL *a, REAL *b, REAL *s, REAL *c, long ldc, int add) {
  gram(M, N, K, a, M, 1, b, 1, K, s, c, ldc, add);
}
"""
    library = built(source(double) + call)
    for m, n in ((1, 1), (5, 33), (26, 64)):
        a, b = torch.randn(rows, m, dtype=dtype), torch.randn(n, rows, dtype=dtype)
        wide = -(-n // 32) * 32
        room = torch.zeros(m * GRAM_LEAD + GRAM_ROWS * wide, dtype=dtype)
        c = torch.randn(m, wide, dtype=dtype)
        product = a.t() @ b.t()
        expected = [product, c[:, :n] + product]
        for add in (1, 0):
            pointers = [ctypes.cast(t.data_ptr(), ctypes.POINTER(real)) for t in (a, b, room, c)]
            library.run(*map(ctypes.c_long, (m, n, rows)), *pointers, ctypes.c_long(wide), add)
            torch.testing.assert_close(c[:, :n], expected[add], rtol=1e-4, atol=1e-4)


class Two(torch.nn.Module):
    """Weights of which one is a product, and one sees rows that do not lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(4, 3), torch.nn.Linear(3, 4, bias=False)
        self.some, self.scale = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.ones(4))

    def forward(self, state: Tensor, inputs: Tensor) -> Tensor:
        mixed = inputs @ (self.right.weight @ self.left.weight) + self.scale.exp() * state
        return torch.cat([torch.tanh(self.some(mixed[1:])), mixed[:1] / 4])


@in_c
def test_softplus_is_the_identity_where_torch_takes_it_for_one() -> None:
    inputs = torch.linspace(19.0, 23.0, 20).reshape(20, 1, 1)

    def step(layer: Any, state: Tensor, inputs: Tensor) -> Any:
        state = torch.nn.functional.softplus(inputs + 0 * layer(state))
        return state, {}

    layer = torch.nn.Linear(1, 1)
    path = engine.scan(step, (layer,), torch.zeros(1, 1), inputs, compile=True)
    assert path is not None
    expected = torch.nn.functional.softplus(inputs)
    torch.testing.assert_close(path.states[1:], expected, rtol=1e-13, atol=0.0)


@in_c
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_of_what_all_steps_share(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(recurrence, "_REPEATED", -1)
    torch.manual_seed(0)
    layer, first, inputs = Two(), torch.randn(3, 4), torch.randn(20, 3, 4)
    weights = [*layer.parameters()]

    def step(layer: Two, state: Tensor, inputs: Tensor) -> Any:
        state = layer(state, inputs)
        return state, {"twice": 2 * state}

    for _ in range(2):  # the second time its memory is not blank
        path = engine.scan(step, (layer,), first, inputs, compile=True)
        assert path is not None
        path.states[1:].sum().backward(retain_graph=True)
    state, states = first, []
    for x in inputs:
        state = layer(state, x)
        states.append(state)
    looped = torch.stack(states)
    torch.testing.assert_close(path.outputs["twice"], 2 * looped, rtol=1e-4, atol=1e-5)
    seed = torch.randn(20, 3, 4)
    found, wanted = (
        torch.autograd.grad((seed * made).sum(), weights, allow_unused=True)
        for made in (path.states[1:], looped)
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    (captured,) = engine.captures(layer)
    assert captured is not None and captured.native is not None
    given = {*captured.native.loop.part.inputs}  # weights, or what was made of them
    assert ({*captured.parts.static.inputs} <= given) == whole


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=in_c)])
def test_a_weight_that_is_used_twice_in_a_step(compile: bool) -> None:
    torch.manual_seed(0)
    layer, first, inputs = torch.nn.Linear(3, 3), torch.randn(2, 3), torch.randn(20, 2, 3)

    def step(layer: torch.nn.Linear, state: Tensor, inputs: Tensor) -> Any:
        return torch.tanh(layer(layer(state).sigmoid() + inputs)), {}

    path = engine.scan(step, (layer,), first, inputs, compile=compile)
    assert path is not None
    states = [first]
    for x in inputs:
        states.append(step(layer, states[-1], x)[0])
    seed, weights = torch.randn(20, 2, 3), [*layer.parameters()]
    found, wanted = (
        torch.autograd.grad((seed * made).sum(), weights)
        for made in (path.states[1:], torch.stack(states[1:]))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@in_c
@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("exp_", torch.exp),
        ("sigmoid_", torch.sigmoid),
        ("tanh_", torch.tanh),
        ("softplus_", partial(torch.nn.functional.softplus, threshold=1e9)),
    ],
)
@pytest.mark.parametrize("double", [False, True])
def test_functions_in_c_are_right_to_a_few_units_in_the_last_place(
    name: str, exact: Callable[[Tensor], Tensor], double: bool
) -> None:
    loop = f"EACH for (long i = 0; i < n; i++) y[i] = {name}(x[i]);"
    call = f"void run(long n, REAL *x, REAL *y) {{ {loop} }}"
    dtype = torch.float64 if double else torch.float32
    x = torch.cat([torch.linspace(-110, 95, 100_001), torch.linspace(-1, 1, 100_001)]).to(dtype)
    y = torch.empty_like(x)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    built(source(double) + call).run(ctypes.c_long(len(x)), *pointers)
    expected = exact(x.double())
    normal = (expected.abs() > torch.finfo(dtype).tiny) & (expected < torch.finfo(dtype).max)
    error = ((y.double() - expected) / expected).abs()[normal].max()
    assert error < 4 * torch.finfo(dtype).eps
    edges = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0], dtype=dtype)
    found = torch.empty_like(edges)
    built(source(double) + call).run(
        ctypes.c_long(4), ctypes.c_void_p(edges.data_ptr()), ctypes.c_void_p(found.data_ptr())
    )
    torch.testing.assert_close(found, exact(edges.double()).to(dtype), equal_nan=True)
