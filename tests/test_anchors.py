"""Embeddings that move to another model: a planted rotation is found again, and what moves is what the target trains on."""

import dataclasses

import pytest
import torch

import distillkit as dk
from distillkit.applications.anchors import anchor_map, carry_over, shared_words
from distillkit.core.examples import special_frame


@pytest.fixture(scope="module")
def task():
    return dk.load_task("docstrings", max_length=16, limit=60)


@pytest.fixture(scope="module")
def source(task):
    return dk.load_student("offline:minilm", task)


@pytest.fixture(scope="module")
def other(task):
    """A model of other weights with the same vocabulary."""
    return dk.load_student("offline:small-bert", task)


@pytest.fixture(scope="module")
def learned(task, source):
    start = dk.DistilledSet.from_real(task, source, per_class=1, length=12)
    noise = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(start, embeds=start.embeds + 0.1 * noise * start.free[..., None], tokens=None)


def test_a_planted_rotation_is_found():
    draw = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=draw, dtype=torch.float64)).Q
    stretched = torch.randn(12, 12, generator=draw, dtype=torch.float64)
    anchors = torch.randn(200, 12, generator=draw, dtype=torch.float64) @ stretched
    vectors, shift = torch.randn(3, 4, 12, generator=draw, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    moved, explained = anchor_map(anchors, anchors @ rotation + shift, vectors)
    assert torch.allclose(moved, vectors @ rotation + shift, atol=1e-9) and explained == pytest.approx(1)


def test_it_is_the_mean_of_anchors_weighted_by_whitened_inner_products():
    """The formula of the module's docstring, written out."""
    draw = torch.Generator().manual_seed(2)
    x, y, vector = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((50, 6), (50, 4), (6,)))
    centred = x - x.mean(0)
    weights = centred @ torch.linalg.inv(centred.T @ centred / len(x)) @ (vector - x.mean(0))
    moved, explained = anchor_map(x, y, vector)
    assert torch.allclose(moved, y.mean(0) + (weights[:, None] * (y - y.mean(0))).mean(0))
    assert 0 < explained < 0.5  # 50 unrelated anchors


def test_words_of_two_kinds_of_tokenizer(source):
    for name in ("tiny-opt", "tiny-llama"):
        reader = dk.load_student(f"offline:{name}", dk.load_task("docstrings_qa:library", max_length=32, limit=20))
        words, ids, others = shared_words(source.tokenizer, reader.tokenizer)
        assert len(words) > 400 and words == sorted({*words}) and "function" in words
        for word, one, another in zip(words[::40], ids[::40], others[::40], strict=True):
            assert source.tokenizer.decode([one]).strip() == word == reader.tokenizer.decode([another]).strip()
        sentence = reader.tokenizer("the function returns", add_special_tokens=False)["input_ids"]
        assert others[words.index("function")] in sentence  # the token that stands within a sentence


def test_a_rotated_table_is_another_model_with_the_same_set(task, source, learned):
    """The planted case end to end: on the rotated table, a set lands where the rotation takes it."""
    draw = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(source.width, source.width, generator=draw)).Q
    rotated = dataclasses.replace(source, embedding=source.embedding @ rotation, table_sha256="0" * 64)
    moved = carry_over(learned, task, rotated, source)
    places = learned.free
    assert torch.allclose(moved.embeds[moved.free], learned.embeds[places] @ rotation, atol=1e-4)
    assert torch.equal(moved.free, places) and torch.equal(moved.mask, learned.mask)
    before, after = special_frame(source.tokenizer)
    assert torch.equal(moved.embeds[0, 0], rotated.embedding[before[0]])
    last = int(moved.mask[0].sum()) - 1
    assert torch.equal(moved.embeds[0, last], rotated.embedding[after[-1]])
    assert moved.meta["carried"]["explained"] == pytest.approx(1, abs=1e-3) and moved.meta["table_sha256"] == "0" * 64


def test_labels_travel_and_the_recipe_does_not(task, source, other, learned):
    with_recipe = dataclasses.replace(learned, step_sizes=torch.tensor([0.1]))
    moved = carry_over(with_recipe, task, other, source)
    assert torch.equal(moved.targets, learned.targets) and moved.soft
    assert moved.tokens is None and moved.step_sizes is None and "recipe" not in moved.meta and "text" not in moved.meta
    assert moved.embeds.shape[-1] == other.width and moved.meta["student"] == other.name
    moved.check_table(other)


def test_transfer_by_anchors_is_evaluation_of_what_was_carried(task, source, other, learned):
    recipe = dk.Unroll(2, optimizer=dk.AdamW(1e-3))
    score = dk.transfer(learned, task, other, method="anchors", source=source, seeds=(0, 1), recipe=recipe)
    expected = dk.evaluate(carry_over(learned, task, other, source), task, other, seeds=(0, 1), recipe=recipe)
    assert score.scores == expected.scores and score.recipe == expected.recipe
    again = dk.transfer(learned, task, other, method="anchors", seeds=(0, 1), recipe=recipe)  # the set names its source
    assert again.scores == score.scores


def test_prompts_move_with_their_responses():
    task = dk.load_task("docstrings_qa:library", max_length=48, limit=24)
    source, other = (dk.load_student(f"offline:{name}", task, trainable="full") for name in ("tiny-opt", "tiny-llama"))
    prompts = dk.DistilledSet.from_real(task, source, fraction=0.2)
    moved = carry_over(dataclasses.replace(prompts, tokens=None), task, other, source)
    expected = [other.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in prompts.meta["responses"]]
    assert moved.meta["responses"] == prompts.meta["responses"] and len(expected) == len(moved)
    assert torch.equal(moved.targets, dk.retokenize(prompts, task, other).targets)
    assert torch.equal(moved.free.sum(1), prompts.free.sum(1))
    assert 0 <= dk.evaluate(moved, task, other, seeds=(0,), recipe="standard").mean <= 1
    short = dataclasses.replace(task, max_length=12)  # the question stands at the end of a prompt
    cut = carry_over(dataclasses.replace(prompts, tokens=None), short, other, source)
    assert cut.meta["carried"]["cut"] > 0 and int(cut.free[0].sum()) < int(moved.free[0].sum())
    assert torch.equal(cut.embeds[0][cut.free[0]], moved.embeds[0][moved.free[0]][-int(cut.free[0].sum()) :])


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "magic"}, "method must be one of text, anchors"),
    ({"source": "source"}, "source is for method='anchors'"),
    ({"method": "anchors", "source": "other"}, "another"),
])
def test_what_cannot_move_is_told(task, source, other, learned, changes, message):
    students = {"source": source, "other": other}
    changes = {key: students.get(value, value) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        dk.transfer(learned, task, other, **changes)


def test_a_set_without_a_source_asks_for_one(task, other, learned):
    nameless = dataclasses.replace(learned, meta={key: value for key, value in learned.meta.items() if key != "student"})
    with pytest.raises(ValueError, match="give it as source"):
        dk.transfer(nameless, task, other, method="anchors")


def test_too_few_shared_words(task, source, other, learned, monkeypatch):
    monkeypatch.setattr("distillkit.applications.anchors.shared_words", lambda *_: (["a"], [1], [1]))
    with pytest.raises(ValueError, match="share 1 words, fewer than the 384 numbers"):
        carry_over(learned, task, other, source)
