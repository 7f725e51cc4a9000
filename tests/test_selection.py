"""Real examples: both rules against cases worked by hand, and sets of equal size whatever the method."""

import json

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.evaluation import selection
from distillkit.evaluation.influence import influence
from distillkit.evaluation.selection import herding, k_center, k_means, round_robin, sentence_features


def column(*values):
    return np.array(values, dtype=np.float32)[:, None]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_k_center_by_hand():
    """Points 0, 1, 2, 6, 11, mean 4.

    Nearest the mean: 2 and 6 are both 2 away, and the first wins: 2. Distances from it: 2, 1, 0, 4, 9: take 11.
    Distances from {2, 11}: 2, 1, 0, 4, 0: take 6. From {2, 11, 6}: 2, 1, 0, 0, 0: take 0. Then 1 is left.
    """
    assert k_center(column(0, 1, 2, 6, 11), 5).tolist() == [2, 4, 3, 0, 1]


def test_k_center_in_the_plane():
    """A square's corners (±1, ±1) and a point (0.1, 0.1), mean (0.02, 0.02): first the point, then a corner farthest.

    From (0.1, 0.1), (−1, −1) is √2.42 away, the next two √2.02. From both, (1, 1) is √1.62 away, (1, −1) and (−1, 1)
    are √2.02: the first of the two.
    """
    x = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1], [0.1, 0.1]])
    assert k_center(x, 3).tolist() == [4, 3, 1]


def test_herding_by_hand():
    """Points 0, 1, 3, 8, mean 3.

    One: 3 is the mean itself. Two: the mean of 3 with 0, 1, 8 is 1.5, 2, 5.5, so 1 (off by 1).
    Three: (3 + 1 + 0) / 3 = 1.33 and (3 + 1 + 8) / 3 = 4, so 8 (off by 1). Then 0 is left, and the mean is exact.
    """
    assert herding(column(0, 1, 3, 8), 4).tolist() == [2, 1, 3, 0]


def test_herding_looks_at_the_sum_not_at_the_points():
    """Points 0, 0, 10, 10, mean 5: the first is a 0, and with it only a 10 brings the mean to 5."""
    assert herding(column(0, 0, 10, 10), 2).tolist() == [0, 2]
    assert herding(column(0, 0, 10, 10), 4).tolist() == [0, 2, 1, 3]


def test_the_two_rules_differ():
    """Points 0, 1, 2, 3, 14, mean 4: both begin with 3. The farthest from it is 14; the mean of 3 and 14 is 8.5, off by
    4.5, that of 3 and 2 is 2.5, off by 1.5."""
    assert k_center(column(0, 1, 2, 3, 14), 2).tolist() == [3, 4]
    assert herding(column(0, 1, 2, 3, 14), 2).tolist() == [3, 2]


def test_medoids_by_hand():
    """Two clusters, with means 1.56 and 10.4: their medoids are 1.8 and 10. One cluster: the point nearest the mean 4.875."""
    x = column(0, 1, 2, 1.8, 9, 10, 12.2, 3)
    assert sorted(k_means(x, 2).tolist()) == [3, 5]
    assert k_means(x, 1).tolist() == [7]


