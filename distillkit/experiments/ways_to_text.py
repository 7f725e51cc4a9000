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
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillkit.applications.transfer import transfer
from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.inner import SGD, AdamW, Optimizer, Unroll
from distillkit.core.objectives import BPTT
from distillkit.core.students import Student, load_student
from distillkit.data.load import load_task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import METHODS, select
from distillkit.experiments.classification import STRATEGIES, twin
from distillkit.experiments.results import SeededRun, Settings, as_json, paired_difference, shown
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.storage import is_vacant
from distillkit.text.judges import FrozenJudge
from distillkit.text.projection import NeighborLoss, corpus_tokens, project
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextJob(Settings):
    """Settings of one experiment.

    Args:
        name: of the result file.
        corpus, limit, max_length, student: as ``load_task`` and ``load_student`` take them.
        per_class, length: size of every set: examples of a class, tokens an example.
        seeds: one set of everything each.
        eval_seeds: fresh initialisations that each set is scored on.
        unroll_steps, step_size, metagrad, outer_batch, lr, label_lr, step_size_lr: as for
            :class:`~distillkit.experiments.classification.ClassificationJob`.
        outer_steps: of each distillation.
        label_steps, label_unroll_steps: outer steps of relabelling, and inner ones (None: as many as ``unroll_steps``), for
            every text alike.
        label_adamw: step size of AdamW as the inner optimiser of relabelling; None: SGD, as embeddings are distilled.
        label_rates: outer learning rates of labels and step sizes in relabelling; None: those of distilling.
        neighbor_weight: of the neighbour term at the end; it grows linearly from 0.
        judge_steps: of the head that judges swaps.
        sentence_steps, sentences: of the search for real sentences, and the size of its pool.
        swap_steps, candidates, examples: of the search for words by swaps, from every start alike; see
            :class:`~distillkit.text.swaps.SwapSearch`.
        relax_steps: of the relaxed choice of words.
        least: how often a token must occur in the training split to be put into a text.
        target: the other model that rows with ``transfer`` are scored on.
        fixed_steps, fixed_step_size, fixed_batch: the training of rows with ``fixed``.
        rows: which rows, as ``method/recipe``.
    """

    name: str
    corpus: str
    student: str
    limit: int | None = None
    max_length: int = 32
    per_class: int = 1
    length: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    unroll_steps: int = 3
    step_size: float = 0.2
    metagrad: str = "forward_difference"
    outer_steps: int = 100
    outer_batch: int = 48
    lr: float = 0.12
    label_lr: float | None = None
    step_size_lr: float | None = None
    label_steps: int = 40
    label_unroll_steps: int | None = None
    label_adamw: float | None = None
    label_rates: tuple[float, ...] | None = None
    neighbor_weight: float = 0.1
    judge_steps: int = 400
    sentence_steps: int = 80
    sentences: int = 3000
    swap_steps: int = 100
    candidates: int = 64
    examples: int | None = None
    relax_steps: int = 100
    least: int = 2
    target: str = "offline:distil-minilm"
    fixed_steps: int = 60
    fixed_step_size: float = 1e-4
    fixed_batch: int = 16
    rows: tuple[str, ...] = ROWS
    kind: str = "text"

    def __post_init__(self):
        self.check_name()
        check_choice("kind", self.kind, ("text",))
        check_choice("metagrad", self.metagrad, STRATEGIES)
        for row in self.rows:
            check_choice("a row", row, ROWS)
        for key in ("max_length", "per_class", "length", "unroll_steps", "outer_steps", "outer_batch", "label_steps",
                    "judge_steps", "sentence_steps", "sentences", "swap_steps", "candidates", "relax_steps", "least",
                    "fixed_steps", "fixed_batch"):
            check_whole(key, getattr(self, key))
        for key in ("examples", "label_unroll_steps"):
            if getattr(self, key) is not None:
                check_whole(key, getattr(self, key))
        self.check_positive("step_size", "lr", "neighbor_weight", "label_lr", "step_size_lr", "fixed_step_size",
                            "label_adamw")
        if self.label_rates is not None and not (
            isinstance(self.label_rates, tuple) and len(self.label_rates) == 2 and all(rate > 0 for rate in self.label_rates)
        ):
            raise ValueError(f"label_rates must be two numbers above 0, of labels and of step sizes, not {self.label_rates!r}")
        for key in ("seeds", "eval_seeds"):
            value = getattr(self, key)
            if not value or not all(isinstance(s, int) for s in value):
                raise ValueError(f"{key} must be a list of whole numbers, not {value!r}")


