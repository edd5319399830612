"""Training and evaluation mode: who is in which, that both end, and what dropout makes of them."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from inference import (
    ELBO,
    FIVO,
    NonFiniteLossError,
    Validation,
    evaluate,
    fit,
    rate_split,
    seeded,
    sequence_codes,
    to_arviz,
)
from inference.modes import evaluating, learning
from pyro_avrnn import recipes
from pyro_avrnn.networks import MLP
from pyro_avrnn.recipes import Recipe
from tests.unit.table import X, Z, assert_close, parameters, prefix_mask

LENGTHS = (4, 2, 3, 1, 4)
H = 12
MAKERS: dict[str, Callable[..., Recipe]] = {
    "rnn": lambda **options: recipes.rnn(X, H, **options),
    "vrnn": lambda **options: recipes.vrnn(X, Z, H, **options),
    "residual": lambda **options: recipes.vrnn(X, Z, H, guide="residual", **options),
    "avrnn": lambda **options: recipes.avrnn(X, Z, H, **options),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(len(LENGTHS), max(LENGTHS), X, generator=torch.Generator().manual_seed(2))
    return x, prefix_mask(LENGTHS)


def in_mode(training: bool, recipe: Recipe) -> Recipe:
    recipe.model.train(training)
    recipe.guide.train(training)
    return recipe


def scored(recipe: Recipe, seed: int = 0, **options: Any) -> Any:
    with seeded(seed), torch.no_grad():
        return recipe.model.rollout(recipe.guide, *batch(), **options)


# ---- who is in which mode ----


class Watch:
    """Modes of a part of the model and of the guide whenever they are called."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.seen = recipe, list[Any]()
        guide: Any = recipe.guide
        for part in (recipe.model.encode_x, guide.network):
            part.register_forward_pre_hook(lambda part, _: self.note(part.training))

    def note(self, mark: Any) -> None:
        if not self.seen or self.seen[-1] != mark:
            self.seen.append(mark)

    def hook(self, model: nn.Module, guide: nn.Module, *_: Any) -> dict[str, float]:
        assert model.training and guide.training
        self.note("hook")
        return {}

    def score(self) -> float:
        assert not self.recipe.model.training and not self.recipe.guide.training
        return float(scored(self.recipe).log_weight.sum())


def mixed(recipe: Recipe) -> list[bool]:
    """Modes as a person may have left them: one part of a module in another than the module."""
    recipe.model.eval()
    recipe.model.prior.train()
    recipe.guide.train()
    return modes(recipe)


def modes(recipe: Recipe) -> list[bool]:
    return [part.training for m in (recipe.model, recipe.guide) for part in m.modules()]


def trained(recipe: Recipe, loss: Any = None, **options: Any) -> Any:
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-2}), loss or ELBO())
    options = {"steps": 4, "seed": 0, "progress": False} | options
    if "validation" in options:
        options["validation"] = Validation(options["validation"], every=2)
    return fit(svi, [batch()], **options)


@pytest.mark.parametrize("own", [False, True], ids=["batch", "function"])
def test_fit_steps_in_training_mode_and_validates_in_evaluation_mode(own: bool) -> None:
    recipe = MAKERS["vrnn"](dropout=0.2)
    before, watch = mixed(recipe), Watch(recipe)
    history = trained(recipe, hooks=[watch.hook], validation=watch.score if own else batch())
    assert watch.seen == [True, "hook", True, "hook", False] * 2
    assert modes(recipe) == before and len(set(before)) == 2
    assert history.best_step > 0


