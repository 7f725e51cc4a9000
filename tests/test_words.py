"""Words as rivals: keyword lines, a teacher's labels, and the accuracies of word classifiers and linear probes."""

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import distillkit as dk
from distillkit.data.tasks import task_of_rows
from distillkit.evaluation.selection import sentence_features
from distillkit.evaluation.upper_lines import linear_probe_accuracy, tfidf_accuracy
from distillkit.evaluation.words import keyword_lines, tfidf_classifier, word_classifier


def planted(words: dict[str, str], rows: int = 12, name: str = "planted"):
    """A task whose rows hold two words of their class and two of everybody's, the class's first word most often."""
    draw, texts = np.random.default_rng(0), []
    for label, own in enumerate(words.values()):
        own = own.split()
        for _ in range(rows):
            texts.append((" ".join([own[0], draw.choice(own[1:]), *draw.choice(["common", "shared"], 2)]), label))
    return task_of_rows(name, tuple(words), dict.fromkeys(("train", "validation", "test"), texts), max_length=12,
                        origin="by hand")


THREE = {"rivers": "river water bank", "money": "profit market bank", "sport": "match team goal"}


class Letters:
    """A tokenizer with a token for each letter."""

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [list(text.strip()) for text in texts]}


def test_keywords_are_those_of_the_classifier():
    """The heaviest word first; never a word that speaks for another class."""
    task = planted(THREE)
    (rivers,), (money,), (sport,) = keyword_lines(task, Letters(), 1, 1000)
    assert (rivers.split()[0], money.split()[0], sport.split()[0]) == ("river", "profit", "match")
    assert "water" in rivers.split() and not {"profit", "match", "team"} & {*rivers.split()}
    weights = word_classifier(task)[-1].coef_
    assert len(rivers.split()) == (weights[0] > 0).sum()


def test_two_classes_share_one_vector_of_weights():
    task = planted({"neg": "bad dull boring", "pos": "good bright lively"})
    (neg,), (pos,) = keyword_lines(task, Letters(), 1, 1000)
    assert neg.split()[0] == "bad" and pos.split()[0] == "good" and not {*neg.split()} & {*pos.split()}


def test_lines_go_on_with_the_next_words_and_fit_into_the_room():
    task = planted(THREE)
    whole = [words for (line,) in keyword_lines(task, Letters(), 1, 1000) for words in [line.split()]]
    for lines, words in zip(keyword_lines(task, Letters(), 2, 10), whole, strict=True):
        assert len(lines) == 2 and all(lines) and all(len(line.replace(" ", "")) <= 10 for line in lines)
        assert " ".join(lines).split() == words[: len(" ".join(lines).split())]
    for lines, words in zip(keyword_lines(task, Letters(), 2, 1000), whole, strict=True):
        assert [len(line.split()) for line in lines] == [len(words) - 1, 1], "each line has a word"
    with pytest.raises(ValueError, match=r"class 'rivers' .* has \d+ keywords, fewer than the 50 lines"):
        keyword_lines(task, Letters(), 50, 10)


def test_a_set_of_keywords(world):
    task, student = world
    lines = keyword_lines(task, student.tokenizer, 2, 6)
    distilled = dk.select(task, student, "keywords", per_class=2, length=8, seed=3)
    assert distilled.meta["text"] == [student.tokenizer.decode(student.tokenizer(line, add_special_tokens=False)["input_ids"])
                                      for of_class in lines for line in of_class]
    assert distilled.targets.tolist() == [0, 0, 1, 1] and distilled.mask.shape[1] <= 8
    assert distilled.meta["selection"] == {"method": "keywords", "seed": 3}


def test_an_instruction_task_has_no_keywords(standin_hub):
    task = dk.load_task("arc_easy", max_length=40)
    student = dk.load_student("facebook/opt-1.3b", task)
    with pytest.raises(ValueError, match="need classes, and task 'arc_easy' is instruction"):
        dk.select(task, student, "keywords", fraction=0.5)


def test_a_corpus_without_words_is_named():
    task = task_of_rows("signs", ("a", "b"), {split: [("? !", 0), ("! !", 1)] for split in ("train", "validation", "test")},
                        max_length=8, origin="by hand")
    with pytest.raises(ValueError, match="task 'signs': no word classifier"):
        word_classifier(task)


# --- a teacher's labels, and upper lines -----------------------------------------------------------------------------


def test_teacher_labels(world):
    """The targets are the teacher's log-probabilities of the text as it stands."""
    task, student = world
    selected = dk.select(task, student, "random", per_class=3)
    labelled = dk.with_teacher_labels(selected, task)
    expected = tfidf_classifier(task).predict_proba(selected.meta["text"])
    assert np.allclose(labelled.probabilities().numpy(), expected, atol=1e-6) and labelled.soft
    assert torch.equal(labelled.tokens, selected.tokens) and labelled.step_sizes is None
    assert 0.5 < expected[range(6), selected.meta["labels"]].mean() < 1
    with pytest.raises(ValueError, match="reads text"):
        free = dk.DistilledSet.from_real(task, student, per_class=1)
        free.tokens = None
        dk.with_teacher_labels(free, task)


def test_upper_lines(world):
    """TF-IDF by a count of words; the probe by scikit-learn on the features, with the C that validation prefers."""
    task, student = world
    easy = planted(THREE)
    assert tfidf_accuracy(easy) == 1.0
    counts = CountVectorizer().fit(task.train["text"][:])
    plain = LogisticRegression().fit(counts.transform(task.train["text"][:]), task.labels("train"))
    assert abs(plain.score(counts.transform(task.test["text"][:]), task.labels("test")) - tfidf_accuracy(task)) < 0.2
    x = {split: sentence_features(task, student, split) for split in ("train", "validation", "test")}
    probes = {c: LogisticRegression(C=c, max_iter=2000).fit(x["train"], task.labels("train")) for c in (1, 10, 100)}
    best = max(probes, key=lambda c: (probes[c].score(x["validation"], task.labels("validation")), -c))
    assert linear_probe_accuracy(task, student) == probes[best].score(x["test"], task.labels("test"))
