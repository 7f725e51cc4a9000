"""The distilled set φ: a few synthetic examples, as tensors, with everything needed to train on them.

A synthetic example is l input embeddings of width d.  Its label is learned too (a *soft label*: c logits), and so may be
the step size of each inner step, and where the first token looks (*attention labels*).  For an instruction task an example
is a prompt, and its label the tokens of the response, which are not learned.  A set begins as real sentences
(:meth:`DistilledSet.from_real`), moves away from them while it is distilled, and comes back to words when it is projected;
``tokens`` is there exactly while each embedding *is* the embedding of a token.

On disk a set is one safetensors file that carries its own SHA-256 (:mod:`distillkit.io.files`); the recipe it was distilled
with travels in ``meta["recipe"]``, since a distilled set is good for the recipe it was made with.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillkit.core.contents import check_attention, check_depth, check_inputs, check_meta, check_step_sizes, check_targets
from distillkit.core.examples import embed, examples_per_class, rows_as_set, texts_as_set
from distillkit.core.student import Student
from distillkit.data.rows import dataset_of
from distillkit.data.tasks import Task
from distillkit.io.checks import check_are, check_flag, check_is, check_whole, require
from distillkit.io.files import read_file, write_file
from distillkit.io.seeds import generator
from distillkit.io.storage import StorageError, absolute

if TYPE_CHECKING:
    import datasets

KIND = "distilled-set"
CONFIDENCE = 0.9  # share of its own class in a soft label before learning
OPTIONAL = ("step_sizes", "tokens", "attention")
NONE_AT_ALL = 30.0  # nats below the rest: a share of 1e-13
WAY_ACROSS = ("only text moves to another model: dk.transfer(set, task, student), or dk.retokenize for the set alone; learned "
              "embeddings become text by dk.project(set, the student it was made with)")


@dataclasses.dataclass(eq=False, repr=False)
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
        attention: ``[m, layers, heads, l]`` float logits; their softmax over unmasked positions is the label of the first
            token's attention (:meth:`with_attention`).  None: a set without.
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
    attention: Tensor | None = None

    def __post_init__(self):
        check_is("meta", self.meta, dict)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "meta" and (value is not None or field.name not in OPTIONAL):
                check_is(field.name, value, Tensor)
        check_inputs(self.embeds, self.mask, self.free, self.tokens)
        check_meta(self.meta, len(self))
        check_targets(self.targets, len(self), len(self.meta.get("classes", ())))
        if self.step_sizes is not None:
            check_step_sizes(self.step_sizes)
        if self.attention is not None:
            check_attention(self.attention, *self.mask.shape)

    def __len__(self) -> int:
        return len(self.embeds)

    def __repr__(self) -> str:
        m, length, width = self.embeds.shape
        labels = "soft labels" if self.soft else "responses" if self._has_responses else "hard labels"
        steps = "" if self.step_sizes is None else f", {self.step_sizes.numel()} step sizes"
        attention = "" if self.attention is None else ", attention labels"
        inputs = "learned embeddings" if self.tokens is None else "text"
        return f"DistilledSet({m} examples of {length} positions × {width}, {inputs}, {labels}{steps}{attention})"

    @property
    def soft(self) -> bool:
        """Whether the labels are soft."""
        return self.targets.is_floating_point()

    @property
    def _has_responses(self) -> bool:
        return self.targets.ndim == 2 and not self.soft

    @property
    def nbytes(self) -> int:
        """Bytes a reader needs to train on it: embeddings (or, for text, token ids), labels of both kinds and step sizes."""
        inputs = self.embeds if self.tokens is None else self.tokens.to(torch.int32)
        return sum(tensor.nbytes for tensor in (inputs, self.targets, self.step_sizes, self.attention) if tensor is not None)

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
        check_are(task=(task, Task), student=(student, Student))
        check_flag("soft_labels", soft_labels)
        check_flag("fill", fill)
        k = examples_per_class(task, per_class, fraction)
        draw = generator("from-real", seed)
        rows = [r[torch.randperm(len(r), generator=draw)[:k].numpy()] for r in task.rows_by_class("train")]
        distilled = cls.from_rows(task, student, rows, length=length, fill=fill, seed=seed)
        return distilled.soften() if soft_labels and task.classes else distilled

    @classmethod
    def from_rows(
        cls, task: Task, student: Student, rows: list, *, length: int | None = None, fill: bool = True, seed: int = 0
    ) -> DistilledSet:
        """A set of chosen training rows with hard labels; ``meta["rows"]`` lists them.

        Args:
            rows: for each class (of an instruction task: one list) the indices of its training rows, in the order wanted.
            length: l; see :meth:`from_real`, also on how short sentences are filled up.
            fill: whether they are.
            seed: which further sentences fill up.
        """
        return cls(**rows_as_set(task, student, rows, length=length, fill=fill, seed=seed))

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
        check_are(task=(task, Task), student=(student, Student))
        check_flag("soft_labels", soft_labels)
        check_flag("fill", fill)
        distilled = cls(**texts_as_set(texts, labels, task, student, length=length, fill=fill, seed=seed))
        return distilled.soften() if soft_labels and task.classes else distilled

    def check_table(self, student: Student) -> None:
        """Raise ValueError unless this set lies in the embedding space of ``student``.

        A set carries the SHA-256 of the table it was made with.  Older sets have none.  They are accepted if the widths agree
        and if those embeddings that are known to be tokens (all of a set with tokens, else the fixed special tokens) equal
        the student's.  Of an object that is no :class:`Student` only the width is checked.
        """
        require(self.embeds.shape[-1] == student.width, f"the set's embeddings are {self.embeds.shape[-1]} wide, student "
                f"{student.name!r} wants {student.width}; {WAY_ACROSS}")
        if not isinstance(student, Student):
            return
        table, maker = self.meta.get("table_sha256", ""), reprlib.repr(self.meta.get("student"))
        require(table in ("", student.table_sha256), f"the set was made with the embedding table of {maker} (SHA-256 "
                f"{table[:12]}…), and student {student.name!r} has another ({student.table_sha256[:12]}…); {WAY_ACROSS}")
        ids = [] if self.tokens is None else [self.tokens[self.mask]]
        ids += [self.targets[self.targets >= 0]] if self._has_responses else []
        largest = int(torch.cat(ids).max()) if ids else 0
        require(largest < len(student.embedding), f"the set holds the token {largest}, and the table of student "
                f"{student.name!r} ends at {len(student.embedding) - 1}; {WAY_ACROSS}")
        require(table or self._has_rows_of(student), f"the set was made with the embedding table of {maker}, and its tokens "
                f"have other embeddings in that of student {student.name!r}; {WAY_ACROSS}")

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
        names = list(self.meta.get("classes", ()))
        kinds = ("responses", "classes") if classes else ("classes", "responses")
        require(self._has_responses != bool(classes),
                f"the set holds {kinds[0]}, and {owner} wants {kinds[1]}: they are of different kinds of task")
        if names == list(classes) or not classes:
            return self
        if not names:  # nobody has named them: only their number can be told
            check_targets(self.targets, len(self), len(classes))
            return self
        require({*names} <= {*classes} and (foreign is not None or len(names) == len(classes)),
                f"the set has the classes {reprlib.repr(names)}, and {owner} has {reprlib.repr(list(classes))}; take what it "
                "was made for, or rename its classes (distillkit.applications.merging.renamed)")
        place = torch.tensor([list(classes).index(name) for name in names])
        meta = {**self.meta, "classes": list(classes)}
        if meta.get("labels"):
            meta["labels"] = place[meta["labels"]].tolist()
        if not self.soft:
            return dataclasses.replace(self, targets=place[self.targets], meta=meta)
        others = len(classes) - len(names)
        share = math.log(foreign / (1 - foreign) / others) if foreign and others else -NONE_AT_ALL
        targets = (self.targets.logsumexp(1, keepdim=True) + share).repeat(1, len(classes))
        targets[:, place] = self.targets
        return dataclasses.replace(self, targets=targets, meta=meta)

    def for_student(self, student: Student) -> DistilledSet:
        """This set as ``student`` trains on it: in its embedding space, with labels in the order of its classes.

        Raises:
            ValueError: see :meth:`check_table` and :meth:`in_classes`; or attention labels for other layers or heads.
        """
        self.check_table(student)
        if self.attention is not None and isinstance(student, Student):
            config: Any = student.module.config
            layers_heads = config.num_hidden_layers, config.num_attention_heads
            require(self.attention.shape[1:3] == layers_heads, f"the set's attention labels are for "
                    f"{list(self.attention.shape[1:3])} layers and heads, student {student.name!r} has {list(layers_heads)}; "
                    "take the set without them: dataclasses.replace(set, attention=None)")
        return self.in_classes(student.classes, f"student {student.name!r}") if isinstance(student, Student) else self

    def tensors_on(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
        """Embeddings, mask, targets and attention labels as a student reads them: on ``device``, floats in ``dtype``."""
        values = {name: getattr(self, name) for name in ("embeds", "mask", "targets", "attention")}
        return {name: None if value is None else value.to(device, dtype if value.is_floating_point() else None)
                for name, value in values.items()}

    def with_attention(self, student: Student) -> DistilledSet:
        """The same examples with attention labels: a target for where the first token looks, beside the soft label.

        Training then minimises the loss of the labels plus ``Unroll.attention_weight`` times KL(label ‖ attention of the
        first token), as Maekawa et al. (ACL 2023, "Dataset Distillation with Attention Labels for Fine-tuning BERT") propose.
        They start from random labels; these start as the student's attention before training, which costs nothing until they
        are learned.  The labels belong to positions: projected sets keep them, retokenised sets and exported text have none.

        Args:
            student: an encoder with a classifier and attention="eager", whose layers and heads the labels are for.

        Raises:
            ValueError: another kind of student, or one of another embedding table.
        """
        self.check_table(student)
        with torch.no_grad():
            batch = {"inputs_embeds": self.embeds, "attention_mask": self.mask}
            _, attention = student.with_first_attention(student.init(0), batch)
        logits = attention.clamp_min(torch.finfo(attention.dtype).tiny).log().to(self.embeds)
        return dataclasses.replace(self, attention=logits.masked_fill(~self.mask[:, None, None], 0.0), meta=dict(self.meta))

    def with_prompt_vectors(self, count: int) -> DistilledSet:
        """The same examples, of which only the first ``count`` learned positions are still learned.

        In this form a synthetic example is a real one whose opening tokens become ``count`` prompt vectors; the rest of its
        text is never optimised, and it holds no more tokens than before.

        Raises:
            ValueError: ``count`` is no whole number from 1 on.
        """
        check_whole("count", count)
        return dataclasses.replace(self, free=self.free & (self.free.cumsum(1) <= count), meta=dict(self.meta))

    def soften(self, confidence: float = CONFIDENCE) -> DistilledSet:
        """The same examples with soft labels that give each its own class with probability ``confidence``."""
        c = len(self.meta.get("classes", ()))
        require(c and self.meta.get("labels"), "responses cannot be softened: only classes can")
        require(1 / c < confidence < 1, f"confidence must lie between 1/{c} and 1, not {confidence!r}")
        gap = math.log(confidence * (c - 1) / (1 - confidence))
        targets = torch.nn.functional.one_hot(torch.tensor(self.meta["labels"]), c) * gap
        return dataclasses.replace(self, targets=targets.float(), meta=dict(self.meta))

    def to_text(self) -> datasets.Dataset:
        """One row an example: ``text``, ``label`` (its class's name) and ``probabilities`` (of each class); of an
        instruction task ``prompt`` and ``response``.  :class:`~distillkit.data.rows.Rows` where `datasets` is not installed.

        Raises:
            ValueError: the embeddings are not tokens yet.
        """
        require(self.tokens is not None and "text" in self.meta,
                "this set holds free embeddings, which have no text; project it first: dk.project(set, student)")
        if "responses" in self.meta:
            return dataset_of({"prompt": self.meta["text"], "response": self.meta["responses"]})
        labels, probabilities = self.label_names(), self.probabilities().tolist()
        return dataset_of({"text": self.meta["text"], "label": labels, "probabilities": probabilities})

    def label_names(self) -> list[str]:
        """The name of each example's own class.

        Raises:
            ValueError: the set does not tell, as an instruction set, or one that was put together by hand.
        """
        classes, labels = self.meta.get("classes"), self.meta.get("labels")
        require(classes and labels, "this set does not name its classes and labels, in meta['classes'] and meta['labels']")
        return [classes[label] for label in labels]

    def probabilities(self) -> Tensor:
        """What each label says of each class, ``[m, c]``: the softmax of soft labels, 0 and 1 for hard ones.

        Raises:
            ValueError: the targets are responses, not classes.
        """
        if self.soft:
            return self.targets.softmax(-1)
        require(self.targets.ndim == 1, "the targets of this set are responses, which have no probabilities of classes")
        return torch.nn.functional.one_hot(self.targets, len(self.meta.get("classes", ())) or -1).to(torch.float32)

    def save(self, path: str | Path) -> Path:
        """Write the set to the file ``path``, all or nothing; returns the path."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "meta"}
        write_file(path, kind=KIND, tensors={n: t for n, t in tensors.items() if t is not None}, data=self.meta)
        return absolute(path)

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
            require("responses" not in distilled.meta or distilled._has_responses,
                    "meta holds responses, and the targets are no response ids [m, r]")
            return distilled
        except (TypeError, ValueError) as error:
            raise StorageError(f"{path} holds no set that this distillkit can read ({error}); make it again") from error
