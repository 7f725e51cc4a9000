"""Few-shot prompts: distilled examples as demonstrations in a language model's context, with nothing trained.

A set that trains a model well holds what tells the classes apart.  Does a model that only *reads* it profit too?  In-context
learning (Brown et al., 2020) puts k solved examples before a question and takes the answer that the model finds likeliest.
What comes out depends on the order of the examples (Lu et al., 2022) and on what the context makes the model say anyway
(Zhao et al., 2021).  So several orders are scored, and beside the plain log-likelihood of each answer stand that by length
and the *calibrated* one, log p(answer | question) − log p(answer | a question without content).

:func:`questions` turns classes into words to choose from, so that the multiple choice of :mod:`distillkit.data.instruction` is
all the scoring there is: without demonstrations, :func:`few_shot` scores as
:func:`~distillkit.evaluation.scoring.choice_scores`.

Demonstrations, a separator behind each, and the question are tokenised piece by piece.  The context is then the same for all
questions, so that the model reads it once and keeps its keys and values; and a piece may be *embeddings* that are no
token's, where a set was distilled with the very model that reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import special_frame
from distillkit.core.student import Student
from distillkit.data.instruction import InstructionTask
from distillkit.data.rows import dataset_of
from distillkit.data.tasks import Task
from distillkit.evaluation.scoring import log_likelihoods, mean_and_std, per_character, picks
from distillkit.io.checks import check_whole, require
from distillkit.io.seeds import generator

TEMPLATE, SEPARATOR = "{text}\nAnswer:", "\n\n"
CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. (2021), section 5
ROOM = 32  # tokens of a question beside its text


@dataclasses.dataclass(frozen=True, eq=False)
class Questions(InstructionTask):
    """A classification task as multiple choice; made by :func:`questions`.

    Attributes:
        template: a question, with ``{text}`` where the text goes.
        names: of the classes, which are the answers.
    """

    template: str = TEMPLATE
    names: tuple[str, ...] = ()


def questions(task: Task, *, template: str = TEMPLATE) -> Questions:
    """Ask of each text of a classification task which class it is of; load language models for the task this returns.

    Args:
        task: its classes' names are the answers; ``merging.with_classes`` and ``merging.renamed`` give a task and a set
            others.
        template: a question, with ``{text}`` once.

    Returns:
        the same splits as questions, grouped by class, with ``ROOM`` tokens more than the task's ``max_length``.  Longer
        questions lose tokens in front.

    Raises:
        ValueError: a task of another kind, or a template without ``{text}``.
    """
    require(task.kind == "classification",
            f"task {task.name!r} is {task.kind}, which asks questions already; give it to few_shot as it is")
    require(template.count("{text}") == 1, f"a template holds {{text}} once, not {template!r}")
    splits = {}
    for split in ("train", "validation", "test"):
        labels = task.labels(split).tolist()
        splits[split] = dataset_of({
            "prompt": [template.replace("{text}", text) for text in task.split(split)["text"][:]],
            "response": [task.classes[label] for label in labels],
            "choices": [[*task.classes]] * len(labels),
            "answer": labels,
            "group": [task.classes[label] for label in labels],
        })
    digest = hashlib.sha256(json.dumps([task.fingerprint, template, task.classes]).encode()).hexdigest()
    return Questions(task.name, "instruction", (), **splits, max_length=task.max_length + ROOM, origin=task.origin,
                     fingerprint=digest, template=template, names=task.classes)


@dataclasses.dataclass(frozen=True)
class FewShot:
    """The accuracy of a language model with demonstrations in its context.

    Attributes:
        mean, std: accuracy over the orders by plain log-likelihood, std with n − 1 (nan for one order).
        scores, normalized, calibrated: accuracy of each order by log-likelihood, by log-likelihood per character, and
            calibrated (None where answers are not the same for all questions).
        losses: of each order, the mean of −log p(right answer) among the choices, in nats.
        k: demonstrations requested.
        dropped: demonstrations that each order left out because they did not fit the model's positions.
        context: tokens of each order's context.
        rows: questions that were scored.
    """

    mean: float
    std: float
    scores: tuple[float, ...]
    normalized: tuple[float, ...]
    calibrated: tuple[float, ...] | None
    losses: tuple[float, ...]
    k: int
    dropped: tuple[int, ...]
    context: tuple[int, ...]
    rows: int

    def __str__(self) -> str:
        spread = f" ± {self.std:.3f}" if len(self.scores) > 1 else ""
        return f"{self.mean:.3f}{spread} ({self.k} shots, {len(self.scores)} orders)"


def few_shot(
    task: InstructionTask, student: Student, shots: DistilledSet | Sequence[tuple[str, str]] = (), *, k: int | None = None,
    orders: int = 4, seed: int = 0, length: int | None = None, separator: str = SEPARATOR, split: str = "test",
    rows: Sequence[int] | None = None, batch_size: int | None = None,
) -> FewShot:
    """Answer multiple-choice questions after reading demonstrations; nothing is trained.

    Args:
        task: what :func:`questions` made, or an instruction task with choices.
        student: a language model, as pretrained.
        shots: demonstrations: a set, whose text is read if it has one and whose embeddings are read otherwise; or pairs of a
            text (of an instruction task: a prompt) and its class's name (a response).  An example with a soft label is shown
            under its original class.  Empty: zero-shot.
        k: demonstrations in a context; default: all.
        orders: number of seeded draws of ``k`` demonstrations, with answers as equal in number as they can be.
        length: tokens that a demonstration's text, or embeddings, are cut to; default: uncut.
        separator: what follows a demonstration.
        split, rows: the questions to answer; default: all of "test".
        batch_size: questions (or choices, where these are longer than a token) at a time; default: 16 on a CPU, 64 on a GPU.

    Raises:
        ValueError: a classifier, another model's embeddings, more shots than there are, demonstrations for a task that did
            not make them, a context in which not one has room, questions without choices, or a chat model.
    """
    rows = range(len(task.split(split))) if rows is None else [int(row) for row in rows]
    _check_reader(task, student, split, rows)
    check_whole("orders", orders)
    shown = _demonstrations(task, student, shots, length, separator)
    k = len(shown) if k is None else k
    check_whole("k", k, least=0, most=len(shown), meaning="no more than there are demonstrations")

    opening = special_frame(student.tokenizer)[0]
    asked = [task.token_ids(student.tokenizer, split)[row][len(opening) :] for row in rows]
    choices = [task.choice_ids(student.tokenizer, split, row) for row in rows]
    blank = _content_free(task, student) if isinstance(task, Questions) else ([], [])
    longest = max(len(prompt) + max(map(len, ids)) for prompt, ids in zip(asked + blank[0], choices + blank[1], strict=True))
    accuracies, losses, dropped, lengths = [], [], [], []
    for order in range(orders if k else 1):
        chosen = _order([answer for answer, _ in shown], k, generator("few-shot-order", seed, order))
        parts = [shown[i][1] for i in chosen]
        while parts and len(opening) + sum(map(len, parts)) + longest > student.max_positions:
            parts.pop(0)  # what stands farthest from the question
        require(parts or not chosen,
                f"not one demonstration has room beside a question of {longest} tokens in the "
                f"{student.max_positions} positions of {student.name!r}; give a smaller length")
        context = torch.cat([_embedded(student, opening), *parts])
        read = {"memory": remember(student, context), "batch_size": batch_size}
        plain = log_likelihoods(student, asked, choices, **read)
        scores = [plain, per_character(plain, task, split, rows)]
        if blank[0]:
            blank_scores = torch.tensor(np.stack(log_likelihoods(student, *blank, **read)))
            prior = blank_scores.softmax(1).mean(0).log().numpy()
            scores.append([s - prior for s in plain])
        losses.append(cross_entropy(plain, task.split(split)[[*rows]]["answer"]))
        accuracies.append([float(task.are_right(split, rows, picks(s)).mean()) for s in scores])
        dropped.append(len(chosen) - len(parts))
        lengths.append(len(context))
    plain, by_length, *calibrated = zip(*accuracies, strict=True)
    return FewShot(*mean_and_std(plain), plain, by_length, calibrated[0] if calibrated else None, tuple(losses), k=k,
                   dropped=tuple(dropped), context=tuple(lengths), rows=len(rows))


def cross_entropy(scores: Sequence[np.ndarray], answers: Sequence[int]) -> float:
    """Mean over questions of −log p(right answer), in nats, where p is the softmax of a question's log-likelihoods."""
    return -float(np.mean([log_softmax(row)[answer] for row, answer in zip(scores, answers, strict=True)]))