class Broken:
    """A loss that is not finite at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return ELBO()(*args) * (torch.nan if self.calls == 3 else 1.0)


def raising(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss": Broken()}, NonFiniteLossError),
        ({"hooks": [raising]}, KeyboardInterrupt),
        ({"validation": raising}, KeyboardInterrupt),
        ({"progress": raising}, KeyboardInterrupt),
    ],
    ids=["loss", "hook", "validation", "progress"],
)
def test_fit_restores_modes_after_an_exception_too(
    options: dict[str, Any], error: type[BaseException]
) -> None:
    recipe = MAKERS["vrnn"](dropout=0.2)
    before = mixed(recipe)
    with pytest.raises(error):
        trained(recipe, **options)
    assert modes(recipe) == before


def test_evaluate_is_in_evaluation_mode_and_restores_the_others() -> None:
    recipe = MAKERS["vrnn"](dropout=0.5)
    x, mask = batch()
    given: dict[str, Any] = {"num_particles": 5, "fivo_particles": 3, "train": (x, mask)}
    before, watch = mixed(recipe), Watch(recipe)
    found = evaluate(recipe.model, recipe.guide, x, mask, **given)
    assert watch.seen == [False] and modes(recipe) == before
    in_mode(False, recipe)
    assert evaluate(recipe.model, recipe.guide, x, mask, **given) == found
    mixed(recipe)
    with pytest.raises(ValueError, match="x must have shape"):
        evaluate(recipe.model, recipe.guide, x[..., :1], mask)
    assert modes(recipe) == before


def test_codes_are_of_evaluation_mode_and_leave_the_others() -> None:
    recipe = MAKERS["vrnn"](dropout=0.5)
    before, watch = mixed(recipe), Watch(recipe)
    found = sequence_codes(recipe.model, recipe.guide, *batch())
    assert watch.seen == [False] and modes(recipe) == before
    again = sequence_codes(in_mode(False, recipe).model, recipe.guide, *batch())
    assert torch.equal(found.z, again.z) and torch.equal(found.z_draw, again.z_draw)


def test_the_rate_split_is_of_evaluation_mode_and_leaves_the_others() -> None:
    recipe = MAKERS["vrnn"](dropout=0.5)
    before, watch = mixed(recipe), Watch(recipe)
    found = rate_split(recipe.model, recipe.guide, batch(), batch(), steps=2)
    assert watch.seen == [False] and modes(recipe) == before
    in_mode(False, recipe)
    assert rate_split(recipe.model, recipe.guide, batch(), batch(), steps=2) == found


def test_draws_for_arviz_are_of_evaluation_mode_and_leave_the_others() -> None:
    recipe = MAKERS["vrnn"](dropout=0.5)
    before, watch = mixed(recipe), Watch(recipe)
    found = to_arviz(recipe.model, recipe.guide, batch()[0][0], draws=3)
    assert watch.seen == [False] and modes(recipe) == before
    again = to_arviz(in_mode(False, recipe).model, recipe.guide, batch()[0][0], draws=3)
    for group in ("posterior", "prior_predictive", "sample_stats"):
        assert found[group].equals(again[group])


def test_recurrent_layers_stay_in_training_mode_if_that_makes_no_difference() -> None:
    layers = nn.ModuleList([nn.GRU(2, 3), nn.LSTM(2, 3, num_layers=2, dropout=0.5), nn.Dropout()])
    layers[1].eval()
    with evaluating(layers):
        assert [part.training for part in layers] == [True, False, False]
        with learning(layers):
            assert all(part.training for part in layers)
        assert [part.training for part in layers] == [True, False, False]
    assert [part.training for part in layers] == [True, False, True]


# ---- dropout ----


def test_dropout_hides_its_share_of_features_and_scales_up_the_others() -> None:
    count, share = 100_000, 0.3
    net = MLP([count, 1], dropout=share)
    seen: list[Tensor] = []
    net[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net(torch.ones(count))
        net.eval()(torch.ones(count))
    hidden = seen[0] == 0.0
    error = (share * (1.0 - share) / count) ** 0.5
    assert abs(hidden.double().mean().item() - share) < 5 * error
    assert abs(hidden.double().mean().item() - 0.31) > 5 * error  # the twin
    torch.testing.assert_close(seen[0][~hidden], torch.ones(int((~hidden).sum())) / (1.0 - share))
    assert torch.equal(seen[1], torch.ones(count))


@every_maker
def test_dropout_changes_nothing_in_evaluation_mode(make: Callable[..., Recipe]) -> None:
    found = []
    for dropout in (0.0, 0.5):
        with seeded(1):
            found.append(in_mode(False, make(dropout=dropout)))
    plain, dropped = map(parameters, found)
    # names and initial values do not depend on it either, so files fit both
    assert plain.keys() == dropped.keys()
    assert all(torch.equal(plain[name], dropped[name]) for name in plain)
    a, b = (scored(recipe, num_particles=4) for recipe in found)
    for name in ("z", "log_prior", "log_emission", "log_proposal"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    found[1].model.load_state_dict(found[0].model.state_dict())


@every_maker
def test_dropout_changes_what_is_drawn_and_scored_in_training_mode(
    make: Callable[..., Recipe],
) -> None:
    recipe = make(dropout=0.5)
    at_rest, training = (scored(in_mode(mode, recipe)) for mode in (False, True))
    again, other = scored(recipe), scored(recipe, seed=1)
    assert torch.equal(training.log_weight, again.log_weight)
    for name in ("z", "log_emission") if recipe.model.z_dim else ("log_emission",):
        values = [getattr(d, name) for d in (at_rest, training, other)]
        assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    with seeded(1):
        plain = in_mode(True, make())
    a = scored(plain)
    assert torch.equal(a.log_weight, scored(in_mode(False, plain)).log_weight)


@every_maker
def test_with_dropout_at_rest_the_loop_equals_the_rollout(make: Callable[..., Recipe]) -> None:
    recipe, (x, mask) = in_mode(False, make(dropout=0.5)), batch()

    def logs() -> dict[str, Tensor]:
        guide = poutine.trace(recipe.guide).get_trace(x, mask)
        model = poutine.trace(poutine.replay(recipe.model, guide)).get_trace(x, mask)
        guide.compute_log_prob()
        model.compute_log_prob()
        pairs = {"log_emission": (model, "x"), "log_prior": (model, "z")}
        return {
            name: torch.stack([trace.nodes[f"{site}_{t}"]["log_prob"] for t in range(1, 5)])
            for name, (trace, site) in (pairs | {"log_proposal": (guide, "z")}).items()
            if site == "x" or recipe.model.z_dim
        }

    with seeded(0), torch.no_grad():
        looped = logs()
    rolled = scored(recipe)
    for name, value in looped.items():
        assert_close(getattr(rolled, name)[:, 0], value, name)
    in_mode(True, recipe)  # the twin: masks of dropout are drawn, and differ
    with seeded(0), torch.no_grad():
        assert not torch.allclose(logs()["log_emission"], looped["log_emission"])


@pytest.mark.parametrize("loss", [ELBO, FIVO])
def test_a_recipe_with_dropout_is_trained(loss: type) -> None:
    found = []
    for dropout in (0.0, 0.4, 0.4):
        pyro.clear_param_store()
        with seeded(1):
            recipe = MAKERS["vrnn"](dropout=dropout)
        history = trained(recipe, loss(), validation=batch())
        found.append((history.rows[0]["loss"], history.best_bound))
    assert found[1] == found[2]  # the seed is that of dropout, too
    assert all(a != b for a, b in zip(*found[:2], strict=True))


@every_maker
def test_a_file_keeps_dropout(make: Callable[..., Recipe], tmp_path: Any) -> None:
    path = tmp_path / "parameters.pt"
    recipe = make(dropout=0.25)
    recipes.save(recipe, path)
    loaded = recipes.load(path)
    assert loaded.config == recipe.config and loaded.config["dropout"] == 0.25
    assert loaded.model.encode_x.dropout == 0.25
    assert torch.equal(scored(loaded).log_weight, scored(recipe).log_weight)
    # a file from before there was any
    content = torch.load(path, weights_only=True)
    del content["recipe"]["dropout"]
    torch.save(content, path)
    assert recipes.load(path).model.encode_x.dropout == 0.0


@every_maker
@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_named(make: Callable[..., Recipe], dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"^dropout must be in \[0, 1\), got {dropout}$"):
        make(dropout=dropout)
