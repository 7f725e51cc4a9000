"""Does a text train another model?  Texts made on one student, scored on others that had no part in making them.

Every set is made on its source as another experiment makes its sets, that on ways to text
(:mod:`distillkit.experiments.ways_to_text`) or that on instruction tuning (:mod:`distillkit.experiments.instruction`), real
sentences too: the source selects those.  Then the words move (:func:`~distillkit.applications.transfer.transfer`): the target
reads them with its own tokenizer, trains on hard labels by the grid that every set gets (or, for larger sets, by one fixed
training a target), and is scored.  So the budget is one and the same for all, in examples and in the source's tokens.  A
target's own score on the full data says what it could have learned.

One *seed* is another set of everything; each set is scored on several fresh initialisations of the target.

A student of random weights can be a target, not a source: what it selects or searches for follows its random features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from distillkit.applications.transfer import retokenize, transfer
from distillkit.core.inner import Unroll
from distillkit.core.loading import load_student
from distillkit.core.optimizers import AdamW
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import ALL_METHODS
from distillkit.experiments.instruction import LEARNED, InstructionJob, InstructionRun
from distillkit.experiments.results import as_json, markdown, means, paired_difference, shown, spread
from distillkit.experiments.runner import Run, load_corpus
from distillkit.experiments.settings import (
    REQUIRED,
    Experiment,
    Scoring,
    SetSeeds,
    check_keys,
    names,
    option,
    settings,
    tupled,
)
from distillkit.experiments.ways_to_text import TEXTS, TextJob, TextRun, hardened
from distillkit.io.checks import check_choice, check_number, check_whole

# For each kind of experiment that makes sets: its settings, its run, and those of its methods that end in text.
MAKERS = {
    "text": (TextJob, TextRun, TEXTS),
    "instruction": (InstructionJob, InstructionRun, (*ALL_METHODS, *(f"{m} text" for m in LEARNED))),
}
FIXED = ("steps", "step_size", "batch")  # what describes a fixed training
AGAINST = {"random": "random real text", "k_center": "k-centre's", "herding": "herding's"}  # what gains are told over
UNTRAINED = ("offline:small-bert",)
NOT_HERE = ("name", "student", "rows", "seeds", "eval_seeds", "target")


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
        for row in self.rows:
            self._check_row(row)
        if not any(parsed(row)[0] for row in self.rows):
            raise ValueError(f"rows must hold at least one '<source> to <target>/<method>', not {self.rows!r}")
        if self.recipe == "fixed":
            for target in dict.fromkeys(target for source, target, _ in map(parsed, self.rows) if source):
                self.training(target)

    def _check_row(self, row: str) -> None:
        source, target, method = parsed(row)
        for name in (target, source or target):
            check_choice(f"row {row!r}: a student", name, self.by_name)
        check_choice(f"row {row!r}: the method", method, MAKERS[self.sets["kind"]][2] if source else ("full",))
        if not source:
            return
        if self.by_name[source] in UNTRAINED:
            raise ValueError(f"row {row!r}: {source} has random weights, so what it selects or finds would be random too")
        self.making(source)  # settings that cannot be are an error before anything runs

    def training(self, target: str) -> str | Unroll:
        """What a target is trained by on every text: a recipe's name, or the fixed training."""
        if self.recipe != "fixed":
            return self.recipe
        training = (self.fixed or {}).get(target)
        if not isinstance(training, dict) or training.keys() != {*FIXED}:
            raise ValueError(f"fixed must give {', '.join(FIXED)} for the target {target!r}, not {training!r}")
        check_whole("fixed steps", training["steps"])
        check_whole("fixed batch", training["batch"])
        check_number("fixed step_size", training["step_size"], without="least")
        return Unroll(training["steps"], optimizer=AdamW(training["step_size"]), batch_size=training["batch"])

    @property
    def by_name(self) -> dict[str, str]:
        """Short name → what ``load_student`` takes."""
        return {short_name(student): student for student in self.students}

    def making(self, source: str) -> TextJob | InstructionJob:
        """Settings of the experiment that makes the sets of a source, by its short name."""
        job_class = MAKERS[self.sets["kind"]][0]
        check_keys("sets", self.sets, {*names(job_class)} - {*NOT_HERE})
        if "corpus" not in self.sets:
            raise ValueError("sets: the setting 'corpus' is missing")
        return job_class(**tupled(self.sets), name=source, student=self.by_name[source], seeds=self.seeds)


