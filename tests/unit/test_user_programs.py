"""Our ELBO against Pyro's, same draws, for guides and programs that users write."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from inference import ELBO, FIVO, IWAE, evaluate, fit, seeded, to_arviz
from inference.probes import sequence_codes
from inference.traces import rolls, step_densities
from pyro_avrnn import recipes
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.models import VRNN
from tests.unit.table import prefix_mask

B, T, X, Z, H = 3, 4, 2, 2, 5


def data() -> Tensor:
    return torch.randn(B, T, X, generator=torch.Generator().manual_seed(1))


def library() -> recipes.Recipe:
    with seeded(3):
        return recipes.vrnn(X, Z, H)


def own_guide(x: Tensor, mask: Tensor | None = None) -> None:
    """A function that proposes the latents of a library model."""
    gain = pyro.param("gain", torch.tensor(0.3))
    with pyro.plate("sequences", len(x), dim=-1):
        for t in range(1, x.shape[1] + 1):
            masked = nullmask() if mask is None else poutine.mask(mask=mask[:, t - 1])
            with masked:
                loc = gain * x[:, t - 1].sum(-1, keepdim=True).expand(-1, Z)
                pyro.sample(f"z_{t}", dist.Normal(loc, 0.8).to_event(1))


def nullmask() -> Any:
    return poutine.mask(mask=True)


class OwnGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(X, Z)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        pyro.module("own", self)
        with pyro.plate("sequences", len(x), dim=-1):
            for t in range(1, x.shape[1] + 1):
                masked = nullmask() if mask is None else poutine.mask(mask=mask[:, t - 1])
                with masked:
                    q = dist.Normal(self.linear(x[:, t - 1]), 0.6).to_event(1)
                    pyro.sample(f"z_{t}", q)


def chain(name: Callable[[str, int], str], total: int | None = None) -> tuple[Any, Any]:
    """A program without the library, its sites named by ``name(letter, t)``."""

    def plate(x: Tensor) -> Any:
        return pyro.plate("sequences", total or len(x), subsample=torch.arange(len(x)), dim=-1)

    def model(x: Tensor, mask: Tensor | None = None) -> None:
        with plate(x):
            z = torch.zeros(len(x), 1)
            for t in range(1, x.shape[1] + 1):
                z = pyro.sample(name("z", t), dist.Normal(0.5 * z, 1.0).to_event(1))
                pyro.sample(name("x", t), dist.Normal(z, 0.7).to_event(1), obs=x[:, t - 1, :1])

    def guide(x: Tensor, mask: Tensor | None = None) -> None:
        gain = pyro.param("gain", torch.tensor(0.4))
        with plate(x):
            for t in range(1, x.shape[1] + 1):
                q = dist.Normal(gain * x[:, t - 1, :1], 0.9).to_event(1)
                pyro.sample(name("z", t), q)

    return model, guide


def with_deterministic() -> tuple[Any, Any]:
    model, guide = chain(lambda letter, t: f"{letter}_{t}")

    def further(x: Tensor, mask: Tensor | None = None) -> None:
        model(x, mask)
        pyro.deterministic("summary", x.sum(dim=(1, 2)))

    return further, guide


def conditioned() -> tuple[Any, Any]:
    model, guide = chain(lambda letter, t: f"{letter}_{t}")
    given = poutine.condition(model, data={"z_2": torch.full((B, 1), 0.3)})
    return given, poutine.block(guide, hide=["z_2"])


def bayesian() -> tuple[Any, Any]:
    model = library().model
    pyro.nn.module.to_pyro_module_(model)
    net = model.decoder.net[0]
    net.bias = PyroSample(dist.Normal(0.0, 1.0).expand([net.out_features]).to_event(1))
    return model, AutoNormal(model)


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "function": lambda: (library().model, own_guide),
    "module": lambda: (library().model, OwnGuide()),
    "autonormal": lambda: (m := library().model, AutoNormal(m)),
    "blocked": lambda: (library().model, poutine.block(library().guide, hide=["nothing"])),
    "scaled": lambda: (
        poutine.scale(library().model, 0.1),
        poutine.scale(library().guide, 0.1),
    ),
    "conditioned": conditioned,
    "bayesian weights": bayesian,
    "deterministic": with_deterministic,
    "subsampled": lambda: chain(lambda letter, t: f"{letter}_{t}", total=30),
    "z_t": lambda: chain(lambda letter, t: f"{letter}_{t}"),
    "zt": lambda: chain(lambda letter, t: f"{letter}{t}"),
    "stept_z": lambda: chain(lambda letter, t: f"step{t}_{letter}"),
    "z_0t": lambda: chain(lambda letter, t: f"{letter}_{t:02d}"),
}


def both(model: Any, guide: Any, *args: Any, ours: Any = None, theirs: Any = None) -> Any:
    """Losses with the same draws, after a call that registers parameters."""
    with seeded(0):
        (theirs or Trace_ELBO()).differentiable_loss(model, guide, *args)
    with seeded(7):
        one = (ours or ELBO())(model, guide, *args)
    with seeded(7):
        other = (theirs or Trace_ELBO()).differentiable_loss(model, guide, *args)
    return one, other


@pytest.mark.parametrize("case", CASES)
def test_our_elbo_is_pyros(case: str) -> None:
    model, guide = CASES[case]()
    one, other = both(model, guide, data())
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    named = dict(pyro.get_param_store().named_parameters())
    found = [
        torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in (one, other)
    ]
    assert any(g is not None and g.any() for g in found[0])
    for name, a, b in zip(named, *found, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


def test_the_comparison_sees_a_scale_that_is_ignored() -> None:
    r = library()
    one, other = both(r.model, r.guide, data())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one, 0.1 * other)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace. is deprecated:DeprecationWarning")
def test_a_jit_trace_which_would_keep_its_first_mask_is_refused() -> None:
    r, x = library(), data()
    loss = JitTrace_ELBO(ignore_jit_warnings=True)
    with pytest.raises(NotImplementedError, match="mask and length of its first batch"):
        loss.loss_and_grads(r.model, r.guide, x, prefix_mask((T, T, 2)))


def test_handlers_around_a_loss_are_honoured() -> None:
    r, x = library(), data()
    plain, _ = both(r.model, r.guide, x)
    with poutine.scale(scale=0.1), seeded(7):
        scaled = ELBO()(r.model, r.guide, x)
    torch.testing.assert_close(scaled, 0.1 * plain, rtol=1e-10, atol=0)
    assert rolls(r.model, r.guide)
    with poutine.scale(scale=0.1):
        assert not rolls(r.model, r.guide)


@pytest.mark.parametrize("loss", [ELBO, IWAE])
def test_the_scale_of_a_subsampled_plate_multiplies_the_loss_and_no_weight(loss: Any) -> None:
    found = []
    for case in ("subsampled", "z_t"):  # 3 of 30 sequences, and 3 of 3
        with seeded(7):
            found.append(loss(num_particles=5)(*CASES[case](), data()))
    torch.testing.assert_close(found[0], 10.0 * found[1], rtol=1e-10, atol=0)


def test_a_guide_that_draws_all_latents_at_once_is_refused_in_a_sentence() -> None:
    model = library().model
    guide = AutoLowRankMultivariateNormal(model)
    with pytest.raises(NotImplementedError, match="step densities need one plate over the"):
        ELBO()(model, guide, data())


def test_bayesian_weights_need_a_guide_that_proposes_them() -> None:
    model, _ = bayesian()
    assert isinstance(PyroModule[VRNN], type)
    with pytest.raises(ValueError, match=r"does not propose the model's latent 'decoder\.net\.0"):
        ELBO()(model, FilteringGuide(model), data())


@pytest.mark.parametrize("case", ["function", "module", "autonormal"])
def test_a_users_guide_of_a_library_model_is_scored_trained_and_looked_at(case: str) -> None:
    model, guide = CASES[case]()
    x, mask = data(), prefix_mask((4, 2, 3))
    if case == "autonormal":
        mask = torch.ones(B, T, dtype=torch.bool)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
    history = fit(svi, [(x, mask)], steps=3, validation=(x, mask), seed=0, progress=False)
    assert history.best_step > 0
    found = evaluate(model, guide, x, mask, num_particles=30, train=(x, mask))
    assert found.iwae_per_frame >= found.elbo_per_frame
    assert found.information_at_most is None  # which needs the model's state
    assert sequence_codes(model, guide, x, mask).z.shape == (B, Z)
    if case != "autonormal":  # whose parameters are those of three series
        assert to_arviz(model, guide, x[0], draws=4).posterior["z"].shape == (1, 4, T, Z)
    with pytest.raises(TypeError, match="guide must have the stepwise functions encode, proposal"):
        FIVO(num_particles=2)(model, guide, x, mask)


def test_sites_that_are_no_data_do_not_widen_it() -> None:
    model, guide = CASES["deterministic"]()
    assert step_densities(model, guide, data()).x.shape[-1] == 1


@pytest.mark.parametrize("case", ["zt", "stept_z", "z_0t"])
def test_steps_are_found_however_sites_are_named(case: str) -> None:
    model, guide = CASES[case]()
    assert step_densities(model, guide, data(), num_particles=2).z.shape == (T, 2, B, 1)
    found = evaluate(model, guide, data(), num_particles=30)
    assert found.active_units is not None and found.active_units <= 1


@pytest.mark.parametrize("padding", [torch.nan, 1e300])
def test_padding_of_a_plain_program_is_overwritten(padding: float) -> None:
    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            for t in range(1, x.shape[1] + 1):
                with poutine.mask(mask=mask[:, t - 1]):
                    z = pyro.sample(f"z_{t}", dist.Normal(torch.zeros(len(x), Z), 1.0).to_event(1))
                    emission = dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1)
                    pyro.sample(f"x_{t}", emission, obs=x[:, t - 1, :1])

    x, mask = data(), prefix_mask((4, 2, 3))
    padded = x.where(mask[..., None], padding)
    for score in (
        lambda x: evaluate(model, own_guide, x, mask, num_particles=5).as_dict(),
        lambda x: sequence_codes(model, own_guide, x, mask).z.tolist(),
    ):
        assert score(padded) == score(x)


def test_pyros_module_form() -> None:
    r, x = library(), data()
    module = ELBO()(r.model, r.guide)
    assert {id(p) for p in module.parameters()} >= {id(p) for p in r.guide.parameters()}
    with seeded(7):
        one = module(x)
    with seeded(7):
        other = ELBO()(r.model, r.guide, x)
    assert torch.equal(one, other)


def test_the_scale_of_a_subsampled_plate_multiplies_penalties_too() -> None:
    class Distance:
        weight, name = 0.4, "distance"

        def penalty(self, densities: Any) -> Tensor:
            return densities.z.square().mean()

    found = []
    for case in ("subsampled", "z_t"):  # 3 of 30 sequences, and 3 of 3
        with seeded(7):
            found.append(ELBO(penalties=[Distance()])(*CASES[case](), data()))
    torch.testing.assert_close(found[0], 10.0 * found[1], rtol=1e-10, atol=0)
