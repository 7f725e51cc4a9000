"""One set distilled by BPTT, scored beside every honest baseline of its size.

The rows, all scored on the same test split with the same fresh seeds:

* ``random``, ``k_center``, ``herding``: real sentences with hard labels, recipe tuned on the validation split; ``keywords``: a
  line of the most telling words of each class.
* ``real + learned labels``: random real sentences left as they are; only soft labels and step sizes were learned.  What
  it gains over ``random`` is the labels' doing and must not be mistaken for learned inputs.  ``keywords + learned labels``:
  the same for the keywords.
* ``embeddings``: the distilled set, under its own recipe and, if asked for, under the others.
* ``projected``: its nearest-token text.
* ``full``: the whole training split, standard fine-tuning.

A grid (:class:`GridJob`) has many cells, which differ from the common settings in a few: how many examples per class, how many
tokens an example, how many inner steps (*scaling*), or which corpus and which student (the *slides'* table).  All cells stand
in one result; the same command continues it, also from that result alone, and may be given single cells, rows or seeds.  A
cell whose corpus or model cannot be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pandas as pd

from distillkit.core.distilled import DistilledSet
from distillkit.evaluation.selection import SELECTIONS
from distillkit.experiments.results import by_row, frame, markdown, number, of_the_corpus, read, spread, take_up
from distillkit.experiments.runner import Cell, Scores
from distillkit.experiments.settings import (
    Data,
    Experiment,
    Grid,
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

LEARNED_LABELS, KEYWORD_LABELS = "real + learned labels", "keywords + learned labels"
ROW_NAMES = (
    *(f"{method}/tuned" for method in SELECTIONS),
    f"{LEARNED_LABELS}/own", f"{KEYWORD_LABELS}/own",
    *(f"{method}/{recipe}" for method in ("embeddings", "projected") for recipe in ("own", "standard", "tuned")),
    "full/standard",
)


@settings(kind="classification", rows=ROW_NAMES, metagrad="forward_difference")
class ClassificationJob(Experiment, Data, Size, Inner, Outer, SetSeed, Scoring):
    """Settings of one experiment."""

    label_steps: int | None = whole(None, "outer steps of the row 'real + learned labels' (default: outer_steps)")
    full_seeds: Seeds | None = option((0, 1, 2), "fresh initialisations that are trained on the full data, the longest work "
                                                 "(null: one, the set's seed)")
    together: bool = option(False, "learn the sets of cells that differ in their seed side by side, which pays on a GPU")
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

    texts, selections, projected = ("projected",), SELECTIONS, {"projected": "embeddings"}
    relabelled: ClassVar[Mapping[str, str]] = {  # method: text whose labels and step sizes are learned
        LEARNED_LABELS: "random", KEYWORD_LABELS: "keywords"}

    def __init__(self, *args):
        super().__init__(*args)
        for row in self.job.committed_rows:
            self._committed(row)  # a missing one is an error now, not after all other rows

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        row = f"{method}/{recipe}"
        return self._committed(row) if row in self.job.committed_rows else super().score(method, recipe, seed)

    def training_hash(self, method: str, recipe: str, seed: int) -> str | None:
        if f"{method}/{recipe}" in self.job.committed_rows:
            return None
        if method == "full":
            return self.hash_of(["full", self.job.full_seeds or (seed,)], recipe)
        return super().training_hash(method, recipe, seed)

    def create(self, method: str, seed: int) -> DistilledSet:
        if self.learns_together(method):
            self.learn_with_siblings(method, seed)
        if method not in self.relabelled:
            return super().create(method, seed)
        start = self.set_of(self.relabelled[method], seed).soften()
        return self.distil(method, seed, start, self.objective(), steps=self.job.label_steps, learn=("targets", "step_sizes"))

    def learns_together(self, method: str) -> bool:
        """Whether a set is learned side by side with the same set of the cells that differ in their seed."""
        return self.job.together and method == "embeddings"

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
        corpus = self.task.resampled[0] if self.task.resampled else self.task
        mark = "same corpus" if cell["corpus"]["sha256"] == corpus.fingerprint else "another version of the corpus"
        return [score | {"committed": mark} for score in scores], cell["notes"][f"{row} {scores[0]['set_seed']}"]


def table(result: Mapping) -> str:
    """The result as a Markdown table."""
    rows = by_row(result).join(frame(result).groupby("row")["accuracy"].apply(spread).rename("score"))
    cell = next(iter(result["cells"].values()), {})
    marks = {score["row"]: f" (committed, {score['committed']})" for score in result["scores"] if "committed" in score}
    lines = []
    for row in rows.itertuples():
        method, recipe = row.Index.split("/")
        lines.append([method + marks.get(row.Index, ""), recipe, number(row.examples, ",.0f"), number(row.nbytes, ",.0f"),
                      of_the_corpus(math.nan if method == "full" else row.nbytes, cell),
                      "not run" if math.isnan(row.mean) else row.score, number(row.size, ".0f"), number(row.seconds, ".1f")])
    heads = ["method", "recipe", "examples", "bytes", "of the compressed corpus", "accuracy (mean ± sd)", "seeds",
             "seconds to train"]
    return markdown(heads, lines, "ll")


# --- grids ---------------------------------------------------------------------------------------------------------------

BASE = "base"  # the name of the cell that differs in nothing


@settings(kind="scaling")
class GridJob(Grid):
    """Settings of a grid of experiments on classification; kinds differ in the table they are shown as."""

    product: Mapping | None = option(None, "{setting: values}; every combination is a cell, or one with its variations")
    around: Mapping | None = option(None, "{setting: values} varied one at a time from what base says, which is a cell too")

    kinds, cell_job, of_grid = ("scaling", "slides"), ClassificationJob, (*Grid.of_grid, "committed", "committed_rows")

    def variations(self) -> dict[str, Mapping]:
        """What each cell has besides the base, by a name such as ``corpus=imdb,student=roberta-base``."""
        axes, around = self.product or {}, self.around or {}
        for key, chosen in {"product": axes, "around": around}.items():
            self.check(key, chosen)
            for setting, values in chosen.items():
                if not isinstance(values, list | tuple) or not values:
                    raise ValueError(f"{key}: {setting} must be a list of values, not {values!r}")
        if self.kind == "slides" and not {"corpus", "student"} <= axes.keys():
            raise ValueError("the slides' table is of a product of corpus and student; give both")
        defaults, named = {f.name: f.default for f in dataclasses.fields(ClassificationJob)}, {}
        changes = [{}, *({key: value} for key, values in around.items() for value in values)]
        for values, change in itertools.product(itertools.product(*axes.values()), changes):
            if all(self.base.get(key, defaults[key]) == value for key, value in change.items()):
                change = {}  # the base itself
            cell = {**dict(zip(axes, values, strict=True)), **change}
            named.setdefault(",".join(f"{k}={v}" for k, v in cell.items()) or BASE, cell)
        return named


def committed(config: str | Path, folder: str | Path) -> dict:
    """The result in ``folder`` of the grid that a file of settings describes; one without cells where there is none yet."""
    job = GridJob.from_yaml(config)
    return take_up(Path(folder) / f"{job.name}.json", job, job.cells())


def scaling_table(result: Mapping) -> str:
    """A scaling grid as a Markdown table: a line for each cell, its seeds together."""
    job, scores = GridJob(**result["config"]), frame(result)
    scores["place"] = scores["cell"].map(without_seed)
    lines = {}
    for key, cell in job.cells().items():
        of_cell = scores[scores["place"] == without_seed(key)]
        means, sizes = of_cell.groupby("row")["accuracy"].mean(), of_cell[of_cell["method"] == "embeddings"]
        lines[without_seed(key)] = [
            without_seed(key), str(cell.per_class), str(cell.length or cell.max_length), str(cell.unroll_steps),
            *(_bytes(sizes.iloc[0], result) if len(sizes) else ("", "")),
            *(f"{means[row]:.3f}" if row in means else "not run" for row in job.rows), str(of_cell["cell"].nunique())]
    heads = ["cell", "examples a class", "tokens", "inner steps", "bytes", "of the compressed corpus", *job.rows,
             "sets"]
    return markdown(heads, [*lines.values()])


def _bytes(score: pd.Series, result: Mapping) -> tuple[str, str | None]:
    """The bytes of a scored set, and their share of the compressed corpus."""
    return f"{score['nbytes']:,}", of_the_corpus(score["nbytes"], result["cells"][score["cell"]])


def without_seed(key: str) -> str:
    """The name of a cell without its set seed."""
    return ",".join(part for part in key.split(",") if not part.startswith("seed=")) or BASE


def slides_table(result: Mapping) -> str:
    """The slides' table in Markdown: a line for each corpus and way of training, a column for each student.

    Ways that learn a set have a line for each value of the product's other settings, such as ``unroll_steps``.  Mean and
    spread over sets; of a single one over its initialisations.
    """
    config, scores, lines = result["config"], frame(result), []
    axes = {name: values for name, values in config["product"].items() if name not in ("corpus", "student", "seed")}
    for corpus, row in itertools.product(config["product"]["corpus"], config["rows"]):
        learned = row.split("/")[0] not in (*SELECTIONS, "full")
        for values in itertools.product(*(axes.values() if learned else ())):
            asked = {"corpus": corpus, **dict(zip(axes, values))}
            line = [corpus, ", ".join((row, *(f"{name}={value}" for name, value in list(asked.items())[1:])))]
            for student in config["product"]["student"]:
                keys = [key for key, cell in result["cells"].items() if (asked | {"student": student}).items() <= {
                    name: cell["config"].get(name) for name in ("student", *asked)}.items()]
                line.append(spread(_by_set(scores[scores["cell"].isin(keys) & (scores["row"] == row)])) or "not run")
            lines.append(line)
    machines = ", ".join(sorted(scores["machine"].dropna().unique())) or "nothing has been run yet"
    return f"{markdown(['corpus', 'trained on', *config['product']['student']], lines, 'll')}\n\nMade on: {machines}."


def _by_set(scores: pd.DataFrame) -> pd.Series:
    """The accuracy of each set, or of each initialisation of a single set; the same set in several cells counts once."""
    if "same_set_as" in scores:  # of the same row: a set may also equal one of another row, which is not among these
        copies = [f": {row}, set" in str(origin) for row, origin in zip(scores["row"], scores["same_set_as"])]
        scores = scores[[not copy for copy in copies]]
    means = scores.groupby("cell")["accuracy"].mean()
    return scores["accuracy"] if len(means) == 1 else means
