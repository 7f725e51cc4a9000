"""Tasks: every row is checked, splits are made honestly, and batches hold what they say."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.data.corpus import CorpusError
from distillkit.data.load import load_task
from distillkit.data.tasks import Task
from distillkit.io.seeds import generator

NAMES = ["cold", "mild", "hot"]


def rows_of(per_class, prefix="day"):
    """Rows of three classes, `per_class` of each (a number, or one for each class), classes interleaved."""
    counts = [per_class] * 3 if isinstance(per_class, int) else per_class
    return [{"text": f"{prefix} {number} was {NAMES[label]}", "label": label}
            for number in range(max(counts)) for label in range(3) if number < counts[label]]


@pytest.fixture
def write(tmp_path):
    """Writes splits as jsonl and returns their folder; labels.json names the three classes unless told otherwise."""

    def write(labels=NAMES, name="weather", **splits):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if labels is not None:
            (folder / "labels.json").write_text(json.dumps(labels))
        return folder

    return write


@pytest.fixture
def weather(write):
    return write(train=rows_of([30, 20, 10]), validation=rows_of(4, "eve"), test=rows_of(5, "night"))


@pytest.fixture(scope="session")
def tokenizer(standin_home):
    from transformers import AutoTokenizer

    import standin_hub

    with standin_hub.patched(standin_home):
        return AutoTokenizer.from_pretrained("bert-base-uncased")


# --- what a task is --------------------------------------------------------------------------------------------------


def test_a_task_by_contract(weather):
    task = load_task(weather, max_length=16)
    assert isinstance(task, Task) and (task.name, task.kind, task.max_length) == ("weather", "classification", 16)
    assert task.classes == ("cold", "mild", "hot") and str(weather) not in task.origin
    for name, size in (("train", 60), ("validation", 12), ("test", 15)):
        split = task.split(name)
        assert split is getattr(task, name) and split.column_names == ["text", "label"] and len(split) == size
    assert task.test[0] == {"text": "night 0 was cold", "label": 0} and type(task.test[0]["label"]) is int
    with pytest.raises(ValueError, match="no split 'dev'"):
        task.split("dev")
    with pytest.raises(AttributeError):
        task.name = "other"


def test_rows_by_class(weather):
    groups = load_task(weather).rows_by_class("train")
    assert [len(group) for group in groups] == [30, 20, 10]
    labels = load_task(weather).train["label"][:]
    assert [labels[row] for row in groups[1]] == [1] * 20


def test_fingerprint_is_of_the_rows_alone(weather, write):
    task = load_task(weather)
    same = write(name="elsewhere", train=rows_of([30, 20, 10]), validation=rows_of(4, "eve"), test=rows_of(5, "night"))
    assert load_task(same, max_length=9, seed=3).fingerprint == task.fingerprint and len(task.fingerprint) == 64
    write(name="elsewhere", test=rows_of(5, "Night"))
    assert load_task(same).fingerprint != task.fingerprint
    assert load_task(write(labels=["a", "b", "c"])).fingerprint != task.fingerprint


# --- splits ----------------------------------------------------------------------------------------------------------


def test_missing_validation_is_carved_out_of_train(write):
    folder = write(train=rows_of([30, 20, 4]), test=rows_of(5, "night"))
    task = load_task(folder)
    assert [len(group) for group in task.rows_by_class("validation")] == [3, 2, 1]
    train, validation = task.train["text"][:], task.validation["text"][:]
    assert not {*train} & {*validation}
    assert sorted(train + validation) == sorted(row["text"] for row in rows_of([30, 20, 4]))
    assert "validation is 10% of train (seed 0)" in task.origin
    assert load_task(folder).fingerprint == task.fingerprint != load_task(folder, seed=1).fingerprint


def test_seed_changes_nothing_where_nothing_is_chosen(weather):
    assert load_task(weather, seed=5).fingerprint == load_task(weather, seed=6).fingerprint


@pytest.mark.parametrize("test", [None, [{"text": "nobody knows", "label": -1}] * 3])
def test_validation_stands_in_for_a_missing_or_unlabelled_test(write, test):
    splits = {"train": rows_of(20), "validation": rows_of(4, "eve")} | ({"test": test} if test else {})
    task = load_task(write(**splits))
    assert sorted(task.test["text"][:]) == sorted(row["text"] for row in rows_of(4, "eve"))
    assert [len(task.split(name)) for name in ("train", "validation")] == [54, 6]
    assert "used as test" in task.origin and "10% of train" in task.origin


def test_a_split_that_cannot_be_made(write):
    with pytest.raises(CorpusError, match="weather has no test split .*train.jsonl; add a labelled test"):
        load_task(write(train=rows_of(4)))
    with pytest.raises(CorpusError, match="other has no train split .*test.jsonl; add a labelled train split"):
        load_task(write(name="other", test=rows_of(4)))
    with pytest.raises(CorpusError, match="train.jsonl has one row of the class 'hot'"):
        load_task(write(name="small", train=rows_of([3, 3, 1]), test=rows_of(1)))


# --- limit -----------------------------------------------------------------------------------------------------------


def test_limit_balances_each_split(weather):
    task = load_task(weather, limit=12)
    for name in ("train", "validation", "test"):
        assert [len(group) for group in task.rows_by_class(name)] == [4, 4, 4]
    whole = load_task(weather)
    positions = [whole.train["text"][:].index(text) for text in task.train["text"][:]]
    assert positions == sorted(positions), "rows keep their order"


def test_limit_takes_from_large_classes_what_small_ones_lack(weather):
    assert [len(group) for group in load_task(weather, limit=40).rows_by_class("train")] == [15, 15, 10]
    assert load_task(weather, limit=1000).fingerprint == load_task(weather).fingerprint


def test_limit_spreads_a_remainder_and_is_seeded(weather):
    counts = sorted(len(group) for group in load_task(weather, limit=11).rows_by_class("train"))
    assert counts == [3, 4, 4]
    assert load_task(weather, limit=11).fingerprint == load_task(weather, limit=11).fingerprint
    assert len({load_task(weather, limit=11, seed=seed).fingerprint for seed in range(4)}) == 4


@pytest.mark.parametrize("limit, sizes", [
    ({"test": 9}, [60, 12, 9]), ({"train": 12, "test": 6}, [12, 12, 6]), ({"train": None, "validation": 3}, [60, 3, 15]),
    ({}, [60, 12, 15]), ({"test": 900}, [60, 12, 15]),
])
def test_splits_are_limited_apart(weather, limit, sizes):
    task = load_task(weather, limit=limit)
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == sizes
    for split, most in limit.items():  # the same rows as a limit of all splits takes
        assert task.split(split)["text"][:] == load_task(weather, limit=most).split(split)["text"][:]


@pytest.mark.parametrize("limit, message", [
    ({"tset": 9}, "each split in limit must be one of train, validation, test, not 'tset'"),
    ({"dev": 9}, "each split in limit .* not 'dev'"),
    ({3: 9}, "each split in limit .* not 3"),
    ({"test": 0}, r"limit of the test split must be a whole number of at least 1, not 0"),
    ({"test": "9"}, r"limit of the test split must be a whole number of at least 1, not '9'"),
    ({"test": True}, r"limit of the test split must be a whole number .*, not True"),
    ({"train": 60, "test": 2}, "limit=2 .* 3 classes of weather"),
])
def test_bad_limits_of_splits(weather, limit, message):
    with pytest.raises(ValueError, match=message):
        load_task(weather, limit=limit)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_length", "limit"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_bad_numbers_are_named(weather, name, value):
    with pytest.raises(ValueError, match=f"{name}.* must be a whole number of .* not {value!r}"):
        load_task(weather, **{name: value})


@pytest.mark.parametrize("text", ["", " \n", None, 7, "half \ud83d of it"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_text_is_named_by_split_and_row(write, split, text):
    rows = {"train": rows_of(4), "test": rows_of(4)}
    rows[split][2]["text"] = text
    with pytest.raises(CorpusError, match=rf"weather, split {split}, row 2 .*{split}.jsonl, line 3\)") as caught:
        load_task(write(**rows))
    assert repr(text) in str(caught.value)


def test_labels_that_skip_a_class(write):
    skipping = [row for row in rows_of(4) if row["label"] != 1]
    assert load_task(write(labels=None, train=skipping, test=skipping)).classes == ("0", "2"), "names, not places"
    with pytest.raises(CorpusError, match="split test, row 1 .*the label is 1, which is none of the 2 classes 0, 2"):
        load_task(write(labels=None, test=rows_of(4)))
    with pytest.raises(CorpusError, match="train.jsonl has rows of the classes cold, hot and none of mild"):
        load_task(write(train=skipping, test=rows_of(4)))


def test_other_labels_that_cannot_be_used(write):
    one = [row for row in rows_of(4) if row["label"] == 0]
    with pytest.raises(CorpusError, match="rows of the classes 0 and none of others; a task needs two"):
        load_task(write(labels=None, train=one, test=one))
    (write(test=[]) / "test.jsonl").write_text("")
    with pytest.raises(CorpusError, match="test.jsonl has no column 'text'"):
        load_task(write(train=rows_of(4)))


# --- tokens, batches, scores -----------------------------------------------------------------------------------------


def test_token_ids_are_cut_and_cached(weather, tokenizer):
    task = load_task(weather, max_length=6)
    ids = task.token_ids(tokenizer, "test")
    assert len(ids) == 15 and max(map(len, ids)) <= 6
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in ids)
    assert task.token_ids(tokenizer, "test") is ids


@pytest.mark.parametrize("make", [lambda task, rows: task.with_rows(test=rows), lambda task, rows: replace(task, test=rows)])
def test_other_rows_are_read_anew(weather, tokenizer, make):
    """What was computed for the old rows, their labels and their tokens, is not taken for the new ones."""
    task = load_task(weather)
    old = task.batch(tokenizer, "test", range(len(task.test)))
    new = make(task, task.test.select([14, 3]))
    batch = new.batch(tokenizer, "test", [0, 1])
    assert batch["labels"].tolist() == old["labels"][[14, 3]].tolist() and len({*batch["labels"].tolist()}) == 2
    for row, place in enumerate((14, 3)):
        length = int(old["attention_mask"][place].sum())
        assert torch.equal(batch["input_ids"][row, :length], old["input_ids"][place, :length])
    assert torch.equal(task.batch(tokenizer, "test", range(15))["labels"], old["labels"]), "the task itself is as it was"


def test_a_task_with_other_rows_says_so(weather):
    task = load_task(weather)
    some = [task.with_rows(test=task.test.select(numbers)) for numbers in ([1, 2], [1, 2], [2, 1])]
    prints = [part.fingerprint for part in some]
    assert prints[0] == prints[1] and len({task.fingerprint, *prints}) == 3
    assert some[0].origin.endswith("; other rows in test") and len(some[0].train) == len(task.train)
    with pytest.raises(ValueError, match="no split 'exam'"):
        task.with_rows(exam=task.test)
    for bad in (task.test.remove_columns("label"), ["a text"], None):
        with pytest.raises(ValueError, match="test must be rows with the columns label, text, not"):
            task.with_rows(test=bad)


def test_batch_equals_the_tokenizer_on_those_rows(write, tokenizer):
    texts = ["a day", "a very long and warm day", "so cold"]
    rows = [{"text": text, "label": label} for label, text in enumerate(texts)]
    task = load_task(write(train=rows, validation=rows, test=rows), max_length=32)
    batch = task.batch(tokenizer, "test", torch.tensor([2, 1]))
    expected = tokenizer([texts[2], texts[1]], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == [2, 1] and {tensor.dtype for tensor in batch.values()} == {torch.int64}
    short = task.batch(tokenizer, "test", np.array([0]))
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1], "padded to the longest of its own rows"
    with pytest.raises(ValueError, match="at least one row"):
        task.batch(tokenizer, "test", [])


def test_balanced_rows(weather):
    task = load_task(weather)
    labels = np.array(task.train["label"][:])
    for size in (1, 2, 3, 7, 30):
        rows = task.balanced_rows("train", size, generator("test", size))
        counts = np.bincount(labels[rows.numpy()], minlength=3)
        assert rows.dtype == torch.int64 and len({*rows.tolist()}) == size and counts.max() - counts.min() <= 1
    rows = task.balanced_rows("train", 75, generator("test"))
    times = Counter(rows.tolist())
    assert np.bincount(labels[rows.numpy()]).tolist() == [25, 25, 25]
    assert {times[row] for row in task.rows_by_class("train")[0]} == {0, 1}
    assert {times[row] for row in task.rows_by_class("train")[2]} == {2, 3}, "ten rows, each used before any again"
    with pytest.raises(ValueError, match="size must be at least 1, not 0"):
        task.balanced_rows("train", 0, generator("test"))


def test_balanced_rows_are_random_and_reproducible(weather):
    task = load_task(weather)
    draws = [task.balanced_rows("train", 8, generator("test", seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    single = [task.balanced_rows("train", 1, generator("one", seed)).item() for seed in range(60)]
    first = Counter(task.train[row]["label"] for row in single)
    assert min(first[label] for label in range(3)) >= 8, "what does not divide evenly goes to random classes"


# --- the sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, sizes", [
    ("rotten_tomatoes", [80, 40, 40]),
    ("sst2", [72, 8, 40]),
    ("imdb", [72, 8, 40]),
    ("ag_news", [144, 16, 80]),
    ("trec", [216, 24, 120]),
])
def test_hub_names_become_tasks(standin_hub, name, sizes):
    task = load_task(name)
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == sizes and task.name == name


def test_the_offline_task(docstrings):
    task = load_task("docstrings", limit=60)
    assert task.name == "docstrings" and task.classes == docstrings.classes
    assert [[len(group) for group in task.rows_by_class(name)] for name in ("train", "test")] == [[10] * 6] * 2


@pytest.mark.parametrize("name, sizes", [("rotten_tomatoes", [8530, 1066, 1066]), ("ag_news", [9387, 1042, 7600])])
def test_real_corpora(name, sizes):
    root = os.environ.get("DISTILLKIT_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"$DISTILLKIT_DATA/{name} is not on this machine")
    task = load_task(name)
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == sizes
    assert len(task.classes) == len({*task.test["label"][:]})


# --- bootstraps ------------------------------------------------------------------------------------------------------


def test_a_bootstrap_draws_training_rows_with_replacement(task):
    one, again, other = dk.bootstrap(task, 0), dk.bootstrap(task, 0), dk.bootstrap(task, 1)
    assert one.train["text"][:] == again.train["text"][:] != other.train["text"][:]
    assert one.fingerprint == again.fingerprint and len({task.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert {*one.train["text"][:]} < {*task.train["text"][:]}, "some rows twice, others not at all"
    assert [len(rows) for rows in one.rows_by_class("train")] == [len(rows) for rows in task.rows_by_class("train")]
    labels = dict(zip(task.train["text"][:], task.train["label"][:], strict=True))
    assert [labels[text] for text in one.train["text"][:]] == one.labels("train").tolist()
    for split in ("validation", "test"):
        assert one.split(split)["text"][:] == task.split(split)["text"][:]
    assert "seed 1" in other.origin and task.resampled is None


def test_how_often_rows_of_a_bootstrap_are_drawn(task):
    """1 − (1 − 1/n)^n of the rows are there, 0.638 for pools of 40, on average over seeds."""
    shares = [len({*dk.bootstrap(task, seed).resampled[1].tolist()}) / len(task.train) for seed in range(200)]
    assert abs(sum(shares) / len(shares) - (1 - (39 / 40) ** 40)) < 0.01


def test_features_of_a_bootstrap_are_those_of_its_rows(world, monkeypatch):
    from distillkit.evaluation.selection import sentence_features

    task, student = world
    drawn = dk.bootstrap(task, 3)
    expected = sentence_features(task, student)[drawn.resampled[1].numpy()]
    assert abs(sentence_features(drawn, student) - expected).max() < 1e-6

    def features(self, batch):
        pytest.fail("read again")

    monkeypatch.setattr(dk.Student, "features", features)
    sentence_features(dk.bootstrap(task, 4), student)
