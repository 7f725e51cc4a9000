"""Instruction tuning on a fraction of the data: distilled by two objectives, selected by four methods, and all of it.

One *seed* of this experiment is everything anew: another distilled or selected set, in another order.  So the scores of two
methods at the same seed are paired, and a method beats another when the mean of the paired differences lies above its 95 %
interval.

Methods:

* ``zero-shot``: the model as it is; ``full``: the whole training split, standard fine-tuning.
* ``random``, ``k_center``, ``herding``, ``less``: real examples (:mod:`distillkit.evaluation.selection`).
* ``nacd``: prompts learned by trajectory matching with the neighbour term (Yao et al., 2025); ``nacd text``: their nearest
  tokens.
* ``bptt``: prompts learned through the loss on real data instead, at the same size; ``bptt text``: their nearest tokens.

Each is scored under ``standard`` fine-tuning and under the ``tuned`` grid, and distilled sets under their ``own`` recipe
too, since a set may be good for the recipe it was distilled with only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distillkit.core.distilled import DistilledSet
from distillkit.core.experts import record_experts
from distillkit.core.loading import load_student
from distillkit.core.objectives import BPTT, TrajectoryMatching
from distillkit.core.optimizers import AdamW
from distillkit.core.student import Student
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.scoring import choice_accuracy
from distillkit.evaluation.selection import ALL_METHODS
from distillkit.experiments.results import as_json, markdown, means, paired_difference, shown, spread
from distillkit.experiments.runner import Run, neighbor_terms, strategy, unroll_of
from distillkit.experiments.settings import (
    Data,
    Experiment,
    Expert,
    Inner,
    Neighbor,
    Outer,
    SetSeeds,
    Size,
    option,
    positive,
    settings,
    whole,
)
from distillkit.text.projection import project

LEARNED = ("nacd", "bptt")
ROWS = (
    "zero-shot/none",
    *(f"{m}/{r}" for m in ALL_METHODS for r in ("standard", "tuned")),
    *(f"{m}/{r}" for m in LEARNED for r in ("own", "standard", "tuned")),
    *(f"{m} text/{r}" for m in LEARNED for r in ("standard", "tuned")),
    "full/standard",
)


@settings(
    kind="instruction", rows=ROWS, max_length=96, fraction=0.05, seeds=(0, 1, 2, 3, 4), expert_count=2, expert_epochs=2,
    expert_batch=64, snapshots_per_epoch=8, match_epochs=0.125, unroll_steps=8, inner_batch=32, step_size=1e-3, outer_batch=64,
    lr=0.003, step_size_lr=0.1,
)
class InstructionJob(Experiment, Data, Size, Expert, Inner, Outer, Neighbor, SetSeeds):
    """Settings of one experiment.

    ``eps_root`` is inside the root of AdamW, of students and experts alike.  Where it is small beside the squares of
    gradients, Adam's first steps depend on little but their signs, whose derivative is next to nothing.
    """

    max_start_epoch: float | None = option(None, "last epoch of an expert's path that a matched segment may begin with")
    micro_batch: int = whole(8, "examples of an inner step that are computed at once")
    eps_root: float = positive(1e-4, "ε inside the root of AdamW")
    distance: str = option("whole", "distance of trajectory matching")


class InstructionRun(Run):
    """An experiment on instruction tuning under way; see :class:`~distillkit.experiments.runner.Run`."""

    job: InstructionJob
    _adapted: Student | None = None

    def score(self, method: str, recipe: str, seed: int) -> dict:
        if method == "zero-shot":
            plain, by_length = choice_accuracy(self.student, self.student.init(seed), self.task, "test")
            return {"mean": round(plain, 6), "normalized": [round(by_length, 6)], "examples": 0, "nbytes": 0, "seconds": 0.0}
        set_ = None if method == "full" else self.set_of(method, seed)
        return as_json(evaluate(set_, self.task, self.student, seeds=(seed,), recipe=recipe))

    def selector(self, method: str) -> Student:
        """The student itself; for LESS with low-rank adapters, as its paper has it."""
        if method != "less" or self.student.trainable == "lora":
            return self.student
        if self._adapted is None:
            self._adapted = load_student(self.job.student, self.task, trainable="lora")
        return self._adapted

    def create(self, method: str, seed: int) -> DistilledSet:
        if method.endswith(" text"):
            return project(self.set_of(method.removesuffix(" text"), seed), self.student)
        matching = method == "nacd"
        start = DistilledSet.from_real(self.task, self.student, **self.job.size(seed))
        terms = neighbor_terms(self.student, self.job.neighbor_weight) if matching else ()
        return self.distil(method, seed, start, self.matching(seed) if matching else self.bptt(), regularizers=terms)

    def matching(self, seed: int) -> TrajectoryMatching:
        """Trajectory matching against experts of this seed, which are recorded at its first use."""
        job = self.job
        experts = record_experts(
            self.task, self.student, self.work / f"experts-{seed}", count=job.expert_count, epochs=job.expert_epochs,
            optimizer=AdamW(job.expert_step_size, eps_root=job.eps_root), batch_size=job.expert_batch, micro_batch=16,
            snapshots_per_epoch=job.snapshots_per_epoch, seed=seed,
        )
        return TrajectoryMatching(
            self.task, self.student, unroll_of(job, **self._training()), experts, metagrad=strategy(job.metagrad),
            expert_epochs=job.match_epochs, distance=job.distance, max_start_epoch=job.max_start_epoch,
        )

    def bptt(self) -> BPTT:
        """The loss on real data after the same inner loop."""
        return self.objective(**self._training())

    def _training(self) -> dict:
        job = self.job
        return {"optimizer": AdamW(job.step_size, eps_root=job.eps_root), "micro_batch": job.micro_batch}


def instruction_table(result: Mapping) -> str:
    """The result as two Markdown tables: the scores, and how learned sets compare with selected ones, seed by seed."""
    rows, lines, marked = result["rows"], [], False
    full = means(rows, "full/standard")
    for name in result["config"]["rows"]:
        method, recipe = name.split("/")
        if not (scores := means(rows, name)):
            lines.append([method, recipe, None, "not run", None, None, None])
            continue
        share = f"{np.mean(scores) / np.mean(full):.0%}" if full else ""
        if recipe == "own" and _only_its_own(rows, method):
            method, marked = f"{method} †", True
        by_length = np.mean([first for first, *_ in means(rows, name, "normalized")])
        lines.append([method, recipe, f"{means(rows, name, 'examples')[0]:,}", spread(scores), f"{by_length:.3f}",
                      str(len(scores)), share])
    heads = ["method", "recipe", "examples", "accuracy (mean ± sd)", "length-normalised", "seeds", "of full data"]
    note = ["", "† above random selection by more than the 95 % interval under its own recipe, but not under standard "
            "fine-tuning."]
    return "\n".join([*markdown(heads, lines, "ll"), *(note if marked else ()), *_differences(result)])


def _beats(rows: Mapping, one: str, other: str) -> bool:
    mean, half = paired_difference(rows, one, other)
    return mean > half


def _only_its_own(rows: Mapping, method: str) -> bool:
    own, standard, random = f"{method}/own", f"{method}/standard", "random/standard"
    return {own, standard, random} <= rows.keys() and _beats(rows, own, random) and not _beats(rows, standard, random)


def _differences(result: Mapping) -> list[str]:
    """Lines of the table of paired differences; none where there is nothing to compare."""
    rows, names = result["rows"], result["config"]["rows"]
    learned = [name for name in names if name.startswith(LEARNED) and name in rows]
    selected = [name for name in names if name.split("/")[0] in ALL_METHODS and name in rows]
    if not learned or not selected:
        return []
    lines = []
    for name in learned:
        way = ""
        if {"random/standard", "full/standard"} <= rows.keys():
            gain, most = (paired_difference(rows, one, "random/standard")[0] for one in (name, "full/standard"))
            way = f"{gain / most:.0%}"
        lines.append([name.replace("/", ", "), *(shown(*paired_difference(rows, name, other)) for other in selected), way])
    return ["", "Differences at the same seed, mean ± half of the 95 % interval; above it, one beats the other. The last "
            "column is the share of the way from random selection to the full data.", "",
            *markdown(["minus", *(name.replace("/", ", ") for name in selected), "of the way"], lines)]
