"""Words as rivals: what a linear classifier on word counts knows, as text, as labels and as a score.

A logistic regression on TF-IDF features is trained in a second on all rows.  Three uses of it are opponents of a distilled set:

* its most telling words, a line for each class, are a text to train on (:func:`keyword_lines`, ``select(…, "keywords")``);
* its probabilities are soft labels for any text (:func:`with_teacher_labels`);
* its own accuracy is an upper line (:mod:`distillkit.evaluation.upper_lines`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from distillkit.core.distilled import DistilledSet
from distillkit.data.tasks import Task
from distillkit.io.checks import check_are, check_whole, require

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


def word_classifier(task: Task, *, ngrams: int = 1, sublinear: bool = False, regularization: float = 1.0) -> Pipeline:
    """Multinomial logistic regression on TF-IDF features, fit on the training split.

    Args:
        ngrams: the longest sequence of words that is a feature.
        sublinear: count a word's occurrences as 1 + log n.
        regularization: C of scikit-learn, the inverse of the strength of the L2 penalty.

    Raises:
        ValueError: a task without classes, or one whose training split has no words of two letters or more.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # a second to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    require(task.kind == "classification", f"keywords and word classifiers need classes, and task {task.name!r} is "
            f"{task.kind}; take a selection of real rows instead")
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, ngrams), sublinear_tf=sublinear),
                             LogisticRegression(C=regularization, max_iter=1000))
    try:
        return pipeline.fit(task.train["text"][:], task.labels("train"))
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: no word classifier can be fit on its training split: {error}") from error


def keyword_lines(task: Task, tokenizer, k: int, room: int) -> list[list[str]]:
    """For each class ``k`` lines of the words with its largest weights in a :func:`word_classifier`, the heaviest first.

    A line holds as many words as fit into ``room`` tokens, and the next line goes on with the next words; where words are few,
    a line takes fewer of them, so that each line has one.

    Raises:
        ValueError: a class has fewer words of positive weight than lines.
    """
    check_whole("room", room)
    lines = []
    for name, of_class in zip(task.classes, weighted_words(task), strict=True):
        words = [word for word, _ in of_class]
        require(len(words) >= k, f"class {name!r} of task {task.name!r} has {len(words)} keywords, fewer than the {k} lines "
                "that are asked for; ask for fewer examples")
        lines.append(_lines(words, tokenizer, k, room))
    return lines


def weighted_words(task: Task) -> list[list[tuple[str, float]]]:
    """For each class the words of positive weight in a :func:`word_classifier`, and their weights, the heaviest first."""
    classifier = word_classifier(task)
    weights, names = classifier[-1].coef_, classifier[0].get_feature_names_out()
    if len(weights) == 1:  # two classes share one vector of weights
        weights = np.concatenate([-weights, weights])
    return [[(str(names[place]), float(of_class[place])) for place in np.argsort(-of_class, kind="stable")
             if of_class[place] > 0] for of_class in weights]


def _lines(words: list[str], tokenizer, k: int, room: int) -> list[str]:
    sizes = [len(ids) for ids in tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]]
    lines, place = [], 0
    for later in reversed(range(k)):
        end, used = place + 1, sizes[place]
        while end < len(words) - later and used + sizes[end] <= room:
            used += sizes[end]
            end += 1
        lines.append(" ".join(words[place:end]))
        place = end
    return lines


def tfidf_classifier(task: Task) -> Pipeline:
    """The strong word classifier: words and pairs of words, sublinear counts, C = 10."""
    return word_classifier(task, ngrams=2, sublinear=True, regularization=10.0)


def with_teacher_labels(distilled: DistilledSet, task: Task) -> DistilledSet:
    """The same text with the soft labels that a teacher gives it: :func:`tfidf_classifier` of the task.

    Args:
        distilled: a set of text with classes of the task.
        task: whose training split the teacher is fit on.

    Returns:
        a set whose targets are the logarithms of the teacher's probabilities; without step sizes and recipe.

    Raises:
        ValueError: a set without text, or a task without classes.
    """
    check_are(distilled=(distilled, DistilledSet), task=(task, Task))
    require(distilled.tokens is not None and "text" in distilled.meta,
            "a teacher of words reads text, and this set holds free embeddings; project it first: dk.project(set, student)")
    distilled = distilled.in_classes(task.classes, f"task {task.name!r}")
    targets = torch.from_numpy(tfidf_classifier(task).predict_log_proba(distilled.meta["text"])).float()
    meta = {name: value for name, value in distilled.meta.items() if name != "recipe"} | {"teacher": "TF-IDF, C=10"}
    return dataclasses.replace(distilled, targets=targets, step_sizes=None, meta=meta)
