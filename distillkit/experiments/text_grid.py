"""Ways to text on several corpora and at several sizes: a grid of :mod:`distillkit.experiments.ways_to_text`.

Every cell is a :class:`~distillkit.experiments.ways_to_text.TextJob` of one corpus and one number of examples a class, with all
its seeds. The cells stand in one result; the same command goes on where it was stopped, and processes may share the seeds.  A
cell whose corpus is not to be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

from collections.abc import Mapping

from distillkit.experiments.grid import Grid
from distillkit.experiments.results import markdown, means, paired_difference, shown, spread
from distillkit.experiments.settings import REQUIRED, check_keys, names, option, settings, tupled
from distillkit.experiments.ways_to_text import TextJob, TextRun
from distillkit.io.checks import check_whole

AGAINST = ("k_center", "herding")  # what gains are told over


@settings(kind="text_grid")
class TextGridJob(Grid):
    """Settings of a grid."""

    corpora: Mapping = option(REQUIRED, "{corpus: settings of its cells besides}")
    per_class: tuple[int, ...] = option(REQUIRED, "examples per class")

    run = TextRun

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
                                     **tupled({**self.base, **more}))
            for k in self.per_class for corpus, more in self.corpora.items()
        }


def text_grid_table(result: Mapping) -> str:
    """The grid as a Markdown table: a line a method and size that has a score, a column a corpus, gains over real sentences
    in brackets."""
    job, lines, missing = TextGridJob(**tupled(result["config"])), [], []
    for k in job.per_class:
        columns = [result["cells"].get(f"{corpus},{k}", {}).get("rows", {}) for corpus in job.corpora]
        lines += [[str(k), row.split("/")[0], *(_cell(rows, row) for rows in columns)]
                  for row in job.rows if any(row in rows for rows in columns)]
        if not any(columns):
            missing.append(str(k))
    note = f"Mean ± sd over sets; in brackets the gain, paired by set, over {', '.join(AGAINST)}."
    if missing:
        note += f" Not run: {', '.join(missing)} a class."
    return "\n".join([*markdown(["examples a class", "text", *job.corpora], lines, "rl"), "", note])


def _cell(rows: Mapping, row: str) -> str:
    method, recipe = row.split("/")
    gains = [shown(*paired_difference(rows, row, f"{other}/{recipe}")) for other in AGAINST
             if row in rows and rows.get(f"{other}/{recipe}")]
    told = f" ({'; '.join(gains)})" if gains and method not in (*AGAINST, "random") else ""
    return (spread(means(rows, row)) or "not run") + told
