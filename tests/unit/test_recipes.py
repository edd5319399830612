"""The table of options that recipes pass on is that of the constructors."""

import inspect
from typing import Any

import pytest

from pyro_avrnn.emissions import EMISSIONS
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.recipes import TAKES

KINDS = {"prior": PRIORS, "emission": EMISSIONS, "guide": {k: v[0] for k, v in GUIDES.items()}}
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
    assert all(TAKES[kind].keys() - {""} <= parts.keys() for kind, parts in KINDS.items())
