"""Lens on several sets side by side, on edits, and on what a trained student says: right numbers, without a browser."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.evaluation.scoring import classified
from distillkit.view import measures
from distillkit.view.lens import maps, panes
from distillkit.view.lens.film import filmed


@pytest.fixture(scope="module")
def start(world):
    return dk.DistilledSet.from_real(*world, per_class=2, length=10)


@pytest.fixture(scope="module")
def learned(start):
    """Its free positions moved by a little noise: the embeddings of no token."""
    noise = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    return dataclasses.replace(start, embeds=start.embeds + noise * start.free.unsqueeze(-1), tokens=None)


@pytest.fixture(scope="module")
def small(world):
    """One example per class, shorter ones, and the classes in the other order."""
    one = dk.DistilledSet.from_real(*world, per_class=1, length=6, seed=1)
    return one.in_classes(one.meta["classes"][::-1])


@pytest.fixture
def side_by_side(world, start, learned, small):
    return dk.Lens({"random": start, "distilled": learned, "small": small}, world[1], task=world[0])


def array(lens, name):
    kind, shape, begin = lens.content["arrays"][name]
    return np.frombuffer(lens.binary, kind, int(np.prod(shape)), begin).reshape(shape)


# --- several sets side by side


def test_each_set_is_a_choice_with_its_name(world, side_by_side, start, learned):
    assert side_by_side.content["frames"] == ["random", "distilled", "small"] and side_by_side.content["choices"]
    figure = side_by_side.figure()
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["random", "distilled", "small"]
    assert dk.Lens([start, learned], world[1]).content["choices"], "set 1, set 2"
    for film in ({"step 0": start, "step 20": learned}, {str(n): start for n in range(9)}, {"alone": start}):
        assert not dk.Lens(film, world[1]).content["choices"]


def test_labels_are_matched_by_name(side_by_side, start, small):
    content, labels = side_by_side.content, array(side_by_side, "labels")
    assert content["classes"] == start.meta["classes"] and small.meta["classes"] == content["classes"][::-1]
    assert labels[0].tolist() == labels[1].tolist() == start.meta["labels"]
    assert labels[2].tolist() == [*(1 - np.array(small.meta["labels"])), -1, -1], "the smaller set has two examples"
    assert np.array(content["probabilities"][2]) == pytest.approx(small.probabilities().numpy()[:, ::-1], abs=1e-4)


def test_classes_of_several_tasks_are_all_named(start):
    other = dataclasses.replace(start, meta=start.meta | {"classes": ["neither", start.meta["classes"][0]]})
    names, labels, probabilities = panes.common_labels([start, other])
    assert names == [*start.meta["classes"], "neither"]
    assert labels[1].tolist() == [2 if label == 0 else 0 for label in start.meta["labels"]]
    assert probabilities[1].shape == (4, 3) and not probabilities[1][:, 1].any()


def test_an_example_that_a_set_lacks(side_by_side):
    side_by_side.frame, side_by_side.example = 2, 3
    with pytest.raises(ValueError, match="2 examples, and none with the number 4"):
        side_by_side.answer(["attention", 0, 2, 3])
    assert "Example 2" in side_by_side.figure().axes[3].get_title(loc="left"), "the picture shows one that is there"


def test_a_page_has_the_heads_of_every_set(side_by_side, tmp_path):
    text = side_by_side.save_html(tmp_path / "sets.html").read_text(encoding="utf-8")
    answers = json.loads(text.split('id="stored">')[1].split("</script>")[0])["answers"]
    shown = [json.loads(ask)[2:] for ask in answers if ask.startswith('["attention"')]
    assert sorted(shown) == [[frame, example] for frame, count in enumerate((4, 4, 2)) for example in range(count)]


def test_the_share_of_neighbours_is_that_of_the_set_that_is_shown(world, side_by_side, start, learned, small):
    both = [maps.make_map(filmed(dict(zip(names, (start, learned))), world[1]), world[1], real=start).preserved
            for names in (("random", "distilled"), ("step 0", "step 9"))]
    assert [*both[0]] == [0, 1] and [*both[1]] == [1] and both[0][1] == both[1][1]
    assert both[0][0] > both[0][1], "the positions of the first set are words, neighbours of themselves on every map"


# --- the control of the own class


def test_the_control_shifts_each_position_apart(world, start, learned, small):
    film, labels = filmed([start, learned], world[1]), start.meta["labels"]
    owner = learned.free.nonzero()[:, 0].numpy()

    def share(together):
        shifted = measures.random_shift(learned, start, together=together)
        groups = np.array(labels)[owner]
        return measures.neighbour_overlap(shifted.embeds[shifted.free], groups, 10, metric="l2", owners=owner).share

    assert maps.own_class(film, 1, labels)["control"] == share(False) != share(True)
    foreign = dataclasses.replace(learned, meta=learned.meta | {"rows": [0, 1, 2, 3]})
    assert np.isnan(maps.own_class(filmed([start, foreign], world[1]), 1, labels)["control"]), "it did not start there"


# --- where an edit goes on the map


def test_an_edited_position_is_where_its_word_is(world, start, learned):
    lens = dk.Lens([start, learned], world[1])
    flat, (reply, _) = lens.maps["pca"], lens.answer(["place", "pca", 50])
    assert 50 in flat.words and reply["at"] == flat.background[flat.words.tolist().index(50)].tolist()
    scale, word = lens.content["maps"]["pca"]["scale"], lens.content["words"].split("\n")
    spot = [word[i] for i in array(lens, "pca.words")].index(world[1].tokenizer.convert_ids_to_tokens(50))
    drawn = (np.array(reply["at"]) - scale["least"]) / scale["unit"]
    assert np.abs(drawn - array(lens, "pca.background")[spot]).max() <= 0.51, "on the scale of the words"
    special = world[1].tokenizer.pad_token_id
    assert special not in flat.words
    expected = flat.place(world[1].embedding[[special]].numpy())[0]
    assert lens.answer(["place", "pca", special])[0]["at"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_page_has_the_places_of_its_edits(world, start, learned, tmp_path):
    lens = dk.Lens([start, learned], world[1])
    lens.accept(50, example=1, position=3)
    assert '["place","pca",50]' in lens.save_html(tmp_path / "lens.html").read_text(encoding="utf-8").replace('\\"', '"')


# --- what a trained student says


@pytest.mark.parametrize("recipe", ["own", "standard"])
def test_the_student_that_is_asked_is_the_one_that_is_evaluated(world, start, recipe):
    task, student = world
    distilled = start
    if recipe == "own":
        goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
        distilled = dk.Distiller(start, goal, lr=0.1).distilled
    shares = []
    params, name = panes.trained(distilled, student, task, shares.append)
    assert name == recipe and shares[-1] == 1 and shares == sorted(shares)
    score = dk.evaluate(distilled, task, student, seeds=(0,), recipe=recipe)
    assert classified(student, params, task, "test").mean() == score.mean
    logits = student.logits(params, {"inputs_embeds": distilled.embeds, "attention_mask": distilled.mask.long()})
    said = panes.predicted(student, params, distilled, 2)
    assert [said[label] for label in task.classes] == pytest.approx(logits.softmax(-1)[2].tolist(), abs=1e-5)


def test_a_student_is_trained_once_and_asked_before_and_after_an_edit(world, start, small, monkeypatch):
    lens, trainings = dk.Lens({"two": start, "small": small}, world[1], task=world[0]), []
    whole = panes.trained
    monkeypatch.setattr(panes, "trained", lambda *args: trainings.append(args[0]) or whole(*args))
    first, _ = lens.answer(["prediction", 0, 0, 1])
    assert first["after"] is None and sum(first["before"]) == pytest.approx(1) and first["recipe"] == "standard"
    lens.accept(50, frame=0, example=1, position=3)
    second, _ = lens.answer(["prediction", lens.revision, 0, 1])
    assert second["before"] == first["before"] and len(trainings) == 1
    said = panes.predicted(world[1], lens._trained[1], lens.edited, 1)
    assert second["after"] == [said[name] for name in start.meta["classes"]] != second["before"]
    third, _ = lens.answer(["prediction", lens.revision, 1, 0])
    assert third["after"] is None and trainings == [start, small], "another set has a student of its own"


# --- a film that takes the place of another


def test_answers_about_an_earlier_film_are_gone(world, start, tmp_path):
    goal = dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)

    def distiller():
        return dk.Distiller(start, goal, lr=0.5, checkpoint=tmp_path / "run", checkpoint_every=100)

    for _ in dk.record_film(distiller(), tmp_path / "film", 2, frames=2):
        pass

    async def resumed():
        lens = dk.Lens(distiller(), world[1])
        before = lens.answer(["attention", 0, 0, 1])[1][0]
        await lens.run(2, folder=tmp_path / "film", frames=2)
        return before, lens.answer(["attention", 0, 0, 1])[1][0], lens

    before, after, lens = asyncio.run(resumed())
    assert lens.film.names == ("step 0", "step 2")
    expected = panes.heads(world[1], [panes.one_example(start, 1)] * 2)
    assert after == expected.tobytes() != before, "frame 0 was step 2, and is the start"
