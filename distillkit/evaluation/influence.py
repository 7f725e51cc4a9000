"""Influence: which training examples, trained on next, would lower the loss on validation examples the most.

A step of Adam on a single example z moves the parameters by −η Γ(z).  To first order it lowers the loss on validation
examples by η ⟨∇ℓ(D_val), Γ(z)⟩.  LESS (Xia et al., 2024, "LESS: Selecting influential data for targeted instruction
tuning") makes a selection rule of that:

1. Warm up on a random part of the training split, with a checkpoint i at the end of each epoch.
2. At each checkpoint take Γ(z, θ_i), one Adam step's direction on each training example, and the plain mean gradient of
   each validation subtask j; project both at random to a few thousand numbers (:func:`sparse_projection`).
3. Influence of z on j = Σ_i η̄_i cos(∇ℓ(D_val,j; θ_i), Γ(z, θ_i)), with η̄_i the mean step size of epoch i.
   The cosine keeps short examples, whose gradients are large, from winning by their length.
4. Each subtask in turn takes the unused example with the highest influence on it (``round_robin`` in
   :mod:`distillkit.evaluation.selection`).  The paper takes the examples whose highest influence on any subtask is largest,
   which can serve one subtask alone; greedy round-robin selects better at low budgets (arXiv 2602.14696).

Subtasks of an instruction task are the answers of its validation split, where these are a few that repeat, else the values of
its column ``group``.  Classification needs none: a selection takes equally many rows of each class.  Within a class, a row's
influence on the class's own validation rows is mostly the pull towards that class, right or wrong.  With a fifth of 480
docstrings under a wrong label, a warmed-up MiniLM with adapters put a rightly labelled one before a wrong one of its class with
probability 0.80 by one subtask, and 0.60 by one subtask per class.

The paper trains LoRA adapters only.  This module takes the gradients of all that the student trains: load it with
``trainable="lora"`` for the paper's method.  With ``"full"`` every example costs a gradient of all parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distillkit.core.experts import real_parts
from distillkit.core.inner import inner_step, loss_and_grads
from distillkit.core.optimizers import AdamW, State
from distillkit.core.student import Batch, Params, Student
from distillkit.data.tasks import Task
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator

BLOCK = 1 << 13  # coordinates of a projection that share a random stream
ROWS = 16  # examples whose activations, or whose gradients, are alive at a time
MOST_ANSWERS = 32  # different answers of a split that count as groups
NUMBERS = 1 << 26  # entries of per-example gradients that are alive at a time, where one example has no more


def _flat(values: Params) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


# --- projection ------------------------------------------------------------------------------------------------------


def sparse_projection(x: Tensor, dim_out: int, *, seed: int) -> Tensor:
    """A random linear map of the rows of ``x [b, n]`` to ``[b, dim_out]`` that keeps inner products on average.

    Each coordinate goes, with random signs and divided by √2, to two outputs, one in each half of the output (the block
    construction of Kane & Nelson, 2014, "Sparser Johnson–Lindenstrauss transforms").  E⟨Px, Py⟩ = ⟨x, y⟩ and
    Var⟨Px, Py⟩ = (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ x_i² y_i²) / dim_out.  It takes two operations per coordinate where a dense
    matrix takes ``dim_out``.  The entries are
    drawn anew from ``seed`` at each call, so nothing of size n is stored.  A row's image does not depend on the other rows; on
    a CPU it is the same to the last bit, on a GPU sums may differ by rounding.

    LESS projects by a dense matrix of random signs, to 8192 numbers too.

    Args:
        dim_out: an even number.
        seed: any integer; the same map for the same seed and n.
    """
    out, part = x.new_zeros(len(x), dim_out), dim_out // 2
    for block, piece in enumerate(x.split(BLOCK, dim=1)):
        draws = torch.randint(2 * part, (2, BLOCK), generator=generator("projection", seed, block)).to(x.device)
        for half, draw in enumerate(draws[:, : piece.shape[1]]):
            out.scatter_add_(1, (draw // 2 + part * half).expand_as(piece), piece * (1 - 2 * (draw % 2)))
    return out / 2**0.5


# --- LESS ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LessSettings:
    """How LESS warms up and compares.

    The paper's: ``fraction``, ``epochs``, ``projection``.  Its released scripts have batches of 32, AdamW at 2e-5, 3 % of
    the steps as warm-up before the linear decay, LoRA of rank 128 with dropout 0.1, a few examples a validation subtask,
    and ε inside the root of Γ and no bias correction.  Ours: a step size fit for small students with a fresh head, linear
    decay from the first step on, the student's own adapters without dropout, the whole validation split, and Γ as the
    inner optimiser of this kit makes it (ε outside the root, bias corrected).

    Args:
        fraction: share of the training split to warm up on, in (0, 1].
        epochs: passes over it, each ending in a checkpoint.
        batch_size: examples a warm-up step.
        optimizer: makes the steps of the warm-up and, without its weight decay and clipping, Γ.
        projection: numbers that a gradient is projected to, even; parameters of no more numbers are not projected.
    """

    fraction: float = 0.05
    epochs: int = 4
    batch_size: int = 32
    optimizer: AdamW = AdamW(3e-4)
    projection: int = 8192


LESS = LessSettings()


class WarmedUp(NamedTuple):
    """The end of an epoch of warming up: parameters, AdamW's state, and the epoch's mean step size."""

    params: Params
    state: State
    step_size: float


def warm_up(task: Task, student: Student, *, seed: int = 0, settings: LessSettings = LESS) -> Iterator[WarmedUp]:
    """Train a fresh student on a random part of the training split, yielding its state at the end of each epoch."""
    draw, n = generator("less-rows", seed), len(task.split("train"))
    rows = torch.randperm(n, generator=draw)[: max(1, round(settings.fraction * n))]
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    step_sizes = settings.optimizer.step_size * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    params = student.init(derive_seed("less-init", seed))
    state = settings.optimizer.init(params)
    for epoch in step_sizes.split(steps // settings.epochs):
        batches = rows[torch.randperm(len(rows), generator=draw)].split(settings.batch_size)
        for step_size, batch in zip(epoch.tolist(), batches, strict=True):
            parts = real_parts(task, student, batch, ROWS)
            params, state, *_ = inner_step(student, settings.optimizer, params, state, parts, step_size)
        yield WarmedUp(params, state, epoch.mean().item())


def adam_direction(optimizer: AdamW, state: State, grads: Tensor) -> Tensor:
    """Γ ``[b, p]``: where the next step on each single example would go, θ_{t+1} − θ_t = −η Γ.

    Args:
        state: after t steps: ``count``, and ``m`` and ``v`` as ``AdamW`` keeps them, p numbers in all.
        grads: each example's gradient at θ_t, ``[b, p]``.
    """
    moments = {"count": state["count"], "m": {"θ": _flat(state["m"])}, "v": {"θ": _flat(state["v"])}}
    bare = dataclasses.replace(optimizer, weight_decay=0.0, clip_norm=None)
    moved, _ = bare.update({"θ": grads.new_zeros(())}, {"θ": grads}, moments, 1.0)
    return -moved["θ"]


def influence(task: Task, student: Student, *, seed: int = 0, settings: LessSettings = LESS) -> np.ndarray:
    """The influence of each training row on each validation group, float64 ``[n, groups]``; remembered by the student.

    Takes one gradient per checkpoint and training row.

    Args:
        seed: stands for the warm-up's initialisation and rows, and the projection.

    Raises:
        ValueError: a gradient that is not finite.
    """
    key = f"less:{task.fingerprint}:{task.max_length}:{seed}:{settings}"
    if key in student.cache:
        return student.cache[key]
    n = len(task.split("train"))
    dim, projection_seed = sum(p.numel() for p in student.init(0).values()), derive_seed("less-projection", seed)
    chunks = torch.arange(n).split(min(ROWS, max(1, NUMBERS // dim)))
    subtasks = validation_groups(task)

    def feature(grads: Tensor) -> Tensor:
        wide = grads.to(torch.promote_types(grads.dtype, torch.float32))
        if dim > settings.projection:
            wide = sparse_projection(wide, settings.projection, seed=projection_seed)
        return torch.nn.functional.normalize(wide, dim=1)

    scores = torch.zeros(n, len(subtasks), dtype=torch.float64)
    with progress(total=settings.epochs * n, desc="influence", unit="row", leave=False) as bar:
        for point in warm_up(task, student, seed=seed, settings=settings):
            parts = (real_parts(task, student, rows, ROWS, "validation") for rows in subtasks)
            means = (loss_and_grads(student, point.params, subtask)[1] for subtask in parts)
            aims = torch.cat([feature(_flat(mean)[None]) for mean in means])
            for rows in chunks:
                grads = gradients(task, student, point.params, rows, at_once=student.device.type == "cuda")
                influences = feature(adam_direction(settings.optimizer, point.state, grads)) @ aims.T
                scores[rows] += point.step_size * influences.cpu().double()
                bar.update(len(rows))
    finite = scores.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"training row {int((~finite).nonzero()[0])} of task {task.name!r} has a gradient that is "
                         f"not finite; lower the warm-up's step size of {settings.optimizer.step_size}")
    student.cache[key] = scores.numpy()
    return student.cache[key]


def gradients(task: Task, student: Student, params: Params, rows: Tensor, *, at_once: bool = False) -> Tensor:
    """The gradient of the loss of each of ``rows`` of the training split, ``[b, p]``.

    Args:
        rows: indices ``[b]``.
        at_once: all rows through each kernel together.  On a GPU a single sentence takes about as long as sixteen.  The
            gradients are the same up to rounding; a model that builds its own attention masks takes its rows one by one.
    """
    if not at_once or student.builds_masks:
        singles = (real_parts(task, student, row, 1) for row in rows.split(1))
        return torch.stack([_flat(loss_and_grads(student, params, single)[1]) for single in singles])
    batch = {name: values.to(student.device) for name, values in task.batch(student.tokenizer, "train", rows.tolist()).items()}
    targets = batch.pop("labels")

    def loss(params: Params, inputs: Batch, target: Tensor) -> Tensor:
        return student.loss(params, {name: values[None] for name, values in inputs.items()}, target[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, batch, targets)
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1)


def validation_groups(task: Task) -> list[Tensor]:
    """The rows of each validation group, the subtasks that influence is measured on; one group for classification."""
    validation = task.split("validation")
    if task.kind == "classification":
        return [torch.arange(len(validation))]
    groups = groups_of_questions(task, "validation")
    return [torch.from_numpy(np.flatnonzero(groups == group)) for group in range(groups.max() + 1)]


def groups_of_questions(task: Task, split: str) -> np.ndarray:
    """The number of each row's group, ``[n]``: its answer, where these are a few that repeat, else its column ``group``."""
    rows = task.split(split)
    answers, groups = np.unique(rows["response"][:], return_inverse=True)
    if len(answers) > MOST_ANSWERS or 2 * len(answers) > len(rows):
        _, groups = np.unique(rows["group"][:], return_inverse=True)
    return groups
