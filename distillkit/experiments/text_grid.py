"""Ways to text on several corpora and at several sizes: a grid of :mod:`distillkit.experiments.ways_to_text`.

Every cell is a :class:`~distillkit.experiments.ways_to_text.TextJob` of one corpus and one number of examples per class, with
all its seeds.  The cells stand in one result.  The same command continues an interrupted run, and processes may share the
seeds.  A cell whose corpus cannot be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

from collections.abc import Mapping

from distillkit.experiments.runner import Grid
from distillkit.experiments.settings import REQUIRED, check_keys, names, option, settings
from distillkit.experiments.table import by_set, gain, markdown, spread
from distillkit.experiments.ways_to_text import TextJob
from distillkit.io.checks import check_whole

AGAINST = ("k_center", "herding")  # selections that gains are measured over


@settings(kind="text_grid")
class TextGridJob(Grid):
    """Settings of a grid."""

    corpora: Mapping = option(REQUIRED, "{corpus: settings of its cells besides}")
    per_class: tuple[int, ...] = option(REQUIRED, "examples per class")

    def __post_init__(self):
        super().__post_init__()
        if not self.corpora:
            raise ValueError(f"corpora must hold a line 'corpus: {{}}' for each, not {self.corpora!r}")
        if not self.per_class:
            raise ValueError(f"per_class must be a list of whole numbers, not {self.per_class!r}")
        for k in self.per_class:
            check_whole("per_class", k)
        known = {*names(TextJob)} - {"rows", "corpus", "per_class", "kind"}
        for key, values in (("base", self.base), *self.corpora.items()):
            check_keys(key, values, known)
        self.cells()  # every one of them is checked before the first is run

    def cells(self) -> dict[str, TextJob]:
        """The cells by name, such as ``ag_news,10``, in the order they are run."""
        return {
            f"{corpus},{k}": TextJob(name=f"{self.name}-{corpus}-{k}", corpus=corpus, per_class=k, rows=self.rows,
                                     **dict(self.base) | more)
            for k in self.per_class for corpus, more in self.corpora.items()
        }


def text_grid_table(result: Mapping) -> str:
    """The grid as a Markdown table: a line for each method and size that has a score, a column for each corpus, gains over
    real sentences in brackets."""
    config, lines, missing = result["config"], [], []
    for k in config["per_class"]:
        cells = [by_set(result, cell=f"{corpus},{k}") for corpus in config["corpora"]]
        scored = {row for sets in cells for row in sets.dropna(how="all").index}
        for row in (row for row in config["rows"] if row in scored):
            lines.append([str(k), row.split("/")[0], *(_score(sets, row) for sets in cells)])
        if not scored:
            missing.append(str(k))
    note = f"Mean ± sd over sets; in brackets the gain, paired by set, over {', '.join(AGAINST)}."
    if missing:
        note += f" Not run: {', '.join(missing)} a class."
    return f"{markdown(['examples a class', 'text', *config['corpora']], lines, 'rl')}\n\n{note}"


def _score(sets, row: str) -> str:
    method, recipe = row.split("/")
    others = () if method in (*AGAINST, "random") else AGAINST
    gains = "; ".join(filter(None, (gain(sets, row, f"{other}/{recipe}") for other in others)))
    return (spread(sets.loc[row]) or "not run") + (f" ({gains})" if gains else "")
