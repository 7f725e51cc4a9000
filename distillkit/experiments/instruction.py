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

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.experts import record_experts
from distillkit.core.inner import AdamW, Unroll
from distillkit.core.metagrad import recommend
from distillkit.core.objectives import BPTT, TrajectoryMatching
from distillkit.core.students import Student, load_student
from distillkit.data.load import load_task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.scoring import choice_accuracy
from distillkit.evaluation.selection import ALL_METHODS, select
from distillkit.experiments.classification import STRATEGIES
from distillkit.experiments.results import SeededRun, Settings, as_json, paired_difference, shown
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.storage import is_vacant
from distillkit.text.projection import NeighborLoss, project

LEARNED = ("nacd", "bptt")
ROWS = (
    "zero-shot/none",
    *(f"{m}/{r}" for m in ALL_METHODS for r in ("standard", "tuned")),
    *(f"{m}/{r}" for m in LEARNED for r in ("own", "standard", "tuned")),
    *(f"{m} text/{r}" for m in LEARNED for r in ("standard", "tuned")),
    "full/standard",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionJob(Settings):
    """Settings of one experiment.

    Args:
        name: of the result file.
        corpus, limit, max_length, student, trainable: as ``load_task`` and ``load_student`` take them.
        fraction: size of every set, as a share of the training split.
        seeds: one distilled or selected set, and order, each.
        expert_count, expert_epochs, expert_step_size, expert_batch, snapshots_per_epoch: of the AdamW experts.
        segment, max_start_epoch: what is matched, in expert epochs.
        unroll_steps, batch_size, step_size: inner loop of both objectives: AdamW, its learned step sizes start there.
        eps_root: ε inside the root of AdamW, students and experts alike.  Where it is small beside the squares of
            gradients, Adam's first steps depend on little but their signs, whose derivative is next to nothing.
        micro_batch: examples of an inner step that are computed at once.
        metagrad: ``"replay"`` or ``"forward_difference"``; None: what :func:`~distillkit.core.metagrad.recommend` names.
        distance: of :class:`~distillkit.core.objectives.TrajectoryMatching`.
        neighbor_weight: of the neighbour term at the end; it grows linearly from 0.
        outer_steps, lr, step_size_lr: outer loop of both objectives.
        outer_batch: real examples an outer step of BPTT.
        rows: which rows, as ``method/recipe``.
        kind: tells this kind of settings from others.
    """

    name: str
    corpus: str
    student: str
    trainable: str | None = None
    limit: int | None = None
    max_length: int = 96
    fraction: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    expert_count: int = 2
    expert_epochs: int = 2
    expert_step_size: float = 1e-3
    expert_batch: int = 64
    snapshots_per_epoch: int = 8
    segment: float = 0.125
    max_start_epoch: float | None = None
    unroll_steps: int = 8
    batch_size: int = 32
    micro_batch: int = 8
    step_size: float = 1e-3
    eps_root: float = 1e-4
    metagrad: str | None = None
    distance: str = "whole"
    neighbor_weight: float = 0.0
    outer_steps: int = 100
    outer_batch: int = 64
    lr: float = 0.003
    step_size_lr: float = 0.1
    rows: tuple[str, ...] = ROWS
    kind: str = "instruction"

    def __post_init__(self):
        self.check_name()
        check_choice("kind", self.kind, ("instruction",))
        if self.metagrad is not None:
            check_choice("metagrad", self.metagrad, STRATEGIES)
        for row in self.rows:
            check_choice("a row", row, ROWS)
        for key in ("max_length", "expert_count", "expert_epochs", "expert_batch", "snapshots_per_epoch", "unroll_steps",
                    "batch_size", "micro_batch", "outer_steps", "outer_batch"):
            check_whole(key, getattr(self, key))
        self.check_positive("fraction", "expert_step_size", "segment", "step_size", "eps_root", "lr", "step_size_lr")
        if not self.seeds or not all(isinstance(s, int) for s in self.seeds):
            raise ValueError(f"seeds must be a list of whole numbers, not {self.seeds!r}")


class InstructionRun(SeededRun):
    """An experiment on instruction tuning under way; see :class:`~distillkit.experiments.results.SeededRun`."""

    job: InstructionJob

    def __init__(self, job: InstructionJob, folder: str | Path, work: str | Path):
        task = load_task(job.corpus, max_length=job.max_length, limit=job.limit)
        super().__init__(job, folder, work, task, load_student(job.student, task, trainable=job.trainable))
        self._adapted: Student | None = None

    def _scored(self, method: str, recipe: str, seed: int) -> dict:
        if method == "zero-shot":
            plain, by_length = choice_accuracy(self.student, self.student.init(seed), self.task, "test")
            return {"mean": round(plain, 6), "normalized": [round(by_length, 6)], "examples": 0, "nbytes": 0, "seconds": 0.0}
        set_ = None if method == "full" else self.set_of(method, seed)
        return as_json(evaluate(set_, self.task, self.student, seeds=(seed,), recipe=recipe))

    def _make(self, method: str, seed: int) -> DistilledSet:
        if method in ALL_METHODS:
            return select(self.task, self._selector(method), method, fraction=self.job.fraction, seed=seed)
        if method.endswith(" text"):
            return project(self.set_of(method.removesuffix(" text"), seed), self.student)
        return self._distilled(method, seed)

    def _selector(self, method: str) -> Student:
        """Who selects: the student itself, for LESS with low-rank adapters, as its paper has it."""
        if method != "less" or self.student.trainable == "lora":
            return self.student
        if self._adapted is None:
            self._adapted = load_student(self.job.student, self.task, trainable="lora")
        return self._adapted

    def _distilled(self, method: str, seed: int) -> DistilledSet:
        folder = self.work / f"{method}-{seed}"
        if not is_vacant(folder):
            return DistilledSet.load(folder)
        distiller = Distiller(
            DistilledSet.from_real(self.task, self.student, fraction=self.job.fraction, seed=seed),
            self.matching(seed) if method == "nacd" else self.bptt(),
            lr=self.job.lr,
            step_size_lr=self.job.step_size_lr,
            regularizers=self._regularizers() if method == "nacd" else (),
            seed=seed,
            checkpoint_dir=self.work / f"checkpoint-{method}-{seed}",
        )
        for _ in distiller.run(self.job.outer_steps):
            pass
        distiller.distilled.save(folder)
        self.result["distilling"][folder.name] = {
            "steps": self.job.outer_steps,
            "seconds": sum(r.seconds for r in distiller.records),
            "terms": {t: [round(r.terms[t], 5) for r in distiller.records] for t in distiller.records[0].terms},
            "step_sizes": [float(f"{s:.4g}") for s in distiller.records[-1].step_sizes],
        }
        return distiller.distilled

    def _regularizers(self) -> tuple:
        end = self.job.neighbor_weight
        return (NeighborLoss(self.student, weight=lambda at: end * at),) if end else ()

    def unroll(self) -> Unroll:
        """The inner loop of both objectives."""
        strategy = STRATEGIES[self.job.metagrad] if self.job.metagrad else recommend(self.student)[0]
        optimizer = AdamW(self.job.step_size, eps_root=self.job.eps_root)
        sizes: dict[str, Any] = {"batch_size": self.job.batch_size, "micro_batch": self.job.micro_batch}
        return Unroll(self.job.unroll_steps, optimizer=optimizer, metagrad=strategy, **sizes)

    def matching(self, seed: int) -> TrajectoryMatching:
        """Trajectory matching against experts of this seed, which are recorded at its first use."""
        job = self.job
        experts = record_experts(
            self.task, self.student, self.work / f"experts-{seed}", count=job.expert_count, epochs=job.expert_epochs,
            optimizer=AdamW(job.expert_step_size, eps_root=job.eps_root), batch_size=job.expert_batch, micro_batch=16,
            snapshots_per_epoch=job.snapshots_per_epoch, seed=seed,
        )
        return TrajectoryMatching(
            self.task, self.student, self.unroll(), experts, expert_epochs=job.segment, distance=job.distance,
            max_start_epoch=job.max_start_epoch,
        )

    def bptt(self) -> BPTT:
        """The loss on real data after the inner loop."""
        return BPTT(self.task, self.student, self.unroll(), batch_size=self.job.outer_batch)


def instruction_table(result: dict) -> str:
    """The result as two Markdown tables: the scores, and how learned sets compare with selected ones, seed by seed."""
    lines = [
        "| method | recipe | examples | accuracy (mean ± sd) | length-normalised | seeds | of full data |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    rows, marked = result["rows"], []
    full = [row["mean"] for row in rows.get("full/standard", {}).values()]
    for name in result["config"]["rows"]:
        method, recipe = name.split("/")
        found = list(rows.get(name, {}).values())
        if not found:
            lines.append(f"| {method} | {recipe} | | not run | | | |")
            continue
        scores, by_length = ([f(row) for row in found] for f in (lambda r: r["mean"], lambda r: r["normalized"][0]))
        spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
        share = f"{np.mean(scores) / np.mean(full):.0%}" if full else ""
        if recipe == "own" and _only_its_own(rows, method):
            method += " †"
            marked.append(method)
        lines.append(f"| {method} | {recipe} | {found[0]['examples']:,} | {np.mean(scores):.3f}{spread} | "
                     f"{np.mean(by_length):.3f} | {len(scores)} | {share} |")
    if marked:
        lines += ["", "† above random selection by more than the 95 % interval under its own recipe, but not under "
                  "standard fine-tuning."]
    return "\n".join([*lines, *_differences(result)])


def _beats(rows: dict, one: str, other: str) -> bool:
    mean, half = paired_difference(rows, one, other)
    return mean > half


def _only_its_own(rows: dict, method: str) -> bool:
    own, standard, random = f"{method}/own", f"{method}/standard", "random/standard"
    return {own, standard, random} <= rows.keys() and _beats(rows, own, random) and not _beats(rows, standard, random)


def _differences(result: dict) -> list[str]:
    """Lines of the table of paired differences; none where there is nothing to compare."""
    rows, names = result["rows"], result["config"]["rows"]
    learned = [name for name in names if name.startswith(LEARNED) and name in rows]
    selected = [name for name in names if name.split("/")[0] in ALL_METHODS and name in rows]
    if not learned or not selected:
        return []
    lines = ["", "Differences at the same seed, mean ± half of the 95 % interval; above it, one beats the other. The last "
             "column is the share of the way from random selection to the full data.", "",
             f"| minus | {' | '.join(name.replace('/', ', ') for name in selected)} | of the way |",
             "|---|" + "---:|" * (len(selected) + 1)]
    for name in learned:
        cells = [shown(*paired_difference(rows, name, other)) for other in selected]
        way = ""
        if {"random/standard", "full/standard"} <= rows.keys():
            gain, most = (paired_difference(rows, one, "random/standard")[0] for one in (name, "full/standard"))
            way = f"{gain / most:.0%}"
        lines.append(f"| {name.replace('/', ', ')} | {' | '.join(cells)} | {way} |")
    return lines
