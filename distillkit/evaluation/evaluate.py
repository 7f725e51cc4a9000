"""Honest scores: train fresh students on a set, score them on held-out real data.

A score belongs to a *recipe*, so every :class:`Evaluation` names its own:

* ``"own"``: the recipe stored with a distilled set, its learned step sizes included.
* ``"standard"``: AdamW fine-tuning with published settings: step size 5e-5, batches of 32, three epochs, weight decay
  0.01 (Devlin et al., 2019), linear warm-up over a tenth of the steps and linear decay; and at least 200 steps, since
  three epochs of a few examples train nothing (Mosbach et al., 2021).  Language models: 2e-4 for LoRA (Dettmers et al.,
  2023), and 1e-3 for all parameters of models as small as the offline ones, and at least 60 steps, which is our choice.
* ``"tuned"``: AdamW at the best point of one grid (:data:`GRID`; :data:`LANGUAGE_GRID` for language models), judged on
  the validation split, the same grid for every set.  It is how a set without a recipe, such as selected real sentences,
  gets a fair chance.

Classification is scored by the largest logit.  Multiple choice is scored as ARC and MMLU are: the choice that the model
gives the highest log-likelihood after the prompt, and beside it the same divided by the choice's number of characters; of
choices that read the same, any is right if one is.  Where a row has no choices there is no accuracy, and the score is the
loss of the responses: the mean negative log-likelihood of a response token, and its exponential, the perplexity.

Initialisations for scoring, for tuning and for distilling come from disjoint seed streams.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import AdamW, Optimizer, Part, Unroll, described, from_recipe, inner_step, set_parts
from distillkit.core.objectives import bound_step_sizes
from distillkit.core.students import Params, Student
from distillkit.data.tasks import NO_TARGET, Task
from distillkit.io.checks import check_is, check_seeds
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator

if TYPE_CHECKING:
    from distillkit.data.instruction import InstructionTask

STANDARD = AdamW(step_size=5e-5, weight_decay=0.01)
STANDARD_LANGUAGE = {"lora": 2e-4, "full": 1e-3, "head": 1e-3}
STANDARD_EPOCHS, STANDARD_BATCH = 3, 32
# A language model that knows its subject loses more than it gains by many passes over a few pairs.
STANDARD_LEAST_STEPS = {"classification": 200, "instruction": 60}
_BATCHES: dict[str, Any] = {"batch_size": STANDARD_BATCH, "micro_batch": 16}  # 16 of like length at a time: less padding
GRID = {"step_size": (1e-4, 3e-4, 1e-3), "steps": (10, 30, 60)}
LANGUAGE_GRID = {"step_size": (3e-4, 1e-3, 3e-3), "steps": (30, 60, 120)}
TUNING_SEEDS, TUNING_ROWS = 2, 300

Feed = Callable[[int], Iterable[Part]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a set is worth under one recipe.

    Accuracy is told of classes and of multiple choice.  Where the scored split has rows without choices, ``losses`` is told
    instead, ``mean``, ``std`` and each of ``scores`` are nan, and ``groups`` is empty.

    Attributes:
        mean, std: accuracy over the seeds, std with n − 1 (nan for one seed).
        scores: one accuracy a seed.
        groups: accuracy by class, or by kind of question or subject, mean over the seeds.
        seconds: one training run, scoring not counted, mean over the seeds.
        flops: floating-point operations of one training run.
        examples, nbytes: size of what was trained on.
        recipe: how it was trained, as JSON values.
        normalized: multiple choice by length-normalised log-likelihood, one accuracy a seed; None where there is none.
        losses: where there are no choices: mean negative log-likelihood (nats) of the split's response tokens, one value a
            seed; else None.
    """

    mean: float
    std: float
    scores: tuple[float, ...]
    groups: dict[str, float]
    seconds: float
    flops: int
    examples: int
    nbytes: int
    recipe: dict
    normalized: tuple[float, ...] | None = None
    losses: tuple[float, ...] | None = None

    @property
    def loss(self) -> float | None:
        """The mean of ``losses``."""
        return None if self.losses is None else float(np.mean(self.losses))

    @property
    def perplexity(self) -> float | None:
        """e to the power of ``loss``."""
        return None if self.losses is None else float(np.exp(np.mean(self.losses)))

    @property
    def worth(self) -> float:
        """What to compare evaluations on one split by, the higher the better: accuracy, or minus the loss of the responses."""
        return self.mean if self.losses is None else -float(np.mean(self.losses))

    def score_text(self) -> str:
        """The score in words: mean ± std, without std for a single seed."""
        if self.losses is None:
            return f"{self.mean:.3f}" + (f" ± {self.std:.3f}" if len(self.scores) > 1 else "")
        spread = f" ± {np.std(self.losses, ddof=1):.3f}" if len(self.losses) > 1 else ""
        return f"response loss {self.loss:.3f}{spread}, perplexity {self.perplexity:.3g}"

    def __str__(self) -> str:
        score = f"{self.mean:.3f} ± {self.std:.3f}" if self.losses is None else self.score_text()
        return f"{score} (n={len(self.scores)}, {self.recipe['name']})"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A training run: optimiser, its step size at each step, and what each step sees."""

    optimizer: Optimizer
    step_sizes: Tensor
    feed: Feed
    recipe: dict

    def train(self, student: Student, params: Params) -> Iterator[Params]:
        """Parameters after each step, which the next one may overwrite: take what is needed of them before."""
        state = self.optimizer.init(params)
        for t, step_size in enumerate(self.step_sizes):
            params, state, *_ = inner_step(student, self.optimizer, params, state, self.feed(t), step_size, in_place=True)
            yield params


def evaluate(
    distilled: DistilledSet | None,
    task: Task,
    student: Student,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: str | Unroll | None = None,
    split: str = "test",
) -> Evaluation:
    """Train a fresh student per seed on the set, score each on ``split``.

    The score is accuracy, or the loss of the responses where an instruction task has rows without choices.

    Args:
        distilled: the set; None trains on the task's whole training split (recipe ``"standard"``).
        seeds: one fresh initialisation each.
        recipe: ``"own"``, ``"standard"``, ``"tuned"``, or an :class:`Unroll` whose optimiser and steps to use (with its
            own constant step size).  Default: own where one is stored, else tuned.
        split: ``"test"``, ``"validation"`` or ``"train"``.

    Raises:
        ValueError: ``"own"`` for a set without a recipe, an unknown recipe or split, no seeds, another model's embeddings,
            classes of other names.  The same names in another order are told by their names.
    """
    if distilled is not None:
        check_is("distilled", distilled, DistilledSet)
    check_is("task", task, Task)
    check_is("student", student, Student)
    check_seeds("seeds", tuple(seeds) if isinstance(seeds, range) else seeds)
    student = student.for_task(task)
    distilled = None if distilled is None else distilled.for_student(student)
    task.split(split)  # a name that is none is an error before anything is trained
    plan_for = _planner(distilled, task, student, recipe)
    runs, seconds = [], []
    grade = _graded if _has_choices(task, split) else response_loss
    for seed in progress(seeds, desc="evaluating", unit="run", leave=False):
        plan = plan_for(seed)
        start = student.init(derive_seed("evaluate-init", seed))
        begun = time.perf_counter()
        *_, params = collections.deque(plan.train(student, start), maxlen=1)
        seconds.append(time.perf_counter() - begun)
        runs.append(grade(student, params, task, split))
    return Evaluation(
        **(_accuracies(task, split, runs) if grade is _graded else _without_accuracy(runs)),
        seconds=float(np.mean(seconds)),
        flops=_flops(plan, student),
        examples=len(task.train) if distilled is None else len(distilled),
        nbytes=_text_bytes(task) if distilled is None else distilled.nbytes,
        recipe=plan.recipe,
    )


def _has_choices(task: Task, split: str) -> bool:
    """Whether there is an accuracy: of classes, and of rows that all have choices."""
    return task.kind == "classification" or not len(cast("InstructionTask", task).without_choices(split))


def _accuracies(task: Task, split: str, runs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The scores of an :class:`Evaluation` from what :func:`_graded` says of each run."""
    plain, by_length = zip(*runs, strict=True)
    scores = [float(right.mean()) for right in plain]
    names, of_row = _groups(task, split)
    groups = [[float(right[of_row == g].mean()) for g in range(len(names))] for right in plain]
    return {
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else float("nan"),
        "scores": tuple(scores),
        "groups": dict(zip(names, np.mean(groups, axis=0).tolist(), strict=True)),
        "normalized": tuple(float(right.mean()) for right in by_length) if task.kind == "instruction" else None,
    }


