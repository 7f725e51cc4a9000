"""Upper lines: what cheap classifiers reach that are trained on all rows, without any distilled set.

A distilled set that trains a student to less than these is no way to a good classifier, whatever it gains on other sets.
"""

from __future__ import annotations

import numpy as np

from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.selection import sentence_features
from distillkit.evaluation.words import tfidf_classifier
from distillkit.io.checks import require

STRENGTHS = (1.0, 10.0, 100.0)  # C of the linear probe; validation chooses


def tfidf_accuracy(task: Task, split: str = "test") -> float:
    """Accuracy of TF-IDF and logistic regression (:func:`~distillkit.evaluation.words.tfidf_classifier`)."""
    return float(tfidf_classifier(task).score(task.split(split)["text"][:], task.labels(split)))


def linear_probe_accuracy(task: Task, student: Student, split: str = "test") -> float:
    """Accuracy of a logistic regression on the student's frozen sentence representations; its C is chosen on validation.

    Raises:
        ValueError: a task without classes.
    """
    from sklearn.linear_model import LogisticRegression  # a second to import

    require(task.kind == "classification", f"a linear probe needs classes, and task {task.name!r} is {task.kind}")
    x, y = sentence_features(task, student), task.labels("train")
    probes = [LogisticRegression(C=strength, max_iter=2000).fit(x, y) for strength in STRENGTHS]
    scores = [probe.score(sentence_features(task, student, "validation"), task.labels("validation")) for probe in probes]
    return float(probes[int(np.argmax(scores))].score(sentence_features(task, student, split), task.labels(split)))
