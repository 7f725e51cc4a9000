"""Which way to text trains best: every way at one size, next to real sentences that were selected.

One *seed* of this experiment is another set of everything: another random start, another distillation, another search.
Each set is scored on several fresh initialisations of the student.

Methods:

* ``random``, ``k_center``, ``herding``: real sentences (:mod:`distillkit.evaluation.selection`).
* ``embeddings``: distilled by BPTT, before any step to text: the upper line.  ``projection``: their nearest tokens.
* ``neighbor loss``: distilled with a neighbour term that grows, then projected.
* ``through projection``: distilled through the projection
  (:class:`~distillkit.text.projection.ThroughProjection`), then projected.
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

A grid (:class:`TextGridJob`) is one such experiment for each of several corpora and numbers of examples per class, with all its
seeds, in one result.  The same command continues an interrupted run, and processes may share the seeds.  A cell whose corpus
cannot be had here is skipped, with the reason printed, and says *not run*.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping

import torch

from distillkit.applications.transfer import transfer
from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.loading import load_student
from distillkit.core.optimizers import AdamW
from distillkit.core.student import Student
from distillkit.evaluation.selection import SELECTIONS
from distillkit.experiments.building import recipe_of
from distillkit.experiments.results import by_set, gain, markdown, rows_of, spread
from distillkit.experiments.runner import Cell, Scores
from distillkit.experiments.settings import (
    REQUIRED,
    Data,
    Experiment,
    Grid,
    Inner,
    Neighbor,
    Outer,
    Positive,
    Scoring,
    Search,
    SetSeeds,
    Size,
    Target,
    filled,
    option,
    positive,
    settings,
    whole,
)
from distillkit.text.judges import FrozenJudge
from distillkit.text.projection import ThroughProjection, corpus_tokens, project, relabel
from distillkit.text.relaxed import relax_tokens
from distillkit.text.sentences import nearest_sentences, search_sentences
from distillkit.text.swaps import SwapSearch

STARTS = {"swaps": "k_center"} | {
    f"swaps from {start}": start for start in ("random", "herding", "sentences", "relaxed tokens")
}
WAYS = ("projection", "neighbor loss", "through projection", "nearest sentences", "sentences", "relaxed tokens", *STARTS)
TEXTS = (*SELECTIONS, *WAYS)
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
    label_rates: tuple[Positive, Positive] | None = option(
        None, "outer learning rates of labels and step sizes in relabelling (default: as in distilling)")
    sentence_steps: int = whole(80, "steps of the search for real sentences")
    sentences: int = whole(3000, "real sentences that the search chooses from")
    relax_steps: int = whole(100, "steps of the relaxed choice of words")
    fixed_steps: int = whole(60, "steps of the training of rows with 'fixed'")
    fixed_step_size: float = positive(1e-4, "step size of that training, by AdamW")
    fixed_batch: int = whole(16, "examples of a step of that training")

    def __post_init__(self):
        super().__post_init__()
        if not self.neighbor_weight:
            raise ValueError("neighbor_weight must be a number above 0, not 0")


class TextCell(Cell):
    """An experiment on ways to text, or a cell of a grid of them."""

    texts = (*WAYS, *(f"{method} relabelled" for method in WAYS))
    selections, projected = SELECTIONS, {"projection": "embeddings"}

    @functools.cached_property
    def target(self) -> Student:
        """The other model, which reads the text."""
        return load_student(self.job.target, self.task)

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        job = self.job
        if method == "full" or recipe == "own":
            return super().score(method, recipe, seed)
        if recipe == "relabelled":
            return self.evaluated(self.saved(f"{method} relabelled", seed, lambda: self._relabelled(method, seed)), "own")
        text = hardened(self.set_of(method, seed))
        if recipe == "transfer":
            scored = transfer(text, self.task, self.target, seeds=job.eval_seeds, recipe=recipe_of(job, "tuned"))
            return rows_of(scored, job.eval_seeds)
        fixed = Unroll(job.fixed_steps, optimizer=AdamW(job.fixed_step_size), batch_size=job.fixed_batch)
        return self.evaluated(text, fixed if recipe == "fixed" else recipe)

    def columns(self, method: str, recipe: str) -> dict:
        return super().columns(method, recipe) | ({"target": self.job.target} if recipe == "transfer" else {})

    def create(self, method: str, seed: int) -> DistilledSet:
        if method == "nearest sentences":
            return nearest_sentences(self.set_of("embeddings", seed), self.task, self.student)
        if method in ("sentences", "relaxed tokens"):
            return self._searched(method, seed)
        if method in STARTS:
            return self._swapped(method, seed)
        if method == "neighbor loss":
            learned = self.distil(method, seed, self.start(seed), self.objective(), regularizers=self.neighbor_terms())
            return project(learned, self.student)
        if method == "through projection":
            return project(self.distil(method, seed, self.start(seed), ThroughProjection(self.objective())), self.student)
        return super().create(method, seed)

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

    def _swapped(self, method: str, seed: int) -> DistilledSet:
        """The text that token swaps find."""
        job = self.job
        search = SwapSearch(
            self.set_of(STARTS[method], seed), self.student, FrozenJudge(self.task, self.student, steps=job.judge_steps),
            candidates=job.candidates, seed=seed, examples=job.examples,
            allowed=corpus_tokens(self.task, self.student, least=job.least), checkpoint=self.checkpoint(method, seed),
        )
        for _ in search.run(job.swap_steps):
            pass
        self.note(method, seed, [record.after for record in search.records], sum(record.seconds for record in search.records))
        return search.distilled

    def _relabelled(self, method: str, seed: int) -> DistilledSet:
        job, rates = self.job, self.job.rates()
        if job.label_rates is not None:
            rates |= dict(zip(("label_lr", "step_size_lr"), job.label_rates, strict=True))
        # An ε inside the root: what AdamW does to labels can be differentiated.
        optimizer = None if job.label_adamw is None else AdamW(job.label_adamw, eps_root=1e-8)
        objective = self.objective(steps=job.label_unroll_steps, optimizer=optimizer)
        return relabel(hardened(self.set_of(method, seed)), objective, steps=job.label_steps, seed=seed, **rates)


def hardened(distilled: DistilledSet) -> DistilledSet:
    """The same examples with each its own class as a hard label, without step sizes or recipe."""
    meta = {k: v for k, v in distilled.meta.items() if k != "recipe"}
    return dataclasses.replace(distilled, targets=torch.tensor(distilled.meta["labels"]), step_sizes=None, meta=meta)


# Where methods with a recipe of their own stand in the table.
INSTEAD = {("embeddings", "relabelled"): "embeddings/own", ("full", "tuned"): "full/standard"}
TITLES = {"tuned": "hard labels, tuned", "fixed": "hard labels, fixed", "relabelled": "learned labels, own",
          "transfer": "on another model, tuned"}


def text_table(result: Mapping) -> str:
    """The result as a Markdown table: scores by recipe, and what each text gains on k-centre's with the same labels."""
    sets = by_set(result)
    counts = sets.notna().sum(axis=1)
    recipes = [recipe for recipe in TITLES if any(name.endswith(f"/{recipe}") for name in sets.index)]
    lines = []
    for method in dict.fromkeys(name.split("/")[0] for name in sets.index):
        line = [method]
        for recipe in recipes:
            name, other = INSTEAD.get((method, recipe), f"{method}/{recipe}"), f"k_center/{recipe}"
            score = spread(sets.loc[name]) or "not run" if name in sets.index else ""
            line += [score + " (standard)" * (name == "full/standard"), gain(sets, name, other) if method in WAYS else ""]
        lines.append([*line, str(max(counts[name] for name in sets.index if name.split("/")[0] == method))])
    heads = ["method", *(head for recipe in recipes for head in (TITLES[recipe], "minus k-centre")), "sets"]
    return markdown(heads, lines) + _recovery(sets)