def _without_accuracy(losses: list[float]) -> dict[str, Any]:
    nan = float("nan")
    return {"mean": nan, "std": nan, "scores": (nan,) * len(losses), "groups": {}, "losses": tuple(losses)}


def _groups(task: Task, split: str) -> tuple[list[str], np.ndarray]:
    """Names of what scores are told apart by, and which of them each row belongs to."""
    if task.kind == "classification":
        return list(task.classes), task.labels(split)
    column = task.split(split)["group"][:]
    names = list(dict.fromkeys(column))
    return names, np.array([names.index(name) for name in column])


def _text_bytes(task: Task) -> int:
    columns = ("text",) if task.kind == "classification" else ("prompt", "response")
    return sum(len(text.encode()) for column in columns for text in task.train[column])


def _planner(distilled, task, student, recipe) -> Callable[[int], _Plan]:
    """Settle on a recipe; returns seed → plan.

    The seed decides the order of the full data, that of a set under recipes it was not distilled with, and dropout masks.
    """
    if distilled is None:
        if recipe not in (None, "standard"):
            raise ValueError(f"the full training split is trained on by recipe='standard' only, not {recipe!r}")
        return lambda seed: _full_data(task, student, seed)
    if recipe is None:
        recipe = "own" if "recipe" in distilled.meta else "tuned"
    if isinstance(recipe, Unroll):
        return lambda seed: _constant(distilled, student, recipe, "unroll", seed)
    if recipe == "own":
        _own(distilled, student, 0)  # a set without a recipe is an error before anything is trained
        return lambda seed: _own(distilled, student, seed)
    if recipe == "standard":
        return lambda seed: _standard(distilled, student, seed)
    if recipe == "tuned":
        return _tuned(distilled, task, student)
    raise ValueError(f"recipe must be 'own', 'standard', 'tuned' or an Unroll, not {recipe!r}")


