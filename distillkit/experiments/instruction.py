"""Instruction tuning on a fraction of the data: distilled by two objectives, selected by four methods, and all of it.

One *seed* of this experiment is everything anew: another distilled or selected set, in another order.  So the scores of two
methods at the same seed are paired, and a method beats another when the mean of the paired differences lies above its 95 %
interval.

Methods:

* ``zero-shot``: the model as it is; ``full``: the whole training split, standard fine-tuning.
* ``random``, ``k_center``, ``herding``, ``less``: real examples (:mod:`distillkit.evaluation.selection`).
* ``nacd``: prompts learned by trajectory matching with the neighbour term (Yao et al., 2025); ``nacd text``: their nearest
  tokens.
* ``chosen pairs``: real examples, exchanged while that lowers the loss of trajectory matching
  (:func:`~distillkit.text.sentences.search_pairs`).
* ``nacd vectors``: those pairs, of which only the first few tokens of each prompt are learned, as ``nacd``.
* ``bptt``: prompts learned through the loss on real data instead, at the same size; ``bptt text``: their nearest tokens.

Each is scored under ``standard`` fine-tuning and under the ``tuned`` grid, and distilled sets under their ``own`` recipe
too, since a set may be good for the recipe it was distilled with only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from distillkit.core.distilled import DistilledSet
from distillkit.core.experts import record_experts
from distillkit.core.loading import load_student
from distillkit.core.objectives import BPTT, TrajectoryMatching
from distillkit.core.optimizers import AdamW
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.scoring import answered
from distillkit.evaluation.selection import REAL_METHODS
from distillkit.experiments.building import load_corpus, strategy, unroll_of
from distillkit.experiments.results import (
    also_column,
    beats,
    by_row,
    by_set,
    gain,
    markdown,
    number,
    of_the_corpus,
    paired_difference,
    rounded,
    spread,
)
from distillkit.experiments.runner import Cell, Scores
from distillkit.experiments.settings import (
    Data,
    Experiment,
    Expert,
    Inner,
    Neighbor,
    Number,
    Outer,
    Recipes,
    SetSeeds,
    Size,
    option,
    positive,
    settings,
    whole,
)
from distillkit.text.sentences import search_pairs

LEARNED, PAIRS, VECTORS = ("nacd", "bptt"), "chosen pairs", "nacd vectors"
FURTHER_LENGTH = 512  # tokens of a question of a further corpus
RANDOM, FULL, ZERO = "random/standard", "full/standard", "zero-shot/none"
ROWS = (
    ZERO,
    *(f"{m}/{r}" for m in REAL_METHODS for r in ("standard", "tuned")),
    *(f"{m}/{r}" for m in (*LEARNED, VECTORS) for r in ("own", "standard", "tuned")),
    *(f"{m}/{r}" for m in (PAIRS, *(f"{m} text" for m in LEARNED)) for r in ("standard", "tuned")),
    FULL,
)


@settings(
    kind="instruction", rows=ROWS, max_length=96, fraction=0.05, seeds=(0, 1, 2, 3, 4), expert_count=2, expert_epochs=2,
    expert_batch=64, snapshots_per_epoch=8, match_epochs=0.125, unroll_steps=8, inner_batch=32, step_size=1e-3, outer_batch=64,
    lr=0.003, step_size_lr=0.1,
)
class InstructionJob(Experiment, Data, Size, Expert, Inner, Outer, Neighbor, SetSeeds, Recipes):
    """Settings of one experiment.

    ``eps_root`` is inside the root of AdamW, of students and experts alike.  Where it is small beside the squares of
    gradients, Adam's first steps depend on little but their signs, whose derivative is next to nothing.
    """

    max_start_epoch: Number | None = option(None, "last epoch of an expert's path that a matched segment may begin with")
    micro_batch: int = whole(8, "examples of an inner step that are computed at once")
    eps_root: float = positive(1e-4, "ε inside the root of AdamW")
    distance: str = option("whole", "distance of trajectory matching")
    pair_steps: int = whole(30, "exchanges that the search for chosen pairs tries")
    prompt_vectors: int = whole(8, "learned tokens of each prompt in the row 'nacd vectors'")
    also: tuple[str, ...] = option((), "further corpora of multiple choice, such as mmlu, that the same students answer")
    also_limit: int | None = whole(None, "test questions of each of them (default: all)")

    def seeds_of(self, row: str) -> tuple[int, ...]:
        """The seeds of the sets of a row: one for the model as it is, which nothing changes."""
        return self.seeds[:1] if row == ZERO else self.seeds

    def further_data(self, longest: int = FURTHER_LENGTH) -> list[Data]:
        """The settings that load the further corpora; questions are cut to ``longest`` tokens."""
        limit = None if self.also_limit is None else {"test": self.also_limit}
        return [Data(name=self.name, corpus=name, student=self.student, max_length=longest, limit=limit) for name in self.also]


class InstructionCell(Cell):
    """An experiment on instruction tuning."""

    projected = {f"{method} text": method for method in LEARNED}

    @functools.cached_property
    def further(self) -> tuple[Task, ...]:
        """The further corpora that students answer."""
        return tuple(map(load_corpus, self.job.further_data(min(FURTHER_LENGTH, self.student.max_positions))))

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        if method == "zero-shot":
            start = self.student.init(seed)
            plain, by_length = (float(right.mean()) for right in answered(self.student, start, self.task, "test"))
            score = {"init_seed": seed, "accuracy": rounded(plain), "normalized": rounded(by_length)}
            for task in self.further:
                score[also_column(task.name)] = rounded(float(answered(self.student, start, task, "test")[0].mean()))
            return [score | {"examples": 0, "nbytes": 0, "seconds": 0.0}], {}
        return self.evaluated(None if method == "full" else self.set_of(method, seed), recipe, (seed,), also=self.further)

    def selector(self, method: str) -> Student:
        """The student itself; for LESS with low-rank adapters, as its paper has it."""
        adapted = method == "less" and self.student.trainable != "lora"
        return load_student(self.job.student, self.task, trainable="lora") if adapted else self.student

    def create(self, method: str, seed: int) -> DistilledSet:
        if method == PAIRS:
            return search_pairs(self.start(seed), self.task, self.student, self.matching(seed), steps=self.job.pair_steps,
                                length=self.job.length, seed=seed)
        if method not in ("nacd", VECTORS):
            return super().create(method, seed)
        vectors = method == VECTORS
        start = self.set_of(PAIRS, seed).with_prompt_vectors(self.job.prompt_vectors) if vectors else self.start(seed)
        return self.distil(method, seed, start, self.matching(seed), regularizers=self.neighbor_terms())

    def objective(self, *args, **unroll) -> BPTT:
        return super().objective(*args, **self._training(), **unroll)

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

    def _training(self) -> dict:
        return {"optimizer": AdamW(self.job.step_size, eps_root=self.job.eps_root), "micro_batch": self.job.micro_batch}


def instruction_table(result: Mapping) -> str:
    """The result as two Markdown tables: the scores, and how learned sets compare with selected ones, seed by seed."""
    sets, by_length, rows, lines = by_set(result), by_set(result, "normalized").mean(axis=1), by_row(result), []
    further = {name: by_set(result, also_column(name)) for name in result["config"].get("also", ())}
    scored, (zero, full) = sets.dropna(how="all"), rows["mean"].reindex([ZERO, FULL])
    cell = next(iter(result["cells"].values()), {})
    marked = [f"{method}/own" for method in LEARNED if beats(sets, f"{method}/own", RANDOM)
              and f"{method}/standard" in scored.index and not beats(sets, f"{method}/standard", RANDOM)]
    for row in rows.dropna(subset="mean").itertuples():  # what has not run is not in the table
        method, recipe = row.Index.split("/")
        lines.append([method + " †" * (row.Index in marked), recipe, number(row.examples, ",.0f"),
                      number(row.nbytes, ",.0f"), of_the_corpus(math.nan if row.Index in (ZERO, FULL) else row.nbytes, cell),
                      spread(sets.loc[row.Index]), number(by_length[row.Index], ".3f"),
                      *(spread(scores.loc[row.Index]) for scores in further.values()), number(row.size, ".0f"),
                      number((row.mean - zero) / ((full - zero) or math.nan), ".0%")])
    heads = ["method", "recipe", "examples", "bytes", "of the compressed corpus", "accuracy (mean ± sd)",
             "length-normalised", *map(also_column, further), "seeds", "of the way"]
    note = ("\n\n*Of the way*: the share of the way from the model as it is (zero-shot) to the full data." +
            ("\n\n† above random selection by more than the 95 % interval under its own recipe, but not under standard "
             "fine-tuning." if marked else ""))
    return markdown(heads, lines, "ll") + note + _differences(scored)


def _differences(sets) -> str:
    """The table of paired differences; nothing where there is nothing to compare."""
    learned = [name for name in sets.index if name.startswith((*LEARNED, PAIRS))]
    selected = [name for name in sets.index if name.split("/")[0] in REAL_METHODS]
    if not learned or not selected:
        return ""
    lines = [[name.replace("/", ", "), *(gain(sets, name, other) for other in selected)] for name in learned]
    table = markdown(["minus", *(name.replace("/", ", ") for name in selected)], lines)
    pairs = [(name, other) for name in learned for other in selected
             if math.isfinite(paired_difference(sets, name, other)[1])]  # of one set alone there is no interval
    sure = [f"{name} over {other}" for name, other in pairs if beats(sets, name, other, len(pairs))]
    note = (f"\n\nCorrected for these {len(pairs)} comparisons together (Bonferroni), the interval lies above 0 for: "
            f"{'; '.join(sure) or 'none'}.") if pairs else ""
    return ("\n\nDifferences at the same seed, mean ± half of the 95 % interval of each by itself, not "
            f"corrected.\n\n{table}{note}")
