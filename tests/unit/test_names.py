"""Names of 0.1 that are gone say what to write instead; names that are promised are there."""

import importlib

import pytest

import inference
import pyro_avrnn


@pytest.mark.parametrize(
    ("name", "instead"),
    [("RegularisedELBO", r"ELBO\(penalties="), ("load_parameters", r"recipes\.load\(path\)")],
)
def test_a_removed_name_says_what_to_write_instead(name: str, instead: str) -> None:
    with pytest.raises(ImportError, match=f"{name} was removed in 0.2; use .*{instead}"):
        exec(f"from inference import {name}")
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        getattr(inference, "nonesuch")  # noqa: B009


@pytest.mark.parametrize("package", [inference, pyro_avrnn])
def test_every_promised_name_is_there(package: object) -> None:
    assert all(hasattr(package, name) for name in package.__all__)
    assert pyro_avrnn.data.vowels and pyro_avrnn.recipes.vrnn


def test_arviz_is_imported_by_to_arviz_alone() -> None:
    adapter = importlib.import_module("inference.arviz_adapter")
    assert not hasattr(adapter, "az")
