"""Tables from the tidy scores of a result, by pandas.

Sets and initialisations are different sources of spread.  :func:`by_set` gives a row's score for each set, the mean over
its initialisations; spreads and intervals over sets come from it.  :func:`by_row` describes all students of a row together.
Differences are paired by set seed, with a 95 % interval by Student's t.  Means and deviations have six digits, as scores have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.stats import t

from distillkit.experiments.results import COLUMNS


def frame(result: Mapping) -> pd.DataFrame:
    """The scores of a result, with all columns of :data:`~distillkit.experiments.results.COLUMNS` and those it has besides."""
    scores = pd.DataFrame(result["scores"])
    return scores.reindex(columns=[*COLUMNS, *(name for name in scores.columns if name not in COLUMNS)])


def classes_of(result: Mapping) -> list[str]:
    """The classes, or kinds of questions, that a result tells apart."""
    notes = (note for cell in result["cells"].values() for note in cell["notes"].values())
    return [*next(note["groups"] for note in notes if "groups" in note)]


def by_set(result: Mapping, value: str = "accuracy", cell: str | None = None) -> pd.DataFrame:
    """Mean of a column over the initialisations of each set: a line for each row of the settings, a column for each set seed.

    Args:
        value: the column.
        cell: of a grid, the cell; default all.
    """
    scores = frame(result)
    chosen = scores if cell is None else scores[scores["cell"] == cell]
    if value not in chosen or chosen[value].isna().all():
        return pd.DataFrame(index=result["config"]["rows"])
    return chosen.pivot_table(index="row", columns="set_seed", values=value).round(6).reindex(result["config"]["rows"])


def by_row(result: Mapping, cell: str | None = None) -> pd.DataFrame:
    """What there is to say of each row: ``mean`` and ``std`` (n − 1) over all its students, their number, and its first size.

    The lines are the rows of the settings; ``mean`` is nan where a row has not run.
    """
    scores = frame(result)
    groups = (scores if cell is None else scores[scores["cell"] == cell]).groupby("row")
    first = groups[["method", "recipe", "examples", "nbytes", "seconds", "flops"]].first()
    summary = groups["accuracy"].agg(["mean", "std", "size"]).round(6)
    return first.join(summary).reindex(result["config"]["rows"])


def spread(values: pd.Series, digits: int = 3) -> str:
    """Mean ± standard deviation (n − 1) in words; of one value that alone, of none nothing."""
    values = values.dropna()
    deviation = f" ± {round(values.std(), 6):.{digits}f}" if len(values) > 1 else ""
    return f"{round(values.mean(), 6):.{digits}f}{deviation}" if len(values) else ""


def paired_difference(sets: pd.DataFrame, one: str, other: str) -> tuple[float, float]:
    """Mean of the differences between two rows at the same set seeds, and half the width of its 95 % interval (Student's t).

    Args:
        sets: as :func:`by_set` gives it.

    Returns:
        nan where the rows have no set in common; an infinite half width for a single one.
    """
    differences = (sets.loc[one] - sets.loc[other]).dropna()
    half = t.ppf(0.975, len(differences) - 1) * differences.sem() if len(differences) > 1 else math.inf
    return float(differences.mean()), float(half)


def gain(sets: pd.DataFrame, one: str, other: str) -> str:
    """:func:`paired_difference` in words; nothing where the rows have no set in common."""
    if not {one, other} <= {*sets.dropna(how="all").index}:
        return ""
    mean, half = paired_difference(sets, one, other)
    if math.isnan(mean):
        return ""
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else " (one set)")


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str | None]], align: str = "l") -> str:
    """A Markdown table.

    Args:
        heads: titles of the columns.
        lines: cells of each line; None is a cell with nothing but a space.
        align: ``l`` or ``r`` for each of the first columns; the others are aligned to the right.
    """
    rule = "|".join("---" if place == "l" else "---:" for place in align.ljust(len(heads), "r"))
    body = ("|".join(" " if cell is None else f" {cell} " for cell in cells) for cells in (heads, *lines))
    first, *others = [f"|{line}|" for line in body]
    return "\n".join([first, f"|{rule}|", *others])
