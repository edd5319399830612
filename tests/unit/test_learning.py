"""The learning check: the end of a training, dead units, and gradients by part."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from inference import ELBO, Records, dead_units, fit, rise, scales_at_floor, still_rising, training
from inference.updates import svi_step
from pyro_avrnn import recipes
from pyro_avrnn.guides import GUIDES
from tests.unit.table import prefix_mask

X_DIM, Z_DIM, H_DIM = 3, 2, 8
LENGTHS = (7, 3, 5, 7)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(len(LENGTHS), max(LENGTHS), X_DIM, generator=torch.Generator().manual_seed(3))
    return x, prefix_mask(LENGTHS)


def rows(*bounds: tuple[float, float]) -> list[dict[str, float]]:
    """Metrics with a validation at each of these steps, and steps without one between them."""
    made: list[dict[str, float]] = [{"step": 1, "loss": 3.0}]
    for step, bound in bounds:
        made += [{"step": step - 1, "loss": 2.0}, {"step": step, "validation_bound": bound}]
    return made


# ---- the end of a training ----


@pytest.mark.parametrize(
    ("bounds", "gained", "rising"),
    [
        (((20, -5.0), (80, 2.0), (100, 2.5)), 0.5, True),
        (((20, -5.0), (80, 2.0), (81, 2.5), (100, 1.0)), 0.5, True),  # the best, not the last
        (((20, -5.0), (79, 1.0), (80, 2.0), (85, 1.9), (100, 1.8)), 0.0, False),  # it fell
        (((20, 4.0), (80, 2.0), (100, 3.0)), 0.0, False),  # the best was long before
        (((20, 0.0), (80, 99.0), (100, 100.0)), 1.0, False),  # a hundredth of all that was gained
        (((20, 0.0), (80, 98.9), (100, 100.0)), 1.1, True),
        (((20, 1.0), (80, 1.0), (100, 1.0)), 0.0, False),
        (((20, -math.inf), (80, 2.0), (90, math.nan), (100, 3.0)), 1.0, True),
        (((25, 1.0), (75, 2.0), (76, 7.0), (95, 8.0)), 1.0, True),  # a fifth of 95 steps
    ],
)
def test_the_last_fifth_is_what_the_best_bound_gained_in_it(
    bounds: tuple[tuple[float, float], ...], gained: float, rising: bool
) -> None:
    assert rise(rows(*bounds)) == pytest.approx(gained, rel=1e-12)
    assert still_rising(rows(*bounds)) == rising
    assert not still_rising(rows(*bounds), share=1.0)  # nobody gains more than all


@pytest.mark.parametrize("bounds", [(), ((100, 2.0),), ((40, -math.inf), (100, 2.0))])
def test_without_an_earlier_validation_nobody_knows(
    bounds: tuple[tuple[float, float], ...],
) -> None:
    assert math.isnan(rise(rows(*bounds)))
    assert still_rising(rows(*bounds))  # it was not shown to have ended


# ---- dead units ----


def activations(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.ReLU, nn.SiLU))]


def hidden(module: nn.Module) -> nn.Linear:
    """The layer before the one activation of a part."""
    (layer, *_) = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(activations(module)) == 1 and layer.out_features == H_DIM
    return layer


def vrnn(activation: str, **parts: Any) -> recipes.Recipe:
    """A VRNN no ReLU of which is dead but by a test's own doing."""
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM, activation=activation, **parts)
    for root in (recipe.model, recipe.guide):
        for m in root.modules():
            if isinstance(m, nn.Linear):
                nn.init.constant_(m.bias, 2.0)
    return recipe


def test_planted_dead_units_are_counted_by_part() -> None:
    recipe, planted = vrnn("relu"), {"guide": [0, 3, 7], "prior": [2], "decoder": [1, 4]}
    parts = {"guide": recipe.guide, "prior": recipe.model.prior, "decoder": recipe.model.decoder}
    alive = dead_units(recipe.model, recipe.guide, *batch())
    assert alive == dict.fromkeys((*parts, "encode_x", "encode_z"), (0, H_DIM))
    for part, units in planted.items():
        with torch.no_grad():
            hidden(parts[part]).bias[units] = -1e6
    found = dead_units(recipe.model, recipe.guide, *batch())
    assert found == alive | {part: (len(units), H_DIM) for part, units in planted.items()}
    # with a mask or without: padding counts as a frame
    assert dead_units(recipe.model, recipe.guide, batch()[0]) == found


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if "pixelcnn" not in name])
def test_smooth_units_live_in_every_model(name: str) -> None:
    sizes = {"x_dim": X_DIM, "h_dim": H_DIM} | ({} if name == "rnn" else {"z_dim": Z_DIM})
    recipe = recipes.RECIPES[name](**sizes, activation="silu")
    found = dead_units(recipe.model, recipe.guide, *batch())
    assert all(dead == 0 for dead, _ in found.values())
    seen = sum(units for _, units in found.values())
    # a guide borrows the encoder of x, which is the model's and counts once
    layers = len(activations(recipe.model)) + len(activations(recipe.guide))
    assert seen == layers * H_DIM and {"encode_x", "decoder"} <= found.keys()