def _recovery(sets) -> str:
    """How much of what projection loses each way recovers, learned labels for all; nothing where a part is missing."""
    top, bottom, shares = "embeddings/own", "projection/relabelled", []
    for name in (f"{method}/relabelled" for method in WAYS):
        paired = sets.reindex([top, bottom, name]).dropna(axis=1)
        if name == bottom or paired.empty:
            continue
        mean = paired.mean(axis=1)
        gap = mean[top] - mean[bottom]
        share = f"{(mean[name] - mean[bottom]) / gap:.2f}" if gap > 0 else "undefined, projection lost nothing"
        shares.append(f"{name.split('/')[0]} {share}{' (one set)' if paired.shape[1] == 1 else ''}")
    about = "Recovery, (text − projection) / (embeddings − projection) with learned labels"
    return f"\n\n{about}: {', '.join(shares)}." if shares else ""


# --- grids ---------------------------------------------------------------------------------------------------------------

AGAINST = ("k_center", "herding")  # selections that gains are measured over


@settings(kind="text_grid")
class TextGridJob(Grid):
    """Settings of a grid."""

    corpora: Mapping = option(REQUIRED, "{corpus: settings of its cells besides}")
    per_class: tuple[int, ...] = filled(REQUIRED, "examples per class")

    cell_job, of_grid = TextJob, (*Grid.of_grid, "corpus", "per_class")

    def variations(self) -> dict[str, Mapping]:
        """What each cell has besides the base, by a name such as ``ag_news,10``."""
        if not self.corpora:
            raise ValueError(f"corpora must hold a line 'corpus: {{}}' for each, not {self.corpora!r}")
        for corpus, values in self.corpora.items():
            self.check(corpus, values)
        return {f"{corpus},{k}": {**more, "corpus": corpus, "per_class": k}
                for k in self.per_class for corpus, more in self.corpora.items()}


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
