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

import collections
import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import special_frame
from distillkit.core.student import Student
from distillkit.data.instruction import InstructionTask
from distillkit.data.tasks import Task
from distillkit.evaluation.scoring import by_size, per_character, picks, without_nan
from distillkit.io.checks import check_whole
from distillkit.io.seeds import generator

TEMPLATE, SEPARATOR = "{text}\nAnswer:", "\n\n"
CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. (2021), section 5
ROOM = 32  # tokens of a question beside its text


@dataclasses.dataclass(frozen=True, eq=False)
class Questions(InstructionTask):
    """A classification task as multiple choice; made by :func:`questions`.

    Attributes:
        template: a question, with ``{text}`` where the text goes.
        names: of the classes.
        words: the answer that stands for each class.
    """

    template: str = TEMPLATE
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def questions(task: Task, *, template: str = TEMPLATE, words: Sequence[str] | None = None) -> Questions:
    """Ask of each text of a classification task which class it is of; load language models for the task this returns.

    Args:
        template: a question, with ``{text}`` once.
        words: an answer for each class; default: the names of the classes.

    Returns:
        the same splits as questions, grouped by class, with ``ROOM`` tokens more than the task's ``max_length``.  Longer
        questions lose tokens in front.

    Raises:
        ValueError: a task of another kind, a template without ``{text}``, or words that are not one for each class.
    """
    if task.kind != "classification":
        raise ValueError(f"task {task.name!r} is {task.kind}, which asks questions already; give it to few_shot as it is")
    if template.count("{text}") != 1:
        raise ValueError(f"a template holds {{text}} once, not {template!r}")
    words = task.classes if words is None else tuple(words)
    if len(words) != len(task.classes) or len({*words}) != len(words):
        raise ValueError(f"words must be a different one for each of {', '.join(task.classes)}, not {words!r}")
    splits = {}
    for split in ("train", "validation", "test"):
        labels = task.labels(split).tolist()
        splits[split] = datasets.Dataset.from_dict({
            "prompt": [template.replace("{text}", text) for text in task.split(split)["text"][:]],
            "response": [words[label] for label in labels],
            "choices": [[*words]] * len(labels),
            "answer": labels,
            "group": [task.classes[label] for label in labels],
        })
    digest = hashlib.sha256(json.dumps([task.fingerprint, template, words]).encode()).hexdigest()
    return Questions(task.name, "instruction", (), **splits, max_length=task.max_length + ROOM, origin=task.origin,
                     fingerprint=digest, template=template, names=task.classes, words=words)


@dataclasses.dataclass(frozen=True)
class FewShot:
    """What demonstrations are worth in a context.

    Attributes:
        mean, std: accuracy over the orders by plain log-likelihood, std with n − 1 (nan for one order).
        scores, normalized, calibrated: accuracy of each order by log-likelihood, by log-likelihood per character, and
            calibrated (None where answers are not the same for all questions).
        k: demonstrations asked for.
        dropped: of them, how many each order left out because they outgrew the model's positions.
        context: tokens of each order's context.
        rows: questions that were scored.
    """

    mean: float
    std: float
    scores: tuple[float, ...]
    normalized: tuple[float, ...]
    calibrated: tuple[float, ...] | None
    k: int
    dropped: tuple[int, ...]
    context: tuple[int, ...]
    rows: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f} ({self.k} shots, {len(self.scores)} orders)"


