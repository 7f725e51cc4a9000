"""Does a text train another model?  Texts made on one student, scored on others that had no part in making them.

Every set is made on its source as another experiment makes its sets, that on ways to text
(:mod:`distillkit.experiments.ways_to_text`) or that on instruction tuning (:mod:`distillkit.experiments.instruction`), real
sentences too: the source selects those.  Then the words move (:func:`~distillkit.applications.transfer.retokenize`): the target
reads them with its own tokenizer, trains on hard labels by the grid that every set gets (or, for larger sets, by one fixed
training a target), and is scored.  ``anchors`` carries the embeddings over instead
(:func:`~distillkit.applications.anchors.carry_over`), with hard labels too.  So the budget is one and the same for all, in
examples and in the source's tokens.  A target's own score on the full data says what it could have learned.

One *seed* is another set of everything; each set is scored on several fresh initialisations of the target.

A student of random weights can be a target, not a source: what it selects or searches for follows its random features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pandas as pd

from distillkit.applications.anchors import carry_over
from distillkit.applications.transfer import retokenize
from distillkit.core.inner import Unroll
from distillkit.core.loading import load_student
from distillkit.core.optimizers import AdamW
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import ALL_METHODS, REAL_METHODS
from distillkit.experiments.building import load_corpus, recipe_of
from distillkit.experiments.instruction import LEARNED, InstructionCell, InstructionJob
from distillkit.experiments.results import beats, by_set, classes_of, gain, markdown, paired_difference, rows_of, spread
from distillkit.experiments.runner import Cell, Scores, size_columns
from distillkit.experiments.settings import (
    REQUIRED,
    Experiment,
    Scoring,
    SetSeeds,
    check_keys,
    names,
    option,
    settings,
)
from distillkit.experiments.ways_to_text import TEXTS, TextCell, TextJob, hardened
from distillkit.io.checks import check_choice

ANCHORS = "anchors"  # the embeddings of the row "embeddings", which move by anchors
# For each kind of experiment that makes sets: its settings, its cell, and those of its methods that end in text.
MAKERS = {
    "text": (TextJob, TextCell, (*TEXTS, ANCHORS)),
    "instruction": (InstructionJob, InstructionCell, (*REAL_METHODS, *(f"{m} text" for m in LEARNED))),
}
FIXED = ("steps", "step_size", "batch")  # what describes a fixed training
# Selections that gains are measured over.
AGAINST = {"random": "random real text", "k_center": "k-centre's", "herding": "herding's", "keywords": "keywords",
           "projection": "nearest words"}  # the last one beside embeddings alone
UNTRAINED = ("offline:small-bert",)
DRAWS_NOTHING = ("keywords",)  # texts that are one set, whatever the seed
NOT_HERE = ("name", "student", "rows", "seeds", "eval_seeds", "standard_steps", "tuned_grid", "target")


@settings(kind="transfer")
class TransferJob(Experiment, SetSeeds, Scoring):
    """Settings of one experiment.

    Rows are ``<source> to <target>/<method>``, with students by their :func:`short_name`, and ``<target>/full``: that target on
    the whole training split.
    """

    sets: dict = option(REQUIRED, "how sets are made on each source: kind (text or instruction) and its settings")
    students: tuple[str, ...] = option(REQUIRED, "every source and target, as load_student takes them")
    recipe: Literal["tuned", "standard", "fixed"] = option("tuned", "how a target is trained: tuned, standard or fixed")
    fixed: dict | None = option(None, "of the last: {target: {steps, step_size, batch}} of AdamW, the same for every text")

    def __post_init__(self):
        super().__post_init__()
        check_choice("kind of sets", self.sets.get("kind"), MAKERS)
        if len(self.by_name) != len(self.students):
            raise ValueError(f"two of the students have one short name: {', '.join(self.students)}")
        if not any(parsed(row)[0] for row in self.rows):
            raise ValueError(f"rows must hold at least one '<source> to <target>/<method>', not {self.rows!r}")
        for row in self.rows:
            source, target, method = parsed(row)
            for name in (target, source or target):
                check_choice(f"row {row!r}: a student", name, self.by_name)
            check_choice(f"row {row!r}: the method", method, MAKERS[self.sets["kind"]][2] if source else ("full",))
            if source and self.by_name[source] in UNTRAINED:
                raise ValueError(f"row {row!r}: {source} has random weights, so what it selects or finds would be random too")
            if source:  # settings that cannot be are an error before anything runs
                self.making(source)
                self.training(target)

    def training(self, target: str) -> str | Unroll:
        """What a target is trained by on every text: a recipe's name, or the fixed training."""
        if self.recipe != "fixed":
            return self.recipe
        training = (self.fixed or {}).get(target)
        if not isinstance(training, dict) or training.keys() != {*FIXED}:
            raise ValueError(f"fixed must give {', '.join(FIXED)} for the target {target!r}, not {training!r}")
        return Unroll(training["steps"], optimizer=AdamW(training["step_size"]), batch_size=training["batch"])

    @property
    def by_name(self) -> dict[str, str]:
        """Short name → what ``load_student`` takes."""
        return {short_name(student): student for student in self.students}

    def making(self, source: str) -> TextJob | InstructionJob:
        """Settings of the experiment that makes the sets of a source, by its short name."""
        job_class = MAKERS[self.sets["kind"]][0]
        check_keys("sets", self.sets, {*names(job_class)} - {*NOT_HERE})
        return job_class(**self.sets, name=source, student=self.by_name[source], seeds=self.seeds)


def short_name(student: str) -> str:
    """What rows call a student: the last part of its name, with '-' for what cannot stand in a file's name."""
    last = student.removeprefix("offline:").rstrip("/").split("/")[-1]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in last)