def remember(student: Student, context: Tensor):
    """The keys and values of a context of input embeddings ``[p, d]``, read once; None where it is empty."""
    if not len(context):
        return None
    with torch.no_grad():
        return student.module(inputs_embeds=student.scaled(context)[None], use_cache=True, logits_to_keep=1).past_key_values


def _check_reader(task, student: Student, split: str, rows: Sequence[int]) -> None:
    """Raise ValueError unless ``student`` can answer ``rows``."""
    require(task.kind == student.kind == "instruction",
            f"few_shot asks a language model questions, and task {task.name!r} is {task.kind}, student "
            f"{student.name!r} is for {student.kind}; make asked = questions(task), load_student(…, asked)")
    require(student.tokenizer.chat_template is None,
            f"{student.name!r} is a chat model, whose turns few_shot does not write; set "
            "student.tokenizer.chat_template = None to have it read plain text")
    require(len(rows), f"task {task.name!r}, split {split!r}: there must be questions to answer, and rows is empty")
    task.check_choices(split, rows)


def _demonstrations(task, student: Student, shots, length: int | None, separator: str) -> list[tuple[str, Tensor]]:
    """Each demonstration's answer, and all of it, its separator included, as input embeddings ``[p, d]``."""
    if length is not None:
        check_whole("length", length)
    template, names = (task.template, task.names) if isinstance(task, Questions) else ("{text}", ())
    (front, behind), tokenizer, demonstrations = template.split("{text}"), student.tokenizer, []
    for body, answer in _bodies(task, student, shots):
        require(answer in names or not names, f"a demonstration is of class {answer!r}, which is none of {', '.join(names)}")
        end = f"{behind} {answer}{separator}"
        if isinstance(body, str):
            ids = _ids(tokenizer, body)
            text = body if length is None or len(ids) <= length else tokenizer.decode(ids[:length])
            parts = [_embedded(student, _ids(tokenizer, f"{front}{text}{end}"))]
        else:
            first = _embedded(student, _ids(tokenizer, front))
            parts = [first, body[:length].to(first), _embedded(student, _ids(tokenizer, end))]
        demonstrations.append((answer, torch.cat(parts)))
    return demonstrations


