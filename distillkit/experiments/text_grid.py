"""Ways to text on several corpora and at several sizes: a grid of :mod:`distillkit.experiments.ways_to_text`.

Every cell is a :class:`~distillkit.experiments.ways_to_text.TextJob` of one corpus and one number of examples a class, with all
its seeds. The cells stand in one result; the same command goes on where it was stopped, and processes may share the seeds.  A
cell whose corpus is not to be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from distillkit.experiments.grid import GridRun
from distillkit.experiments.results import Settings, paired_difference, shown
from distillkit.experiments.settings import tupled
from distillkit.experiments.ways_to_text import TextJob, TextRun
from distillkit.io.checks import check_choice, check_whole

AGAINST = ("k_center", "herding")  # what gains are told over


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGridJob(Settings):
    """Settings of a grid.

    Args:
        name: of the result file.
        base: settings that cells share, as :class:`~distillkit.experiments.ways_to_text.TextJob` takes them, without name and
          rows.
        corpora: {corpus: settings of its cells besides}.
        per_class: examples a class.
        rows: of each cell, as ``method/recipe``.
    """

    name: str
    base: Mapping
    corpora: Mapping
    per_class: tuple[int, ...]
    rows: tuple[str, ...]
    kind: str = "text_grid"

    def __post_init__(self):
        self.check_name()
        check_choice("kind", self.kind, ("text_grid",))
        if not isinstance(self.corpora, Mapping) or not self.corpora:
            raise ValueError(f"corpora must hold a line 'corpus: {{}}' for each, not {self.corpora!r}")
        if not isinstance(self.per_class, tuple) or not self.per_class:
            raise ValueError(f"per_class must be a list of whole numbers, not {self.per_class!r}")
        for k in self.per_class:
            check_whole("per_class", k)
        known = {f.name for f in dataclasses.fields(TextJob)} - {"name", "rows", "corpus", "per_class", "kind"}
        for key, values in (("base", self.base), *self.corpora.items()):
            if not isinstance(values, Mapping):
                raise ValueError(f"{key} must hold settings as 'key: value' lines, not {values!r}")
            if unknown := sorted(map(str, values.keys() - known)):
                raise ValueError(f"{key}: unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
        self.cells()  # every one of them is checked before the first is run

    def cells(self) -> dict[str, TextJob]:
        """The cells by name, such as ``ag_news,10``, in the order they are run."""
        found = {}
        for k in self.per_class:
            for corpus, own in self.corpora.items():
                found[f"{corpus},{k}"] = TextJob(
                    name=f"{self.name}-{corpus}-{k}", corpus=corpus, per_class=k, rows=self.rows, **tupled({**self.base, **own})
                )
        return found


class TextGridRun(GridRun):
    """A grid of texts under way; its result is ``folder/<name>.json``, what the cells leave behind ``work/<name>``."""

    job: TextGridJob

    def __call__(self, only: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> dict:
        """Make what is missing, or for now these cells, rows and seeds of it; returns the result."""
        self._seeds = seeds
        return super().__call__(only)

    def _make(self, key: str, cell: TextJob, rows: list[str]) -> None:
        made = self.result["cells"].get(key, {}).get("rows", {})
        if all(made.get(row, {}).keys() >= {str(seed) for seed in self._seeds or cell.seeds} for row in rows):
            return
        run = TextRun(cell, self._taken_up(key, cell), self.work)
        for row in rows:
            self._keep(key, run((row,), self._seeds))


def text_grid_table(result: Mapping) -> str:
    """The grid as a Markdown table: a line a method and size that has a score, a column a corpus, gains over real sentences
    in brackets."""
    job = TextGridJob(**tupled(result["config"]))
    lines = [f"| examples a class | text | {' | '.join(job.corpora)} |", "|---:|---|" + "---:|" * len(job.corpora)]
    for k in job.per_class:
        made = [result["cells"].get(f"{corpus},{k}", {}).get("rows", {}) for corpus in job.corpora]
        for row in (row for row in job.rows if any(row in rows for rows in made)):
            lines.append(f"| {k} | {row.split('/')[0]} | {' | '.join(_cell(rows, row) for rows in made)} |")
    missing = [k for k in job.per_class if not any(result["cells"].get(f"{corpus},{k}") for corpus in job.corpora)]
    notes = [f"Mean ± sd over sets; in brackets the gain, paired by set, over {', '.join(AGAINST)}."]
    if missing:
        notes.append(f"Not run: {', '.join(map(str, missing))} a class.")
    return "\n".join([*lines, "", " ".join(notes)])


def _cell(rows: Mapping, row: str) -> str:
    scores = [score["mean"] for score in rows.get(row, {}).values()]
    if not scores:
        return "not run"
    spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
    method, recipe = row.split("/")
    others = [f"{other}/{recipe}" for other in AGAINST]
    gains = [shown(*paired_difference(dict(rows), row, other)) for other in others if rows.get(other)]
    told = f" ({'; '.join(gains)})" if gains and method not in (*AGAINST, "random") else ""
    return f"{np.mean(scores):.3f}{spread}{told}"