class TextRun(SeededRun):
    """An experiment on ways to text under way; see :class:`~distillkit.experiments.results.SeededRun`."""

    job: TextJob

    def __init__(self, job: TextJob, folder: str | Path, work: str | Path):
        task = load_task(job.corpus, max_length=job.max_length, limit=job.limit)
        super().__init__(job, folder, work, task, load_student(job.student, task))
        self._target: Student | None = None

    def _scored(self, method: str, recipe: str, seed: int) -> dict:
        if method == "full":
            return as_json(evaluate(None, self.task, self.student, seeds=(seed,)))
        set_ = self.set_of(method, seed)
        scores = {other: self.result["rows"].get(f"{other}/{recipe}", {}).get(str(seed)) for other in METHODS}
        if found := twin(method, scores, lambda other: self.set_of(other, seed)):
            return found
        if recipe == "transfer":
            self._target = self._target or load_student(self.job.target, self.task)
            return as_json(transfer(hardened(set_), self.task, self._target, seeds=self.job.eval_seeds))
        if recipe == "relabelled":
            set_ = self._kept(f"{method} relabelled", seed, lambda: self._relabelled(method, seed))
        elif recipe in ("tuned", "fixed"):
            set_ = hardened(set_)
        job, train = self.job, {"relabelled": "own"}.get(recipe, recipe)
        if recipe == "fixed":
            train = Unroll(job.fixed_steps, optimizer=AdamW(job.fixed_step_size), batch_size=job.fixed_batch)
        found = evaluate(set_, self.task, self.student, seeds=job.eval_seeds, recipe=train)
        row = as_json(found)
        if method in WAYS:
            row["text"] = set_.to_text().to_list()
        return row

    def _make(self, method: str, seed: int) -> DistilledSet:
        if method in METHODS:
            return select(self.task, self.student, method, **self._size(seed))
        return self._kept(method, seed, lambda: self._found(method, seed))

    def _found(self, method: str, seed: int) -> DistilledSet:
        if method == "projection":
            return project(self.set_of("embeddings", seed), self.student)
        if method == "nearest sentences":
            return nearest_sentences(self.set_of("embeddings", seed), self.task, self.student)
        if method == "sentences":
            return self._chosen(seed)
        if method == "relaxed tokens":
            return self._relaxed(seed)
        if method in STARTS:
            return self._swapped(method, seed)
        objective, terms = self.objective(), ()
        if method == "through projection":
            objective = ThroughProjection(objective)
        if method == "neighbor loss":
            end = self.job.neighbor_weight
            terms = (NeighborLoss(self.student, weight=lambda at: end * at),)
        distiller = Distiller(
            DistilledSet.from_real(self.task, self.student, **self._size(seed)), objective, regularizers=terms, seed=seed,
            checkpoint_dir=self.work / f"checkpoint-{_file(method)}-{seed}", **self._rates(),
        )
        for _ in distiller.run(self.job.outer_steps):
            pass
        self._noted(method, seed, [r.loss for r in distiller.records], sum(r.seconds for r in distiller.records))
        return distiller.distilled if method == "embeddings" else project(distiller.distilled, self.student)

    def _judge(self) -> FrozenJudge:
        return FrozenJudge(self.task, self.student, steps=self.job.judge_steps)

    def _allowed(self) -> Tensor:
        return corpus_tokens(self.task, self.student, least=self.job.least)

    def _chosen(self, seed: int) -> DistilledSet:
        job, begun = self.job, time.perf_counter()
        found = search_sentences(
            self.set_of("herding", seed), self.task, self.student, self._judge(), steps=job.sentence_steps,
            candidates=job.candidates, sentences=job.sentences, seed=seed,
        )
        losses = [after for _, after in found.meta["search"]["losses"]]
        self._noted("sentences", seed, losses, time.perf_counter() - begun)
        return found

    def _relaxed(self, seed: int) -> DistilledSet:
        begun = time.perf_counter()
        found = relax_tokens(
            self.set_of("k_center", seed), self.student, self._judge(), steps=self.job.relax_steps, allowed=self._allowed(),
            seed=seed,
        )
        self._noted("relaxed tokens", seed, found.meta["search"]["losses"], time.perf_counter() - begun)
        return found

    def _swapped(self, method: str, seed: int) -> DistilledSet:
        search = SwapSearch(
            self.set_of(STARTS[method], seed), self.student, self._judge(), candidates=self.job.candidates, seed=seed,
            examples=self.job.examples,
            allowed=self._allowed(),
            checkpoint_dir=self.work / f"checkpoint-{_file(method)}-{seed}",
        )
        for _ in search.run(self.job.swap_steps):
            pass
        self._noted(method, seed, [r.after for r in search.records], sum(r.seconds for r in search.records))
        return search.distilled

    def _relabelled(self, method: str, seed: int) -> DistilledSet:
        job, rates = self.job, self._rates()
        if job.label_rates is not None:
            rates |= dict(zip(("label_lr", "step_size_lr"), job.label_rates, strict=True))
        # An ε inside the root: what AdamW does to labels can be differentiated.
        optimizer = SGD(job.step_size) if job.label_adamw is None else AdamW(job.label_adamw, eps_root=1e-8)
        objective = self.objective(job.label_unroll_steps, optimizer)
        return relabel(hardened(self.set_of(method, seed)), objective, steps=job.label_steps, seed=seed, **rates)

    def _kept(self, name: str, seed: int, make) -> DistilledSet:
        """A set that is read from ``work`` if it was made before."""
        folder = self.work / f"{_file(name)}-{seed}"
        if is_vacant(folder):
            make().save(folder)
        return DistilledSet.load(folder)

    def _noted(self, method: str, seed: int, losses: list[float], seconds: float) -> None:
        self.result["distilling"][f"{method} {seed}"] = {
            "steps": len(losses), "seconds": round(seconds, 1), "losses": [round(loss, 4) for loss in losses],
        }

    def _size(self, seed: int) -> dict:
        return {"per_class": self.job.per_class, "length": self.job.length, "seed": seed}

    def _rates(self) -> dict:
        return {"lr": self.job.lr, "label_lr": self.job.label_lr, "step_size_lr": self.job.step_size_lr}

    def objective(self, steps: int | None = None, optimizer: Optimizer | None = None) -> BPTT:
        """The objective of every distillation, and with other inner ``steps`` and ``optimizer`` of relabelling."""
        job = self.job
        unroll = Unroll(steps or job.unroll_steps, optimizer=optimizer or SGD(job.step_size), metagrad=STRATEGIES[job.metagrad])
        return BPTT(self.task, self.student, unroll, batch_size=job.outer_batch)


