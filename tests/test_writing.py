"""Sentences that a language model writes: which lines count, what is reported of them, and a judge that chooses among them."""

import dataclasses

import pytest
import torch

import distillkit as dk
from distillkit.data.rows import Rows
from distillkit.text import writing


@pytest.fixture(scope="module")
def task():
    return dk.load_task("docstrings", max_length=16, limit=60)


@pytest.fixture(scope="module")
def writer(task):
    return dk.load_student("offline:tiny-opt", dk.questions(task), trainable="full")


@pytest.fixture(scope="module")
def student(task):
    return dk.load_student("offline:small-bert", task)


@pytest.fixture
def dictated(monkeypatch):
    """``dictated(lines)``: the writer goes through these lines, again and again, whatever it is shown."""

    def dictate(lines):
        def continuations(*_, num_return_sequences, **__):
            return iter((lines * num_return_sequences)[:num_return_sequences])

        monkeypatch.setattr(writing, "continuations", continuations)

    return dictate


def test_a_model_writes_the_same_sentences_for_the_same_seed(task, writer):
    state = torch.get_rng_state()
    written = dk.write_sentences(task, writer, per_class=3, shown=2, length=12, batch_size=8, seed=1)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's draws change
    assert written.labels == tuple(name for name in task.classes for _ in range(3))
    assert len({*written.texts}) == len(written.texts) and all(len(writing.words_of(text)) >= 3 for text in written.texts)
    assert not any("\n" in text for text in written.texts)
    assert dk.write_sentences(task, writer, per_class=3, shown=2, length=12, batch_size=8, seed=1) == written
    assert dk.write_sentences(task, writer, per_class=3, shown=2, length=12, batch_size=8, seed=2).texts != written.texts
    longest = max(len(writer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written.texts)
    assert longest <= 13  # a token more where a word is cut


def test_training_rows_and_repetitions_are_left_out_and_counted(task, writer, dictated):
    row = task.train[0]["text"]
    run = " ".join(f"word{i}" for i in range(9))
    rows = {name: task.train[name][:] for name in task.train.column_names}
    one_long = dataclasses.replace(task, train=Rows(rows | {"text": [f"so {run} ends", *rows["text"][1:]]}))
    assert row != one_long.train[0]["text"]
    known = one_long.train[1]["text"]
    dictated([known.upper(), "A new, short line", "a new short LINE!", "two words", f"begins with {run}"])
    written = dk.write_sentences(one_long, writer, per_class=2, batch_size=5)
    assert written.texts[:2] == ("A new, short line", f"begins with {run}")
    assert written.lines == 5 * len(task.classes)
    assert (written.verbatim, written.repeated, written.overlap) == (0.2, 0.2, 0.5)


def test_a_row_that_is_cut_short_is_still_a_row(task, writer, dictated):
    known = max(task.train["text"][:], key=len)
    dictated([" ".join(known.split()[:-1]), "this is a new line", "this is another line"])
    assert known.split()[0] not in dk.write_sentences(task, writer, per_class=2, batch_size=3).texts[0]


def test_a_writer_that_repeats_itself_is_told_of(task, writer, dictated):
    dictated(["always the same line"])
    with pytest.raises(ValueError, match=rf"1 new sentences of class '{task.classes[0]}'.*2 were asked for"):
        dk.write_sentences(task, writer, per_class=2, batch_size=4)


@pytest.mark.parametrize(("arguments", "named"), [
    ({"per_class": 0}, "per_class"), ({"shown": 0}, "shown"), ({"length": 0}, "length"), ({"temperature": 0}, "temperature"),
    ({"top_p": 1.5}, "top_p"), ({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed"),
])
def test_a_bad_argument_is_named(task, writer, arguments, named):
    with pytest.raises(ValueError, match=named):
        dk.write_sentences(task, writer, **arguments)


def test_it_takes_classes_and_a_language_model(task, writer, student):
    with pytest.raises(ValueError, match="no language model"):
        dk.write_sentences(task, student)
    with pytest.raises(ValueError, match="no classes"):
        dk.write_sentences(dk.questions(task), writer)


def test_a_judge_chooses_among_what_was_written(task):
    student = dk.load_student("offline:minilm", task)
    texts = [f"{start} {name} line" for name in ("plot", "graph", "table", "integral", "symbol", "tensor")
             for start in ("draw the", "return a")]
    names = [name for name in task.classes for _ in range(2)]
    pool = dk.DistilledSet.from_text(texts, names, task, student, length=12, soft_labels=False)
    start = dk.DistilledSet.from_text(["nothing at all"] * 6, task.classes, task, student, length=12, soft_labels=False)
    judge = dk.FrozenJudge(task, student, steps=20)
    chosen = dk.search_sentences(start, task, student, judge, steps=8, candidates=12, pool=pool)
    assert start.embeds.shape[1] == 5 < chosen.embeds.shape[1] == pool.embeds.shape[1]
    new = {*chosen.meta["text"]} - {*start.meta["text"]}
    assert new and new <= {*texts} and chosen.meta["search"]["sentences"] == len(texts)
    assert all(text not in new or names[texts.index(text)] == name
               for text, name in zip(chosen.meta["text"], chosen.label_names(), strict=True))


def test_a_pool_that_cannot_be_chosen_from(task, student):
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8, soft_labels=False)
    judge = dk.FrozenJudge(task, student, steps=5)
    one_class = dk.DistilledSet.from_text(["a line"], [task.classes[0]], task, student, length=8)
    with pytest.raises(ValueError, match=f"no sentence of.*{task.classes[1]}"):
        dk.search_sentences(start, task, student, judge, pool=one_class)
