"""Costs, each against a case small enough to work out by hand."""

import dataclasses
import lzma
import math
import types
import zlib

import pytest
import torch

import distillkit as dk
from distillkit.applications import costs


def test_break_even_by_hand():
    """10 once and 1 a time is 15 after 5 times; 3 a time is 15 too."""
    assert costs.break_even(10, 3, 1) == 5
    assert costs.break_even(11, 3, 1) == 6
    assert costs.break_even(0, 3, 1) == 0
    assert costs.break_even(10, 1, 1) == costs.break_even(10, 1, 2) == math.inf
    for n in range(12):
        assert (11 + n * 1 <= n * 3) == (n >= costs.break_even(11, 3, 1))
    with pytest.raises(ValueError, match=r"full must be a number in \[0, inf\), not -1"):
        costs.break_even(1, -1, 1)
    with pytest.raises(ValueError, match="distilling must be .* not nan"):
        costs.break_even(math.nan, 1, 1)


def test_distilling_is_counted_on_the_step_itself(world):
    """A step that is t inner steps forth and back costs more than t trainings' steps, and twice the steps cost twice."""
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    goal = dk.BPTT(task, student, dk.Unroll(2), metagrad=dk.Replay(), batch_size=8)
    one = costs.distilling_flops(start, goal, 1)
    assert costs.distilling_flops(start, goal, 10) == 10 * one
    trained = dk.evaluate(start, task, student, seeds=(0,), recipe=dk.Unroll(2)).flops
    assert one > 2 * trained
    longer = dataclasses.replace(goal, unroll=dk.Unroll(4))
    assert one < costs.distilling_flops(start, longer, 1) < 2 * one, "the batch of real rows is read once in both"
    two = dk.Distiller(start, goal, seed=3)
    list(two.run(1))
    assert costs.distilling_flops(two.distilled, goal, 1) == one, "values do not matter"


def test_an_attempt_that_ran_out_of_memory_is_made_once_and_does_not_count(world):
    """A step of an objective that has room for two examples at a time costs what it costs in parts of two."""
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    tried = []

    def cramped(problem):
        tried.append(problem.micro_batch)
        gradient = dk.Replay()(problem)
        if problem.micro_batch is None or problem.micro_batch > 2:
            raise torch.OutOfMemoryError("out of memory")
        return gradient

    goal = dk.BPTT(task, student, dk.Unroll(2), metagrad=cramped, batch_size=4)
    with pytest.warns(UserWarning, match="out of memory"):
        cost = costs.distilling_flops(start, goal, 4)
    assert tried == [None, 2]
    in_parts = dataclasses.replace(goal, metagrad=dk.Replay(), micro_batch=2, unroll=dk.Unroll(2, micro_batch=2))
    assert cost == costs.distilling_flops(start, in_parts, 4)


def test_text_is_counted_as_it_would_be_sent():
    rows = [("a cat sat", 1), ("a dog sat", 0)]
    data = b"0\ta dog sat\n1\ta cat sat"
    assert costs.text_bytes(rows, "none") == len(data) == costs.text_bytes(rows[::-1], "none")
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert costs.text_bytes(rows, "zlib") == len(raw.compress(data) + raw.flush()) == len(zlib.compress(data, 9)) - 6
    many = [(f"the cat sat on the mat number {i}", i % 2) for i in range(200)]
    assert costs.text_bytes(many, "lzma") < costs.text_bytes(many, "none") / 5
    with pytest.raises(ValueError, match="codec must be one of none, zlib, lzma, not 'rar'"):
        costs.text_bytes(rows, "rar")


def test_every_codec_can_be_undone():
    data = b"0\tsome text\n" * 20
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    assert lzma.decompress(costs.CODECS["lzma"](data), lzma.FORMAT_RAW, filters=filters) == data
    assert zlib.decompress(costs.CODECS["zlib"](data), wbits=-15) == data


