"""Real pairs chosen by an outer loss, and pairs of which only the opening tokens are learned."""

import dataclasses
import math

import pytest
import torch

import distillkit as dk
from distillkit.core.objectives import trained_loss
from distillkit.data.rows import Rows
from distillkit.io.seeds import derive_seed
from distillkit.text.sentences import search_pairs


@pytest.fixture(scope="module")
def lm(standin_home):
    """The stand-in hub's ARC-Easy and a tiny OPT for it."""
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("arc_easy", max_length=48)
        return task, dk.load_student("facebook/opt-1.3b", task, trainable="full")


@pytest.fixture(scope="module")
def goal(lm):
    return dk.BPTT(*lm, dk.Unroll(2, optimizer=dk.AdamW(0.01, eps_root=1e-8), batch_size=3), batch_size=8)


def loss_of(pairs, goal, seed):
    return trained_loss(next(goal.problems(pairs, derive_seed("pairs", seed))))


def test_pairs_are_real_and_the_best_that_were_tried(lm, goal):
    task, student = lm
    start = dk.DistilledSet.from_real(task, student, fraction=0.2, seed=3)
    chosen = search_pairs(start, task, student, goal, steps=6, share=0.5, seed=1)
    losses = chosen.meta["search"]["losses"]
    assert len(losses) == 7 and losses[0] == pytest.approx(loss_of(start, goal, 1), abs=1e-4)
    assert min(losses) == pytest.approx(loss_of(chosen, goal, 1), abs=1e-4) and min(losses) < losses[0]
    rows = chosen.meta["rows"]
    assert len(rows) == len(start) == len({*rows}) and rows != start.meta["rows"]
    again = dk.DistilledSet.from_rows(task, student, [rows])
    assert torch.equal(again.tokens, chosen.tokens) and torch.equal(again.targets, chosen.targets)
    same = search_pairs(start, task, student, goal, steps=6, share=0.5, seed=1)
    assert same.meta["rows"] == rows
    assert search_pairs(start, task, student, goal, steps=6, share=0.5, seed=2).meta["search"] != chosen.meta["search"]


def test_an_exchange_keeps_answers_that_are_few(lm, goal):
    task, student = lm
    yes_and_no = Rows({**{name: task.train[name][:] for name in task.train.column_names},
                       "response": ["yes" if row % 3 else "no" for row in range(len(task.train))]})
    task = dataclasses.replace(task, train=yes_and_no)
    start = dk.DistilledSet.from_real(task, student, fraction=0.2)
    chosen = search_pairs(start, task, student, goal, steps=6, share=0.5)
    assert chosen.meta["rows"] != start.meta["rows"] and chosen.meta["responses"] == start.meta["responses"]


def test_where_no_exchange_helps_the_set_stays(lm):
    task, student = lm
    start = dk.DistilledSet.from_real(task, student, fraction=0.2)
    indifferent = dk.BPTT(task, student, dk.Unroll(1, optimizer=dk.SGD(1e-30), batch_size=2), batch_size=4)
    assert search_pairs(start, task, student, indifferent, steps=2).meta["rows"] == start.meta["rows"]


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": 0}, "steps must be a whole number"), ({"share": 0}, "share must be"), ({"share": 1.1}, "share must be"),
])
def test_bad_searches(lm, goal, change, message):
    start = dk.DistilledSet.from_real(*lm, fraction=0.2)
    with pytest.raises(ValueError, match=message):
        search_pairs(start, *lm, goal, **change)


def test_a_search_needs_rows_of_an_instruction_task(lm, world, goal):
    start = dk.DistilledSet.from_real(*lm, fraction=0.2)
    del start.meta["rows"]
    with pytest.raises(ValueError, match="does not name the training rows"):
        search_pairs(start, *lm, goal)
    with pytest.raises(ValueError, match="has classes; use search_sentences"):
        search_pairs(dk.DistilledSet.from_real(*world, per_class=1), *world, goal)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_only_prompt_vectors_are_learned(lm, count):
    goal = dk.BPTT(*lm, dk.Unroll(2, optimizer=dk.SGD(0.5)), batch_size=8)  # a step sees every example
    start = dk.DistilledSet.from_real(*lm, fraction=0.2)
    vectors = start.with_prompt_vectors(count)
    for row, free in zip(vectors.free, start.free, strict=True):
        assert row.nonzero().flatten().tolist() == free.nonzero().flatten().tolist()[:count]
    distiller = dk.Distiller(vectors, goal, lr=0.5)
    list(distiller.run(2))
    moved = (distiller.distilled.embeds != start.embeds).any(-1)
    assert torch.equal(moved, vectors.free), "the rest of the text stays as it was written"
    text, whole = dk.project(distiller.distilled, lm[1]), start.to_text()
    assert torch.equal(text.tokens[~vectors.free & start.mask], start.tokens[~vectors.free & start.mask])
    if count < 1000:  # the end of each prompt is still its own
        assert all(new["prompt"].endswith(old["prompt"][-10:]) for new, old in zip(text.to_text(), whole, strict=True))


@pytest.mark.parametrize("count", [0, -1, 1.5, math.nan, "2"])
def test_a_number_of_prompt_vectors(lm, count):
    with pytest.raises(ValueError, match="count must be a whole number"):
        dk.DistilledSet.from_real(*lm, fraction=0.2).with_prompt_vectors(count)