def hardened(distilled: DistilledSet) -> DistilledSet:
    """The same examples with each its own class as a hard label, without step sizes or recipe."""
    meta = {k: v for k, v in distilled.meta.items() if k != "recipe"}
    return dataclasses.replace(distilled, targets=torch.tensor(distilled.meta["labels"]), step_sizes=None, meta=meta)


def _file(method: str) -> str:
    return method.replace(" ", "_")


def text_table(result: dict) -> str:
    """The result as a Markdown table: scores by recipe, and what each text gains on k-centre's with the same labels."""
    rows, names = result["rows"], result["config"]["rows"]
    heads = {"tuned": "hard labels, tuned", "fixed": "hard labels, fixed", "relabelled": "learned labels, own",
             "transfer": "on another model, tuned"}
    heads = {recipe: head for recipe, head in heads.items() if any(name.endswith(f"/{recipe}") for name in names)}
    lines = ["| method | " + "".join(f"{head} | minus k-centre | " for head in heads.values()) + "sets |",
             "|---|" + "---:|" * (2 * len(heads) + 1)]
    for method in dict.fromkeys(name.split("/")[0] for name in names):
        cells = [cell for recipe in heads for cell in _cells(rows, names, method, recipe)]
        sets = max((len(found) for name, found in rows.items() if name.split("/")[0] == method), default=0)
        lines.append(f"| {method} | {' | '.join(cells)} | {sets} |")
    return "\n".join([*lines, *_recovery(rows)])


# Where methods with a recipe of their own stand in the table.
INSTEAD = {("embeddings", "relabelled"): "embeddings/own", ("full", "tuned"): "full/standard"}


def _cells(rows: dict, names: Sequence[str], method: str, recipe: str) -> tuple[str, str]:
    """A method's score under a recipe, and what it gains on k-centre's."""
    name = INSTEAD.get((method, recipe), f"{method}/{recipe}")
    scores = [row["mean"] for row in rows.get(name, {}).values()]
    if not scores:
        return "not run" if name in names else "", ""
    spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
    mark = " (standard)" if name == "full/standard" else ""
    other = f"k_center/{recipe}"
    gains = method in WAYS and rows.get(other)
    mean, half = paired_difference(rows, name, other) if gains else (math.nan, math.nan)
    gain = shown(mean, half) if gains else ""
    return f"{np.mean(scores):.3f}{spread}{mark}", gain


def _recovery(rows: dict) -> list[str]:
    """How much of what projection loses each way gets back, learned labels for all; none where a part is missing."""
    top, bottom = "embeddings/own", "projection/relabelled"
    shares = []
    for method in WAYS:
        name = f"{method}/relabelled"
        seeds = {*rows.get(name, {})} & {*rows.get(top, {})} & {*rows.get(bottom, {})}
        if name == bottom or not seeds:
            continue
        means = {row: float(np.mean([rows[row][seed]["mean"] for seed in seeds])) for row in (top, bottom, name)}
        gap = means[top] - means[bottom]
        share = f"{(means[name] - means[bottom]) / gap:.2f}" if gap > 0 else "not told, projection lost nothing"
        shares.append(f"{method} {share}{' (one set)' if len(seeds) == 1 else ''}")
    if not shares:
        return []
    return ["", f"Recovery, (text − projection) / (embeddings − projection) with learned labels: {', '.join(shares)}."]
