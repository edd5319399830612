"""The table of a comparison, from made-up results."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_avrnn import data, recipes
from pyro_avrnn.cli import report
from pyro_avrnn.cli.report import one_step_prediction, table
from pyro_avrnn.cli.runs import row_folder


def result(row: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    numbers = {"fivo_per_frame": -2.0, "iwae_per_frame": -3.0, "elbo_per_frame": -4.0}
    numbers |= {"pareto_k_median": 0.25, "pareto_k_above_07": 0.0, "pareto_k_constant": 0.0}
    about = {"data": "waves", "split": "test", "sequences": 9, "frames": 90, "error": None}
    about |= {"baseline_per_frame": -7.0, "min_scale": 0.001, "command": "avrnn", "commit": "c0"}
    settings = {"steps": 1000, "num_particles": 64, "validate_by": "iwae"}
    settings |= changes.pop("settings", {})
    return {"row": row, "seed": seed, "settings": settings, **about, **numbers, **changes}


def constant(row: str, seed: int = 0) -> dict[str, Any]:
    nothing = {"pareto_k_median": None, "pareto_k_above_07": None}
    return result(row, seed, pareto_k_constant=1.0, **nothing)


def cells(results: list[dict[str, Any]], column: str) -> list[str]:
    """A column of the table, by its heading."""
    lines = [line for line in table(results).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row[rows[0].index(column)] for row in rows[2:]]


def test_a_k_hat_of_constant_weights_is_called_constant() -> None:
    without = {f"pareto_k_{name}": None for name in ("median", "above_07", "constant")}
    results = [
        constant("exact", 0),
        constant("exact", 1),
        result("some", pareto_k_constant=0.5),
        constant("mixed", 0),
        result("mixed", 1, pareto_k_median=0.75),
        result("rnn", **without),
        {name: value for name, value in result("old").items() if name != "pareto_k_constant"},
    ]
    word, *found = cells(results, "k-hat")
    assert "constant" in word and f"({word}: " in table(results)  # which a note explains
    # of a row of several seeds, those that have a k-hat tell it
    assert found == ["0.25", "0.75", "-", "0.25"]
    others = [cells(results, name) for name in ("IWAE-64", "FIVO-64", "ELBO")]
    assert all("constant" not in column for column in others)


def test_bounds_stand_under_their_number_of_particles() -> None:
    results = [result("a", settings={"num_particles": 32}), result("a", 1, fivo_per_frame=-2.5)]
    assert cells(results, "FIVO-32") == ["-2.25 ± 0.35"]
    assert cells(results, "IWAE-32") == ["-3.00 ± 0.00"]
    absent = [{k: v for k, v in r.items() if not k.startswith("fivo")} for r in results]
    assert cells(absent, "FIVO-32") == ["-"]  # results from before there was a filter


@pytest.mark.parametrize(("by", "said"), [("iwae", "IWAE-16"), ("fivo", "FIVO-16"), (None, None)])
def test_the_bound_that_chose_the_parameters_is_named(by: str | None, said: str | None) -> None:
    made = result("a", settings={"validate_by": by})
    if by is None:
        del made["settings"]["validate_by"]  # an older file: it was IWAE
    assert f"Best parameters by the validation {said or 'IWAE-16'} of each" in table([made])


def test_a_short_run_says_so() -> None:
    for steps, short in ((499, True), (500, False)):
        text = table([result("a", settings={"steps": steps})])
        assert (f"**A short run** ({steps} steps a row, 1 seed)" in text) == short


class _Seen(Exception):
    pass


def test_pictures_are_drawn_in_evaluation_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(model: Any, guide: Any, *_: Any, **__: Any) -> None:
        raise _Seen(model.training, guide.training)

    folder = row_folder(tmp_path, "elbo:dropout=0.5", 0)
    folder.mkdir(parents=True)
    recipes.save(recipes.vrnn(12, 2, 4, dropout=0.5), folder / "parameters.pt")
    monkeypatch.setattr(report, "to_arviz", stop)
    with pytest.raises(_Seen) as seen:
        report.illustrate(tmp_path, result("elbo:dropout=0.5"), data.vowels())
    assert seen.value.args == (False, False)


@pytest.mark.parametrize("name", ["vrnn", "storn", "srnn", "dmm", "dsae"])
def test_a_prediction_does_not_see_the_step_it_predicts(name: str) -> None:
    recipe = recipes.RECIPES[name](2, 2, 4)
    x = torch.randn(5, 2)
    other = torch.cat([x[:-1], x[-1:] + 3.0])
    first, second = (one_step_prediction(recipe, given, draws=7) for given in (x, other))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    earlier = torch.cat([x[:3] + 3.0, x[3:]])
    assert (one_step_prediction(recipe, earlier, draws=7)[:, 4] != first[:, 4]).any()