def _set_feed(distilled: DistilledSet, student: Student, unroll: Unroll, seed: int, order: int = 0) -> Feed:
    embeds = distilled.embeds.to(student.device, student.dtype)
    targets = distilled.targets.to(student.device, student.dtype if distilled.soft else None)
    mask, rows = distilled.mask.to(student.device), unroll.rows(len(distilled), order)
    masks = derive_seed("evaluate-dropout", seed)

    def feed(t: int):
        dropout = (masks, t) if unroll.dropout else None
        return set_parts(rows[t], embeds, mask, targets, micro_batch=unroll.micro_batch, dropout=dropout)

    return feed


def _own(distilled: DistilledSet, student: Student, seed: int) -> _Plan:
    if "recipe" not in distilled.meta:
        raise ValueError(
            "recipe='own' asked for, but this set carries none (it was selected, not distilled); use 'tuned' or 'standard'"
        )
    stored = distilled.meta["recipe"]
    if stored.get("trainable", student.trainable) != student.trainable:
        raise ValueError(
            f"recipe='own' trains {stored['trainable']!r} parameters, the student was loaded with "
            f"trainable={student.trainable!r}; load it as the set wants it, or choose another recipe"
        )
    unroll = from_recipe(stored)
    feed = _set_feed(distilled, student, unroll, seed)
    sizes = bound_step_sizes(distilled, unroll, student)
    return _Plan(unroll.optimizer, sizes, feed, {"name": "own", "step_sizes": sizes.tolist(), **unroll.recipe()})


