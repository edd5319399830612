"""The table of a comparison, from made-up results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_avrnn import data, recipes
from pyro_avrnn.cli import learning, report
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


def learnt(row: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A result with what the learning check found: nothing, but for the changes."""
    found = {"rise": 0.0, "still_rising": False, "clipped_share": 0.01, "steps": 1000}
    found |= {"gradient_norms": {"gradient_norm": 2.0, "guide": 1.0, "prior": 0.5}}
    found |= {"dead_units": {"guide": [0, 64], "prior": [6, 64]}, "best_step": 900}
    return result(row, seed, **found | changes)


def notes(results: list[dict[str, Any]]) -> list[str]:
    return [line[2:] for line in table(results).splitlines() if line.startswith("* ")]


def starting(results: list[dict[str, Any]], words: str) -> list[str]:
    return [note for note in notes(results) if note.startswith(words)]


def test_the_last_fifth_is_a_column_and_a_training_at_its_end_is_not_mentioned() -> None:
    results = [learnt("a", rise=0.25), learnt("b", 0, rise=0.5), learnt("b", 1, rise=0.7)]
    results.append(learnt("c", rise=None))  # a NaN, as JSON has it
    assert cells(results, "last fifth") == ["0.25", "0.60 ± 0.14", "-"]
    (note,) = starting(results, "last fifth: ")
    assert note.endswith("A training ends by --patience, or with its budget of 1000 steps.")
    for words in ("**Still rising**", "Most steps were clipped", "Hidden units that never"):
        assert not starting(results, words)


def test_trainings_that_still_rise_are_named_by_row_with_their_seeds() -> None:
    rising = {"still_rising": True, "rise": 0.5}
    results = [
        learnt("a", 0, **rising),
        learnt("a", 1),
        learnt("a", 2, still_rising=True, rise=0.9),
    ]
    results += [learnt("b", 0, **rising), learnt("c", 0, rise=9.0)]
    results += [learnt("d", 0, **rising, error="training stopped")]
    assert starting(results, "**Still rising**") == [
        "**Still rising** at the end of the budget, so that more steps may help: "
        "a (0.70 ± 0.28, 2 of 3 seeds); b (0.50, 1 of 1 seed)."
    ]


def test_rows_whose_steps_were_clipped_are_named() -> None:
    results = [learnt("a", 0, clipped_share=0.9), learnt("a", 1, clipped_share=0.5)]
    results += [learnt("b", 0, clipped_share=0.75), learnt("b", 1, clipped_share=0.85)]
    assert starting(results, "Most steps were clipped") == [
        "Most steps were clipped, so that --clip-norm set their size: "
        "a (90% of the steps); b (80% of the steps)."
    ]


def test_rows_with_steps_left_out_are_named() -> None:
    results = [learnt("a", 0, skipped=2), learnt("a", 1, skipped=0), learnt("b", 1, skipped=1)]
    assert starting(results, "Steps that were left out") == [
        "Steps that were left out, as their gradient was not finite: a (2 with seed 0); "
        "b (1 with seed 1)."
    ]


def test_rows_with_dead_units_are_named_from_a_tenth_on() -> None:
    some, none = {"guide": [7, 64], "prior": [6, 64]}, {"guide": [6, 64]}
    results = [learnt("a", 0, dead_units=some), learnt("a", 1, dead_units=some)]
    results += [learnt("a", 2, dead_units={"decoder": [64, 64]}), learnt("b", dead_units=none)]
    assert starting(results, "Hidden units") == [
        "Hidden units that never change: a (7 of 64 in guide, 64 of 64 in decoder)."
    ]


def test_the_table_of_the_learning_check_has_all_of_it() -> None:
    short = {"gradient_norms": {"gradient_norm": 4.0, "decoder": 3.0}, "clipped_share": 0.5}
    results = [learnt("a", 0), learnt("a", 1, clipped_share=0.03, dead_units={"guide": [0, 64]})]
    results += [learnt("b", **short, steps=300), result("old"), learnt("c", error="it stopped")]
    results += [{k: v for k, v in learnt("d").items() if k != "dead_units"}]  # scored in vain
    text = learning.table(results)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    known = ["row", "steps", "best step", "last fifth", "clipped", "gradient", "guide", "prior"]
    assert head == [*known, "decoder", "dead"]
    assert rows == [
        ["a", "1000 ± 0", "900 ± 0", "0.00 ± 0.00", "0.02 ± 0.01", "2.00 ± 0.00", "1.00 ± 0.00"]
        + ["0.50 ± 0.00", "-", "6 of 64 in prior; none"],
        ["b", "300", "900", "0.00", "0.50", "4.00", "-", "-", "3.00", "6 of 64 in prior"],
        ["d", "1000", "900", "0.00", "0.01", "2.00", "1.00", "0.50", "-", ""],
    ]
    assert "gradient: the median norm" in text


def test_scales_at_their_floor_are_a_column_where_there_are_any() -> None:
    results = [result("a", scales_at_floor=0.25), result("rnn", scales_at_floor=None)]
    assert cells(results, "at floor") == ["0.25", "-"]
    assert len(starting(results, "at floor: the share")) == 1
    assert "at floor" not in table(results[1:])


@pytest.mark.parametrize("reader", [{"mu_law": 16}, {"pcm": 16, "segment": 100}, {"pcm": 8}])
def test_bits_of_speech_are_set_against_flac(reader: dict[str, int]) -> None:
    kind = "mu-law" if "mu_law" in reader else "pcm"
    given = {"bits_per_sample": 7.25, "kind": kind, "reader": reader, "min_scale": None}
    bits = 8 if reader == {"pcm": 8} else 16
    made = [result("a", flac_bits=None if bits == 8 else 8.125, **given)]
    codec = "" if bits == 8 else "; FLAC, on the same files: 8.12"
    assert starting(made, "bits: ") == [
        f"bits: of a sample, by the best of the three bounds; all levels alike: {bits:.2f}{codec}."
    ]
    assert cells(made, "bits") == ["7.25"]
    levels = "linear levels" if kind == "pcm" else "mu-law levels"
    assert f"masses of {levels}" in notes(made)[0] and "scale floor" not in notes(made)[0]
    del made[0]["flac_bits"]  # from before FLAC was there
    assert "FLAC" not in table(made)


def test_results_from_before_the_learning_check_still_print() -> None:
    old = [result("a"), result("b", 1)]
    text = table(old)
    for words in ("last fifth", "at floor", "bits", "FLAC", "Still rising", "clipped"):
        assert words not in text
    # among new ones they are a dash
    assert cells([*old, learnt("c", rise=0.5)], "last fifth") == ["-", "-", "0.50"]
    (named,) = starting([*old, learnt("c", still_rising=True)], "**Still rising**")
    assert named.endswith(": c (0.00, 1 of 1 seed).")


ARCHIVE = Path(__file__).parents[2] / "examples" / "results"
RECORDS = {
    path.parent.name: json.loads(path.read_text()) for path in ARCHIVE.glob("*/results.json")
}


@pytest.mark.parametrize(  # those of a comparison; studies have tables of their own
    "name",
    sorted(n for n, rows in RECORDS.items() if isinstance(rows, list) and "schedule" in rows[0]),
)
def test_committed_results_print(name: str) -> None:
    results = RECORDS[name]
    rows = cells(results, "row")
    assert rows == list(dict.fromkeys(r["row"] for r in results))
    assert ("last fifth" in table(results)) == any("rise" in r for r in results)
    assert learning.table(results)


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
