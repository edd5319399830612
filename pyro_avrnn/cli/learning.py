"""The learning check of a comparison: did the trainings come to their end, what held them back?"""

from collections.abc import Callable, Sequence
from statistics import fmean

from pyro_avrnn.cli.runs import Result
from pyro_avrnn.cli.tables import cell, markdown

_MUCH = 0.5  # share of clipped steps from which clipping is no guard any more


def table(results: Sequence[Result]) -> str:
    """Markdown: steps, rise, clipping, norms of gradients and dead units, mean over seeds."""
    trained = [r for r in results if _looked_at(r)]
    parts = list(dict.fromkeys(part for r in trained for part in r["gradient_norms"]))
    head = ["row", "steps", "best step", "last fifth", "clipped", "gradient", *parts[1:], "dead"]
    lines = []
    for row, of_row in _by_row(trained).items():
        names = ("steps", "best_step", "rise", "clipped_share")
        numbers = [cell([r[name] for r in of_row]) for name in names]
        norms = [cell([r["gradient_norms"].get(part) for r in of_row]) for part in parts]
        dead = [_dead(r, least=0.0) for r in of_row if "dead_units" in r]
        lines.append([row, *numbers, *norms, "; ".join(", ".join(d) or "none" for d in dead)])
    return (
        markdown(head, lines)
        + "\n\n* gradient: the median norm of the gradient of the loss a frame, then that of the "
        "guide and of each part of the model; clipped: share of the steps; dead units, seed by "
        "seed: hidden units whose output never changes."
    )


def notes(results: Sequence[Result]) -> list[str]:
    """A sentence for each kind of handbrake that was found."""
    trained = [r for r in results if _looked_at(r)]
    if not trained:
        return []
    seeds = {row: len(of_row) for row, of_row in _by_row(trained).items()}

    def named(which: Callable[[Result], object], text: Callable[[list[Result]], str]) -> str:
        found = _by_row([r for r in trained if which(r)])
        return "; ".join(f"{row} ({text(of_row)})" for row, of_row in found.items())

    def counted(of_row: list[Result]) -> str:
        all_seeds = seeds[of_row[0]["row"]]
        many = f"{len(of_row)} of {all_seeds} seed{'s' if all_seeds > 1 else ''}"
        return f"{cell([r['rise'] for r in of_row])}, {many}"

    found = {
        "**Still rising** at the end of the budget, so that more steps may help": named(
            lambda r: r["still_rising"], counted
        ),
        "Most steps were clipped, so that --clip-norm set their size": named(
            lambda r: r["clipped_share"] > _MUCH,
            lambda of_row: f"{fmean(r['clipped_share'] for r in of_row):.0%} of the steps",
        ),
        "Steps that were left out, as their gradient was not finite": named(
            lambda r: r.get("skipped"),
            lambda of_row: ", ".join(f"{r['skipped']} with seed {r['seed']}" for r in of_row),
        ),
        "Hidden units that never change": named(
            _dead, lambda of_row: ", ".join(dict.fromkeys(t for r in of_row for t in _dead(r)))
        ),
    }
    budget = results[0]["settings"]["steps"]
    return [
        "last fifth: what the best validation bound gained in the last fifth of the steps. A "
        f"training ends by --patience, or with its budget of {budget} steps.",
        *(f"{title}: {rows}." for title, rows in found.items() if rows),
    ]


def _looked_at(result: Result) -> bool:
    """Whether the training went to its end, and was made since there is this check."""
    return not result["error"] and "gradient_norms" in result


def _by_row(results: Sequence[Result]) -> dict[str, list[Result]]:
    rows: dict[str, list[Result]] = {}
    for r in results:
        rows.setdefault(r["row"], []).append(r)
    return rows


def _dead(result: Result, least: float = 0.1) -> list[str]:
    """Parts of which more than this share is dead."""
    parts = result.get("dead_units", {}).items()
    return [f"{n} of {units} in {part}" for part, (n, units) in parts if n > least * units]