def few_shot(
    task: InstructionTask,
    student: Student,
    shots: DistilledSet | Sequence[tuple[str, str]] = (),
    *,
    k: int | None = None,
    orders: int = 4,
    seed: int = 0,
    length: int | None = None,
    separator: str = SEPARATOR,
    split: str = "test",
    rows: Sequence[int] | None = None,
    batch_size: int = 64,
) -> FewShot:
    """Answer multiple-choice questions after reading demonstrations; nothing is trained.

    Args:
        task: what :func:`questions` made, or an instruction task with choices.
        student: a language model, as pretrained.
        shots: demonstrations: a set, whose text is read if it has one and whose embeddings are read otherwise; or pairs of a
            text (of an instruction task: a prompt) and its class's name (a response).  Of a soft label the example's own
            class is told.  None at all: zero-shot.
        k: demonstrations in a context; default: all.
        orders: how many; each is a seeded draw of ``k`` demonstrations, answers as equal in number as they can be.
        length: tokens that a demonstration's text, or embeddings, are cut to; default: uncut.
        separator: what follows a demonstration.
        split, rows: the questions to answer; default: all of "test".
        batch_size: questions (or choices, where these are longer than a token) at a time.

    Raises:
        ValueError: a classifier, another model's embeddings, more shots than there are, demonstrations for a task that did
            not make them, a context in which not one has room, questions without choices, or a chat model.
    """
    rows = _checked_rows(task, student, split, rows)
    check_whole("orders", orders)
    shown = _demonstrations(task, student, shots, length, separator)
    k = len(shown) if k is None else k
    check_whole("k", k, least=0, most=len(shown), meaning="no more than there are demonstrations")

    opening = special_frame(student.tokenizer)[0]
    asked = [task.token_ids(student.tokenizer, split)[row][len(opening) :] for row in rows]
    choices = [task.choice_ids(student.tokenizer, split, row) for row in rows]
    blank = _content_free(task, student) if isinstance(task, Questions) else ([], [])
    longest = max(len(question) + max(map(len, of)) for question, of in zip(asked + blank[0], choices + blank[1], strict=True))
    accuracies, dropped, lengths = [], [], []
    for order in range(orders if k else 1):
        chosen = _order([answer for answer, _ in shown], k, generator("few-shot-order", seed, order))
        parts = _fitting([shown[i][1] for i in chosen], student, len(opening), longest)
        context = torch.cat([_embedded(student, opening), *parts])
        memory = remember(student, context)
        plain = log_likelihoods(student, memory, asked, choices, batch_size)
        scores = [plain, per_character(plain, task, split, rows)]
        if blank[0]:
            answers = torch.tensor(np.stack(log_likelihoods(student, memory, *blank, batch_size)))
            prior = answers.softmax(1).mean(0).log().numpy()
            scores.append([s - prior for s in plain])
        accuracies.append([float(task.are_right(split, rows, picks(s)).mean()) for s in scores])
        dropped.append(len(chosen) - len(parts))
        lengths.append(len(context))
    return _summary(accuracies, k, dropped, lengths, len(rows))


def _summary(accuracies: list[list[float]], k: int, dropped: list[int], lengths: list[int], rows: int) -> FewShot:
    """The result from the accuracies of each order: plain, by length and, where there is one, calibrated."""
    plain, by_length, *calibrated = (tuple(column) for column in zip(*accuracies, strict=True))
    std = float(np.std(plain, ddof=1)) if len(plain) > 1 else float("nan")
    return FewShot(float(np.mean(plain)), std, plain, by_length, calibrated[0] if calibrated else None, k=k,
                   dropped=tuple(dropped), context=tuple(lengths), rows=rows)


def _checked_rows(task, student: Student, split: str, rows: Sequence[int] | None) -> Sequence[int]:
    """The rows to answer (default: all of the split); raises ValueError unless ``student`` can answer them."""
    if task.kind != "instruction" or student.kind != "instruction":
        raise ValueError(f"few_shot asks a language model questions, and task {task.name!r} is {task.kind}, student "
                         f"{student.name!r} is for {student.kind}; make asked = questions(task), load_student(…, asked)")
    if student.tokenizer.chat_template is not None:
        raise ValueError(f"{student.name!r} is a chat model, whose turns few_shot does not write; set "
                         "student.tokenizer.chat_template = None to have it read plain text")
    rows = range(len(task.split(split))) if rows is None else [int(row) for row in rows]
    if not len(rows):
        raise ValueError(f"task {task.name!r}, split {split!r}: there must be questions to answer, and rows is empty")
    task.check_choices(split, rows)
    return rows


# ---------------------------------------------------------------------------------------------------- demonstrations


def _demonstrations(task, student: Student, shots, length: int | None, separator: str) -> list[tuple[str, Tensor]]:
    """Each demonstration's answer, and all of it, its separator included, as input embeddings ``[p, d]``."""
    if length is not None:
        check_whole("length", length)
    template, words = "{text}", {}
    if isinstance(task, Questions):
        template, words = task.template, dict(zip(task.names, task.words, strict=True))
    front, behind = template.split("{text}")
    tokenizer, demonstrations = student.tokenizer, []
    for body, answer in _bodies(task, student, shots):
        if words and answer not in words:
            raise ValueError(f"a demonstration is of class {answer!r}, which is none of {', '.join(words)}")
        answer = words.get(answer, answer)
        if isinstance(body, str):
            text = _cut(tokenizer, body, length)
            demonstrations.append((answer, _embedded(student, _ids(tokenizer, f"{front}{text}{behind} {answer}{separator}"))))
        else:
            parts = [_ids(tokenizer, front) if front else [], _ids(tokenizer, f"{behind} {answer}{separator}")]
            first, last = (_embedded(student, ids) for ids in parts)
            demonstrations.append((answer, torch.cat([first, body[:length].to(first), last])))
    return demonstrations


def _bodies(task, student: Student, shots) -> Iterator[tuple[str | Tensor, str]]:
    """The text or the embeddings ``[l, d]`` of each demonstration, and the name of its class or its response."""
    if not isinstance(shots, DistilledSet):
        yield from shots
        return
    if ("responses" in shots.meta) == isinstance(task, Questions):
        raise ValueError(f"the demonstrations were made for another kind of task than {task.name!r}")
    if "responses" in shots.meta:
        answers = shots.meta["responses"]
    else:
        answers = shots.label_names()
    if shots.tokens is not None:
        yield from zip(shots.meta["text"], answers, strict=True)
        return
    shots.check_table(student)
    yield from zip([e[free] for e, free in zip(shots.embeds, shots.free, strict=True)], answers, strict=True)


