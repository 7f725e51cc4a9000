"""The distilled set φ: a few synthetic examples, as tensors, with everything needed to train on them.

A synthetic example is l input embeddings of width d.  Its label is learned too (a *soft label*: c logits), and so may be
the step size of each inner step.  For an instruction task an example is a prompt, and its label the tokens of the
response, which are not learned.  A set begins as real sentences (:meth:`DistilledSet.from_real`), moves away from them
while it is distilled, and comes back to words when it is projected; ``tokens`` is there exactly while each embedding *is*
the embedding of a token.

On disk a set is one safetensors file that carries its own SHA-256 (:mod:`distillkit.io.storage`); the recipe it was distilled
with travels in ``meta["recipe"]``, since a distilled set is good for the recipe it was made with.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from distillkit.core.contents import check_depth, check_inputs, check_meta, check_shapes, check_step_sizes, check_targets
from distillkit.core.student import Student
from distillkit.data.corpus import check_text
from distillkit.data.labels import whole
from distillkit.data.tasks import NO_TARGET, Task
from distillkit.io.checks import check_flag, check_is, check_whole
from distillkit.io.files import read_file, write_file
from distillkit.io.seeds import generator
from distillkit.io.storage import StorageError

if TYPE_CHECKING:
    import datasets

KIND = "distilled-set"
CONFIDENCE = 0.9  # share of its own class in a soft label before learning
NONE_AT_ALL = 30.0  # nats below the rest: a share of 1e-13


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
            ``table_sha256`` is the embedding table it belongs to, ``rows`` the training rows that it was taken from.

    Raises:
        ValueError: shapes that disagree, and values that no set has (see :mod:`distillkit.core.contents`); named in the
          message.
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
        check_shapes(self.embeds, self.mask, self.free, self.targets, self.tokens)
        check_inputs(self.embeds, self.mask, self.free, self.tokens)
        check_meta(self.meta, len(self.embeds))
        check_targets(self.targets, len(self.meta.get("classes", ())))
        if self.step_sizes is not None:
            check_step_sizes(self.step_sizes)

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def soft(self) -> bool:
        """Whether the labels are soft."""
        return self.targets.is_floating_point()

    @property
    def _has_responses(self) -> bool:
        return self.targets.ndim == 2 and not self.soft

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
        fill: bool = True,
        seed: int = 0,
    ) -> DistilledSet:
        """Random real sentences as a set: where distillation starts, and the plainest baseline.

        Args:
            per_class: examples of each class; or
            fraction: share of the training split in (0, 1], the same number of each class.  An instruction task, which
                has no classes, takes only this.
            length: l, tokens an example, special tokens included; default ``task.max_length``.
            soft_labels: label logits that give the own class 0.9; otherwise integer classes.  Responses stay as they are.
            fill: fill short sentences up with further ones of their class, so that every set of a size holds as many tokens;
                False: leave them as they are.  Prompts are never filled up; longer ones lose tokens in front.
            seed: which sentences.

        Returns:
            a set whose ``meta["rows"]`` lists the rows of the training split that were drawn (not those that filled up).

        Raises:
            ValueError: a size that cannot be had, naming class and rows.
        """
        check_is("task", task, Task)
        check_is("student", student, Student)
        check_flag("soft_labels", soft_labels)
        check_flag("fill", fill)
        k = examples_per_class(task, per_class, fraction)
        draw = generator("from-real", seed)
        rows = [r[torch.randperm(len(r), generator=draw)[:k].numpy()] for r in task.rows_by_class("train")]
        found = from_rows(task, student, rows, length=length, fill=fill, seed=seed)
        return found.soften() if soft_labels and task.kind == "classification" else found

    @classmethod
    def from_text(
        cls,
        texts: Iterable[str],
        labels: Iterable[str | int],
        task: Task,
        student: Student,
        *,
        length: int | None = None,
        soft_labels: bool = True,
        fill: bool = False,
        seed: int = 0,
    ) -> DistilledSet:
        """Anybody's text as a set: written by hand, generated, or published by another project.

        Args:
            texts: one an example; for an instruction task the prompts.
            labels: the class of each, by its name or (where the classes are not named by numbers) by its index; for an
                instruction task the responses.
            task: whose classes they are of.
            length: l, tokens an example, special tokens included; longer texts lose tokens behind, longer prompts in front.
                Default ``task.max_length``.
            soft_labels: as for :meth:`from_real`.
            fill: fill short texts up with training sentences of their class, which are then part of the set.
            seed: which sentences fill up.

        Raises:
            ValueError: a text or a label that cannot be used, by its row (counted from 0).
        """
        check_is("task", task, Task)
        check_is("student", student, Student)
        check_flag("soft_labels", soft_labels)
        check_flag("fill", fill)
        texts, labels = _listed("texts", texts), _listed("labels", labels)
        if not texts or len(texts) != len(labels):
            raise ValueError(f"there must be a label for each text, one at least, not {len(labels)} labels for {len(texts)} "
                             "texts")
        _check_texts("text", texts)
        if task.kind == "instruction":
            _check_texts("response", labels)
            return _from_pairs(texts, labels, task, student, length)
        numbers = [_class_number(label, task, row) for row, label in enumerate(labels)]
        pools = _pools(task, seed) if fill else {}
        further = [pools.get(number, iter(())) for number in numbers]
        found = _from_sentences(texts, numbers, further, task, student, length)
        return found.soften() if soft_labels else found

    def check_table(self, student: Student) -> None:
        """Raise ValueError unless this set lies in the embedding space of ``student``.

        A set carries the SHA-256 of the table it was made with.  One that was saved before sets did so is accepted where
        the widths agree and what it has of the table is so in the student's: the embeddings of its tokens; of learned
        embeddings those that stay fixed, which are special tokens.  An object of the caller's own in the place of a
        student is asked for its width alone.
        """
        if self.embeds.shape[-1] != student.width:
            raise ValueError(f"the set's embeddings are {self.embeds.shape[-1]} wide, student {student.name!r} wants "
                             f"{student.width}; {self._way_across()}")
        if not isinstance(student, Student):
            return
        own, maker = self.meta.get("table_sha256"), reprlib.repr(self.meta.get("student"))
        if own and own != student.table_sha256:
            raise ValueError(f"the set was made with the embedding table of {maker} (SHA-256 {own[:12]}…), and student "
                             f"{student.name!r} has another ({student.table_sha256[:12]}…); {self._way_across()}")
        ids = [] if self.tokens is None else [self.tokens[self.mask]]
        ids += [self.targets[self.targets >= 0]] if self._has_responses else []
        if ids and (largest := int(torch.cat(ids).max())) >= len(student.embedding):
            raise ValueError(f"the set holds the token {largest}, and the table of student {student.name!r} ends at "
                             f"{len(student.embedding) - 1}; {self._way_across()}")
        if not own and not self._has_rows_of(student):
            raise ValueError(f"the set was made with the embedding table of {maker}, and its tokens have other embeddings in "
                             f"that of student {student.name!r}; {self._way_across()}")

    def _has_rows_of(self, student: Student) -> bool:
        """Whether the embeddings of tokens, or of learned ones those that stay fixed, are a student's, up to half precision."""
        if self.tokens is not None:
            known, rows = self.embeds[self.mask], embed(student, self.tokens[self.mask])
        else:
            known = self.embeds[self.mask & ~self.free].float().unique(dim=0)  # an opening and a closing one, as a rule
            ids = [i for i in student.tokenizer.all_special_ids if i < len(student.embedding)]
            if not len(known) or not ids:
                return True
            special = embed(student, torch.tensor(ids)).float()
            rows = special[torch.cdist(known, special).argmin(1)]
        return torch.allclose(known.to(rows), rows, rtol=1e-2, atol=1e-3 * float(rows.abs().max()))

    def _way_across(self) -> str:
        if self.tokens is None:
            return ("only text moves to another model: dk.project(set, the student it was made with), then dk.transfer or "
                    "dk.retokenize")
        return "its text moves to another model: dk.transfer(set, task, student), or dk.retokenize for the set alone"

    def in_classes(self, classes: Sequence[str], owner: str = "the task", *, foreign: float | None = None) -> DistilledSet:
        """This set with its labels told in other ``classes``, by their names; itself where nothing changes.

        Args:
            classes: names in the order wanted; none for responses.
            owner: whose they are, for the error.
            foreign: None: the names must be the set's own.  A share in [0, 1): there may be others besides, to which soft
                labels give this share of probability in equal parts.

        Raises:
            ValueError: the names differ, with both lists; or responses where classes are wanted.
        """
        own = list(self.meta.get("classes", ()))
        if self._has_responses == bool(classes):
            kinds = ("responses", "classes") if classes else ("classes", "responses")
            raise ValueError(f"the set holds {kinds[0]}, and {owner} wants {kinds[1]}: they are of different kinds of task")
        if own == list(classes) or not classes:
            return self
        if not own:  # nobody has named them: only their number can be told
            check_targets(self.targets, len(classes))
            return self
        if set(own) - set(classes) or foreign is None and len(own) != len(classes):
            raise ValueError(f"the set has the classes {reprlib.repr(own)}, and {owner} has {reprlib.repr(list(classes))}; "
                             "take what it was made for, or rename its classes (distillkit.applications.merging.renamed)")
        place = torch.tensor([list(classes).index(name) for name in own])
        meta = {**self.meta, "classes": list(classes)}
        if meta.get("labels"):
            meta["labels"] = place[meta["labels"]].tolist()
        if not self.soft:
            return dataclasses.replace(self, targets=place[self.targets], meta=meta)
        others = len(classes) - len(own)
        share = math.log(foreign / (1 - foreign) / others) if foreign and others else -NONE_AT_ALL
        targets = (self.targets.logsumexp(1, keepdim=True) + share).repeat(1, len(classes))
        targets[:, place] = self.targets
        return dataclasses.replace(self, targets=targets, meta=meta)

    def for_student(self, student: Student) -> DistilledSet:
        """This set as ``student`` trains on it: in its embedding space, with labels in the order of its classes.

        Raises:
            ValueError: see :meth:`check_table` and :meth:`in_classes`.
        """
        self.check_table(student)
        return self.in_classes(student.classes, f"student {student.name!r}") if isinstance(student, Student) else self

    def soften(self, confidence: float = CONFIDENCE) -> DistilledSet:
        """The same examples with soft labels that give each its own class with probability ``confidence``."""
        c = len(self.meta.get("classes", ()))
        if not c or not self.meta.get("labels"):
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
        import datasets  # a second to import

        if self.tokens is None or "text" not in self.meta:
            raise ValueError("this set holds free embeddings, which have no text; project it first: dk.project(set, student)")
        if "responses" in self.meta:
            return datasets.Dataset.from_dict({"prompt": self.meta["text"], "response": self.meta["responses"]})
        labels, probabilities = self.label_names(), self.probabilities().tolist()
        return datasets.Dataset.from_dict({"text": self.meta["text"], "label": labels, "probabilities": probabilities})

    def label_names(self) -> list[str]:
        """The name of each example's own class.

        Raises:
            ValueError: the set does not tell, as an instruction set, or one that was put together by hand.
        """
        classes, labels = self.meta.get("classes"), self.meta.get("labels")
        if not classes or not labels:
            raise ValueError("this set does not name its classes and labels, in meta['classes'] and meta['labels']")
        return [classes[label] for label in labels]

    def probabilities(self) -> Tensor:
        """What each label says of each class, ``[m, c]``: the softmax of soft labels, 0 and 1 for hard ones.

        Raises:
            ValueError: the targets are responses, not classes.
        """
        if self.soft:
            return self.targets.softmax(-1)
        if self.targets.ndim != 1:
            raise ValueError("the targets of this set are responses, which have no probabilities of classes")
        return torch.nn.functional.one_hot(self.targets, len(self.meta.get("classes", ())) or -1).to(torch.float32)

    def save(self, path: str | Path) -> Path:
        """Write the set to the file ``path``, all or nothing; returns the path."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "meta"}
        write_file(path, kind=KIND, tensors={n: t for n, t in tensors.items() if t is not None}, data=self.meta)
        return Path(path).expanduser()

    @classmethod
    def load(cls, path: str | Path) -> DistilledSet:
        """Read a saved set.

        Raises:
            StorageError: the file is missing, damaged, or holds something else; named in the message.
        """
        stored = read_file(path, kind=KIND)
        try:
            check_depth(stored.data)
            distilled = cls(**stored.tensors, meta=dict(stored.data))
            if "responses" in distilled.meta and not distilled._has_responses:
                raise ValueError("meta holds responses, and the targets are no response ids [m, r]")
            return distilled
        except (TypeError, ValueError) as error:
            raise StorageError(f"{path} holds no set that this distillkit can read ({error}); make it again") from error


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


def from_rows(
    task: Task, student: Student, rows: list, *, length: int | None = None, fill: bool = True, seed: int = 0
) -> DistilledSet:
    """A set of chosen training rows with hard labels; ``meta["rows"]`` lists them.

    Args:
        rows: for each class (of an instruction task: one list) the indices of its training rows, in the order wanted.
        length: l; see :meth:`DistilledSet.from_real`, also on how short sentences are filled up.
        fill: whether they are.
        seed: which further sentences fill up.
    """
    chosen = [int(row) for of_class in rows for row in of_class]
    if task.kind == "instruction":
        found = _prompts(task, student, chosen, length)
    else:
        pools = _pools(task, seed)
        labels = [label for label, of_class in enumerate(rows) for _ in of_class]
        further = [pools[label] if fill else iter(()) for label in labels]
        found = _from_sentences([task.train[row]["text"] for row in chosen], labels, further, task, student, length)
    found.meta["rows"] = chosen
    return found


def origin(task: Task, student: Student) -> dict:
    """What a set remembers of where it was made."""
    return {"task": task.name, "task_fingerprint": task.fingerprint, "student": student.name,
            "table_sha256": student.table_sha256}


def _frame(task: Task, student: Student, length: int | None) -> tuple[list[int], list[int], int]:
    """The special tokens before and after a text, and the room between them in ``length`` tokens."""
    length = task.max_length if length is None else length
    before, after = special_frame(student.tokenizer)
    room = length - len(before) - len(after) if isinstance(length, int) else 0
    if room < 1:
        raise ValueError(f"length must be a whole number above {len(before) + len(after)} (special tokens), not {length!r}")
    if length > student.max_positions:
        raise ValueError(f"length={length} is more than the {student.max_positions} positions of {student.name!r}")
    return before, after, room


def _pools(task: Task, seed: int) -> dict[int, Iterator[str]]:
    """For each class its training sentences in a seeded order, to fill up with; each is taken once."""
    texts, pools = task.train, {}
    for label, rows in enumerate(task.rows_by_class("train")):
        order = rows[torch.randperm(len(rows), generator=generator("fill-up", seed, label)).numpy()].tolist()
        pools[label] = (texts[row]["text"] for row in order)
    return pools


def _from_sentences(
    texts: list[str], labels: list[int], further: list[Iterator[str]], task: Task, student: Student, length: int | None
) -> DistilledSet:
    """A set of sentences with hard labels, each filled up from ``further`` as far as that goes."""
    before, after, room = _frame(task, student, length)
    bodies = []
    for row, (text, more) in enumerate(zip(texts, further, strict=True)):
        bodies.append(_filled(student.tokenizer, text, more, room))
        if not bodies[-1]:
            raise ValueError(f"row {row} (counted from 0): the tokenizer of {student.name!r} makes no token of {text[:40]!r}")
    ids = _padded([before + body + after for body in bodies], cast("int", student.tokenizer.pad_token_id or 0))
    place = torch.arange(ids.shape[1])
    ends = len(before) + torch.tensor([len(body) for body in bodies])[:, None]
    mask, free = place < ends + len(after), (place >= len(before)) & (place < ends)
    meta = {
        **origin(task, student),
        "classes": list(task.classes),
        "labels": labels,
        "text": decode(student.tokenizer, ids, free),
    }
    return DistilledSet(embed(student, ids), mask, free, torch.tensor(labels), tokens=ids, meta=meta)


def _prompts(task, student: Student, rows: list[int], length: int | None) -> DistilledSet:
    """Prompts cut in front to ``length``, behind the special tokens that open them, with responses as targets."""
    before, after, room = _frame(task, student, length)
    opening, length = len(before), len(before) + room + len(after)
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
        **origin(task, student),
        "classes": [],
        "labels": [],
        "text": decode(tokenizer, ids, free),
        "responses": [task.train[row]["response"] for row in rows],
    }
    return DistilledSet(embed(student, ids), mask, free, targets, tokens=ids, meta=meta)


def _from_pairs(prompts: list[str], responses: list[str], task, student: Student, length: int | None) -> DistilledSet:
    """Prompts and responses as the training split of a task, which knows how ``student`` reads those."""
    import datasets

    n = len(prompts)
    rows = {"prompt": prompts, "response": responses, "choices": [[]] * n, "answer": [-1] * n, "group": [""] * n}
    train = datasets.Dataset.from_dict(rows, features=task.test.features)  # a task may have no training split
    stand_in = dataclasses.replace(task, train=train, origin="texts and labels", _token_ids=weakref.WeakKeyDictionary())
    return _prompts(stand_in, student, [*range(n)], length)


def _check_texts(role: str, texts: list) -> None:
    for row, text in enumerate(texts):
        try:
            check_text(text, role)
        except ValueError as error:
            raise ValueError(f"row {row} (counted from 0): {error}") from None


def _listed(name: str, values) -> list:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list with a value for each example, not {reprlib.repr(values)}")
    return values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)


def _class_number(label, task: Task, row: int) -> int:
    """The index of a class that a label names; a number is the name of a class where all names are numbers."""
    classes, name = list(task.classes), label.strip() if isinstance(label, str) else label
    if name in classes:
        return classes.index(name)
    number = int(label) if isinstance(label, np.integer) else None if isinstance(label, str) else whole(label)
    if any(whole(one) is None for one in classes):
        if number is not None and 0 <= number < len(classes):
            return number
    elif number is not None and str(number) in classes:
        return classes.index(str(number))
    raise ValueError(f"labels, row {row} (counted from 0): {reprlib.repr(label)} is none of the classes of task {task.name!r}, "
                     f"{reprlib.repr(classes)}; give the name of one, or its index")


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def embed(student: Student, ids: Tensor) -> Tensor:
    """Input embeddings ``[m, l, d]`` of token ``ids [m, l]`` on the CPU: float64 for a float64 student, else float32."""
    found = student.embedding[ids.to(student.device)].cpu()
    return found if found.dtype == torch.float64 else found.float()


def _filled(tokenizer, text: str, further: Iterator[str], room: int) -> list[int]:
    """``room`` content tokens: those of ``text``, then of ``further`` texts while there are any."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) < room and (more := next(further, None)) is not None:
        apart = " " if ids else ""  # byte-level tokenizers would glue the words together
        ids = ids + tokenizer(apart + more, add_special_tokens=False)["input_ids"]
    return ids[:room]


def decode(tokenizer, ids: Tensor, keep: Tensor) -> list[str]:
    """The text of each row of ``ids [m, l]`` at the positions ``keep [m, l]``."""
    return [tokenizer.decode(row[k].tolist()) for row, k in zip(ids, keep, strict=True)]
