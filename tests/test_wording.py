"""What words a text holds: counts by hand."""

import dataclasses
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.applications.wording import describe_text, log_odds, perplexity, wording_table, words_of
from distillkit.data.tasks import Task

RED = ["the red rose is red", "a red apple", "the rose and the apple", "red red rose"]
BLUE = ["the blue sea is blue", "a blue whale", "the sea and the whale", "blue blue sea"]


@pytest.fixture(scope="module")
def colours():
    """A task of eight sentences, a word for each class in five of them."""
    rows = datasets.Dataset.from_dict({"text": RED + BLUE, "label": [0] * 4 + [1] * 4})
    return Task("colours", "classification", ("red", "blue"), rows, rows, rows, max_length=8, fingerprint="0" * 64, origin="")


def test_log_odds_by_hand():
    one, other, prior = {"a": 3, "b": 1}, {"a": 1, "c": 3}, {"a": 4, "b": 2, "c": 2}
    found = log_odds(one, other, prior, strength=8)
    assert found.keys() == {"a", "b", "c"}
    # α = (4, 2, 2), α_0 = 8: a has 7 of 12 here and 5 of 12 there, b 3 and 2, c 2 and 5.
    for word, here, there in (("a", 7, 5), ("b", 3, 2), ("c", 2, 5)):
        ratio = math.log(here / (12 - here)) - math.log(there / (12 - there))
        assert found[word] == pytest.approx(ratio / math.sqrt(1 / here + 1 / there))
    back = log_odds(other, one, prior, strength=8)
    assert all(back[word] == pytest.approx(-z) for word, z in found.items())


def test_a_strong_prior_takes_chance_away():
    one, other, prior = {"a": 2, "b": 1}, {"b": 3}, {"a": 10, "b": 30}
    weak, strong = (log_odds(one, other, prior, strength=s)["a"] for s in (1, 1000))
    assert weak > strong > 0
    assert log_odds({"new": 1}, {"b": 1}, prior)["new"] > 0, "a word that the prior lacks is no error"


@pytest.mark.parametrize(("one", "other", "strength"), [({}, {"a": 1}, 1), ({"a": 1}, {}, 1), ({"a": 1}, {"a": 1}, 0)])
def test_nothing_to_compare(one, other, strength):
    with pytest.raises(ValueError, match="log-odds compare counts with counts"):
        log_odds(one, other, {"a": 1}, strength=strength)


def test_words():
    assert words_of("The red_rose, isn't  it? 3-D!") == ["the", "red_rose", "isn", "t", "it", "3", "d"]


def test_a_description_by_hand(colours):
    texts = [("red rose apple sky", "red"), ("blue red zzz", "blue")]
    found = describe_text(texts, colours, top=2, telling=0.38)  # eight sentences prove little against the prior
    assert found.words == 7 and found.distinct == pytest.approx(6 / 7)
    # red tells red and blue tells blue; that of blue in its own text is right, red beside it is the other's.
    assert found.own == pytest.approx(2 / 7) and found.other == pytest.approx(1 / 7)
    # sky and zzz were never read; of runs of two only "red rose" was, of three none.
    assert found.overlap == pytest.approx({1: 5 / 7, 2: 1 / 5, 3: 0.0})
    # red and blue occur five times each, the others less.
    assert found.rare == pytest.approx(4 / 7)
    assert found.perplexity is None
    assert found.terms["blue"][0] in ("blue", "zzz") and len(found.terms["red"]) == 2 and "apple" not in found.terms["blue"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.words = 1


def test_training_text_is_all_there(colours):
    found = describe_text([(text, "red") for text in RED] + [(text, "blue") for text in BLUE], colours)
    assert found.overlap == {1: 1.0, 2: 1.0, 3: 1.0}
    assert found.terms["red"][0] == "red" and found.terms["blue"][0] == "blue"
    only = describe_text([(text, "red") for text in RED], colours)
    assert only.terms == {"red": (), "blue": ()}, "one class alone is not set apart from others"


def test_a_set_is_described_by_its_text(world):
    task, student = world
    chosen = dk.select(task, student, "random", per_class=2, length=10)
    rows = chosen.to_text()
    assert describe_text(chosen, task) == describe_text(list(zip(rows["text"], rows["label"])), task)
    with pytest.raises(ValueError, match="project it first"):
        describe_text(dataclasses.replace(chosen, tokens=None), task)


@pytest.mark.parametrize(("texts", "message"), [
    ([("red", "green")], "'green', which is none of red, blue"),
    ([("?!", "red")], "no word in these texts"),
    ([], "no word in these texts"),
])
def test_texts_that_cannot_be(colours, texts, message):
    with pytest.raises(ValueError, match=message):
        describe_text(texts, colours)


def test_models_and_tasks_of_another_kind(world, colours):
    with pytest.raises(ValueError, match="is a classifier, which gives text no probability"):
        describe_text([("red", "red")], colours, world[1])
    with pytest.raises(ValueError, match="is instruction"):
        describe_text([("red", "red")], SimpleNamespace(kind="instruction", name="questions"))


@pytest.mark.parametrize("name", ["gpt2", "facebook/opt-1.3b", "google/gemma-3-270m"])
def test_perplexity_is_the_exponential_of_the_loss(standin_hub, name):
    task = SimpleNamespace(kind="instruction", classes=(), max_length=16, name="questions")
    student = dk.load_student(name, task, trainable="full")
    texts, losses = ["a dull and tired story", "so warm"], []
    for text in texts:
        ids = torch.tensor([student.tokenizer(text)["input_ids"]])
        front = int(ids[0, 0] in student.tokenizer.all_special_ids)
        stop = -1 if front else None  # the stand-in's tokenizer, as RoBERTa's, closes a text too
        logits = student.module(input_ids=ids[:, :stop]).logits[0].log_softmax(-1)
        losses += [-float(logits[i, token].detach()) for i, token in enumerate(ids[0, 1:stop])]
    assert perplexity(texts, student) == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert describe_text([("a dull story", "red")], _like(), student).perplexity > 1


def _like():
    rows = datasets.Dataset.from_dict({"text": RED + BLUE, "label": [0] * 4 + [1] * 4})
    return Task("colours", "classification", ("red", "blue"), rows, rows, rows, max_length=8, fingerprint="0" * 64, origin="")


def test_the_table(colours):
    found = {"real": describe_text([(RED[0], "red"), (BLUE[0], "blue")], colours)}
    found["other"] = dataclasses.replace(found["real"], perplexity=12.34)
    lines = wording_table(found).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| real | 10 | 60% |") and lines[2].endswith("|  |")
    assert "| 100% / 100% / 100% |" in lines[3] and lines[3].endswith("| 12 |")