def short_name(student: str) -> str:
    """What rows call a student: the last part of its name, with '-' for what cannot stand in a file's name."""
    last = student.removeprefix("offline:").rstrip("/").split("/")[-1]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in last)


def parsed(row: str) -> tuple[str, str, str]:
    """Source, target and method of a row; the source of full data is empty."""
    pair, _, method = row.partition("/")
    source, _, target = pair.rpartition(" to ")
    return source, target, method


class TransferRun(Run):
    """An experiment on transfer under way; see :class:`~distillkit.experiments.runner.Run`."""

    job: TransferJob

    def __init__(self, job: TransferJob, folder: str | Path, work: str | Path):
        task = load_corpus(job.making(next(source for source, *_ in map(parsed, job.rows) if source)))
        self.reader = functools.cache(lambda name: load_student(job.by_name[name], task))
        self.maker = functools.cache(self._maker)
        super().__init__(job, folder, work, task, self.reader(parsed(job.rows[0])[1]))

    def _maker(self, source: str) -> Run:
        """The experiment whose sets are taken; it writes no result of its own."""
        return MAKERS[self.job.sets["kind"]][1](self.job.making(source), self.work, self.work)

    def score(self, pair: str, method: str, seed: int) -> dict:
        source, target, _ = parsed(pair)
        student = self.reader(target)
        if method == "full":
            return as_json(evaluate(None, self.task, student, seeds=(seed,)))
        text = self.maker(source).set_of(method, seed)
        self.result["distilling"] |= {f"{source} {k}": v for k, v in self.maker(source).result["distilling"].items()}
        text = hardened(text) if self.task.kind == "classification" else text
        score = as_json(transfer(text, self.task, student, seeds=self.job.eval_seeds, recipe=self.job.training(target)))
        return score | {"retokenized": retokenize(text, self.task, student).meta["retokenized"]}


def transfer_table(result: Mapping) -> str:
    """The result as a Markdown table: a row a pair and method, beside random real text and the target's full data."""
    rows, names, lines = result["rows"], result["config"]["rows"], []
    against = [other for other in AGAINST if any(parsed(name)[2] == other for name in names)]
    for name in names:
        source, target, method = parsed(name)
        cells = [source or "—", target, method if source else "full data"]
        if scores := means(rows, name):
            share = of_full(rows, name)
            cells += [spread(scores), *(_gain(rows, name, other) for other in against), "" if share is None else f"{share:.0%}",
                      str(len(scores))]
        else:
            cells += ["not run", *[None] * (len(against) + 2)]
        lines.append(cells)
    gains = [f"minus {other.replace('k_center', 'k-centre')}" for other in against]
    heads = ["from", "to", "text", "accuracy (mean ± sd)", *gains, "of full data", "sets"]
    return "\n".join([*markdown(heads, lines, "lll"), *_verdict(rows, names)])


def of_full(rows: Mapping, name: str) -> float | None:
    """A row's mean score as a share of its target's score on the full data; None where either has not run."""
    full, scores = means(rows, f"{parsed(name)[1]}/full"), means(rows, name)
    return float(np.mean(scores) / np.mean(full)) if full and scores else None


def _beside(name: str, other: str) -> str:
    """The row of another text that made the same way."""
    return f"{name.split('/')[0]}/{other}"


def _gain(rows: Mapping, name: str, other: str) -> str:
    """What a row gains, seed by seed, on selected text that made the same way; of selected text itself, on random text only."""
    source, _, method = parsed(name)
    if not source or method == "random" or (method in AGAINST and other != "random") or not rows.get(_beside(name, other)):
        return ""
    mean, half = paired_difference(rows, name, _beside(name, other))
    return shown(mean, half) if np.isfinite(mean) else ""


def _verdict(rows: Mapping, names: list[str]) -> list[str]:
    """For each method that is no selection: in how many pairs it beats real text; none where nothing is to be said."""
    lines = []
    for method in dict.fromkeys(parsed(name)[2] for name in names):
        if method in (*ALL_METHODS, "full"):
            continue
        for other, words in AGAINST.items():
            pairs = [n for n in names if parsed(n)[2] == method and rows.get(n) and rows.get(_beside(n, other))]
            if not pairs:
                continue
            gains = [paired_difference(rows, name, _beside(name, other)) for name in pairs]
            above, surely = sum(mean > 0 for mean, _ in gains), sum(mean > half for mean, half in gains)
            lines.append(f"{method}: above {words} in {above} of {len(pairs)} pairs, by more than the 95 % interval in "
                         f"{surely}.")
    return ["", " ".join(lines)] if lines else []
