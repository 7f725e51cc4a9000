"""What words a text holds: distilled text described by counts, beside real and selected text.

A score says that a text teaches and not how.  Four counts of its words say something about that:

* *Terms of a class.*  A word tells a class if it is more frequent there than elsewhere by more than chance.  The log-odds
  ratio with an informative Dirichlet prior (Monroe et al., 2008) shrinks rare words towards the corpus and divides by its
  own standard deviation: for word w with counts y of n words in all, and prior pseudo-counts α_w, α_0 in all,

      δ_w = log (y_w + α_w) / (n + α_0 − y_w − α_w)  −  the same elsewhere,   σ²_w ≈ 1 / (y_w + α_w) + 1 / (y'_w + α_w)

  and z_w = δ_w / σ_w.  Which words tell which class is learned from the training split; what share of a text's words tell its
  own class, or another, is counted.
* *Overlap.*  The share of its runs of 1, 2 and 3 words that stand in the training split.  Text that was taken from there has
  all of them, but for the seams; held-out real text says how many text of that kind has.
* *Rare words.*  The share of words that the training split has fewer than five times, or never.
* *Perplexity*, the exponential of the mean loss a token, under a language model: how much of it reads like language.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import special_frame
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_whole

PRIOR = 500  # words that the prior is worth, our choice
TELLING = 1.96  # z of a word that tells a class
RUNS = (1, 2, 3)
RARE = 5


@dataclasses.dataclass(frozen=True)
class Wording:
    """What words a text holds; all shares are of its words or of its runs of words.

    Attributes:
        words, distinct: their number, and the share of different ones.
        own, other: share of words that tell the text's own class in the training split, and of those that tell only others.
        overlap: {n: share of its runs of n words that stand in the training split}.
        rare: share of words that the training split has fewer than ``RARE`` times.
        perplexity: a token, under a language model; None where none was given.
        terms: {class: words that set its text apart from the text of the other classes, most telling first}.
    """

    words: int
    distinct: float
    own: float
    other: float
    overlap: dict[int, float]
    rare: float
    perplexity: float | None
    terms: dict[str, tuple[str, ...]]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def log_odds(
    one: Mapping[str, int], other: Mapping[str, int], prior: Mapping[str, int], *, strength: float = PRIOR
) -> dict[str, float]:
    """How much more a word belongs to ``one`` than to ``other``: z-scores of the log-odds ratio (Monroe et al., 2008, eq. 22).

    Args:
        one, other: counts of words.
        prior: counts in the corpus that both are seen against.  A word it lacks counts once there.
        strength: α_0, the number of words that the prior is worth.

    Returns:
        {word: z} for every word of ``one`` or ``other``.

    Raises:
        ValueError: a side without words, or a strength that is not above 0.
    """
    if not (strength > 0 and sum(one.values()) and sum(other.values())):
        raise ValueError(f"log-odds compare counts with counts: {sum(one.values())} words, {sum(other.values())} words, "
                         f"strength {strength!r}, which must all be above 0")
    seen = sorted({*one, *other})
    base = {word: max(1, prior.get(word, 0)) for word in {*prior, *seen}}
    scale = strength / sum(base.values())
    sizes = [sum(counts.values()) for counts in (one, other)]
    found = {}
    for word in seen:
        alpha = scale * base[word]
        here, there = (counts.get(word, 0) + alpha for counts in (one, other))
        ratio = math.log(here / (sizes[0] + strength - here)) - math.log(there / (sizes[1] + strength - there))
        found[word] = ratio / math.sqrt(1 / here + 1 / there)
    return found


def describe_text(
    texts: DistilledSet | Sequence[tuple[str, str]], task: Task, student: Student | None = None, *, top: int = 5
) -> Wording:
    """Describe a text by its words, seen against the training split of its task.

    Args:
        texts: a set with text, or pairs of a text and its class's name.
        task: the classification task it is of.
        student: a language model for the perplexity, as :func:`~distillkit.applications.prompting.questions` or an instruction
            task loads it; None: no perplexity.
        top: terms of a class that are told.

    Raises:
        ValueError: a set without text, no words, an unknown class, another kind of task, or a student that is a classifier.
    """
    if task.kind != "classification":
        raise ValueError(f"words are told apart by class, and task {task.name!r} is {task.kind}")
    if student is not None and student.kind != "instruction":
        raise ValueError(f"student {student.name!r} is a classifier, which gives text no probability; load it for an "
                         "instruction task")
    check_whole("top", top)
    if isinstance(texts, DistilledSet):
        rows = texts.to_text()
        texts = list(zip(rows["text"][:], rows["label"][:], strict=True))
    if unknown := {name for _, name in texts} - {*task.classes}:
        raise ValueError(f"a text is of class {min(unknown)!r}, which is none of {', '.join(task.classes)}")
    read = [(words_of(text), name) for text, name in texts]
    if not (count := sum(len(words) for words, _ in read)):
        raise ValueError("there is no word in these texts")

    corpus = [words_of(text) for text in task.train["text"][:]]
    labels = [task.classes[label] for label in task.labels("train")]
    everything = collections.Counter(word for words in corpus for word in words)
    telling = _telling(_by_class(zip(corpus, labels, strict=True), task.classes), everything)
    own = sum(word in telling[name] for words, name in read for word in words)
    any_class = frozenset().union(*telling.values())
    told = sum(word in any_class for words, _ in read for word in words)
    return Wording(
        words=count,
        distinct=len({word for words, _ in read for word in words}) / count,
        own=own / count,
        other=(told - own) / count,
        overlap={n: _overlap([words for words, _ in read], corpus, n) for n in RUNS},
        rare=sum(everything[word] < RARE for words, _ in read for word in words) / count,
        perplexity=None if student is None else perplexity([text for text, _ in texts], student),
        terms=_terms(_by_class(read, task.classes), everything, top),
    )


def perplexity(texts: Sequence[str], student: Student) -> float:
    """exp of the mean loss of all tokens of ``texts``, each read alone behind the special tokens that open a text.

    Where a tokenizer has none, a text's first token is not predicted.  Texts are cut at the model's positions.
    """
    before, loss, tokens = special_frame(student.tokenizer)[0], 0.0, 0
    for text in texts:
        ids = before + student.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(ids[: student.max_positions], device=student.device)
        first = max(1, len(before))
        if len(ids) > first:
            with torch.no_grad():
                said = student.module(inputs_embeds=student.scaled(student.embedding[ids])[None]).logits[0, first - 1 : -1]
            loss += float(torch.nn.functional.cross_entropy(said.double(), ids[first:], reduction="sum"))
            tokens += len(ids) - first
    if not tokens:
        raise ValueError("there is no token to predict in these texts")
    return math.exp(loss / tokens)


def wording_table(found: Mapping[str, Wording]) -> str:
    """Descriptions by name as a Markdown table."""
    lines = ["| text | words | distinct | tell own class | tell others | runs of 1 / 2 / 3 in training text | rare | "
             "perplexity |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, w in found.items():
        overlap = " / ".join(f"{share:.0%}" for share in w.overlap.values())
        read = "" if w.perplexity is None else f"{w.perplexity:.0f}"
        lines.append(f"| {name} | {w.words} | {w.distinct:.0%} | {w.own:.0%} | {w.other:.0%} | {overlap} | {w.rare:.0%} | "
                     f"{read} |")
    return "\n".join(lines)


def _by_class(read: Iterable[tuple[list[str], str]], classes: Sequence[str]) -> dict[str, collections.Counter]:
    counts = {name: collections.Counter() for name in classes}
    for words, name in read:
        counts[name].update(words)
    return counts


def _against_the_others(counts: dict[str, collections.Counter], prior) -> dict[str, dict[str, float]]:
    """z-scores of each class's own words against all other classes together; none where a side has no words."""
    total, found = sum(counts.values(), collections.Counter()), {}
    for name, mine in counts.items():
        others = total - mine
        scores = log_odds(mine, others, prior) if mine and others else {}
        found[name] = {word: scores[word] for word in mine if word in scores}
    return found


def _telling(counts: dict[str, collections.Counter], prior) -> dict[str, frozenset[str]]:
    return {name: frozenset(word for word, z in scores.items() if z > TELLING)
            for name, scores in _against_the_others(counts, prior).items()}


def _terms(counts: dict[str, collections.Counter], prior, top: int) -> dict[str, tuple[str, ...]]:
    return {name: tuple(sorted(scores, key=lambda word: (-scores[word], word))[:top])
            for name, scores in _against_the_others(counts, prior).items()}


def _overlap(texts: list[list[str]], corpus: list[list[str]], n: int) -> float:
    runs = [run for words in texts for run in _runs(words, n)]
    there = {run for words in corpus for run in _runs(words, n)}
    return sum(run in there for run in runs) / len(runs) if runs else float("nan")


def _runs(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