def parsed(row: str) -> tuple[str, str, str]:
    """Source, target and method of a row; the source of full data is empty."""
    pair, _, method = row.partition("/")
    source, _, target = pair.rpartition(" to ")
    return source, target, method


class TransferCell(Cell):
    """An experiment on transfer."""

    def __init__(self, job: TransferJob, work: Path, results: Path):
        task = load_corpus(job.making(next(source for source, *_ in map(parsed, job.rows) if source)))
        self.reader = functools.cache(lambda name: load_student(job.by_name[name], task))
        self.maker = functools.cache(self._maker)
        super().__init__(job, work, results, task, self.reader(parsed(job.rows[0])[1]))

    def _maker(self, source: str) -> Cell:
        """The experiment whose sets are used, with what is already known of them."""
        cell, prefix = MAKERS[self.job.sets["kind"]][1], f"{source} "
        maker = cell(self.job.making(source), self.work / source, self.results, self.task)
        maker.notes |= {name.removeprefix(prefix): note for name, note in self.notes.items() if name.startswith(prefix)}
        return maker

    def score(self, pair: str, method: str, seed: int) -> Scores:
        source, target, _ = parsed(pair)
        student = self.reader(target)
        if method == "full":
            return self.evaluated(None, "standard", (seed,), student=student)
        moved = self.maker(source).set_of("embeddings" if method == ANCHORS else method, seed)
        self.notes |= {f"{source} {name}": note for name, note in self.maker(source).notes.items()}
        moved = hardened(moved) if self.task.kind == "classification" else moved
        recipe = recipe_of(self.job, self.job.training(target))
        if method == ANCHORS:
            moved, how = carry_over(moved, self.task, student, self.maker(source).student), "carried"
        else:
            moved, how = retokenize(moved, self.task, student), "retokenized"
        scored = evaluate(moved, self.task, student, seeds=self.job.eval_seeds, recipe=recipe)
        rows, note = rows_of(scored, self.job.eval_seeds)
        return rows, note | {how: moved.meta[how]}

    def columns(self, pair: str, method: str) -> dict:
        source, target, _ = parsed(pair)
        columns = {"target": self.job.by_name[target], "method": method, "recipe": self.job.recipe if source else "standard"}
        if not source:
            return columns
        return columns | {"source": self.job.by_name[source], **size_columns(self.job.making(source))}


def transfer_table(result: Mapping) -> str:
    """The result as a Markdown table: a row for each pair and method, beside random real text and the target's full data."""
    sets, lines = by_set(result), []
    scored = {parsed(name)[2] for name in sets.dropna(how="all").index}
    against = [other for other in AGAINST if other in scored and any(other in rivals(method) for method in scored)]
    shares = of_full(result)
    for name in sets.index:
        source, target, method = parsed(name)
        line = [source or "—", target, method if source else "full data"]
        values = different_sets(sets, name)
        if score := spread(values):
            line += [score, *(_gain(sets, name, other) for other in against),
                     "" if pd.isna(shares[name]) else f"{shares[name]:.0%}", str(len(values))]
        else:
            line += ["not run", *[None] * (len(against) + 2)]
        lines.append(line)
    gains = [f"minus {other.replace('k_center', 'k-centre')}" for other in against]
    heads = ["from", "to", "text", "accuracy (mean ± sd)", *gains, "of full data, above chance", "sets"]
    return markdown(heads, lines, "lll") + _verdict(sets)


def different_sets(sets: pd.DataFrame, name: str) -> pd.Series:
    """The scores of a row, by set; of a text that draws nothing, that of its one set."""
    return sets.loc[name].dropna()[: 1 if parsed(name)[2] in DRAWS_NOTHING else None]


def of_full(result: Mapping) -> pd.Series:
    """Each row's share of its target's score on the full data, both above chance.

    nan where either has not run, or where the full data teach nothing.
    """
    mean = by_set(result).mean(axis=1)
    full = mean.reindex([f"{parsed(name)[1]}/full" for name in mean.index]).set_axis(mean.index)
    if full.isna().all():
        return full
    chance = 1 / len(classes_of(result))
    return ((mean - chance) / (full - chance)).where(full > chance)


def rivals(method: str) -> list[str]:
    """The rows of :data:`AGAINST` that a method is compared with."""
    if method in ("random", "full"):
        return []
    if method in ALL_METHODS:
        return ["random"]
    return [other for other in AGAINST if other != "projection" or method == ANCHORS]


def beside(name: str, other: str) -> str:
    """The row of another text that made the same way."""
    return f"{name.split('/')[0]}/{other}"


def _gain(sets: pd.DataFrame, name: str, other: str) -> str:
    """What a row gains, set by set, on another text that was made the same way; nothing where they are not compared."""
    return gain(sets, name, beside(name, other)) if other in rivals(parsed(name)[2]) else ""


def _verdict(sets: pd.DataFrame) -> str:
    """For each method that is no selection: in how many pairs it beats real text; nothing where nothing was compared."""
    scored, sentences = sets.dropna(how="all"), []
    for method in dict.fromkeys(parsed(name)[2] for name in scored.index):
        for other in rivals(method) if method not in ALL_METHODS else ():
            pairs = [(name, beside(name, other)) for name in scored.index
                     if parsed(name)[2] == method and beside(name, other) in scored.index]
            if pairs:
                above = sum(paired_difference(scored, *pair)[0] > 0 for pair in pairs)
                sentences.append(f"{method}: above {AGAINST[other]} in {above} of {len(pairs)} pairs, "
                                 f"by more than the 95 % interval in {sum(beats(scored, *pair) for pair in pairs)}.")
    return "\n\n" + " ".join(sentences) if sentences else ""