def _order(answers: list[str], k: int, draw: torch.Generator) -> list[int]:
    """``k`` demonstrations in random order, drawn so that no answer is ahead of another by more than one."""
    turn, seen = [], collections.Counter()
    for place in torch.randperm(len(answers), generator=draw).tolist():
        turn.append((seen[answers[place]], place))
        seen[answers[place]] += 1
    chosen = [place for _, place in sorted(turn, key=lambda item: item[0])[:k]]
    return [chosen[i] for i in torch.randperm(len(chosen), generator=draw).tolist()]


def _fitting(parts: list[Tensor], student: Student, opening: int, longest: int) -> list[Tensor]:
    """The last of ``parts`` that fit between the opening and the longest question: what stands farthest from it goes first.

    Raises:
        ValueError: there are parts, and none fits.
    """
    first, room = 0, student.max_positions - opening - longest
    while parts[first:] and sum(map(len, parts[first:])) > room:
        first += 1
    if parts and first == len(parts):
        raise ValueError(f"not one demonstration has room beside a question of {longest} tokens in the "
                         f"{student.max_positions} positions of {student.name!r}; give a smaller length")
    return parts[first:]


def _cut(tokenizer, text: str, length: int | None) -> str:
    ids = _ids(tokenizer, text)
    return text if length is None or len(ids) <= length else tokenizer.decode(ids[:length])


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _embedded(student: Student, ids: list[int]) -> Tensor:
    return student.embedding[torch.tensor(ids, dtype=torch.long, device=student.device)]


def _content_free(task: Questions, student: Student) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Questions without content, and their answers, in tokens."""
    heads, tails = [], []
    for nothing in CONTENT_FREE:
        prompt = task.template.replace("{text}", nothing).rstrip()
        heads.append(_ids(student.tokenizer, prompt))
        tails.append([_ids(student.tokenizer, f"{prompt} {word}")[len(heads[-1]) :] for word in task.words])
    return heads, tails


# ----------------------------------------------------------------------------------------------------------- scoring


def remember(student: Student, context: Tensor):
    """The keys and values of a context of input embeddings ``[p, d]``, read once; None where it is empty."""
    if not len(context):
        return None
    with torch.no_grad():
        return student.module(inputs_embeds=student.scaled(context)[None], use_cache=True, logits_to_keep=1).past_key_values


def log_likelihoods(
    student: Student, memory, asked: Sequence[list[int]], choices: Sequence[list[list[int]]], batch_size: int = 64
) -> list[np.ndarray]:
    """Log-likelihood of each choice of each question after a context.

    Args:
        memory: what :func:`remember` gave; not changed.
        asked: a question's token ids, one at least, without the special tokens that open a text.
        choices: for each question, the token ids of each choice.
        batch_size: questions (choices, where these are longer than a token) at a time.

    Returns:
        for each question an array with an entry a choice; a NaN counts as −∞.
    """
    likelihoods = [np.zeros(len(of)) for of in choices]
    items = []  # tokens to read, and (place, token, question, choice) of each log-probability to read there
    for row, (question, of) in enumerate(zip(asked, choices, strict=True)):
        end = len(question) - 1
        if all(len(choice) == 1 for choice in of):  # then the question is read once and tells of all of them
            items.append((question, [(end, token, row, i) for i, (token,) in enumerate(of)]))
        else:
            items += [(question + choice[:-1], [(end + j, token, row, i) for j, token in enumerate(choice)])
                      for i, choice in enumerate(of)]
    for part in by_size(items, lambda item: len(item[0]), batch_size):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in part], batch_first=True)
        first = min(place for _, places in part for place, *_ in places)
        past = copy.deepcopy(memory)  # as reading adds to it
        if past is not None:
            past.batch_repeat_interleave(len(part))
        with torch.no_grad():  # padding stands behind, where no token of interest looks
            embeds = student.scaled(F.embedding(ids.to(student.device), student.embedding))
            log_p = student.module(
                inputs_embeds=embeds, past_key_values=past, use_cache=True, logits_to_keep=ids.shape[1] - first
            ).logits.log_softmax(-1)
        where = [(n, place - first, *rest) for n, (_, places) in enumerate(part) for place, *rest in places]
        n, place, token, row, choice = zip(*where, strict=True)
        for r, c, value in zip(row, choice, log_p[[*n], [*place], [*token]].double().cpu().tolist(), strict=True):
            likelihoods[r][c] += value
    return without_nan(likelihoods)