def test_groups_take_turns():
    """Three groups; the second's best row is the first's too and is gone, so it takes its next best."""
    scores = np.array([[9.0, 9.0, 0.0], [8.0, 1.0, 0.0], [7.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    assert round_robin(scores, 4).tolist() == [0, 2, 3, 1]
    assert round_robin(scores[:, :1], 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rule", [k_center, herding, k_means])
@pytest.mark.parametrize("x", [np.ones((6, 3), dtype=np.float32), column(1, 1, 1, 2, 2, 9), column(0, 0, 5, 5, 5, 5)])
def test_no_row_is_chosen_twice(rule, x):
    for k in range(1, 7):
        assert len({*rule(x, k).tolist()}) == k
    assert sorted(rule(x, 6).tolist()) == list(range(6))


@pytest.mark.parametrize("rule", [k_center, herding])
def test_fewer_is_a_prefix_of_more(rule):
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    assert rule(x, 3).tolist() == rule(x, 40)[:3].tolist()
    assert rule(x, 1)[0] == np.linalg.norm(x - x.mean(0), axis=1).argmin(), "the medoid first"
    assert sorted(rule(x, 40).tolist()) == list(range(40))


def test_each_rule_does_better_at_its_own_aim():
    x = np.random.default_rng(0).normal(size=(200, 8))

    def radius(rows):
        return np.linalg.norm(x[:, None] - x[rows], axis=-1).min(1).max()

    def gap(rows):
        return np.linalg.norm(x[rows].mean(0) - x.mean(0))

    assert radius(k_center(x, 20)) < radius(herding(x, 20)) and gap(herding(x, 20)) < 0.5 * gap(k_center(x, 20))


# --- sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", selection.METHODS)
@pytest.mark.parametrize(("size", "per_class"), [({"per_class": 1}, 1), ({"per_class": 5}, 5), ({"fraction": 0.1}, 4)])
def test_every_method_gives_a_set_of_the_same_budget(world, method, size, per_class):
    task, student = world
    found = dk.select(task, student, method, length=10, **size)
    assert found.targets.tolist() == [0] * per_class + [1] * per_class and not found.soft
    assert found.embeds.shape == (2 * per_class, 10, 32) and found.mask.all(), "equal numbers of tokens"
    assert found.step_sizes is None and "recipe" not in found.meta
    assert found.meta["selection"] == {"method": method, "seed": 0}
    assert len({tuple(row) for row in found.tokens.tolist()}) == 2 * per_class
    assert found.to_text()["label"][:] == ["neg"] * per_class + ["pos"] * per_class


@pytest.mark.parametrize("method", ["k_center", "herding"])
def test_choices_follow_the_features(world, method):
    """The sentence each example begins with is the one that the rule picks within its class."""
    task, student = world
    x, rule = sentence_features(task, student), {"k_center": k_center, "herding": herding}[method]
    found = dk.select(task, student, method, per_class=3, length=14, seed=5)
    for label, rows in enumerate(task.rows_by_class("train")):
        for place, chosen in enumerate(rows[rule(x[rows], 3)]):
            ids = student.tokenizer(task.train[int(chosen)]["text"], add_special_tokens=False)["input_ids"]
            assert found.tokens[3 * label + place, 1 : 1 + len(ids)].tolist() == ids[:12]


def test_less_takes_the_highest_scores_of_each_class(world):
    """And notes its settings."""
    task, student = world
    scores = influence(task, student, seed=3)
    found = dk.select(task, student, "less", per_class=2, length=14, seed=3)
    for label, rows in enumerate(task.rows_by_class("train")):
        for place, chosen in enumerate(sorted(rows, key=lambda row: -scores[row, 0])[:2]):
            ids = student.tokenizer(task.train[int(chosen)]["text"], add_special_tokens=False)["input_ids"]
            assert found.tokens[2 * label + place, 1 : 1 + len(ids)].tolist() == ids[:12]
    noted = json.loads(json.dumps(found.meta["selection"]))
    assert {name: noted[name] for name in ("method", "seed", "trainable", "epochs", "projection")} == {
        "method": "less", "seed": 3, "trainable": "full", "epochs": 4, "projection": 8192}
    assert noted["optimizer"]["name"] == "AdamW" and noted["optimizer"]["betas"] == [0.9, 0.999]
    assert found.targets.tolist() == [0, 0, 1, 1] and not found.soft and found.mask.all()
    assert len(dk.select(task, student, "less", fraction=0.1, length=10, seed=3)) == 8


def test_seeds(world):
    first = {m: [dk.select(*world, m, per_class=1, length=8, seed=s).tokens[:, :4] for s in range(3)]
             for m in selection.METHODS}
    assert not torch.equal(first["random"][0], first["random"][1])
    assert all(torch.equal(first[m][0], other) for m in ("k_center", "herding") for other in first[m])
    again = dk.select(*world, "random", per_class=1, length=8, seed=1).tokens
    assert torch.equal(again[:, :4], first["random"][1])


def test_features(world):
    task, student = world
    x = sentence_features(task, student)
    assert x.shape == (80, 32) and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    for row in (0, 17, 79):  # one at a time, so neither padding nor order can matter
        alone = torch.nn.functional.normalize(student.features(task.batch(student.tokenizer, "train", [row])), dim=1)
        assert np.allclose(x[row], alone.numpy(), atol=1e-5)


def test_features_are_computed_once(world, standin_hub, monkeypatch):
    task = world[0]
    student = dk.load_student("bert-base-uncased", task)
    calls, features = [], dk.Student.features
    monkeypatch.setattr(dk.Student, "features", lambda self, batch: calls.append(1) or features(self, batch))
    sentence_features(task, student)
    first = len(calls)
    dk.select(task, student, "herding", per_class=1)
    dk.select(task, student, "k_center", per_class=1)
    assert first == len(calls) == 1
    longer = dk.load_task("rotten_tomatoes", max_length=6)
    assert not np.allclose(sentence_features(longer, student), sentence_features(task, student))


def test_unknown_methods_are_named(world):
    with pytest.raises(ValueError, match="method must be one of random, k_center, .*, not 'kmeans'"):
        dk.select(*world, "kmeans", per_class=1)


@pytest.mark.parametrize("method", selection.METHODS)
def test_more_than_there_is(world, method):
    with pytest.raises(ValueError, match="per_class=41 but class 'neg' of task 'rotten_tomatoes' has only 40"):
        dk.select(*world, method, per_class=41)
    everything = dk.select(*world, method, per_class=40)
    assert len(everything) == 80