@pytest.mark.parametrize("guide", GUIDES)
def test_smooth_units_live_in_every_guide(guide: str) -> None:
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM, guide=guide, activation="silu")
    dead, units = dead_units(recipe.model, recipe.guide, *batch())["guide"]
    assert dead == 0 and units >= H_DIM


@pytest.mark.parametrize("training", [True, False])
def test_a_look_leaves_everything_as_it_was(training: bool) -> None:
    recipe = vrnn("relu", dropout=0.5)
    pair = (recipe.model.train(training), recipe.guide.train(not training))
    before, parameters = torch.get_rng_state(), [p.clone() for p in recipe.model.parameters()]
    found = dead_units(*pair, *batch())
    assert found == dead_units(*pair, *batch())  # the same draws
    assert torch.equal(torch.get_rng_state(), before)
    for program, mode in zip(pair, (training, not training), strict=True):
        for module in program.modules():
            assert module.training == mode and not module._forward_hooks
    for before_it, p in zip(parameters, recipe.model.parameters(), strict=True):
        assert torch.equal(before_it, p) and p.grad is None


def nothing(x: Tensor, mask: Tensor | None = None) -> None:
    pass


class Own(nn.Module):
    """A user's program: one activation for all layers and calls, with what it is shown here."""

    def __init__(self, *shown: Any, model: bool = True) -> None:
        super().__init__()
        self.act, self.model, self.looks = nn.ReLU(), model, list[bool]()
        self.shown = [torch.tensor(values) for values in shown]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.looks.append(self.training or torch.is_grad_enabled())
        for tensor in self.shown:
            self.act(tensor)
        if self.model:
            with pyro.plate("sequences", len(x), dim=-1):
                pyro.sample("x_1", dist.Normal(x.new_zeros(X_DIM), 1.0).to_event(1), obs=x[:, 0])


@pytest.mark.parametrize(
    ("shown", "dead"),
    [
        ([[[1.0, 2.0]], [[1.0, 3.0]]], 1),  # constant in each call, but not the same in both
        ([[[0.0, 2.0], [1.0, 2.0]], [[1.0, 2.0]]], 1),  # alive in the first call alone
        ([[[1.0, 2.0]], [[0.0, 2.0], [1.0, 2.0]]], 1),  # in the last alone
        ([[[-1.0, -2.0], [-3.0, -4.0]]], 2),  # a ReLU gives nothing of all these
        ([[[1.0, 0.0], [2.0, 1.0]], [[3.0] * 3, [3.0, 3.0, 4.0]]], 2),  # layers of two widths
        ([[1.0, 2.0], [1.0, 3.0]], 1),  # no batch at all
    ],
)
def test_all_calls_of_a_module_decide_about_a_unit(shown: list[Any], dead: int) -> None:
    model, guide, x = Own(*shown), Own(*shown, model=False), batch()[0]
    units = sum({tensor.shape[-1] for tensor in model.shown})
    assert dead_units(model, nothing, x) == {"act": (dead, units)}
    # the guide is a part of its own, whatever it is made of
    assert dead_units(model, guide, x) == {"act": (dead, units), "guide": (dead, units)}
    assert not any([*model.looks, *guide.looks])  # in evaluation mode


def test_a_program_that_fails_is_left_without_hooks() -> None:
    model, guide = Own([[1.0]]), Own([[1.0]])
    with pytest.raises(ValueError, match="the guide observes data"):
        dead_units(model, guide, batch()[0])
    assert not model.act._forward_hooks and not guide.act._forward_hooks and model.training


def test_plain_functions_show_no_units() -> None:
    assert dead_units(Own().forward, nothing, batch()[0]) == {}
    with pytest.raises(TypeError, match=r"x must be a tensor \(B, T, X\)"):
        dead_units(Own(), nothing, [1.0])  # type: ignore[arg-type]


# ---- scales at their floor ----


