"""The table of options that recipes pass on is that of the constructors."""

import inspect
from typing import Any

import pytest

from pyro_avrnn import recipes
from pyro_avrnn.emissions import EMISSIONS as INDEPENDENT
from pyro_avrnn.guides import GUIDES, ResidualGuide
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.recipes import EMISSIONS, TAKES

KINDS = {"prior": PRIORS, "emission": INDEPENDENT, "guide": {k: v[0] for k, v in GUIDES.items()}}
SIZES = {"h_dim", "z_dim", "in_dim", "x_dim", "model"}


def arguments_of(part: Any) -> set[str]:
    """Names of a constructor's arguments, with those that it hands to ``_set_up``."""
    names = set(inspect.signature(part).parameters) - SIZES
    if "own" in names:
        names |= set(inspect.signature(part._set_up).parameters) - SIZES
    return names - {"own", "self"}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, parts in KINDS.items() for name in parts]
)
def test_a_part_takes_the_options_that_its_constructor_has(kind: str, name: str) -> None:
    assert set(TAKES[kind].get(name, TAKES[kind][""])) == arguments_of(KINDS[kind][name])


def test_the_table_knows_no_other_parts() -> None:
    known = KINDS | {"emission": EMISSIONS}
    assert all(TAKES[kind].keys() - {""} <= parts.keys() for kind, parts in known.items())


def test_the_users_options_come_before_the_recipes_own() -> None:
    options = {"hidden": (7, 6), "activation": "tanh", "min_scale": 0.5}
    own = {f"{part}_options": options for part in ("prior", "guide", "emission")}
    r = recipes.vrnn(3, 2, 5, min_scale=0.25, activation="elu", **own)
    for part in (r.model.prior, r.guide.network, r.model.decoder):
        assert {name: getattr(part, name) for name in options} == options


def test_dropout_hides_features_of_x_alone() -> None:
    r = recipes.vrnn(3, 2, 5, dropout=0.5)
    assert (r.model.encode_x.dropout, r.model.encode_z.dropout) == (0.5, 0.0)


def test_the_guide_of_an_avrnn_does_not_move_the_prior() -> None:
    r = recipes.avrnn(3, 2, 5)
    assert isinstance(r.guide, ResidualGuide) and not r.guide.prior_gradient
    other = recipes.avrnn(3, 2, 5, base="srnn")  # whose own guide is residual too
    assert isinstance(other.guide, ResidualGuide) and other.guide.prior_gradient
    assert recipes.avrnn(3, 2, 5, prior_gradient=True).guide.prior_gradient
