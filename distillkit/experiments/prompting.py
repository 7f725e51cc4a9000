"""Which demonstrations make a language model answer best: distilled ones against real ones, from 1 to k in a context.

One *seed* of this experiment is another set of everything.  A row is ``source/k``: k demonstrations of a source, several
orders, test questions that are the same for all; no demonstration is longer than another's ``length`` tokens.

Sources:

* ``zero-shot``: none.
* ``random``, ``k_center``: real sentences, filled up to the same length (:mod:`distillkit.evaluation.selection`).
* ``embeddings``: distilled by BPTT with the same language model, under a classifier's head; read as embeddings.
* ``projection``: their nearest tokens.  ``nearest sentences``: the real sentences nearest to them.
* ``swaps``: token swaps that start from ``k_center`` (:class:`~distillkit.text.swaps.SwapSearch`), the same model as judge.
* ``wrong labels``: those of ``random``, each told as the class after its own.  What it loses on ``random`` is what the
  model takes from the answers in a context rather than from its looks (Min et al., 2022).

The template is the one of several with the best accuracy on validation questions, over no demonstrations and
``judged_shots`` real ones that are shown in no row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distillkit.applications.prompting import FewShot, few_shot, questions
from distillkit.core.distilled import DistilledSet
from distillkit.core.loading import load_student
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import select
from distillkit.experiments.results import markdown, means, paired_difference, shown
from distillkit.experiments.runner import Run, load_corpus
from distillkit.experiments.settings import (
    Data,
    Experiment,
    Inner,
    Outer,
    Search,
    SetSeeds,
    Size,
    filled,
    option,
    settings,
    whole,
)
from distillkit.experiments.ways_to_text import swapped
from distillkit.io.checks import check_choice
from distillkit.io.seeds import derive_seed, generator
from distillkit.text.projection import project
from distillkit.text.sentences import nearest_sentences

REAL = ("random", "k_center")
LEARNED = ("embeddings", "projection", "nearest sentences", "swaps")
SOURCES = ("zero-shot", *REAL, *LEARNED, "wrong labels")


@settings(kind="prompting", trainable="full", per_class=2, length=20, step_size=0.05, outer_steps=60, lr=0.01, swap_steps=60)
class PromptingJob(Experiment, Data, Size, Inner, Outer, Search, SetSeeds):
    """Settings of one experiment; the student is a language model, and rows are ``source/k``, such as ``zero-shot/0``."""

    orders: int = whole(4, "orders of the demonstrations, for each set and each k")
    test_rows: int = whole(400, "questions that are scored, the same number for each class")
    validation_rows: int = whole(120, "questions that choose the template, the same number for each class")
    templates: tuple[str, ...] = filled(("{text}\nAnswer:",), "questions to choose from, with {text} in each")
    judged_shots: int = whole(4, "demonstrations with which templates are judged, besides none")
    separator: str = option("\n\n", "text behind a demonstration")

    def __post_init__(self):
        super().__post_init__()
        for row in self.rows:
            source, _, k = row.partition("/")
            check_choice(f"the source of row {row!r}", source, SOURCES)
            if not k.isdecimal() or (source == "zero-shot") != (int(k) == 0):
                raise ValueError(f"a row is a source and its demonstrations, as in random/4 or zero-shot/0, not {row!r}")


class PromptingRun(Run):
    """An experiment on prompts under way; see :class:`~distillkit.experiments.runner.Run`.

    ``student`` is the classifier that distils and selects; ``reader`` the language model that is given demonstrations.
    """

    job: PromptingJob

    def __init__(self, job: PromptingJob, folder: str | Path, work: str | Path):
        task = load_corpus(job)
        super().__init__(job, folder, work, task)
        self.reader = load_student(job.student, questions(task), trainable=job.trainable)
        self._asked = None

    def score(self, source: str, k: str, seed: int) -> dict:
        if self._asked is None:
            self._asked = questions(self.task, template=self._template())
        rows = self.task.balanced_rows("test", min(self.job.test_rows, len(self.task.test)), generator("prompting-test", 0))
        return as_row(few_shot(self._asked, self.reader, self._shots(source, seed), k=int(k), rows=rows.tolist(), seed=seed,
                               **self._reading()))

    def _shots(self, source: str, seed: int):
        if source == "zero-shot":
            return ()
        if source == "wrong labels":
            shown = self.set_of("random", seed)
            names = shown.meta["classes"]
            return [(text, names[(label + 1) % len(names)])
                    for text, label in zip(shown.meta["text"], shown.meta["labels"], strict=True)]
        return self.set_of(source, seed)

    def _reading(self) -> dict:
        return {"orders": self.job.orders, "length": self.job.length, "separator": self.job.separator}

    def _template(self) -> str:
        """The template with the best accuracy on validation questions; judged once for a result."""
        noted = self.result["distilling"]
        if "template" not in noted:
            size = min(self.job.validation_rows, len(self.task.validation))
            rows = self.task.balanced_rows("validation", size, generator("prompting-validation", 0)).tolist()
            shots = select(self.task, self.student, "random", **self.job.size(derive_seed("prompting-template", 0)))
            accuracies = {}
            for template in self.job.templates:
                asked = questions(self.task, template=template)
                accuracies[template] = [
                    round(few_shot(asked, self.reader, shots, k=k, rows=rows, split="validation", **self._reading()).mean, 6)
                    for k in (0, self.job.judged_shots)
                ]
            best = max(accuracies, key=lambda template: np.mean(accuracies[template]))
            noted["template"] = {"chosen": best, "validation": accuracies}
        return noted["template"]["chosen"]

    def create(self, source: str, seed: int) -> DistilledSet:
        if source == "projection":
            return project(self.set_of("embeddings", seed), self.student)
        if source == "nearest sentences":
            return nearest_sentences(self.set_of("embeddings", seed), self.task, self.student)
        if source == "swaps":
            return swapped(self, source, self.set_of("k_center", seed), seed)
        start = DistilledSet.from_real(self.task, self.student, **self.job.size(seed))
        objective = self.objective()
        learned = self.distil(source, seed, start, objective)
        # That it was distilled shows in a student trained on it, by the recipe of the set, against where it started.
        before, after = (evaluate(s, self.task, self.student, seeds=(0, 1), recipe=recipe).mean
                         for s, recipe in ((start, objective.unroll), (learned, "own")))
        self.result["distilling"][f"{source} {seed}"] |= {
            "trained on the start": round(before, 6), "trained on the set": round(after, 6)}
        return learned


def as_row(score: FewShot) -> dict:
    """A score in context as JSON values, floats at six digits, null for what is not a number."""
    row = dataclasses.asdict(score)
    for key in ("mean", "std"):
        row[key] = round(row[key], 6) if math.isfinite(row[key]) else None
    for key in ("scores", "normalized", "calibrated"):
        row[key] = [round(s, 6) for s in row[key]]
    return row


def prompting_table(result: Mapping) -> str:
    """The result as a Markdown table: accuracy for each source and k, plainly and calibrated, and what it gains on random."""
    rows, lines = result["rows"], []
    for name in result["config"]["rows"]:
        source, k = name.split("/")
        if not rows.get(name):
            lines.append([source, k, "not run", *[None] * 5])
            continue
        left_out = sum(map(sum, means(rows, name, "dropped")))
        cells = []
        for key in ("scores", "calibrated"):
            scores = means(rows, name, key)
            cells += [f"{np.mean(scores):.3f}{_deviation(scores)}", _gain(rows, source, k, key)]
        lines.append([source, f"{k} ({left_out} left out)" if left_out else k, *cells,
                      f"{np.mean(means(rows, name, 'context')):.0f}", str(len(rows[name]))])
    heads = ["demonstrations", "k", "accuracy (sd over orders)", "minus random", "calibrated", "minus random", "tokens", "sets"]
    lines = markdown(heads, lines)
    if chosen := result["distilling"].get("template"):
        judged = "; ".join(f"{template!r} {' / '.join(f'{s:.2f}' for s in scores)}"
                           for template, scores in chosen["validation"].items())
        lines += ["", f"Template: `{chosen['chosen']!r}`, chosen on validation questions (no demonstrations / "
                  f"{result['config']['judged_shots']} random ones): `{judged}`."]
    return "\n".join(lines)


def _deviation(scores: list[list[float]]) -> str:
    """The standard deviation over orders, n − 1, root mean square over the sets, in brackets; nothing for one order."""
    if len(scores[0]) < 2:
        return ""
    return f" ({np.sqrt(np.mean([np.var(orders, ddof=1) for orders in scores])):.3f})"


def _gain(rows: Mapping, source: str, k: str, key: str) -> str:
    """What a source gains on random demonstrations at the same k and seed, with half of its 95 % interval over sets."""
    if source in ("zero-shot", "random") or f"random/{k}" not in rows:
        return ""
    averages = {name: {seed: {"mean": float(np.mean(row[key]))} for seed, row in rows[f"{name}/{k}"].items()}
                for name in (source, "random")}
    return shown(*paired_difference(averages, source, "random"))
