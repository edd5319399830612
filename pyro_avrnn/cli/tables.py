"""Tables in Markdown: means and deviations over seeds, columns aligned."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any


def markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table, its columns aligned."""
    cells = [list(head), *([str(cell) for cell in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def cell(values: Sequence[Any]) -> str:
    """Mean, and deviation if there are several; a dash if there is no finite number."""
    numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        return "-"
    digits = 0 if abs(fmean(numbers)) >= 100 else 2
    mean = f"{fmean(numbers):.{digits}f}".replace("-0.00", "0.00")
    return mean if len(numbers) == 1 else f"{mean} ± {stdev(numbers):.{digits}f}"
