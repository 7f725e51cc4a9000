"""Which way to text trains best: every way at one size, next to real sentences that were selected.

One *seed* of this experiment is another set of everything: another random start, another distillation, another search.
Each set is scored on several fresh initialisations of the student.

Methods:

* ``random``, ``k_center``, ``herding``: real sentences (:mod:`distillkit.evaluation.selection`).
* ``embeddings``: distilled by BPTT, before any step to text: the upper line.  ``projection``: their nearest tokens.
* ``neighbor loss``: distilled with a neighbour term that grows, then projected.
* ``through projection``: distilled through the projection
  (:class:`~distillkit.text.through.ThroughProjection`), then projected.
* ``nearest sentences``: the real sentences nearest to ``embeddings``.
* ``sentences``: real sentences that a judge chooses, from ``herding`` on (:func:`~distillkit.text.sentences.search_sentences`).
* ``relaxed tokens``: a distribution over the words at every place, annealed to one, that starts from ``k_center``
  (:func:`~distillkit.text.relaxed.relax_tokens`).
* ``swaps``: token swaps that start from ``k_center`` (:class:`~distillkit.text.swaps.SwapSearch`); ``swaps from random``,
  ``swaps from herding``, ``swaps from sentences``, ``swaps from relaxed tokens``.
* ``full``: the whole training split.

Recipes: ``tuned``, with hard labels, for every text alike; ``relabelled``: soft labels and step sizes learned for the text
that stands, by the same number of outer steps for every text; ``transfer``: hard labels, tuned, on another model that reads
the text with its own tokenizer; ``own`` for the embeddings; ``standard`` for the full data.  ``fixed``, with hard labels,
is AdamW at one step size and number of steps for every set of every size: no set gets a better one, and none is tuned, which
for larger sets would take longer than all the rest.

A grid (:mod:`distillkit.experiments.text_grid`) is one such experiment for each of several corpora and sizes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import PositiveFloat

from distillkit.applications.transfer import transfer
from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.loading import load_student
from distillkit.core.optimizers import SGD, AdamW
from distillkit.core.student import Student
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import METHODS
from distillkit.experiments.results import as_json, markdown, means, paired_difference, shown, spread
from distillkit.experiments.runner import Run, neighbor_terms
from distillkit.experiments.settings import (
    Data,
    Experiment,
    Inner,
    Neighbor,
    Outer,
    Scoring,
    Search,
    SetSeeds,
    Size,
    Target,
    option,
    positive,
    settings,
    whole,
)
from distillkit.text.judges import FrozenJudge
from distillkit.text.projection import corpus_tokens, project
from distillkit.text.relaxed import relax_tokens
from distillkit.text.sentences import nearest_sentences, search_sentences
from distillkit.text.swaps import SwapSearch
from distillkit.text.through import ThroughProjection, relabel

STARTS = {"swaps": "k_center"} | {
    f"swaps from {start}": start for start in ("random", "herding", "sentences", "relaxed tokens")
}
WAYS = ("projection", "neighbor loss", "through projection", "nearest sentences", "sentences", "relaxed tokens", *STARTS)
TEXTS = (*METHODS, *WAYS)
RECIPES = ("tuned", "relabelled", "transfer", "fixed")
ROWS = (
    *(f"{m}/{r}" for m in TEXTS for r in RECIPES), "embeddings/own", "embeddings/tuned", "full/standard",
)


@settings(kind="text", rows=ROWS, metagrad="forward_difference", lr=0.12, neighbor_weight=0.1)
class TextJob(Experiment, Data, Size, Inner, Outer, Search, Neighbor, Target, SetSeeds, Scoring):
    """Settings of one experiment; relabelling, the searches and the fixed training are the same for every text."""

    label_steps: int = whole(40, "outer steps of relabelling")
    label_unroll_steps: int | None = whole(None, "inner steps of relabelling (default: unroll_steps)")
    label_adamw: float | None = positive(None, "step size of AdamW as inner optimiser of relabelling (default: SGD)")
    label_rates: tuple[PositiveFloat, PositiveFloat] | None = option(
        None, "outer learning rates of labels and step sizes in relabelling (default: as in distilling)")
    sentence_steps: int = whole(80, "steps of the search for real sentences")
    sentences: int = whole(3000, "real sentences that the search chooses from")
    examples: int | None = whole(None, "examples that a step of the search for swaps looks at (default: all)")
    relax_steps: int = whole(100, "steps of the relaxed choice of words")
    fixed_steps: int = whole(60, "steps of the training of rows with 'fixed'")
    fixed_step_size: float = positive(1e-4, "step size of that training, by AdamW")
    fixed_batch: int = whole(16, "examples of a step of that training")

    def __post_init__(self):
        super().__post_init__()
        if not self.neighbor_weight:
            raise ValueError("neighbor_weight must be a number above 0, not 0")


class TextRun(Run):
    """An experiment on ways to text under way; see :class:`~distillkit.experiments.runner.Run`."""

    job: TextJob
    _target: Student | None = None

    def score(self, method: str, recipe: str, seed: int) -> dict:
        if method == "full":
            return as_json(evaluate(None, self.task, self.student, seeds=(seed,)))
        if score := self.twin(method, recipe, seed):
            return score
        job, set_, train = self.job, self.set_of(method, seed), recipe
        if recipe == "transfer":
            self._target = self._target or load_student(job.target, self.task)
            return as_json(transfer(hardened(set_), self.task, self._target, seeds=job.eval_seeds))
        if recipe == "relabelled":
            set_, train = self.saved(f"{method} relabelled", seed, lambda: self._relabelled(method, seed)), "own"
        elif recipe in ("tuned", "fixed"):
            set_ = hardened(set_)
        if recipe == "fixed":
            train = Unroll(job.fixed_steps, optimizer=AdamW(job.fixed_step_size), batch_size=job.fixed_batch)
        score = as_json(evaluate(set_, self.task, self.student, seeds=job.eval_seeds, recipe=train))
        return score | {"text": set_.to_text().to_list()} if method in WAYS else score

    def create(self, method: str, seed: int) -> DistilledSet:
        if method == "projection":
            return project(self.set_of("embeddings", seed), self.student)
        if method == "nearest sentences":
            return nearest_sentences(self.set_of("embeddings", seed), self.task, self.student)
        if method in ("sentences", "relaxed tokens"):
            return self._searched(method, seed)
        if method in STARTS:
            return swapped(self, method, self.set_of(STARTS[method], seed), seed, examples=self.job.examples)
        objective = ThroughProjection(self.objective()) if method == "through projection" else self.objective()
        terms = neighbor_terms(self.student, self.job.neighbor_weight) if method == "neighbor loss" else ()
        start = DistilledSet.from_real(self.task, self.student, **self.job.size(seed))
        learned = self.distil(method, seed, start, objective, regularizers=terms)
        return learned if method == "embeddings" else project(learned, self.student)

    def _searched(self, method: str, seed: int) -> DistilledSet:
        """The sentences that a judge chooses, or its relaxed choice of words."""
        job, begun = self.job, time.perf_counter()
        judge = FrozenJudge(self.task, self.student, steps=job.judge_steps)
        if method == "sentences":
            result = search_sentences(self.set_of("herding", seed), self.task, self.student, judge, steps=job.sentence_steps,
                                      candidates=job.candidates, sentences=job.sentences, seed=seed)
            losses = [after for _, after in result.meta["search"]["losses"]]
        else:
            result = relax_tokens(self.set_of("k_center", seed), self.student, judge, steps=job.relax_steps, seed=seed,
                                  allowed=corpus_tokens(self.task, self.student, least=job.least))
            losses = result.meta["search"]["losses"]
        self.note(method, seed, losses, time.perf_counter() - begun)
        return result

    def _relabelled(self, method: str, seed: int) -> DistilledSet:
        job, rates = self.job, self.job.rates()
        if job.label_rates is not None:
            rates |= dict(zip(("label_lr", "step_size_lr"), job.label_rates, strict=True))
        # An ε inside the root: what AdamW does to labels can be differentiated.
        optimizer = SGD(job.step_size) if job.label_adamw is None else AdamW(job.label_adamw, eps_root=1e-8)
        objective = self.objective(steps=job.label_unroll_steps, optimizer=optimizer)
        return relabel(hardened(self.set_of(method, seed)), objective, steps=job.label_steps, seed=seed, **rates)


def swapped(run: Run, name: str, start: DistilledSet, seed: int, *, examples: int | None = None) -> DistilledSet:
    """The text that token swaps find from ``start`` on, with the settings of a run that has :class:`Search` among them."""
    search = SwapSearch(
        start, run.student, FrozenJudge(run.task, run.student, steps=run.job.judge_steps), candidates=run.job.candidates,
        seed=seed, examples=examples, allowed=corpus_tokens(run.task, run.student, least=run.job.least),
        checkpoint_dir=run.checkpoint(name, seed),
    )
    for _ in search.run(run.job.swap_steps):
        pass
    run.note(name, seed, [r.after for r in search.records], sum(r.seconds for r in search.records))
    return search.distilled


def hardened(distilled: DistilledSet) -> DistilledSet:
    """The same examples with each its own class as a hard label, without step sizes or recipe."""
    meta = {k: v for k, v in distilled.meta.items() if k != "recipe"}
    return dataclasses.replace(distilled, targets=torch.tensor(distilled.meta["labels"]), step_sizes=None, meta=meta)


def text_table(result: Mapping) -> str:
    """The result as a Markdown table: scores by recipe, and what each text gains on k-centre's with the same labels."""
    rows, names = result["rows"], result["config"]["rows"]
    titles = {"tuned": "hard labels, tuned", "fixed": "hard labels, fixed", "relabelled": "learned labels, own",
              "transfer": "on another model, tuned"}
    titles = {recipe: title for recipe, title in titles.items() if any(name.endswith(f"/{recipe}") for name in names)}
    lines = []
    for method in dict.fromkeys(name.split("/")[0] for name in names):
        cells = [cell for recipe in titles for cell in _cells(rows, names, method, recipe)]
        sets = max((len(scores) for name, scores in rows.items() if name.split("/")[0] == method), default=0)
        lines.append([method, *cells, str(sets)])
    heads = ["method", *(head for title in titles.values() for head in (title, "minus k-centre")), "sets"]
    return "\n".join([*markdown(heads, lines), *_recovery(rows)])


