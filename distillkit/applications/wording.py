"""What words a text holds: distilled text described by counts, beside real and selected text.

A score says how well a text teaches, but not why.  Four counts of its words help to explain it:

* *Terms of a class.*  A word is typical of a class if it is more frequent there than elsewhere by more than chance.  The
  log-odds ratio with an informative Dirichlet prior (Monroe et al., 2008) shrinks rare words towards the corpus and divides by
  its own standard deviation: for word w with counts y of n words in all, and prior pseudo-counts α_w, α_0 in all,

      δ_w = log (y_w + α_w) / (n + α_0 − y_w − α_w)  −  the same elsewhere,   σ²_w ≈ 1 / (y_w + α_w) + 1 / (y'_w + α_w)

  and z_w = δ_w / σ_w.  The words of each class come from the training split; the count is the share of a text's words that are
  typical of its own class, or of another.
* *Overlap.*  The share of its runs of 1, 2 and 3 words that occur in the training split.  Text that was copied from there has
  nearly all of them; held-out real text gives the value to compare with.
* *Rare words.*  The share of words that occur fewer than five times in the training split, or never.
* *Perplexity*, the exponential of the mean loss per token, under a language model: how much the text reads like language.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from distillkit.core.distilled import DistilledSet
from distillkit.core.examples import special_frame
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.scoring import log_likelihoods
from distillkit.io.checks import require
from distillkit.text.writing import runs, words_of

RUNS = (1, 2, 3)
RARE = 5
TERMS = 5  # terms per class
TELLING = 1.96  # z-score above which a word is typical of a class
STRENGTH = 500  # α_0, the number of words that the prior is worth: our choice


@dataclasses.dataclass(frozen=True)
class Wording:
    """Counts of a text's words; all shares are of its words or of its runs of words.

    Attributes:
        words, distinct: their number, and the share of different ones.
        own, other: share of words typical of the text's own class in the training split, and of those typical of others only.
        overlap: {n: share of its runs of n words that occur in the training split}.
        rare: share of words that the training split has fewer than ``RARE`` times.
        perplexity: per token, under a language model; None without one.
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


def log_odds(one: Mapping[str, int], other: Mapping[str, int], prior: Mapping[str, int]) -> dict[str, float]:
    """How much more a word belongs to ``one`` than to ``other``: z-scores of the log-odds ratio (Monroe et al., 2008, eq. 22).

    Args:
        one, other: counts of words.
        prior: counts in the corpus that both are seen against.  A word it lacks counts once there.

    Returns:
        {word: z} for every word of ``one`` or ``other``.
    """
    words = sorted({*one, *other})
    base = {word: max(1, prior.get(word, 0)) for word in {*prior, *words}}
    scale, sizes, scores = STRENGTH / sum(base.values()), (sum(one.values()), sum(other.values())), {}
    for word in words:
        y, rest = (counts.get(word, 0) + scale * base[word] for counts in (one, other))
        ratio = math.log(y / (sizes[0] + STRENGTH - y)) - math.log(rest / (sizes[1] + STRENGTH - rest))
        scores[word] = ratio / math.sqrt(1 / y + 1 / rest)
    return scores


