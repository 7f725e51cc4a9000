"""The distilled set φ: a few synthetic examples, as tensors, with everything needed to train on them.

A synthetic example is l input embeddings of width d.  Its label is learned too (a *soft label*: c logits), and so may be
the step size of each inner step.  For an instruction task an example is a prompt, and its label the tokens of the
response, which are not learned.  A set begins as real sentences (:meth:`DistilledSet.from_real`), moves away from them
while it is distilled, and comes back to words when it is projected; ``tokens`` is there exactly while each embedding *is*
the embedding of a token.

On disk a set is a folder of safetensors and JSON with a SHA-256 manifest (:mod:`distillkit.storage`); the recipe it was
distilled with travels in ``meta["recipe"]``, since a distilled set is good for the recipe it was made with.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor

from distillkit.checks import check_flag, check_is, check_whole
from distillkit.seeds import generator
from distillkit.storage import StorageError, load_folder, save_folder
from distillkit.students import Student
from distillkit.tasks import NO_TARGET, Task

KIND = "distilled-set"
CONFIDENCE = 0.9  # share of its own class in a soft label before learning


@dataclasses.dataclass(eq=False)
class DistilledSet:
    """m synthetic examples; lives on the CPU, objectives move it.

    Attributes:
        embeds: ``[m, l, d]`` float32 (float64 for a float64 student).
        mask: ``[m, l]`` bool, which positions are there at all.
        free: ``[m, l]`` bool, which positions are learned; special tokens stay fixed.
        targets: ``[m, c]`` float label logits (soft labels), ``[m]`` int64 classes (hard labels), or ``[m, r]`` int64
            response ids, short ones filled up with -100.
        step_sizes: ``[t]`` positive step sizes of the inner loop, or None until bound to an Unroll.
        tokens: ``[m, l]`` int64 token ids, or None when the embeddings are no token's.
        meta: JSON values: classes, each example's own class (``labels``), decoded ``text``, ``recipe``, origin.
    """

    embeds: Tensor
    mask: Tensor
    free: Tensor
    targets: Tensor
    step_sizes: Tensor | None = None
    tokens: Tensor | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("embeds", "mask", "free", "targets", "step_sizes", "tokens"):
            if (value := getattr(self, name)) is not None or name not in ("step_sizes", "tokens"):
                check_is(name, value, Tensor)
        check_is("meta", self.meta, dict)
        if self.embeds.ndim != 3 or not self.embeds.is_floating_point():
            raise ValueError(f"embeds must be floats [m, l, d], not {self.embeds.dtype} {tuple(self.embeds.shape)}")
        m, l, _ = self.embeds.shape
        wrong = [n for n in ("mask", "free") if getattr(self, n).shape != (m, l)]
        if self.targets.shape[:1] != (m,):
            wrong.append("targets")
        if self.tokens is not None and self.tokens.shape != (m, l):
            wrong.append("tokens")
        if wrong:
            shapes = ", ".join(f"{n} {tuple(getattr(self, n).shape)}" for n in wrong)
            raise ValueError(f"shapes disagree with embeds {tuple(self.embeds.shape)}: {shapes}")
        if self.step_sizes is not None and not (self.step_sizes > 0).all():
            raise ValueError(f"step_sizes must be positive, not {self.step_sizes.tolist()}")

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def soft(self) -> bool:
        """Whether the labels are soft."""
        return self.targets.is_floating_point()

    @property
    def nbytes(self) -> int:
        """Bytes a reader needs to train on it: embeddings (or, for text, token ids) and labels and step sizes."""
        inputs = self.embeds if self.tokens is None else self.tokens.to(torch.int32)
        kept = [inputs, self.targets, *([] if self.step_sizes is None else [self.step_sizes])]
        return sum(t.numel() * t.element_size() for t in kept)

    @classmethod
    def from_real(
        cls,
        task: Task,
        student: Student,
        *,
        per_class: int | None = None,
        fraction: float | None = None,
        length: int | None = None,
        soft_labels: bool = True,
        seed: int = 0,
    ) -> DistilledSet:
        """Random real sentences as a set: where distillation starts, and the plainest baseline.

        Args:
            per_class: examples of each class; or
            fraction: share of the training split in (0, 1], the same number of each class.  An instruction task, which
                has no classes, takes only this.
            length: l, tokens an example, special tokens included; default ``task.max_length``.  Short sentences are
                filled up with further ones of their class, so that every set of a size holds as many tokens.  Prompts are
                never filled up; longer ones lose tokens in front.
            soft_labels: label logits that give the own class 0.9; otherwise integer classes.  Responses stay as they are.
            seed: which sentences.

        Raises:
            ValueError: a size that cannot be had, naming class and rows.
        """
        check_is("task", task, Task)
        check_is("student", student, Student)
        check_flag("soft_labels", soft_labels)
        k = examples_per_class(task, per_class, fraction)
        draw = generator("from-real", seed)
        rows = [r[torch.randperm(len(r), generator=draw)[:k].numpy()] for r in task.rows_by_class("train")]
        found = from_rows(task, student, rows, length=length, seed=seed)
        return found.soften() if soft_labels and task.kind == "classification" else found

    def soften(self, confidence: float = CONFIDENCE) -> DistilledSet:
        """The same examples with soft labels that give each its own class with probability ``confidence``."""
        c = len(self.meta["classes"])
        if not c:
            raise ValueError("responses cannot be softened: only classes can")
        if not 1 / c < confidence < 1:
            raise ValueError(f"confidence must lie between 1/{c} and 1, not {confidence!r}")
        gap = math.log(confidence * (c - 1) / (1 - confidence))
        targets = torch.nn.functional.one_hot(torch.tensor(self.meta["labels"]), c) * gap
        return dataclasses.replace(self, targets=targets.float(), meta=dict(self.meta))

    def to_text(self) -> datasets.Dataset:
        """One row an example: ``text``, ``label`` (its class's name) and ``probabilities`` (of each class); of an
        instruction task ``prompt`` and ``response``.

        Raises:
            ValueError: the embeddings are not tokens yet.
        """
        if self.tokens is None or "text" not in self.meta:
            raise ValueError("this set holds free embeddings, which have no text; project it first: dk.project(set, student)")
        if "responses" in self.meta:
            return datasets.Dataset.from_dict({"prompt": self.meta["text"], "response": self.meta["responses"]})
        classes = self.meta["classes"]
        return datasets.Dataset.from_dict(
            {
                "text": self.meta["text"],
                "label": [classes[i] for i in self.meta["labels"]],
                "probabilities": self.probabilities().tolist(),
            }
        )

    def probabilities(self) -> Tensor:
        """What each label says of each class, ``[m, c]``: the softmax of soft labels, 0 and 1 for hard ones.

        Raises:
            ValueError: the targets are responses, not classes.
        """
        if self.soft:
            return self.targets.softmax(-1)
        if self.targets.ndim != 1:
            raise ValueError("the targets of this set are responses, which have no probabilities of classes")
        return torch.nn.functional.one_hot(self.targets, len(self.meta["classes"])).to(torch.float32)

    def save(self, folder: str | Path) -> Path:
        """Write the set to ``folder``, all or nothing; returns the folder."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "meta"}
        tensors = {n: t.contiguous() for n, t in tensors.items() if t is not None}
        return save_folder(folder, kind=KIND, tensors=tensors, data=self.meta)

    @classmethod
    def load(cls, folder: str | Path) -> DistilledSet:
        """Read a saved set.

        Raises:
            StorageError: the folder is missing, damaged, or holds something else; named in the message.
        """
        stored = load_folder(folder, kind=KIND)
        try:
            return cls(**stored.tensors, meta=dict(stored.data))
        except (TypeError, ValueError) as error:
            raise StorageError(f"{folder} holds no set that this distillkit can read ({error}); make it again") from error

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Put the set on the Hugging Face hub, with a card; see :func:`distillkit.publish.push_to_hub`."""
        from distillkit.publish import push_to_hub

        return push_to_hub(self, repo_id, **options)

    @staticmethod
    def from_hub(repo_id: str, revision: str | None = None) -> DistilledSet:
        """A set from the Hugging Face hub, every byte checked; see :func:`distillkit.publish.from_hub`."""
        from distillkit.publish import from_hub

        return from_hub(repo_id, revision)


def examples_per_class(task: Task, per_class: int | None, fraction: float | None) -> int:
    """The number of examples of each class that ``per_class`` or ``fraction`` asks for, checked against the task."""
    if (per_class is None) == (fraction is None):
        raise ValueError(f"give one of per_class and fraction, not per_class={per_class!r} and fraction={fraction!r}")
    if per_class is not None and not task.classes:
        raise ValueError(f"per_class={per_class!r}, but task {task.name!r} has no classes; give fraction")
    if fraction is not None:
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], not {fraction!r}")
        per_class = int(fraction * len(task.train) / max(1, len(task.classes)))
        if per_class < 1:
            least = f"one for each of {len(task.classes)} classes" if task.classes else "one"
            raise ValueError(f"fraction={fraction!r} of {len(task.train)} training rows is less than {least}; ask for more")
    check_whole("per_class", per_class)
    assert per_class is not None  # it is a whole number
    for name, rows in zip(task.classes, task.rows_by_class("train")):
        if len(rows) < per_class:
            raise ValueError(
                f"per_class={per_class} but class {name!r} of task {task.name!r} has only {len(rows)} training rows; "
                "ask for fewer"
            )
    return per_class


def special_frame(tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens a tokenizer puts before and after a single text."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start], whole[start + len(body) :]
    return [], []


def from_rows(task: Task, student: Student, rows: list, *, length: int | None = None, seed: int = 0) -> DistilledSet:
    """A set of chosen training rows with hard labels.

    Args:
        rows: for each class (of an instruction task: one list) the indices of its training rows, in the order wanted.
        length: l; see :meth:`DistilledSet.from_real`, also on how short sentences are filled up.
        seed: which further sentences fill up.
    """
    length = task.max_length if length is None else length
    before, after = special_frame(student.tokenizer)
    room = length - len(before) - len(after) if isinstance(length, int) else 0
    if room < 1:
        raise ValueError(f"length must be a whole number above {len(before) + len(after)} (special tokens), not {length!r}")
    if length > student.max_positions:
        raise ValueError(f"length={length} is more than the {student.max_positions} positions of {student.name!r}")
    if task.kind == "instruction":
        return _prompts(task, student, [int(row) for row in rows[0]], length, len(before))
    tokens, labels = [], []
    for label, (chosen, pool) in enumerate(zip(rows, task.rows_by_class("train"), strict=True)):
        draw = generator("fill-up", seed, label)
        order = iter(pool[torch.randperm(len(pool), generator=draw).numpy()].tolist())
        for row in chosen:
            tokens.append(before + _filled(task, student, int(row), order, room) + after)
            labels.append(label)
    width = max(len(t) for t in tokens)
    pad = student.tokenizer.pad_token_id or 0
    ids = torch.tensor([t + [pad] * (width - len(t)) for t in tokens])
    mask = torch.tensor([[True] * len(t) + [False] * (width - len(t)) for t in tokens])
    fixed = torch.tensor([[i < len(before) or i >= len(t) - len(after) for i in range(width)] for t in tokens])
    meta = {
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "student": student.name,
        "classes": list(task.classes),
        "labels": labels,
        "text": decode(student.tokenizer, ids, mask & ~fixed),
    }
    return DistilledSet(embed(student, ids), mask, mask & ~fixed, torch.tensor(labels), tokens=ids, meta=meta)


def _prompts(task, student: Student, rows: list[int], length: int, opening: int) -> DistilledSet:
    """Prompts cut in front to ``length``, behind their ``opening`` special tokens, with responses as targets."""
    tokenizer, everything, answers = student.tokenizer, task.token_ids(student.tokenizer, "train"), []
    tokens = []
    for row in rows:
        ids = everything[row]
        tokens.append(ids if len(ids) <= length else ids[:opening] + ids[len(ids) - length + opening :])
        answers.append(task.response_ids(tokenizer, "train")[row])
    ids, targets = _padded(tokens, cast("int", tokenizer.pad_token_id or 0)), _padded(answers, NO_TARGET)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in tokens])[:, None]
    free = mask & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.long))
    meta = {
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "student": student.name,
        "classes": [],
        "labels": [],
        "text": decode(tokenizer, ids, free),
        "responses": [task.train[row]["response"] for row in rows],
    }
    return DistilledSet(embed(student, ids), mask, free, targets, tokens=ids, meta=meta)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def embed(student: Student, ids: Tensor) -> Tensor:
    """Input embeddings ``[m, l, d]`` of token ``ids [m, l]`` on the CPU: float64 for a float64 student, else float32."""
    found = student.embedding[ids.to(student.device)].cpu()
    return found if found.dtype == torch.float64 else found.float()


def _filled(task: Task, student: Student, row: int | None, order, room: int) -> list[int]:
    """``room`` content tokens: those of ``row``, then of further rows of its class while there are any."""
    ids: list[int] = []
    while row is not None and len(ids) < room:
        text = (" " if ids else "") + task.train[row]["text"]  # byte-level tokenizers would glue the words together
        ids += student.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < room:
            row = next(order, None)  # None: the whole class is used up
    return ids[:room]


def decode(tokenizer, ids: Tensor, keep: Tensor) -> list[str]:
    """The text of each row of ``ids [m, l]`` at the positions ``keep [m, l]``."""
    return [tokenizer.decode(row[k].tolist()) for row, k in zip(ids, keep, strict=True)]
