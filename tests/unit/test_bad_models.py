"""Bad input to models and recipes: refused with a sentence that names the way out."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_avrnn import recipes
from pyro_avrnn.critics import FeedForwardCritic, context_dim
from pyro_avrnn.recipes import Recipe

B, T, X, Z, H = 2, 4, 3, 2, 5
RECIPES: dict[str, Callable[..., Recipe]] = {
    "rnn": lambda **options: recipes.rnn(X, H, **options),
    "vrnn": lambda **options: recipes.vrnn(X, Z, H, **options),
    "avrnn": lambda **options: recipes.avrnn(X, Z, H, critic_dim=4, **options),
}


def call_model(recipe: Recipe, *args: Any) -> Any:
    return recipe.model(*args)


def call_guide(recipe: Recipe, *args: Any) -> Any:
    return recipe.guide(*args)


def call_rollout(recipe: Recipe, *args: Any) -> Any:
    return recipe.model.rollout(recipe.guide, *args)


# every door through which data enter
everywhere = pytest.mark.parametrize("call", [call_model, call_guide, call_rollout])
with_and_without_latents = pytest.mark.parametrize("name", ["rnn", "vrnn"])


@everywhere
@with_and_without_latents
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((T, X), r"x must have shape \(B, T, 3\), got \(4, 3\); add the batch dimension"),
        ((X,), r"x must have shape \(B, T, 3\), got \(3,\)"),
        ((1, B, T, X), r"x must have shape \(B, T, 3\), got \(1, 2, 4, 3\)"),
        ((B, T, X + 1), r"x must have shape \(B, T, 3\), got \(2, 4, 4\)"),
        ((B, T, 0), r"x must have shape \(B, T, 3\), got \(2, 4, 0\)"),
        ((0, T, X), "at least one sequence and one step"),
        ((B, 0, X), "at least one sequence and one step"),
    ],
)
def test_x_of_another_shape(
    call: Callable[..., Any], name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(RECIPES[name](), torch.zeros(shape))


@everywhere
@with_and_without_latents
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_x_that_is_not_finite_names_sequence_and_frame(
    call: Callable[..., Any], name: str, value: float
) -> None:
    x = torch.zeros(B, T, X)
    x[1, 2:, 0] = value  # frame 3 is padding under the mask
    message = f"finite.*got {value:g} at sequence 1, frame 2, feature 0"
    for mask in (None, torch.tensor([[True] * T, [True, True, True, False]])):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match=message):
            call(RECIPES[name](), x, mask)


@everywhere
@with_and_without_latents
@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, torch.nan])
def test_x_outside_the_support_of_a_bernoulli(
    call: Callable[..., Any], name: str, value: float
) -> None:
    x = torch.ones(B, T, X)
    x[0, 3, 1] = value
    message = f"0 and 1 only.*got {value:g} at sequence 0, frame 3, feature 1"
    with pytest.raises(ValueError, match=message):
        call(RECIPES[name](emission="bernoulli"), x)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_mask_of_another_type(call: Callable[..., Any], dtype: torch.dtype) -> None:
    mask = torch.ones(B, T, dtype=dtype)
    with pytest.raises(TypeError, match=rf"mask.*bool, got {dtype}; use mask\.bool\(\)"):
        call(RECIPES["vrnn"](), torch.zeros(B, T, X), mask)


@everywhere
@pytest.mark.parametrize("shape", [(T, B), (B, T - 1), (B,), (B, T, 1), (1, T)])
def test_mask_of_another_shape(call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 4\), got"):
        call(RECIPES["vrnn"](), torch.zeros(B, T, X), mask)


@everywhere
@pytest.mark.parametrize("row", [(False, True, True, True), (True, False, True, False)])
def test_mask_that_is_no_prefix_names_the_sequence(
    call: Callable[..., Any], row: tuple[bool, ...]
) -> None:
    mask = torch.tensor([(True,) * T, row])
    with pytest.raises(ValueError, match="prefix.*sequence 1 is observed again after a gap"):
        call(RECIPES["vrnn"](), torch.zeros(B, T, X), mask)


@with_and_without_latents
def test_drawing_x_needs_a_mask(name: str) -> None:
    with pytest.raises(ValueError, match=r"mask \(B, T\) is needed to draw x"):
        RECIPES[name]().model()


@with_and_without_latents
def test_drawing_x_needs_a_mask_that_is_a_prefix(name: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        RECIPES[name]().model(None, torch.tensor([[False, True]]))


@with_and_without_latents
@pytest.mark.parametrize("mask", [None, torch.ones(B, T, dtype=torch.bool)])
def test_a_guide_needs_x(name: str, mask: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"x \(B, T, X\) is needed by a guide"):
        RECIPES[name]().guide(None, mask)


@with_and_without_latents
@pytest.mark.parametrize("particles", [0, -1])
def test_a_rollout_needs_a_particle(name: str, particles: int) -> None:
    with pytest.raises(ValueError, match=f"num_particles must be at least 1, got {particles}"):
        call_rollout(RECIPES[name](), torch.zeros(B, T, X), None, particles)


@pytest.mark.parametrize("shape", [(T, B, Z), (T - 1, 1, B, Z), (T, 1, 1, Z), (T, 1, B, Z + 1)])
def test_given_latents_of_another_shape(shape: tuple[int, ...]) -> None:
    recipe = RECIPES["vrnn"]()
    with pytest.raises(ValueError, match=r"z must have shape \(T, K, B, Z\) = \(4, K, 2, 2\)"):
        recipe.model.rollout(recipe.guide, torch.zeros(B, T, X), z=torch.zeros(shape))


UNKNOWN = [
    ("rnn", "cell", "gru, lstm"),
    ("rnn", "emission", "normal, bernoulli"),
    ("vrnn", "cell", "gru, lstm"),
    ("vrnn", "emission", "normal, bernoulli"),
    ("vrnn", "prior", "conditional, standard"),
    ("vrnn", "guide", "filtering, residual"),
    ("avrnn", "guide", "filtering, residual"),
    ("avrnn", "critic", "lstm, feedforward"),
    ("avrnn", "view", "marginal, trajectory, trajectory_redrawn, conditional, joint"),
]


@pytest.mark.parametrize(("name", "argument", "known"), UNKNOWN)
@pytest.mark.parametrize("value", ["nonesuch", ""])
def test_an_unknown_name_lists_the_known_ones(
    name: str, argument: str, known: str, value: str
) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be one of {known}.*, got {value!r}"):
        RECIPES[name](**{argument: value})


def test_an_unknown_view_has_no_context() -> None:
    with pytest.raises(ValueError, match="view must be one of marginal, .*got 'future'"):
        context_dim("future", H, X)


@pytest.mark.parametrize("lipschitz", ["z", "all"])
def test_spectral_normalisation_of_an_lstm_critic_names_a_way_out(lipschitz: str) -> None:
    with pytest.raises(NotImplementedError, match="critic='feedforward'"):
        RECIPES["avrnn"](critic="lstm", lipschitz=lipschitz)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of .*, groupsort, got 'gelu'"),
        ({"lipschitz": "h"}, "lipschitz must be None, 'z' or 'all', got 'h'"),
        ({"critic_dim": 5}, "critic_dim must be even.* got 5"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
    ],
)
def test_bad_options_of_a_feed_forward_critic(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedForwardCritic(Z, **({"critic_dim": 6} | options))


@pytest.mark.parametrize(("window", "shows_path"), [(0, True), (2, False)])
def test_a_critic_whose_window_does_not_fit_its_view(window: int, shows_path: bool) -> None:
    z = torch.zeros(T, 1, B, Z)
    with pytest.raises(ValueError, match="view.*path|path.*view"):
        FeedForwardCritic(Z, window=window)(z, None, z if shows_path else None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: recipes.rnn(0, H), "x_dim must be at least 1, got 0"),
        (lambda: recipes.vrnn(X, -1, H), "z_dim must be at least"),
        (lambda: recipes.vrnn(X, Z, H, min_scale=-0.1), "min_scale must be at least 0, got -0.1"),
    ],
    ids=["x_dim", "z_dim", "min_scale"],
)
def test_sizes_that_make_no_model(build: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# saving and loading

SAVED: dict[str, Callable[[], Recipe]] = {
    "rnn": lambda: RECIPES["rnn"](emission="bernoulli", cell="lstm"),
    "vrnn": RECIPES["vrnn"],
    "vrnn-standard": lambda: RECIPES["vrnn"](prior="standard", cell="lstm", min_scale=0.1),
    "vrnn-residual": lambda: RECIPES["vrnn"](guide="residual", prior_gradient=False),
    "avrnn": RECIPES["avrnn"],
    "avrnn-joint": lambda: RECIPES["avrnn"](view="joint", guide="filtering"),
    "avrnn-feedforward": lambda: RECIPES["avrnn"](
        view="trajectory", critic="feedforward", window=2, critic_activation="groupsort"
    ),
    "avrnn-spectral": lambda: RECIPES["avrnn"](critic="feedforward", lipschitz="z"),
}


def states(recipe: Recipe) -> dict[str, Tensor]:
    """Every parameter and buffer, by part and name."""
    parts: dict[str, nn.Module | None] = {
        "model": recipe.model,
        "guide": recipe.guide,
        "critic": recipe.critic,
    }
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    recipe = SAVED[name]()
    recipes.save(recipe, tmp_path / "best.pt")
    loaded = recipes.load(tmp_path / "best.pt")
    assert loaded.config == recipe.config
    expected = states(recipe)
    assert states(loaded).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in states(loaded).items())
    x = torch.randint(2, (B, T, X)).to(torch.get_default_dtype())
    found = []
    for one in (recipe, loaded):
        torch.manual_seed(7)
        found.append(one.model.rollout(one.guide, x, num_particles=3).log_weight)
    assert torch.equal(*found)


def test_a_loaded_recipe_shares_nothing_with_the_saved_one(tmp_path: Path) -> None:
    recipe = SAVED["avrnn"]()
    recipes.save(recipe, str(tmp_path / "best.pt"))  # a path may be a string
    loaded = states(recipes.load(str(tmp_path / "best.pt")))
    before = {name: value.clone() for name, value in loaded.items()}
    for value in states(recipe).values():
        value += 1.0
    assert all(torch.equal(value, before[name]) for name, value in loaded.items())


def test_loading_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no parameters at .*nonesuch"):
        recipes.load(tmp_path / "nonesuch.pt")


def test_loading_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no parameters at"):
        recipes.load(tmp_path)


class Code:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def text(path: Path) -> None:
    path.write_text("epoch,loss\n1,0.5\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    recipes.save(RECIPES["vrnn"](), path)
    path.write_bytes(path.read_bytes()[:-200])


def without_a_recipe(path: Path) -> None:
    torch.save(RECIPES["vrnn"]().model.state_dict(), path)


def of_an_unknown_recipe(path: Path) -> None:
    content = {"recipe": {"recipe": "nonesuch"}, "model": {}, "guide": {}}
    torch.save(content | {"format": "pyro-avrnn parameters 2"}, path)


def of_version_01(path: Path) -> None:
    recipe = recipes.vrnn(X, Z, H)
    content = {"model": recipe.model.state_dict(), "guide": recipe.guide.state_dict()}
    torch.save(content | {"recipe": recipe.config}, path)


def of_another_size(path: Path) -> None:
    small, large = recipes.vrnn(X, Z, H), recipes.vrnn(X, Z, H + 1)
    mixed = Recipe(small.model, small.guide, config=large.config)
    with pytest.raises(ValueError, match="recipe cannot be written so that it can be read again"):
        recipes.save(mixed, path)
    recipes.save(large, path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"model": small.model.state_dict()}, path)


def pickled_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code(path.with_name("executed"))))


def code_saved_by_torch(path: Path) -> None:
    torch.save({"recipe": Code(path.with_name("executed"))}, path)


@pytest.mark.parametrize(
    "write",
    [
        text,
        empty,
        truncated,
        without_a_recipe,
        of_an_unknown_recipe,
        of_another_size,
        of_version_01,
        pickled_code,
        code_saved_by_torch,
    ],
)
def test_loading_a_file_of_another_kind(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    write(path)
    with pytest.raises(
        ValueError, match="is not a parameter file of this version of pyro-avrnn, or"
    ):
        recipes.load(path)
    assert not (tmp_path / "executed").exists()


def test_the_code_in_the_files_above_would_run_if_it_were_unpickled(tmp_path: Path) -> None:
    pickled_code(tmp_path / "other.pt")
    pickle.loads((tmp_path / "other.pt").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("failing", ["torch.save", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(
    failing: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.pt"
    recipes.save(RECIPES["vrnn"](), path)
    old = path.read_bytes()

    def fail(content: Any, target: Any) -> None:
        if failing == "torch.save":
            target.write_bytes(b"half a file")
        raise error("disk full")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(error, match="disk full"):
        recipes.save(RECIPES["vrnn"](), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["best.pt"]


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    for name in ("vrnn", "avrnn"):
        recipes.save(SAVED[name](), tmp_path / "best.pt")
    assert recipes.load(tmp_path / "best.pt").config["recipe"] == "avrnn"
    assert os.listdir(tmp_path) == ["best.pt"]
