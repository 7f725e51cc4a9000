"""Distilled sets: equal token budgets, labels that are distributions, folders that come back whole or not."""

import dataclasses
import json

import pytest
import torch

import distillkit as dk
from distillkit.core.examples import special_frame


@pytest.fixture(scope="module")
def students(task, standin_home):
    import standin_hub

    names = ("bert-base-uncased", "roberta-base")
    with standin_hub.patched(standin_home):
        return {n: dk.load_student(n, task) for n in names} | {
            "float64": dk.load_student("bert-base-uncased", task, dtype="float64")
        }


@pytest.fixture
def student(students):
    return students["bert-base-uncased"]


def write(folder, rows):
    """A task of two classes in a folder; each row is a text and a label."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(lines)
    return dk.load_task(folder, max_length=12)


def same(one, other):
    """Two sets, every tensor to the bit and the type, and meta."""
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if not isinstance(mine, torch.Tensor):
            assert mine == theirs, field.name
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), field.name


@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta-base"])
def test_from_real(task, students, name):
    student = students[name]
    found = dk.DistilledSet.from_real(task, student, per_class=3, length=10)
    assert found.embeds.shape == (6, 10, 32) and found.embeds.dtype == torch.float32 and len(found) == 6
    assert found.mask.all(), "short sentences are filled up"
    assert found.meta["labels"] == [0, 0, 0, 1, 1, 1] == found.targets.argmax(1).tolist()
    assert found.step_sizes is None and "recipe" not in found.meta
    # Only the first and the last position hold special tokens, and only those are fixed.
    special = torch.isin(found.tokens, torch.tensor(student.tokenizer.all_special_ids))
    assert torch.equal(found.free, ~special) and special.sum(1).tolist() == [2] * 6
    assert torch.equal(found.embeds, student.embedding[found.tokens])
    real = {text for text, label in zip(task.train["text"], task.train["label"]) if label == 1}
    assert all(any(text.startswith(r) or r.startswith(text) for r in real) for text in found.meta["text"][3:])
    assert len({tuple(row) for row in found.tokens.tolist()}) == 6


def test_seeds(task, student):
    draws = [dk.DistilledSet.from_real(task, student, per_class=2, seed=s).tokens for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_length_is_the_tasks_by_default(task, student):
    assert dk.DistilledSet.from_real(task, student, per_class=1).embeds.shape == (2, 12, 32)


@pytest.mark.parametrize(("fraction", "per_class"), [(0.05, 2), (0.1, 4), (0.12, 4), (1.0, 40), (1, 40)])
def test_fraction_of_the_training_split(task, student, fraction, per_class):
    found = dk.DistilledSet.from_real(task, student, fraction=fraction)
    assert found.meta["labels"] == [0] * per_class + [1] * per_class


def test_budgets_are_equal_as_long_as_there_is_text(tmp_path, student):
    """Sentences of 4 tokens, 10 a class. Room for 8 takes one further sentence an example, room for 12 takes two."""
    rows = [(f"{'warm' if label else 'dull'} day and {letter}", label) for letter in "abcdefghij" for label in (0, 1)]
    task = write(tmp_path / "small", rows)
    assert dk.DistilledSet.from_real(task, student, per_class=10, length=10).mask.all()
    assert dk.DistilledSet.from_real(task, student, per_class=5, length=14).mask.all()
    used_up = dk.DistilledSet.from_real(task, student, per_class=10, length=14).free.sum(1).reshape(2, 10)
    assert used_up.tolist() == [[12] * 5 + [4] * 5] * 2


@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta-base"])
def test_sentences_that_fill_up_do_not_run_together(tmp_path, students, name):
    rows = [(f"{word} day", label) for label, word in enumerate(("dull", "warm")) for _ in range(9)]
    found = dk.DistilledSet.from_real(write(tmp_path / "small", rows), students[name], per_class=1, length=12)
    words = [text.split() for text in found.meta["text"]]
    assert words[0][:4] == ["dull", "day"] * 2 and words[1][:4] == ["warm", "day"] * 2


def test_what_fills_up_is_of_the_same_class(tmp_path, student):
    rows = [(f"{'warm' if label else 'dull'} {letter}", label) for letter in "abcdefghij" for label in (0, 1)]
    found = dk.DistilledSet.from_real(write(tmp_path / "small", rows), student, per_class=2, length=12)
    for text, label in zip(found.meta["text"], found.meta["labels"]):
        assert text.split()[::2] == [("dull", "warm")[label]] * 5


def test_a_class_without_enough_text_is_padded(tmp_path, student):
    rows = [("dull", 0), ("warm", 1), *((f"dull {letter}", 0) for letter in "abcd")]
    found = dk.DistilledSet.from_real(write(tmp_path / "small", rows), student, per_class=1, length=9)
    assert found.free.sum(1).tolist() == [7, 2] and found.mask.sum(1).tolist() == [9, 4]
    assert not (found.free & ~found.mask).any()
    assert found.tokens[1, 4:].eq(student.tokenizer.pad_token_id).all()


def test_soft_labels(task, student):
    hard = dk.DistilledSet.from_real(task, student, per_class=1, soft_labels=False)
    assert hard.targets.tolist() == [0, 1] and hard.targets.dtype == torch.int64 and not hard.soft
    assert hard.soften().targets.softmax(1)[1].tolist() == pytest.approx([0.1, 0.9])
    assert hard.soften(0.75).targets.softmax(1)[0].tolist() == pytest.approx([0.75, 0.25])
    assert not hard.soft, "the set itself is as it was"
    same(hard.soften(), dk.DistilledSet.from_real(task, student, per_class=1))


def test_soft_labels_of_many_classes(standin_hub):
    trec = dk.load_task("trec", max_length=8)
    found = dk.DistilledSet.from_real(trec, dk.load_student("bert-base-uncased", trec), per_class=1).soften(0.5)
    expected = torch.full((6, 6), 0.1) + 0.4 * torch.eye(6)
    assert torch.allclose(found.targets.softmax(1), expected)


@pytest.mark.parametrize("confidence", [0.5, 1.0, 0.0, 1.2])
def test_confidence_out_of_range(task, student, confidence):
    with pytest.raises(ValueError, match=f"between 1/2 and 1, not {confidence}"):
        dk.DistilledSet.from_real(task, student, per_class=1).soften(confidence)


def test_nbytes(task, student):
    text = dk.DistilledSet.from_real(task, student, per_class=2, length=10)  # 4 examples of 10 tokens, 2 classes
    assert text.nbytes == 4 * 10 * 4 + 4 * 2 * 4
    learned = dataclasses.replace(text, tokens=None, step_sizes=torch.ones(3))
    assert learned.nbytes == 4 * 10 * 32 * 4 + 4 * 2 * 4 + 3 * 4


@pytest.mark.parametrize("soft", [True, False])
def test_to_text(task, student, soft):
    rows = dk.DistilledSet.from_real(task, student, per_class=2, soft_labels=soft).to_text()
    assert rows.column_names == ["text", "label", "probabilities"]
    assert rows["label"][:] == ["neg", "neg", "pos", "pos"]
    assert rows["probabilities"][2] == pytest.approx([0.1, 0.9] if soft else [0, 1])
    assert all("[SEP]" not in text and text for text in rows["text"])


def test_free_embeddings_have_no_text(task, student):
    found = dataclasses.replace(dk.DistilledSet.from_real(task, student, per_class=1), tokens=None)
    with pytest.raises(ValueError, match="free embeddings, which have no text; project it first: dk.project"):
        found.to_text()


def test_special_frame(students):
    assert special_frame(students["bert-base-uncased"].tokenizer) == ([2], [3])
    assert special_frame(students["roberta-base"].tokenizer) == ([0], [2])


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def learned(task, students):
    """A set that has everything a set can have, in float64."""
    found = dk.DistilledSet.from_real(task, students["float64"], per_class=2)
    return dataclasses.replace(found, step_sizes=torch.tensor([0.1, 0.2]), meta=found.meta | {"recipe": {"steps": 2}})


@pytest.mark.parametrize("change", [{}, {"tokens": None, "step_sizes": None}, {"targets": torch.tensor([0, 0, 1, 1])}])
def test_save_and_load(learned, tmp_path, change):
    found = dataclasses.replace(learned, **change)
    assert found.save(tmp_path / "set") == tmp_path / "set"
    same(found, dk.DistilledSet.load(tmp_path / "set"))
    assert dk.DistilledSet.load(str(tmp_path / "set")).embeds.dtype == torch.float64


def test_other_things_are_refused_by_name(tmp_path):
    from distillkit.io.files import write_file

    with pytest.raises(dk.StorageError, match=f"{tmp_path / 'none'} is not there"):
        dk.DistilledSet.load(tmp_path / "none")
    with pytest.raises(dk.StorageError, match=f"{tmp_path} is not a file"):
        dk.DistilledSet.load(tmp_path)
    write_file(tmp_path / "other", kind="distiller-checkpoint")
    with pytest.raises(dk.StorageError, match="holds 'distiller-checkpoint', not 'distilled-set'"):
        dk.DistilledSet.load(tmp_path / "other")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("mask", torch.ones(4, 11, dtype=torch.bool)),
    ("free", torch.ones(3, 12, dtype=torch.bool)),
    ("targets", torch.zeros(5, 2)),
    ("tokens", torch.zeros(4, 13, dtype=torch.long)),
])
def test_shapes_that_disagree(learned, field, value):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(learned, **{field: value})
    assert "shapes disagree" in str(caught.value) and f"{field} {tuple(value.shape)}" in str(caught.value)


@pytest.mark.parametrize("sizes", [[0.1, 0.0], [-0.1], [float("nan")]])
def test_step_sizes_are_positive(learned, sizes):
    with pytest.raises(ValueError, match="step_sizes must be positive"):
        dataclasses.replace(learned, step_sizes=torch.tensor(sizes))


def test_too_many_examples_names_class_and_count(tmp_path, student):
    task = write(tmp_path / "small", [("dull a", 0), ("dull b", 0), ("dull c", 0), ("warm a", 1), ("warm b", 1)])
    with pytest.raises(ValueError, match="per_class=3 but class '1' of task 'small' has only 2 training rows"):
        dk.DistilledSet.from_real(task, student, per_class=3)


@pytest.mark.parametrize(("size", "message"), [
    ({}, "one of per_class and fraction, not per_class=None and fraction=None"),
    ({"per_class": 1, "fraction": 0.1}, "not per_class=1 and fraction=0.1"),
    ({"per_class": 0}, "per_class must be a whole number of at least 1, not 0"),
    ({"per_class": 1.0}, "not 1.0"),
    ({"per_class": True}, "not True"),
    ({"fraction": 0.0}, r"fraction must be a number in \(0, 1\], not 0.0"),
    ({"fraction": 1.01}, "not 1.01"),
    ({"fraction": 0.02}, "fraction=0.02 of 80 training rows is less than one for each of 2 classes"),
    ({"per_class": 1, "length": 513}, "length=513 is more than the 512 positions of 'bert-base-uncased'"),
    ({"per_class": 1, "length": 2}, r"length must be a whole number above 2 \(special tokens\), not 2"),
    ({"per_class": 1, "length": 8.0}, "not 8.0"),
    ({"per_class": 1, "length": -1}, "not -1"),
])
def test_sizes_that_cannot_be_had(task, student, size, message):
    with pytest.raises(ValueError, match=message):
        dk.DistilledSet.from_real(task, student, **size)


def test_the_longest_possible_example(task, students):
    found = dk.DistilledSet.from_real(task, students["roberta-base"], per_class=1, length=512)
    logits = students["roberta-base"].logits(
        students["roberta-base"].init(0), {"inputs_embeds": found.embeds, "attention_mask": found.mask}
    )
    assert logits.isfinite().all()


def test_what_a_notebook_shows_of_an_object_is_one_line(task, student):
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=10)
    learned = dataclasses.replace(start, tokens=None, step_sizes=torch.full((3,), 0.1)).with_attention(student)
    assert repr(start) == "DistilledSet(4 examples of 10 positions × 32, text, soft labels)"
    assert repr(learned).endswith("learned embeddings, soft labels, 3 step sizes, attention labels)")
    assert f"rows: train={len(task.train)}, validation={len(task.validation)}" in repr(task)
    assert repr(dataclasses.replace(task, test=None)).endswith(f"test=0, max_length={task.max_length})")
    assert repr(student).startswith("Student('bert-base-uncased', classification, ")
    assert "\n" not in repr(dk.FrozenJudge(task, student)) and len(repr(dk.FrozenJudge(task, student))) < 300