# Where methods with a recipe of their own stand in the table.
INSTEAD = {("embeddings", "relabelled"): "embeddings/own", ("full", "tuned"): "full/standard"}


def _cells(rows: Mapping, names: Sequence[str], method: str, recipe: str) -> tuple[str, str]:
    """A method's score under a recipe, and what it gains on k-centre's."""
    name, other = INSTEAD.get((method, recipe), f"{method}/{recipe}"), f"k_center/{recipe}"
    if not (scores := means(rows, name)):
        return "not run" if name in names else "", ""
    mark = " (standard)" if name == "full/standard" else ""
    gain = shown(*paired_difference(rows, name, other)) if method in WAYS and rows.get(other) else ""
    return f"{spread(scores)}{mark}", gain


def _recovery(rows: Mapping) -> list[str]:
    """How much of what projection loses each way gets back, learned labels for all; none where a part is missing."""
    top, bottom = "embeddings/own", "projection/relabelled"
    shares = []
    for method in WAYS:
        name = f"{method}/relabelled"
        seeds = {*rows.get(name, {})} & {*rows.get(top, {})} & {*rows.get(bottom, {})}
        if name == bottom or not seeds:
            continue
        mean = {row: float(np.mean([rows[row][seed]["mean"] for seed in seeds])) for row in (top, bottom, name)}
        gap = mean[top] - mean[bottom]
        share = f"{(mean[name] - mean[bottom]) / gap:.2f}" if gap > 0 else "not told, projection lost nothing"
        shares.append(f"{method} {share}{' (one set)' if len(seeds) == 1 else ''}")
    if not shares:
        return []
    return ["", f"Recovery, (text − projection) / (embeddings − projection) with learned labels: {', '.join(shares)}."]
