"""Anybody's text as a set: labels by name, errors by row, nothing added that nobody asked for."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.applications import merging
from distillkit.core.examples import special_frame

TEXTS = ["a dull and tired story", "it was warm , almost tender", "what a stale flat day"]
NAMES = ["neg", "pos", "neg"]


@pytest.fixture(scope="module")
def students(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return {name: dk.load_student(name, task) for name in ("bert-base-uncased", "roberta-base", "gpt2")}


def written(task, student, texts=TEXTS, labels=NAMES, **options):
    return dk.DistilledSet.from_text(texts, labels, task, student, **options)


@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta-base", "gpt2"])
def test_a_set_holds_the_texts_and_nothing_else(task, students, name):
    student = students[name]
    found = written(task, student)
    for row, text in enumerate(TEXTS):
        ids = student.tokenizer(text)["input_ids"]
        assert found.tokens[row][found.mask[row]].tolist() == ids
        assert found.free[row].sum() == len(ids) - sum(map(len, special_frame(student.tokenizer)))
    assert torch.equal(found.embeds, student.embedding[found.tokens])
    assert found.to_text()["label"][:] == NAMES and found.meta["labels"] == [0, 1, 0] == found.targets.argmax(1).tolist()
    assert "rows" not in found.meta and "recipe" not in found.meta and found.step_sizes is None


def test_it_is_the_set_that_real_sentences_make(task, students):
    """The training rows that a selection took, given as text, are the same set to the bit."""
    student = students["bert-base-uncased"]
    for soft in (True, False):
        real = dk.DistilledSet.from_real(task, student, per_class=2, soft_labels=soft, fill=False, seed=3)
        rows = task.train[real.meta["rows"]]
        found = written(task, student, rows["text"], [task.classes[label] for label in rows["label"]], soft_labels=soft)
        for name in ("embeds", "mask", "free", "targets", "tokens"):
            assert torch.equal(getattr(found, name), getattr(real, name)), name
        assert dk.evaluate(found, task, student, seeds=(0,), recipe=dk.Unroll(2)).scores == dk.evaluate(
            real, task, student, seeds=(0,), recipe=dk.Unroll(2)).scores


@pytest.mark.parametrize("labels", [
    ["neg", "pos", "neg"], [0, 1, 0], np.array([0, 1, 0]), torch.tensor([0, 1, 0]), [" neg", "pos ", "neg"], (0.0, 1.0, 0.0),
    np.array(["neg", "pos", "neg"]), datasets.Dataset.from_dict({"label": ["neg", "pos", "neg"]})["label"],
], ids=str)
def test_labels_may_be_names_or_indices(task, students, labels):
    found = written(task, students["bert-base-uncased"], labels=labels, soft_labels=False)
    assert found.targets.tolist() == [0, 1, 0] and found.to_text()["label"][:] == NAMES


def test_a_number_is_a_name_where_names_are_numbers(task, students):
    years = merging.with_classes(task, {"neg": "2020", "pos": "1"})
    student = dataclasses.replace(students["bert-base-uncased"], classes=years.classes)
    for labels in (["2020", "1", "2020"], [2020, 1, 2020]):
        assert written(years, student, labels=labels).meta["labels"] == [0, 1, 0]
    with pytest.raises(ValueError, match="row 1"):
        written(years, student, labels=[2020, 0, 1])


@pytest.mark.parametrize(("texts", "labels", "message"), [
    (TEXTS, ["neg", "poss", "neg"], r"row 1 .*'poss'.*\['neg', 'pos'\]"),
    (TEXTS, [0, 1, 2], "row 2 .*2 is none"),
    (TEXTS, [0, -1, 1], "row 1 .*-1 is none"),
    (TEXTS, ["neg", None, "pos"], "row 1 .*None is none"),
    (TEXTS, ["neg", True, "pos"], "row 1 .*True is none"),
    (TEXTS, ["neg", "1", "pos"], "row 1 .*'1' is none"),
    (TEXTS, ["neg", ["pos"], "pos"], "row 1 "),
    (TEXTS, ["neg", float("nan"), "pos"], "row 1 "),
    (["fine", "", "fine"], NAMES, "row 1 "),
    (["fine", " \n", "fine"], NAMES, "row 1 "),
    (["fine", None, "fine"], NAMES, "row 1 "),
    (["fine", "half \ud800", "fine"], NAMES, "row 1 "),
    (TEXTS, NAMES[:2], "2 labels for 3"),
    ([], [], "one at least"),
])
def test_what_cannot_be_used_is_named_by_its_row(task, students, texts, labels, message):
    with pytest.raises(ValueError, match=message):
        written(task, students["bert-base-uncased"], texts, labels)


@pytest.mark.parametrize(("given", "message"), [
    ({"texts": "one text"}, "texts"), ({"labels": "neg"}, "labels"), ({"texts": 3}, "texts"), ({"labels": None}, "labels"),
    ({"length": 2}, "length"), ({"length": 513}, "length"), ({"length": 8.0}, "length"), ({"soft_labels": 1}, "soft_labels"),
    ({"fill": "yes"}, "fill"),
])
def test_bad_arguments_are_named(task, students, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        written(task, students["bert-base-uncased"], **given)


def test_long_texts_are_cut_and_short_ones_filled_up_only_if_asked(task, students):
    student = students["bert-base-uncased"]
    cut = written(task, student, length=5)
    assert cut.mask.sum(1).tolist() == [5] * 3 and cut.meta["text"][0] == "a dull and"
    assert written(task, student, length=12).mask.sum(1).tolist() == [7, 8, 7]
    filled = written(task, student, length=12, fill=True)
    assert filled.mask.all()
    texts = [" ".join(text.split()) for text in task.train["text"]]
    for row, (text, name) in enumerate(zip(TEXTS, NAMES, strict=True)):
        more = filled.meta["text"][row].removeprefix(student.tokenizer.decode(student.tokenizer(
            text, add_special_tokens=False)["input_ids"])).strip()
        own = [t for t, label in zip(texts, task.train["label"], strict=True) if task.classes[label] == name]
        said = [student.tokenizer.decode(student.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in own]
        assert more and any(t.startswith(more) or more.startswith(t) for t in said), "of its own class"


def test_prompts_and_responses(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        asked = dk.questions(task)
        student = dk.load_student("facebook/opt-1.3b", asked)
    real = dk.DistilledSet.from_real(asked, student, fraction=0.05)
    rows = asked.train[real.meta["rows"]]
    found = dk.DistilledSet.from_text(rows["prompt"], rows["response"], asked, student)
    for name in ("embeds", "mask", "free", "targets", "tokens"):
        assert torch.equal(getattr(found, name), getattr(real, name)), name
    assert found.meta["responses"] == rows["response"] and "rows" not in found.meta
    for prompts, responses in ((["a", ""], ["b", "c"]), (["a", "b"], ["c", None])):
        with pytest.raises(ValueError, match="row 1"):
            dk.DistilledSet.from_text(prompts, responses, asked, student)


# --- what selections remember ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "k_center", "herding", "less"])
def test_selections_remember_their_rows(world, tmp_path, method):
    task, student = world
    found = dk.select(task, student, method, per_class=2)
    rows = task.train[found.meta["rows"]]
    assert rows["label"] == found.meta["labels"] == [0, 0, 1, 1]
    cut = [student.tokenizer(text, truncation=True, max_length=task.max_length)["input_ids"] for text in rows["text"]]
    assert [tokens[: len(ids) - 1].tolist() for tokens, ids in zip(found.tokens, cut, strict=True)] == [i[:-1] for i in cut]
    assert dk.DistilledSet.load(found.save(tmp_path / "set")).meta["rows"] == found.meta["rows"]


def test_rows_stay_with_their_examples(world):
    task, student = world
    one, two = (dk.select(task, student, "random", per_class=1, length=8, seed=seed) for seed in (0, 1))
    named = dataclasses.replace(two, meta={**two.meta, "task": "other"})
    both = merging.merge(one, named)
    assert both.meta["rows"] == one.meta["rows"] + two.meta["rows"]
    assert merging.without(both, one.meta["task"]).meta["rows"] == two.meta["rows"]
    assert dk.project(one, student).meta["rows"] == dk.retokenize(one, task, student).meta["rows"] == one.meta["rows"]
    chosen = dk.search_sentences(one, task, student, dk.FrozenJudge(task, student), steps=3, sentences=20)
    for row, text in zip(chosen.meta["rows"], chosen.meta["text"], strict=True):
        begun = student.tokenizer.decode(student.tokenizer(task.train[row]["text"], add_special_tokens=False)["input_ids"][:6])
        assert text.startswith(begun), "the rows of the sentences that were found"