def _bodies(task, student: Student, shots) -> Iterable[tuple[str | Tensor, str]]:
    """The text or the embeddings ``[l, d]`` of each demonstration, and the name of its class or its response."""
    if not isinstance(shots, DistilledSet):
        return shots
    require(("responses" in shots.meta) != isinstance(task, Questions),
            f"the demonstrations were made for another kind of task than {task.name!r}")
    answers = shots.meta["responses"] if "responses" in shots.meta else shots.label_names()
    if shots.tokens is not None:
        return zip(shots.meta["text"], answers, strict=True)
    shots.check_table(student)
    return zip([e[free] for e, free in zip(shots.embeds, shots.free, strict=True)], answers, strict=True)


def _order(answers: list[str], k: int, draw: torch.Generator) -> list[int]:
    """``k`` demonstrations in random order, drawn so that no answer is ahead of another by more than one."""
    shuffled = pd.Series(answers, dtype=object).iloc[torch.randperm(len(answers), generator=draw).tolist()]
    turns = shuffled.groupby(shuffled).cumcount().sort_values(kind="stable")  # all first ones of an answer, all second ones …
    return turns.index[:k].to_numpy()[torch.randperm(k, generator=draw).numpy()].tolist()


def _content_free(task: Questions, student: Student) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Questions without content, and their answers, in tokens."""
    prompts = [task.template.replace("{text}", nothing).rstrip() for nothing in CONTENT_FREE]
    heads, tails = [_ids(student.tokenizer, prompt) for prompt in prompts], []
    for prompt, head in zip(prompts, heads, strict=True):
        tails.append([_ids(student.tokenizer, f"{prompt} {word}")[len(head) :] for word in task.names])
    return heads, tails


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _embedded(student: Student, ids: list[int]) -> Tensor:
    return student.embedding[torch.tensor(ids, dtype=torch.long, device=student.device)]
