"""Which demonstrations make a language model answer best: distilled ones against real ones, from 1 to k in a context.

One *seed* of this experiment is another set of everything.  A row is ``source/k``: k demonstrations of a source, several
orders, test questions that are the same for all; no demonstration is longer than another's ``length`` tokens.

Sources:

* ``zero-shot``: none.
* ``random``, ``k_center``, ``herding``: real sentences, filled up to the same length, and ``keywords``, lines of words
  (:mod:`distillkit.evaluation.selection`).
* ``sentences``: real sentences that a frozen judge chooses (:func:`~distillkit.text.sentences.search_sentences`).
* ``likeliest``: of several draws of random sentences, the one after which the reader finds the right answers of training
  questions likeliest: a choice by the reader itself, without a gradient.
* ``embeddings``: distilled by BPTT with the language model that reads them, under a classifier's head; read as embeddings.
* ``projection``: their nearest tokens.  ``nearest sentences``: the real sentences nearest to them.
* ``swaps``: token swaps that start from ``k_center`` (:class:`~distillkit.text.swaps.SwapSearch`), the same model as judge.
* ``wrong labels``: those of ``random``, each told as the class after its own.  What it loses on ``random`` is what the
  model takes from the answers in a context rather than from its looks (Min et al., 2022).

The student makes and selects the demonstrations; ``reader``, by default the same model, reads them.  The template is the one of
several with the best accuracy on validation questions, over no demonstrations and ``judged_shots`` real ones that are shown in
no row.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping

import numpy as np

from distillkit.applications.prompting import few_shot, questions
from distillkit.core.distilled import DistilledSet
from distillkit.core.loading import load_student
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import select
from distillkit.experiments.results import by_set, frame, gain, markdown, rounded
from distillkit.experiments.runner import Scores, size_columns
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
from distillkit.experiments.ways_to_text import TextCell
from distillkit.io.checks import check_choice
from distillkit.io.seeds import derive_seed, generator

SOURCES = ("zero-shot", "random", "k_center", "herding", "keywords", "sentences", "likeliest", "embeddings", "projection",
           "nearest sentences", "swaps", "wrong labels")


@settings(kind="prompting", trainable="full", per_class=2, length=20, step_size=0.05, outer_steps=60, lr=0.01, swap_steps=60)
class PromptingJob(Experiment, Data, Size, Inner, Outer, Search, SetSeeds):
    """Settings of one experiment; the student is a language model, and rows are ``source/k``, such as ``zero-shot/0``."""

    reader: str | None = option(None, "language model that reads the demonstrations (default: the student)")
    sentence_steps: int = whole(60, "steps of the search for real sentences")
    sentences: int = whole(3000, "real sentences that the search chooses from")
    draws: int = whole(8, "draws of random sentences that the likeliest are taken from")
    draw_rows: int = whole(64, "training questions that judge them")
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
            if source == "embeddings" and self.reader not in (None, self.student):
                raise ValueError(f"row {row!r}: {self.reader} cannot read embeddings of {self.student}; leave reader out, or "
                                 "ask for rows of text")


class PromptingCell(TextCell):
    """An experiment on prompts: the student distils and selects as a classifier, and reads prompts as a language model."""

    texts, selections = (), ()

    @functools.cached_property
    def reader(self) -> Student:
        """The language model that demonstrations are given to."""
        reader = load_student(self.job.reader or self.job.student, questions(self.task), trainable=self.job.trainable)
        reader.tokenizer.chat_template = None  # a chat model reads plain text
        return reader

    @functools.cached_property
    def asked(self) -> Task:
        """The questions of the test split, in the chosen template."""
        return questions(self.task, template=self.template())

    def score(self, source: str, k: str, seed: int) -> Scores:
        rows = self.task.balanced_rows("test", min(self.job.test_rows, len(self.task.test)), generator("prompting-test", 0))
        scored = few_shot(self.asked, self.reader, self.shots(source, seed), k=int(k), rows=rows.tolist(), seed=seed,
                          **self._reading())
        calibrated = scored.calibrated or [None] * len(scored.scores)
        columns = {"accuracy": scored.scores, "normalized": scored.normalized, "calibrated": calibrated,
                   "loss": scored.losses, "dropped": scored.dropped, "context": scored.context}
        return [{"order": order, "questions": scored.rows,
                 **{name: None if value is None else rounded(value) for name, value in zip(columns, values, strict=True)}}
                for order, values in enumerate(zip(*columns.values(), strict=True))], {}

    def columns(self, source: str, k: str) -> dict:
        size = size_columns(self.job) if int(k) else {}
        return {"source": self.job.student, "target": self.job.reader or self.job.student, "method": source, "shots": int(k),
                **size}

    def shots(self, source: str, seed: int):
        """The demonstrations of a source."""
        if source == "zero-shot":
            return ()
        if source == "wrong labels":
            shown = self.set_of("random", seed)
            classes = shown.meta["classes"]
            return [(text, classes[(label + 1) % len(classes)])
                    for text, label in zip(shown.meta["text"], shown.meta["labels"], strict=True)]
        return self.set_of(source, seed)

    def _reading(self) -> dict:
        return {"orders": self.job.orders, "length": self.job.length, "separator": self.job.separator}

    def template(self) -> str:
        """The template with the best accuracy on validation questions; judged once for a result."""
        if "template" not in self.notes:
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
            self.notes["template"] = {"chosen": best, "validation": accuracies}
        return self.notes["template"]["chosen"]

    def create(self, source: str, seed: int) -> DistilledSet:
        if source == "likeliest":
            return self._likeliest(seed)
        learned = super().create(source, seed)
        if source == "embeddings":
            # That it was distilled shows in a student trained on it, by the recipe of the set, against where it started.
            trained = {"start": (self.start(seed), self.objective().unroll), "set": (learned, "own")}
            for name, (distilled, recipe) in trained.items():
                score = evaluate(distilled, self.task, self.student, seeds=(0, 1), recipe=recipe).mean
                self.notes[f"{source} {seed}"][f"trained on the {name}"] = rounded(score)
        return learned

    def _likeliest(self, seed: int) -> DistilledSet:
        """The random sentences after which the reader finds the right answers of training questions likeliest."""
        size = min(self.job.draw_rows, len(self.task.train))
        rows = self.task.balanced_rows("train", size, generator("prompting-draws", seed)).tolist()
        begun, losses, draws = time.perf_counter(), [], []
        for number in range(self.job.draws):
            drawn = select(self.task, self.student, "random", **self.job.size(derive_seed("prompting-draw", seed, number)))
            unseen = [row for row in rows if row not in drawn.meta["rows"]]
            losses.append(few_shot(self.asked, self.reader, drawn, rows=unseen, split="train", seed=seed,
                                   **self._reading() | {"orders": 1}).losses[0])
            draws.append(drawn)
        self.note("likeliest", seed, losses, time.perf_counter() - begun)
        return draws[int(np.argmin(losses))]


def prompting_table(result: Mapping) -> str:
    """The result as a Markdown table: accuracy for each source and k, plainly and calibrated, and what it gains on random."""
    scores, lines, measures = frame(result), [], ("accuracy", "calibrated")
    sets = {measure: by_set(result, measure) for measure in measures}
    for name in result["config"]["rows"]:
        (source, k), chosen = name.split("/"), scores[scores["row"] == name]
        if chosen.empty:
            lines.append([source, k, "not run", *[None] * 5])
            continue
        line = [source, f"{k} ({chosen['dropped'].sum():.0f} left out)" if chosen["dropped"].any() else k]
        for measure in measures:
            deviation = order_deviation(chosen, measure)
            line += [f"{sets[measure].loc[name].mean():.3f}" + ("" if np.isnan(deviation) else f" ({deviation:.3f})"),
                     "" if source in ("zero-shot", "random") else gain(sets[measure], name, f"random/{k}")]
        lines.append([*line, f"{chosen['context'].mean():.0f}", str(chosen["set_seed"].nunique())])
    heads = ["demonstrations", "k", "accuracy (sd over orders)", "minus random", "calibrated", "minus random", "tokens", "sets"]
    return markdown(heads, lines) + _template(result)


def order_deviation(scores, measure: str = "accuracy") -> float:
    """The standard deviation over orders (n − 1), root mean square over sets; nan for one order."""
    return float(np.sqrt(scores.groupby("set_seed")[measure].var().mean()))


def _template(result: Mapping) -> str:
    """What the templates scored on validation questions; nothing before one has been chosen."""
    chosen = [cell["notes"]["template"] for cell in result["cells"].values() if "template" in cell["notes"]]
    if not chosen:
        return ""
    judged = "; ".join(f"{template!r} {' / '.join(f'{score:.2f}' for score in scores)}"
                       for template, scores in chosen[0]["validation"].items())
    return (f"\n\nTemplate: `{chosen[0]['chosen']!r}`, chosen on validation questions (no demonstrations / "
            f"{result['config']['judged_shots']} random ones): `{judged}`.")
