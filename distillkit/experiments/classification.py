"""One set distilled by BPTT, scored beside every honest baseline of its size.

The rows, all scored on the same test split with the same fresh seeds:

* ``random``, ``k_center``, ``herding``: real sentences with hard labels, recipe tuned on the validation split.
* ``real + learned labels``: random real sentences left as they are; only soft labels and step sizes were learned.  What
  it gains over ``random`` is the labels' doing and must not be mistaken for learned inputs.
* ``embeddings``: the distilled set, under its own recipe and, if asked for, under the others.
* ``projected``: its nearest-token text.
* ``full``: the whole training split, standard fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from distillkit.core.distilled import DistilledSet
from distillkit.evaluation.selection import METHODS
from distillkit.experiments.results import read
from distillkit.experiments.runner import Cell, Scores
from distillkit.experiments.settings import (
    Data,
    Experiment,
    Inner,
    Outer,
    Scoring,
    Seeds,
    SetSeed,
    Size,
    option,
    settings,
    whole,
)
from distillkit.experiments.table import by_row, frame, markdown
from distillkit.text.projection import project

LEARNED_LABELS = "real + learned labels"
ROW_NAMES = (
    *(f"{method}/tuned" for method in METHODS),
    f"{LEARNED_LABELS}/own",
    *(f"{method}/{recipe}" for method in ("embeddings", "projected") for recipe in ("own", "standard", "tuned")),
    "full/standard",
)


@settings(kind="classification", rows=ROW_NAMES, metagrad="forward_difference")
class ClassificationJob(Experiment, Data, Size, Inner, Outer, SetSeed, Scoring):
    """Settings of one experiment."""

    label_steps: int | None = whole(None, "outer steps of the row 'real + learned labels' (default: outer_steps)")
    full_seeds: Seeds = option((0, 1, 2), "fresh initialisations that are trained on the full data, the longest work")
    committed: str | None = option(None, "name of a committed result that committed_rows are taken from, not computed")
    committed_rows: tuple[str, ...] = option((), "which rows are taken from there")

    def __post_init__(self):
        super().__post_init__()
        if unknown := [row for row in self.committed_rows if row not in ROW_NAMES]:
            raise ValueError(f"unknown row {unknown[0]!r} in committed_rows; there are {', '.join(ROW_NAMES)}")
        if bool(self.committed) != bool(self.committed_rows):
            raise ValueError("committed and committed_rows belong together: the name of a result, and rows to take from it")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the sets: one."""
        return (self.seed,)


class ClassificationCell(Cell):
    """An experiment on classification, or a cell of a grid of them."""

    job: ClassificationJob
    texts, selections = ("projected",), METHODS

    def __init__(self, *args):
        super().__init__(*args)
        for row in self.job.committed_rows:
            self._committed(row)  # a missing one is an error now, not after all other rows

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        if (row := f"{method}/{recipe}") in self.job.committed_rows:
            return self._committed(row)
        if method == "full":
            return self.evaluated(None, recipe, self.job.full_seeds)
        return self.evaluated(self.set_of(method, seed), recipe)

    def training_hash(self, method: str, recipe: str, seed: int) -> str | None:
        return None if f"{method}/{recipe}" in self.job.committed_rows else super().training_hash(method, recipe, seed)

    def create(self, method: str, seed: int) -> DistilledSet:
        if method == "projected":
            return project(self.set_of("embeddings", seed), self.student)
        if method == LEARNED_LABELS:
            return self.distil(method, seed, self.set_of("random", seed).soften(), self.objective(), steps=self.job.label_steps,
                               learn=("targets", "step_sizes"))
        return self.distil(method, seed, self.start(seed), self.objective())

    def _committed(self, row: str) -> Scores:
        path = self.results / f"{self.job.committed}.json"
        if not path.is_file():
            raise FileNotFoundError(f"committed={self.job.committed!r}, but there is no result {path}; make it first")
        result = read(path)
        scores = [score for score in result["scores"] if score["row"] == row]
        if not scores:
            raise ValueError(f"committed={self.job.committed!r}, but {path} has no row {row}; finish it first")
        (cell,) = result["cells"].values()
        # The docstring corpus follows the versions of the installed libraries.
        mark = "same corpus" if cell["corpus"]["sha256"] == self.task.fingerprint else "another version of the corpus"
        return [score | {"committed": mark} for score in scores], cell["notes"][f"{row} {scores[0]['set_seed']}"]


def table(result: Mapping) -> str:
    """The result as a Markdown table."""
    lines = []
    committed = frame(result).groupby("row").first().get("committed", {})
    for row in by_row(result).itertuples():
        method, recipe = row.Index.split("/")
        if math.isnan(row.mean):
            lines.append([method, recipe, None, None, "not run", None, None])
            continue
        mark = f" (committed, {committed[row.Index]})" if isinstance(committed.get(row.Index), str) else ""
        deviation = "" if math.isnan(row.std) else f" ± {row.std:.3f}"
        lines.append([f"{method}{mark}", recipe, f"{row.examples:,.0f}", f"{row.nbytes:,.0f}", f"{row.mean:.3f}{deviation}",
                      f"{row.size:.0f}", f"{row.seconds:.1f}"])
    heads = ["method", "recipe", "examples", "bytes", "accuracy (mean ± sd)", "seeds", "seconds to train"]
    return markdown(heads, lines, "ll")