def describe_text(
    texts: DistilledSet | Sequence[tuple[str, str]], task: Task, student: Student | None = None
) -> Wording:
    """Describe a text by its words, compared with the training split of its task.

    Args:
        texts: a set with text, or pairs of a text and its class's name.
        task: the classification task it is of.
        student: a language model for the perplexity, as :func:`~distillkit.applications.prompting.questions` or an instruction
            task loads it; None: no perplexity.

    Raises:
        ValueError: a set without text, no words, an unknown class, another kind of task, or a student that is a classifier.
    """
    require(task.kind == "classification", f"words are counted by class, and task {task.name!r} is {task.kind}")
    if student is not None and student.kind != "instruction":
        raise ValueError(f"student {student.name!r} is a classifier, which gives text no probability; load it for an "
                         "instruction task")
    if isinstance(texts, DistilledSet):
        rows = texts.to_text()
        texts = list(zip(rows["text"][:], rows["label"][:], strict=True))
    if unknown := {name for _, name in texts} - {*task.classes}:
        raise ValueError(f"a text is of class {min(unknown)!r}, which is none of {', '.join(task.classes)}")
    pairs = [(words_of(text), name) for text, name in texts]
    words = pd.Series([word for body, _ in pairs for word in body], dtype=object)
    require(len(words), "there is no word in these texts")

    corpus = [(words_of(text), task.classes[label]) for text, label in zip(task.train["text"][:], task.labels("train"))]
    frequency = collections.Counter(word for body, _ in corpus for word in body)
    scores = _scores_by_class(corpus, task.classes, frequency)
    words_of_class = {name: {word for word, z in scores[name].items() if z > TELLING} for name in task.classes}
    tells_own = pd.Series([word in words_of_class[name] for body, name in pairs for word in body])
    overlap = {}
    for n in RUNS:
        known = {run for body, _ in corpus for run in runs(body, n)}
        own = [run for body, _ in pairs for run in runs(body, n)]
        overlap[n] = sum(run in known for run in own) / len(own) if own else math.nan
    terms = _scores_by_class(pairs, task.classes, frequency)
    return Wording(
        words=len(words),
        distinct=words.nunique() / len(words),
        own=float(tells_own.mean()),
        other=float((words.isin(set().union(*words_of_class.values())) & ~tells_own).mean()),
        overlap=overlap,
        rare=sum(frequency[word] < RARE for word in words) / len(words),
        perplexity=None if student is None else perplexity([text for text, _ in texts], student),
        terms={name: tuple(sorted(z, key=lambda word: (-z[word], word))[:TERMS]) for name, z in terms.items()},
    )


def perplexity(texts: Sequence[str], student: Student) -> float:
    """exp of the mean loss of all tokens of ``texts``, each read alone behind the special tokens that open a text.

    Where a tokenizer has none, a text's first token is not predicted.  Texts are cut at the model's positions.
    """
    before = special_frame(student.tokenizer)[0]
    first = max(1, len(before))
    texts_ids = [before + student.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    texts_ids = [ids[: student.max_positions] for ids in texts_ids if len(ids) > first]
    require(texts_ids, "there is no token to predict in these texts")
    prompts, rest = [ids[:first] for ids in texts_ids], [[ids[first:]] for ids in texts_ids]
    scores = log_likelihoods(student, prompts, rest, batch_size=8)
    return math.exp(-sum(float(score[0]) for score in scores) / sum(len(ids) for (ids,) in rest))


def wording_table(descriptions: Mapping[str, Wording]) -> str:
    """Descriptions by name as a Markdown table."""
    lines = ["| text | words | distinct | tell own class | tell others | runs of 1 / 2 / 3 in training text | rare | "
             "perplexity |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name, w in descriptions.items():
        overlap = " / ".join(f"{share:.0%}" for share in w.overlap.values())
        perplexity = "" if w.perplexity is None else f"{w.perplexity:.0f}"
        lines.append(f"| {name} | {w.words} | {w.distinct:.0%} | {w.own:.0%} | {w.other:.0%} | {overlap} | {w.rare:.0%} | "
                     f"{perplexity} |")
    return "\n".join(lines)


def _scores_by_class(
    pairs: Sequence[tuple[list[str], str]], classes: Sequence[str], prior: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """z-scores of each class's own words against all other classes together; none where a side has no words."""
    counts = {name: collections.Counter(w for words, label in pairs if label == name for w in words) for name in classes}
    total, scores = sum(counts.values(), collections.Counter()), {}
    for name, count in counts.items():
        others = total - count
        z = log_odds(count, others, prior) if count and others else {}
        scores[name] = {word: z[word] for word in count if z}
    return scores
