"""Judges: what the outer loss of a text would be, cheap enough to ask thousands of times.

A judge makes a search affordable.  :class:`FrozenJudge` trains only a linear head on frozen sentence representations: one
candidate costs one forward pass of one sentence, and its head is tried on thousands of real rows at once.
:class:`StudentJudge` trains the real student and costs accordingly.  Both give the loss of a set after each of several groups
of swaps, and its gradient in the embeddings.  A custom judge is any object with the methods of :class:`Judge`.
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import embed
from distillkit.core.objectives import Objective, check_objective, meta_gradient, trained_loss
from distillkit.core.problem import MetaGradient
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.selection import over_rows
from distillkit.io.checks import check_are, check_choice, check_whole, check_wholes, require
from distillkit.io.seeds import derive_seed, generator

READS = ("layers", "head")
REMEMBERED = 8192  # sentences whose representations a judge keeps


@dataclasses.dataclass(frozen=True, order=True)
class Swap:
    """Token ``new`` for the one at ``position`` of ``example``."""

    example: int
    position: int
    new: int


def swapped(distilled: DistilledSet, swaps: Sequence[Swap]) -> Tensor:
    """The tokens ``[m, l]`` of a set after some swaps."""
    assert distilled.tokens is not None  # without tokens there is nothing to swap
    tokens = distilled.tokens.clone()
    for swap in swaps:
        tokens[swap.example, swap.position] = swap.new
    return tokens


class Judge(Protocol):
    """What a search asks of a judge; any object with these methods is one.

    :func:`~distillkit.text.relaxed.relax_tokens` needs the gradient only, :class:`~distillkit.text.swaps.SwapSearch` both.
    """

    def gradient(self, distilled: DistilledSet, seed: int) -> tuple[float, Tensor]:
        """The outer loss of a set and its gradient in the embeddings, ``[m, l, d]``, on the real rows of an address ``seed``.

        A judge that can save work takes a third argument ``examples``, an index tensor: the gradient of the other examples
        may then be zero.  A search passes it only if it looks at a few examples per step.
        """

    def losses(self, distilled: DistilledSet, swaps: Sequence[Sequence[Swap]], seed: int) -> list[float]:
        """The outer loss of a set after each of several groups of swaps; an empty group is the set as it is."""

    def describe(self) -> dict:
        """The settings as JSON values."""


def check_search(distilled: DistilledSet, student: Student, judge, *methods: str) -> None:
    """Check the arguments that every search for words takes.

    Args:
        methods: those of the judge that the search calls.

    Raises:
        TypeError: no set, no student, or a judge without one of the methods.
        ValueError: a set without tokens, or of another embedding table.
    """
    check_are(distilled=(distilled, DistilledSet), student=(student, Student))
    missing = [name for name in (*methods, "describe") if not callable(getattr(judge, name, None))]
    require(not missing,
            f"judge must be one with {', '.join(missing)}, such as FrozenJudge, not {reprlib.repr(judge)}", TypeError)
    require(distilled.tokens is not None,
            "a search for words needs tokens to begin with, and this set holds free embeddings; project it "
            "first: dk.project(set, student)")
    distilled.check_table(student)


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenJudge:
    """Judges a text by a linear head trained on its frozen representations.

    A sentence is represented by all layers, since training the whole student moves all of them, or by the last state that the
    head reads (an encoder's first token), since a fresh student starts from there.  The parts that
    :meth:`~distillkit.core.student.Student.layer_features` gives are centred on the training split, scaled to the same mean
    square there, and put side by side; their squared lengths are 1 on average.  A head without bias starts at zero
    and takes ``steps`` steps of gradient descent on the set's representations and labels, with the largest step size that is
    stable everywhere.  Its cross-entropy on real training rows is the outer loss.  The encoder is never trained, so a set of
    which one sentence changes needs one forward pass of that sentence.

    Args:
        task, student: a classification task and the student whose body is the encoder.
        steps: of the head's training.
        batch_size: real rows, balanced, drawn anew for each seed; None: the whole training split.
        reads: ``"layers"`` or ``"head"``, what of a sentence is judged.

    The judge remembers every sentence that it has read since the last gradient, so that a step of a search reads each once.

    Raises:
        ValueError: from every method, a set of another embedding table or of classes with other names.
    """

    task: Task
    student: Student
    _: dataclasses.KW_ONLY
    steps: int = 400
    batch_size: int | None = 2048
    reads: str = "layers"
    _read: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        check_are(task=(self.task, Task), student=(self.student, Student))
        check_choice("reads", self.reads, READS)
        check_wholes(steps=self.steps, **({} if self.batch_size is None else {"batch_size": self.batch_size}))
        require(self.task.kind == "classification",
                f"FrozenJudge needs classes, and task {self.task.name!r} is {self.task.kind}; use StudentJudge")

    def gradient(self, distilled: DistilledSet, seed: int, examples: Tensor | None = None) -> tuple[float, Tensor]:
        """The outer loss and its gradient ``[m, l, d]`` in the embeddings, zero outside ``examples`` (None: all)."""
        distilled.check_table(self.student)
        self._read.clear()  # what is remembered follows from the step alone, so that a search resumes to the bit
        embeds = distilled.embeds.detach().to(self.student.device, self.student.dtype).clone().requires_grad_()
        chosen = (torch.arange(len(embeds)) if examples is None else examples).to(embeds.device)
        mask = distilled.mask.to(embeds.device)[chosen].long()
        x = self._represented({"inputs_embeds": embeds[chosen], "attention_mask": mask})
        if examples is not None:
            x = self._of(_sentences(distilled, [])).index_copy(0, chosen, x)
        loss = self.head_losses(x[None], self.labels(distilled), seed)[0]
        return loss.item(), torch.autograd.grad(loss, embeds)[0].cpu()

    def losses(self, distilled: DistilledSet, swaps: Sequence[Sequence[Swap]], seed: int) -> list[float]:
        """The outer loss of the set after each of several groups of swaps; an empty group is the set as it is."""
        distilled.check_table(self.student)
        sets = [_sentences(distilled, group) for group in swaps]
        together = sorted({sentence for sentences in sets for sentence in sentences})
        place = {sentence: n for n, sentence in enumerate(together)}
        rows = torch.tensor([[place[sentence] for sentence in sentences] for sentences in sets])
        with torch.no_grad():
            return self.head_losses(self._of(together)[rows], self.labels(distilled), seed).tolist()

    def _of(self, sentences: list[tuple[int, ...]]) -> Tensor:
        """Representations ``[n, …]`` of n sentences as :func:`_sentences` gives them; remembered ones are not read."""
        if len(self._read) > REMEMBERED:
            self._read.clear()
        fresh = [sentence for sentence in sentences if sentence not in self._read]
        for part in (fresh[start : start + 64] for start in range(0, len(fresh), 64)):
            ids, mask = torch.tensor(part)[:, 1:].chunk(2, dim=1)
            with torch.no_grad():
                self._read.update(zip(part, self._represented({"input_ids": ids, "attention_mask": mask}), strict=True))
        return torch.stack([self._read[sentence] for sentence in sentences])

    def describe(self) -> dict:
        """The settings as JSON values."""
        return {"name": type(self).__name__, "student": self.student.name, "steps": self.steps, "batch_size": self.batch_size,
                **({} if self.reads == READS[0] else {"reads": self.reads})}  # older searches do not say it

    def features(self, distilled: DistilledSet) -> Tensor:
        """The representations ``[m, n·d]`` of a set's sentences, on which heads are trained."""
        distilled.check_table(self.student)
        with torch.no_grad():
            return torch.cat([
                self._represented({"inputs_embeds": embeds, "attention_mask": mask.long()})
                for embeds, mask in zip(distilled.embeds.split(64), distilled.mask.split(64), strict=True)
            ])

    def labels(self, distilled: DistilledSet) -> Tensor:
        """A set's labels as probabilities ``[m, c]`` of the task's classes, matched by name."""
        return distilled.in_classes(self.task.classes, f"task {self.task.name!r}").probabilities().to(self.student.device)

    def _represented(self, batch: dict[str, Tensor]) -> Tensor:
        x = self._parts(self.student.layer_features(batch))
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision cannot tell texts apart
        _, mean, scale = self._of_the_corpus()
        return ((x - mean.to(x)) * scale.to(x)).flatten(1)

    def _parts(self, layers: Tensor) -> Tensor:
        return layers[:, -1:] if self.reads == "head" else layers

    def _of_the_corpus(self) -> tuple[Tensor, Tensor, Tensor]:
        """Representations ``[rows, n·d]`` of the training split, and the mean ``[n, d]`` and scale ``[n, 1]``; remembered."""
        student, task = self.student, self.task
        key = (self.reads, task.fingerprint, task.max_length)
        if key not in student.cache:
            features = self._parts(over_rows(task, student, student.layer_features))
            mean = features.mean(0)
            features -= mean
            scale = (features.square().sum(2).mean(0) * features.shape[1]).rsqrt().unsqueeze(1)
            student.cache[key] = (features * scale).flatten(1), mean, scale
        return student.cache[key]

    def head_losses(self, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Outer losses ``[n]`` of heads trained on n sets of representations.

        Args:
            x: the representations, ``[n, m, n·d]``.
            labels: probabilities ``[m, c]``.
            seed: the address of the real rows.
        """
        real, _, _ = self._of_the_corpus()
        rows = torch.arange(len(real))
        if self.batch_size is not None and self.batch_size < len(real):
            rows = self.task.balanced_rows("train", self.batch_size, generator("judge-batch", seed))
        y = torch.from_numpy(self.task.labels("train"))[rows].to(x.device)
        real, labels = real[rows].to(x), labels.to(x.dtype)
        # The head is a sum of the representations, weight = αᵀx, so that its training needs their inner products only.
        inner = x @ x.transpose(1, 2)
        step = 2 * x.shape[1] / torch.linalg.eigvalsh(inner)[:, -1].clamp_min(1e-12)[:, None, None]
        alpha = x.new_zeros(len(x), x.shape[1], labels.shape[1])
        for _ in range(self.steps):  # the gradient of softmax regression, written out; its curvature is at most 1/step
            alpha = alpha - step / x.shape[1] * ((inner @ alpha).softmax(-1) - labels)
        logits = real @ (alpha.transpose(1, 2) @ x).transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(x)), reduction="none")
        return losses.unflatten(0, (len(x), len(real))).mean(1)


def _sentences(distilled: DistilledSet, swaps: Sequence[Swap]) -> list[tuple[int, ...]]:
    """The number, the tokens and the mask of each sentence of a set after some swaps."""
    columns = torch.arange(len(distilled))[:, None], swapped(distilled, swaps), distilled.mask.long()
    return [tuple(row) for row in torch.cat(columns, 1).tolist()]


@dataclasses.dataclass(eq=False)
class StudentJudge:
    """Judges a text by training the real student: the mean outer loss of an objective over several addresses.

    Args:
        objective: such as :class:`~distillkit.core.objectives.BPTT` or :class:`~distillkit.core.objectives.TrajectoryMatching`.
            After memory has run out, it is replaced by the one with smaller micro-batches that fits.
        tries: addresses (initialisations and real batches, or segments) that every text is judged on.
    """

    objective: Objective
    _: dataclasses.KW_ONLY
    tries: int = 2

    def __post_init__(self):
        check_whole("tries", self.tries)
        check_objective(self.objective)

    def gradient(self, distilled: DistilledSet, seed: int, examples: Tensor | None = None) -> tuple[float, Tensor]:
        """The outer loss and its gradient ``[m, l, d]`` in the embeddings, that of every example whatever ``examples``."""
        smaller = functools.partial(setattr, self, "objective")
        gradients = [meta_gradient(distilled, self.objective, seed=s, on_retry=smaller) for s in self._addresses(seed)]
        gradient = MetaGradient.mean(gradients)
        return float(gradient.loss), gradient.embeds.cpu()

    def losses(self, distilled: DistilledSet, swaps: Sequence[Sequence[Swap]], seed: int) -> list[float]:
        """The outer loss of the set after each of several groups of swaps; an empty group is the set as it is."""
        student, set_losses = self.objective.student, []
        distilled.check_table(student)
        for group in swaps:
            tokens = swapped(distilled, group)
            trial = dataclasses.replace(distilled, embeds=embed(student, tokens), tokens=tokens)
            losses = [trained_loss(p) for s in self._addresses(seed) for p in self.objective.problems(trial, s)]
            set_losses.append(sum(losses) / len(losses))
        return set_losses

    def describe(self) -> dict:
        """The settings as JSON values."""
        return {"name": type(self).__name__, "tries": self.tries, "objective": self.objective.recipe()}

    def _addresses(self, seed: int) -> list[int]:
        return [derive_seed("judge", seed, n) for n in range(self.tries)]


@dataclasses.dataclass(frozen=True, eq=False)
class JointJudge:
    """The mean outer loss of several frozen judges: a text that pleases one encoder does not please the next.

    It gives losses and no gradient, as the encoders' embeddings differ.

    Args:
        judges: such as :class:`FrozenJudge`; their students have one vocabulary.

    Raises:
        TypeError: something else than judges.
        ValueError: no judges, or students with other vocabularies.
    """

    judges: Sequence[FrozenJudge]

    def __post_init__(self):
        listed = isinstance(self.judges, Sequence) and all(hasattr(judge, "student") for judge in self.judges)
        require(listed and self.judges, f"judges must be a list of such as FrozenJudge, not {reprlib.repr(self.judges)}",
                ValueError if listed else TypeError)
        vocabularies = [judge.student.tokenizer.get_vocab() for judge in self.judges]
        other = next((n for n, vocabulary in enumerate(vocabularies) if vocabulary != vocabularies[0]), 0)
        require(other == 0, f"judges read one text token by token, and the vocabulary of {self.judges[other].student.name!r} "
                f"is not that of {self.judges[0].student.name!r}; take encoders that share a tokenizer")

    def losses(self, distilled: DistilledSet, swaps: Sequence[Sequence[Swap]], seed: int) -> list[float]:
        """The mean outer loss of the set after each of several groups of swaps; an empty group is the set as it is."""
        tokens = swapped(distilled, [])
        each = [judge.losses(_with_table(distilled, tokens, judge.student), swaps, seed) for judge in self.judges]
        return torch.tensor(each, dtype=torch.float64).mean(0).tolist()

    def describe(self) -> dict:
        """The settings as JSON values."""
        return {"name": type(self).__name__, "judges": [judge.describe() for judge in self.judges]}


def _with_table(distilled: DistilledSet, tokens: Tensor, student: Student) -> DistilledSet:
    """The same tokens in the embedding table of another student with the same vocabulary."""
    meta = distilled.meta | {"table_sha256": student.table_sha256, "student": student.name}
    return dataclasses.replace(distilled, embeds=embed(student, tokens), meta=meta)
