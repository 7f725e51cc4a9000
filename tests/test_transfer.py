"""From one model to another: the words arrive, the labels with them, and what belongs to the source stays there."""

import dataclasses

import pytest
import torch

import distillkit as dk


@pytest.fixture(scope="module")
def target(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return dk.load_student("roberta-base", task)


@pytest.fixture(scope="module")
def questions():
    task = dk.load_task("docstrings_qa:library", max_length=96, limit=24)
    return task, dk.load_student("offline:tiny-opt", task, trainable="full"), dk.load_student("offline:tiny-llama", task)


def words(text):
    return "".join(text.lower().split())


def test_sentences_arrive_in_the_targets_tokens(world, target):
    start = dk.select(*world, "random", per_class=3, length=12)
    found = dk.retokenize(start, world[0], target)
    before, after = target.tokenizer.bos_token_id, target.tokenizer.eos_token_id
    for row, mask, free, text in zip(found.tokens, found.mask, found.free, start.meta["text"], strict=True):
        row = row[mask].tolist()
        assert row[0] == before and row[-1] == after and not free[[0, len(row) - 1]].any()
        body = target.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row[1:-1] == body[: world[0].max_length - 2]
    assert torch.equal(found.embeds, target.embedding[found.tokens]) and torch.equal(found.targets, start.targets)
    counts = found.meta["retokenized"]
    assert counts["tokens_before"] == int(start.free.sum())
    bodies = target.tokenizer(start.meta["text"], add_special_tokens=False)["input_ids"]
    assert counts["tokens_after"] == sum(map(len, bodies))
    assert found.meta["student"] == "roberta-base" and counts["from"] == "bert-base-uncased"


def test_soft_labels_travel_and_step_sizes_do_not(world, target):
    goal = dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
    distiller = dk.Distiller(dk.DistilledSet.from_real(*world, per_class=1, length=10), goal)
    list(distiller.run(2))
    with pytest.raises(ValueError, match="project it first"):
        dk.transfer(distiller.distilled, world[0], target)
    text = dk.project(distiller.distilled, world[1])
    found = dk.retokenize(text, world[0], target)
    assert torch.equal(found.targets, text.targets) and found.soft
    assert found.step_sizes is None and "recipe" not in found.meta
    score = dk.transfer(text, world[0], target, seeds=(0,))
    assert score.recipe["name"] == "tuned" and score.examples == 2
    with pytest.raises(ValueError, match="leaves its own behind"):
        dk.transfer(text, world[0], target, recipe="own")


def test_a_sentence_that_outgrows_the_length_is_cut_and_counted(world, target):
    task = dataclasses.replace(world[0], max_length=5)
    start = dk.select(*world, "random", per_class=2, length=12)
    found = dk.retokenize(start, task, target)
    assert found.tokens.shape[1] <= 5 and found.meta["retokenized"]["cut"] == len(start)


def test_to_itself_nothing_changes(world):
    start = dk.select(*world, "random", per_class=2, length=12)
    found = dk.retokenize(start, *world)
    counts = found.meta["retokenized"]
    assert counts["same_text"] == len(start) and counts["cut"] == 0
    assert [words(t) for t in found.meta["text"]] == [words(t) for t in start.meta["text"]]


def test_prompts_and_responses_arrive(questions):
    task, opt, llama = questions
    start = dk.select(task, opt, "random", fraction=0.2)
    found = dk.retokenize(start, task, llama)
    assert found.meta["responses"] == start.meta["responses"] and len(found) == len(start)
    for ids, answer in zip(found.targets, start.meta["responses"], strict=True):
        said = llama.tokenizer.decode(ids[ids >= 0].tolist(), skip_special_tokens=True)
        assert said.strip() == answer
    row = next(i for i, p in enumerate(task.train["prompt"]) if words(p) == words(start.meta["text"][0]))
    expected = task.token_ids(llama.tokenizer, "train")[row]
    assert found.tokens[0][found.mask[0]].tolist() == expected, "a real prompt reads as it does in the corpus"


def test_a_set_of_another_kind_is_refused(world, questions):
    task, opt, llama = questions
    with pytest.raises(ValueError, match="different kinds of task"):
        dk.retokenize(dk.select(*world, "random", per_class=1), task, llama)


def test_an_instruction_set_is_scored_on_the_other_model(questions):
    task, opt, llama = questions
    small = dk.load_task("docstrings_qa:library", max_length=96, limit=12)
    found = dk.transfer(dk.select(small, opt, "random", fraction=0.2), small, llama, seeds=(0,), recipe="standard")
    assert 0 <= found.mean <= 1 and found.recipe["name"] == "standard"