def test_bytes_of_sets(world):
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    learned = dataclasses.replace(start, tokens=None, step_sizes=torch.tensor([0.1, 0.2]))
    m, l, d = learned.embeds.shape
    numbers = m * l * d + m * 2 + 2
    assert costs.set_bytes(learned) == 4 * numbers == learned.nbytes
    assert costs.set_bytes(learned, dtype="float16") == 2 * numbers
    assert costs.set_bytes(learned, codec="lzma") < 4 * numbers
    text = dk.select(task, student, "random", per_class=1, length=8)
    with pytest.raises(ValueError, match="this set is text: use text_bytes"):
        costs.set_bytes(text)
    hard = dataclasses.replace(text, tokens=None)
    assert costs.set_bytes(hard) == 4 * m * l * d + 8 * m == hard.nbytes
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, not 'bfloat16'"):
        costs.set_bytes(learned, dtype="bfloat16")


def test_rounding_to_float16(world):
    task, student = world
    start = dataclasses.replace(dk.DistilledSet.from_real(task, student, per_class=1, length=8), tokens=None)
    found = costs.as_float16(start)
    assert found.embeds.dtype == torch.float32 and not torch.equal(found.embeds, start.embeds)
    assert torch.allclose(found.embeds, start.embeds, rtol=1e-3, atol=1e-6)
    assert torch.equal(costs.as_float16(found).embeds, found.embeds), "rounding twice is rounding once"
    assert found.step_sizes is None and torch.allclose(found.targets, start.targets, rtol=1e-3)


def test_rows_needed_by_hand():
    """Over the logarithm, half of the way from 10 to 1,000 examples is at 100."""
    curve = {1000: 0.8, 10: 0.4}
    assert costs.rows_needed(0.6, curve) == pytest.approx(100)
    assert costs.rows_needed(0.4, curve) == costs.rows_needed(0.1, curve) == 10
    assert costs.rows_needed(0.8, curve) == pytest.approx(1000)
    assert costs.rows_needed(0.81, curve) == math.inf
    assert costs.rows_needed(0.5, {1: 0.3, 2: 0.6, 4: 0.4, 8: 0.9}) == pytest.approx(2 ** (2 / 3)), "where it first does"


def test_random_rows_are_balanced_and_real(task):
    rows = costs.random_rows(task, 10)
    assert sorted(label for _, label in rows) == [0] * 5 + [1] * 5
    assert {*rows} <= {*zip(task.train["text"], task.train["label"])}
    assert rows == costs.random_rows(task, 10)


def row(method, mean, flops, examples=2, recipe="own"):
    return {"method": method, "mean": mean, "flops": flops, "examples": examples, "recipe": recipe}


ROWS = {
    "random/tuned": row("random", 0.4, 2 * 10**12, recipe="tuned"),
    "embeddings/own": row("embeddings", 0.7, 10**12),
    "full/standard": row("full", 0.9, 5 * 10**12, examples=100, recipe="standard"),
}


def test_gain_over_random_by_hand():
    gain = costs.over_random(ROWS, "embeddings/own")
    assert (gain.points, gain.of_the_way) == (pytest.approx(0.3), pytest.approx(0.6))
    alone = {name: ROWS[name] for name in ("random/tuned", "embeddings/own")}
    assert math.isnan(costs.over_random(alone, "embeddings/own").of_the_way)
    worse = ROWS | {"full/standard": row("full", 0.4, 1, 100)}
    assert math.isnan(costs.over_random(worse, "embeddings/own").of_the_way), "there is no way to go"
    with pytest.raises(ValueError, match=r"full/standard has 100 examples and random/tuned 2: that is no equal budget"):
        costs.over_random(ROWS, "full/standard")


def test_gain_of_evaluations():
    shared = {"std": 0.0, "scores": (), "groups": {}, "seconds": 1.0, "flops": 1, "examples": 2, "nbytes": 1, "recipe": {}}
    found = {name: dk.Evaluation(mean=mean, **shared) for name, mean in (("random/tuned", 0.25), ("ours", 0.5))}
    assert costs.over_random({name: vars(one) for name, one in found.items()}, "ours").points == 0.25


def test_the_table():
    lines = costs.cost_table(ROWS, ["embeddings/own", "random/tuned", "full/standard"], 10**13).splitlines()
    assert lines[2] == "| embeddings | own | 0.70 | 1.000 | 1 / 5 | 10.0 | 3 |"
    assert lines[3] == "| random | tuned | 0.40 | 2.000 | 1 / 2 |  |  |"
    dear = types.MappingProxyType({**ROWS, "embeddings/own": row("embeddings", 0.7, 5 * 10**12)})
    assert costs.cost_table(dear, ["embeddings/own"], 1).endswith("| never |")