def _constant(distilled: DistilledSet, student: Student, unroll: Unroll, name: str, seed: int = 0, order: int = 0) -> _Plan:
    sizes = bound_step_sizes(dataclasses.replace(distilled, step_sizes=None), unroll, student)
    feed = _set_feed(distilled, student, unroll, seed, order)
    return _Plan(unroll.optimizer, sizes, feed, {"name": name, **unroll.recipe()})


def _warm_up_and_decay(steps: int, step_size: float) -> Tensor:
    t = torch.arange(1, steps + 1, dtype=torch.float32)
    warm = max(1, steps // 10)
    return step_size * torch.minimum(t / warm, (steps + 1 - t) / (steps + 1 - warm))


def _standard_optimizer(student: Student) -> AdamW:
    if student.kind == "classification":
        return STANDARD
    return dataclasses.replace(STANDARD, step_size=STANDARD_LANGUAGE[student.trainable])


def _standard_steps(examples: int, student: Student) -> int:
    return max(STANDARD_EPOCHS * -(-examples // STANDARD_BATCH), STANDARD_LEAST_STEPS[student.kind])


def _standard_recipe(steps: int, optimizer: AdamW) -> dict:
    return {
        "name": "standard",
        "steps": steps,
        "optimizer": described(optimizer),
        "batch_size": STANDARD_BATCH,
        "schedule": "linear warm-up over 10 % of the steps, linear decay",
    }


def _standard(distilled: DistilledSet, student: Student, seed: int) -> _Plan:
    steps = _standard_steps(len(distilled), student)
    unroll = Unroll(steps, **_BATCHES)
    feed = _set_feed(distilled, student, unroll, seed, order=seed)
    optimizer = _standard_optimizer(student)
    return _Plan(optimizer, _warm_up_and_decay(steps, optimizer.step_size), feed, _standard_recipe(steps, optimizer))


def _grouped_by_length(order: Tensor, lengths: Tensor, draw: torch.Generator) -> list[Tensor]:
    """Batches of one pass in random order, each of rows of like length among 16 batches' worth: little padding."""
    batches = []
    for pool in order.split(16 * STANDARD_BATCH):
        batches += pool[lengths[pool].argsort(stable=True)].split(STANDARD_BATCH)
    return [batches[i] for i in torch.randperm(len(batches), generator=draw)]


def _full_data(task: Task, student: Student, seed: int) -> _Plan:
    n = len(task.split("train"))
    steps = _standard_steps(n, student)
    draw, rows = generator("full-data-order", seed), []
    lengths = torch.tensor([len(ids) for ids in task.token_ids(student.tokenizer, "train")])
    while len(rows) < steps:
        rows += _grouped_by_length(torch.randperm(n, generator=draw), lengths, draw)

    def feed(t: int):
        batch = task.batch(student.tokenizer, "train", rows[t])
        return [(1.0, batch, batch["labels"].to(student.device), None)]

    optimizer = _standard_optimizer(student)
    return _Plan(optimizer, _warm_up_and_decay(steps, optimizer.step_size), feed, _standard_recipe(steps, optimizer))


def _tuned(distilled: DistilledSet, task: Task, student: Student) -> Callable[[int], _Plan]:
    """Seed → plan of the grid point with the best mean validation accuracy, or the lowest mean loss where the validation split
    has rows without choices; a tie goes to the cheaper one."""
    rows = task.balanced_rows("validation", min(TUNING_ROWS, len(task.validation)), generator("tune-rows", 0))
    grid = GRID if student.kind == "classification" else LANGUAGE_GRID
    with_choices = _has_choices(task, "validation")
    worth: dict[tuple[int, float], list[float]] = {}
    for step_size in progress(grid["step_size"], desc="tuning", unit="step size", leave=False):
        unroll = Unroll(max(grid["steps"]), optimizer=AdamW(step_size), **_BATCHES)
        plan = _constant(distilled, student, unroll, "tuned")
        for seed in range(TUNING_SEEDS if student.draws else 1):  # or all would be the same run
            params = student.init(derive_seed("tune-init", seed))
            # One run passes through all step counts of the grid, as the step size is constant.
            for steps, trained in enumerate(plan.train(student, params), start=1):
                if steps in grid["steps"]:
                    score = (_graded(student, trained, task, "validation", rows)[0].mean() if with_choices
                             else -response_loss(student, trained, task, "validation", rows))
                    worth.setdefault((steps, step_size), []).append(float(score))
    means = {point: round(float(np.mean(values)), 6) for point, values in worth.items()}
    best = max(means, key=lambda point: (-math.inf if math.isnan(means[point]) else means[point], -point[0], -point[1]))
    unroll = Unroll(best[0], optimizer=AdamW(best[1]), **_BATCHES)
    noted = float(np.mean(worth[best]))
    judged = {"grid": {k: list(v) for k, v in grid.items()},
              **({"validation": noted} if with_choices else {"validation_loss": -noted})}

    def plan_for(seed: int) -> _Plan:
        plan = _constant(distilled, student, unroll, "tuned", order=seed)
        return dataclasses.replace(plan, recipe={**plan.recipe, **judged})

    return plan_for


def _graded(student: Student, params: Params, task: Task, split: str, rows=None) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row (default: all of the split) is answered rightly, plainly and by length: ``[n]`` bool each."""
    rows = np.arange(len(task.split(split))) if rows is None else np.asarray(rows)
    if task.kind == "classification":
        right = _correct(student, params, task, split, rows)
        return right, right
    questions = cast("InstructionTask", task)
    questions.check_choices(split, rows)
    # A model that gives no choice a finite score has answered nothing, not the first choice.
    picks = ([np.argmax(s) if np.isfinite(s).any() else -1 for s in scores]
             for scores in choice_scores(student, params, task, split, rows))
    plain, by_length = (questions.are_right(split, rows, chosen) for chosen in picks)
    return plain, by_length


def response_loss(
    student: Student, params: Params, task: Task, split: str, rows: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 16,
) -> float:
    """Mean negative log-likelihood (nats) of a response token after its prompt, over all tokens of the responses.

    Args:
        rows: of the split; default: all.
        batch_size: rows at a time.
    """
    questions, tokenizer = cast("InstructionTask", task), student.tokenizer
    rows = range(len(task.split(split))) if rows is None else rows
    sizes = {int(row): len(questions.response_ids(tokenizer, split)[int(row)]) for row in rows}
    total = 0.0
    with torch.no_grad():
        for part in _by_size([int(row) for row in rows], sizes.__getitem__, batch_size):
            batch = task.batch(tokenizer, split, part)
            total -= student.log_likelihood(params, batch, batch["labels"]).double().sum().item()
    return total / sum(sizes[int(row)] for row in rows)


def choice_accuracy(student: Student, params: Params, task: Task, split: str) -> tuple[float, float]:
    """Share of a split's multiple-choice rows that ``params`` answer rightly, plainly and by length.

    Raises:
        ValueError: rows without choices.
    """
    plain, by_length = _graded(student, params, task, split)
    return float(plain.mean()), float(by_length.mean())


def choice_scores(
    student: Student, params: Params, task: Task, split: str, rows: Sequence[int] | np.ndarray, batch_size: int = 256
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-likelihood of each choice of each row after its prompt, and the same per character of the choice.

    Args:
        rows: of the split.
        batch_size: choices at a time (rows, where each choice is a single token).

    Returns:
        for each row an array with an entry a choice, twice; a NaN counts as −∞.
    """
    tokenizer, choices = student.tokenizer, task.split(split)["choices"]
    offered = [cast("InstructionTask", task).choice_ids(tokenizer, split, int(row)) for row in rows]
    found = [np.empty(len(ids)) for ids in offered]
    sizes = [len(task.token_ids(tokenizer, split)[int(row)]) for row in rows]
    # Where every choice is a single token, the prompt is read once and tells of all of them.
    single = [place for place, ids in enumerate(offered) if all(len(choice) == 1 for choice in ids)]
    others = [(place, i) for place in sorted({*range(len(rows))} - {*single}) for i in range(len(offered[place]))]
    with torch.no_grad():
        for part in _by_size(single, lambda place: sizes[place], batch_size):
            batch = task.batch(tokenizer, split, [int(rows[place]) for place in part])
            scores = student.next_token(params, batch).double().cpu().numpy()
            for place, of_token in zip(part, scores, strict=True):
                found[place][:] = [of_token[token] for (token,) in offered[place]]
        for part in _by_size(others, lambda item: sizes[item[0]] + len(offered[item[0]][item[1]]), batch_size):
            batch = task.batch(tokenizer, split, [int(rows[place]) for place, _ in part])
            said = [torch.tensor(offered[place][i]) for place, i in part]
            said = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=NO_TARGET)
            scores = student.log_likelihood(params, batch, said).sum(1).double().cpu().numpy()
            for (place, i), score in zip(part, scores, strict=True):
                found[place][i] = score
    plain = [np.nan_to_num(scores, nan=-np.inf, neginf=-np.inf) for scores in found]
    by_length = [s / [len(choice) for choice in choices[int(row)]] for s, row in zip(plain, rows, strict=True)]
    return plain, by_length


def _by_size(items: list, size: Callable, batch_size: int) -> Iterator[list]:
    """Batches of items of like size."""
    items = sorted(items, key=size)
    yield from (items[i : i + batch_size] for i in range(0, len(items), batch_size))


def _correct(student: Student, params: Params, task: Task, split: str, rows=None, batch_size: int = 256) -> np.ndarray:
    """Whether each row (default: all of the split) is classified rightly: ``[n]`` bool."""
    lengths = np.array([len(i) for i in task.token_ids(student.tokenizer, split)])
    rows = np.arange(len(lengths)) if rows is None else np.asarray(rows)
    right = np.zeros(len(rows), dtype=bool)
    order = np.argsort(lengths[rows], kind="stable")  # rows of like length together: little padding
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            where = order[start : start + batch_size]
            batch = task.batch(student.tokenizer, split, rows[where])
            logits = student.logits(params, batch).cpu()
            hit = (logits.argmax(-1) == batch["labels"]) & ~logits.isnan().any(-1)  # as Task.accuracy judges
            right[where] = hit.numpy()
    return right


def flop_counter() -> FlopCounterMode:
    """A counter of floating-point operations in total, forward and backward."""
    counter, total_only = FlopCounterMode(display=False), cast("Any", contextlib.nullcontext())
    # Counts by module need hooks on every module's inputs, which fail where an input is a parameter (DeBERTa's positions).
    total_only.parents = {"Global"}
    counter.mod_tracker = total_only
    return counter


def _flops(plan: _Plan, student: Student) -> int:
    """Operations of a training run, counted on up to eight of its steps, evenly spaced."""
    params, steps = student.init(0), len(plan.step_sizes)
    sample = range(0, steps, -(-steps // 8))
    with flop_counter() as counter:
        for t in sample:
            inner_step(student, plan.optimizer, params, plan.optimizer.init(params), plan.feed(t), plan.step_sizes[t])
    return counter.get_total_flops() * steps // len(sample)
