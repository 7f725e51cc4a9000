"""Searched keywords, and judges that read what a head reads or that judge together."""

import dataclasses

import pytest
import torch

import distillkit as dk
from distillkit.core.examples import embed
from distillkit.evaluation.words import weighted_words
from distillkit.text.judges import FrozenJudge, JointJudge, Swap


@pytest.fixture
def start(world):
    return dk.select(*world, "keywords", per_class=1, length=8)


def joint(world, *others):
    return JointJudge([FrozenJudge(world[0], student, steps=10, batch_size=16, reads=part)
                       for student in (world[1], *others) for part in ("layers", "head")])


@pytest.fixture
def twin(world):
    """A student with the same tokenizer and other weights."""
    student = dataclasses.replace(world[1], cache={}, name="twin", table_sha256="f" * 64)
    student.embedding = 2 * world[1].embedding
    return student


def test_a_judge_of_the_head_reads_the_last_first_token(world, start):
    task, student = world
    judge = FrozenJudge(task, student, reads="head")
    batch = task.batch(student.tokenizer, "train", range(len(task.train)))
    first = student.layer_features(batch)[:, -1]
    size = (first - first.mean(0)).square().sum(1).mean().sqrt()
    of_set = student.layer_features({"inputs_embeds": start.embeds, "attention_mask": start.mask.long()})[:, -1]
    torch.testing.assert_close(judge.features(start), (of_set - first.mean(0)) / size, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="reads"):
        FrozenJudge(task, student, reads="tail")


def test_a_joint_loss_is_the_mean_of_its_judges(world, start, twin):
    judge, swaps = joint(world, twin), [[], [Swap(0, 1, 30)]]
    each = []
    for single in judge.judges:
        text = dataclasses.replace(start, embeds=embed(single.student, start.tokens),
                                   meta=start.meta | {"table_sha256": single.student.table_sha256})
        each.append(single.losses(text, swaps, 3))
    assert len({losses[0] for losses in each}) == 4, "each encoder and each reading has a loss of its own"
    assert judge.losses(start, swaps, 3) == pytest.approx(torch.tensor(each).mean(0).tolist(), abs=1e-6)


def test_joint_judges_read_one_text(world, task, standin_hub):
    other = dk.load_student("roberta-base", task)
    with pytest.raises(ValueError, match="vocabulary"):
        joint(world, other)
    with pytest.raises(ValueError, match="judges"):
        JointJudge([])


@pytest.mark.parametrize("per_class", [1, 2])
def test_words_of_the_class_come_in_and_the_loss_falls(world, per_class):
    start = dk.select(*world, "keywords", per_class=per_class, length=8)
    judge = joint(world)
    after = dk.search_keywords(start, *world, judge, steps=6, candidates=8)
    losses = after.meta["search"]["losses"]
    assert all(end <= begin for begin, end in losses) and any(end < begin for begin, end in losses)
    assert torch.equal(after.targets, start.targets) and torch.equal(after.mask, start.mask)
    assert after.meta["text"] != start.meta["text"]
    words = [{word for word, _ in of_class} for of_class in weighted_words(world[0])]
    for text, label in zip(after.meta["text"], after.meta["labels"], strict=True):
        assert {*text.split()} <= words[label], "whole words of the class"
    again = dk.DistilledSet.from_text(after.meta["text"], after.label_names(), *world, length=8, soft_labels=False)
    assert torch.equal(again.tokens, after.tokens), "what is read is what was judged"
    assert dk.search_keywords(start, *world, judge, steps=6, candidates=8).meta["text"] == after.meta["text"]
    assert dk.search_keywords(start, *world, judge, steps=6, candidates=8, seed=1).meta["text"] != after.meta["text"]


def test_a_judge_that_likes_nothing_changes_nothing(world, start):
    class Content:
        def losses(self, distilled, swaps, seed):
            return [float(bool(group)) for group in swaps]

        def describe(self):
            return {}

    assert dk.search_keywords(start, *world, Content(), steps=2, candidates=4).meta["text"] == start.meta["text"]


def test_a_set_that_is_no_text_is_refused(world, start):
    with pytest.raises(ValueError, match="project"):
        dk.search_keywords(dataclasses.replace(start, tokens=None), *world, joint(world))