@pytest.mark.parametrize("emission", ["normal", "mixture"])
def test_scales_at_their_floor_are_counted_over_observed_frames(emission: str) -> None:
    """Independent: the scales of the emission at the states that a rollout visited."""
    recipe, (x, mask) = recipes.vrnn(X_DIM, Z_DIM, H_DIM, emission), batch()
    x, observed = x.masked_fill(~mask[..., None], 0.0), scales(recipe, x, mask)
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        floor = float(observed.quantile(share)) / 1.1 + 1e-9  # so many are within a tenth of it
        found = scales_at_floor(recipe.model, recipe.guide, x, mask, floor=floor)
        assert found == pytest.approx(share, abs=1.5 / len(observed))
        counted = (observed <= 1.1 * floor).double().mean()
        assert found == pytest.approx(float(counted), rel=1e-12)
    assert scales_at_floor(recipe.model, recipe.guide, x, mask, floor=1e3) == 1.0
    assert scales_at_floor(recipe.model, recipe.guide, x, mask, floor=1e-9) == 0.0


def scales(recipe: recipes.Recipe, x: Tensor, mask: Tensor) -> Tensor:
    """Of the emission, of observed frames alone, with the draws of seed 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, mask)
        emission: Any = recipe.model.emission(d.z, d.states)
    normal = getattr(emission, "component_distribution", emission).base_dist
    return normal.scale.squeeze(1)[mask.T].flatten()


@pytest.mark.parametrize("emission", ["bernoulli", "logistic", "autoregressive"])
def test_other_emissions_have_no_floor(emission: str) -> None:
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM, emission)
    x = torch.full((2, 3, X_DIM), 2.0**-16) if emission == "logistic" else torch.ones(2, 3, X_DIM)
    assert scales_at_floor(recipe.model, recipe.guide, x, floor=1e3) is None


# ---- gradients by part ----


def of_parts(row: dict[str, float]) -> dict[str, float]:
    start = "gradient_norm_"
    return {name.removeprefix(start): v for name, v in row.items() if name.startswith(start)}


def test_norms_of_parts_are_those_of_the_gradient_a_frame() -> None:
    recipe, (x, mask) = recipes.vrnn(X_DIM, Z_DIM, H_DIM), batch()
    torch.manual_seed(0)
    ELBO()(recipe.model, recipe.guide, x, mask).backward()
    expected: dict[str, float] = {}
    for root, name in ((recipe.model, None), (recipe.guide, "guide")):
        for path, p in root.named_parameters():
            part = name or path.split(".")[0]
            assert p.grad is not None
            expected[part] = expected.get(part, 0.0) + float(p.grad.square().sum())
            p.grad = None
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
    (row,) = fit(svi, [(x, mask)], steps=1, seed=0, progress=False, clip_norm=1e-3).rows
    frames = sum(LENGTHS)
    assert of_parts(row) == pytest.approx(
        {part: math.sqrt(square) / frames for part, square in expected.items()}, rel=1e-10
    )
    whole = math.sqrt(sum(expected.values())) / frames  # before it is clipped, as are its parts
    assert row["gradient_norm"] == pytest.approx(whole, rel=1e-10) and whole > 1e-3


def test_norms_of_parts_stand_in_recorded_steps_and_add_up() -> None:
    recipe, seen = recipes.vrnn(X_DIM, Z_DIM, H_DIM), []
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())

    def step(*args: Any, by_part: bool, **given: Any) -> dict[str, float]:
        row = svi_step(*args, by_part=by_part, **given)
        seen.append(bool(of_parts(row)))
        assert seen[-1] == by_part
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "svi_step", step)
        history = fit(svi, [batch()], steps=7, progress=False, records=Records(every=3))
    assert [row["step"] for row in history.rows] == [1, 3, 6, 7]
    assert seen == [True, False, True, False, False, True, True]  # the others pay nothing
    for row in history.rows:
        squares = sum(norm**2 for norm in of_parts(row).values())
        assert squares == pytest.approx(row["gradient_norm"] ** 2, rel=1e-10)
        assert of_parts(row).keys() >= {"guide", "prior", "decoder", "cell"}


def plain_model(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(1.0))
    with pyro.plate("sequences", len(x), dim=-1):
        pyro.sample("x_1", dist.Normal(loc, 1.0), obs=x[:, 0, 0])
        pyro.sample(
            "y_1", dist.Normal(pyro.param("other", torch.tensor(-2.0)), 1.0), obs=x[:, 0, 1]
        )


def test_parameters_of_a_plain_program_are_parts_of_their_own() -> None:
    x = batch()[0]
    svi = SVI(plain_model, nothing, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    (row,) = fit(svi, [(x,)], steps=1, progress=False).rows
    frames = x.shape[0] * x.shape[1]
    expected = {
        "loc": float((1.0 - x[:, 0, 0]).sum().abs()) / frames,
        "other": float((-2.0 - x[:, 0, 1]).sum().abs()) / frames,
    }
    assert of_parts(row) == pytest.approx(expected, rel=1e-10)
    squares = sum(norm**2 for norm in expected.values())
    assert row["gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-10)
