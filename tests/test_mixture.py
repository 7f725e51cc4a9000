"""Recipes drawn afresh in each outer step."""

import dataclasses
from collections import Counter

import pytest
import torch

import distillkit as dk
from distillkit.io.seeds import generator

STEPS = 2
CENTRAL = dk.Unroll(STEPS, optimizer=dk.SGD(0.3))
OTHER = dk.Unroll(4, optimizer=dk.AdamW(0.01, eps_root=1e-6), batch_size=2)


def other(draw):
    return OTHER


@pytest.fixture(scope="module")
def world(standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("rotten_tomatoes", max_length=12)
        return task, dk.load_student("bert-base-uncased", task, dtype="float64")


def a_set(world, **options):
    return dk.DistilledSet.from_real(*world, per_class=2, length=8, **options)


def objective(world, unroll, **options):
    return dk.BPTT(*world, unroll, metagrad=dk.Replay(), batch_size=10, **options)


def test_draws_are_spread_over_what_people_train_with():
    draws = [dk.CommonRecipes()(generator("test", number)) for number in range(600)]
    kinds = Counter(type(unroll.optimizer).__name__ for unroll in draws)
    assert all(150 < kinds[name] < 250 for name in ("SGD", "Momentum", "AdamW"))
    steps = sorted(unroll.steps for unroll in draws)
    assert steps[0] == 3 and steps[-1] >= 58 and 11 <= steps[300] <= 16, "log-uniform: the median is near sqrt(3 x 60)"
    for name, middle, largest in (("SGD", 1.0, 0.3), ("Momentum", 0.2, 0.05), ("AdamW", 3e-3, 1e-3)):
        runs = [(u.steps, u.optimizer.step_size) for u in draws if type(u.optimizer).__name__ == name]
        distances = sorted(steps * size for steps, size in runs)
        assert max(size for _, size in runs) == largest, "short runs of long distance"
        assert 4 * middle < distances[-1] < 10**0.75 * middle
        assert all(steps * size > 10**-0.75 * middle or size == largest for steps, size in runs)
    assert all(unroll.optimizer.eps_root > 0 for unroll in draws if isinstance(unroll.optimizer, dk.AdamW))


def test_the_central_recipe_has_its_share():
    mixture = dk.Mixture(other, central=CENTRAL, share=0.3)
    draws = [mixture.draw(seed) for seed in range(1000)]
    assert 250 < sum(is_central for _, is_central in draws) < 350
    assert {unroll for unroll, is_central in draws if is_central} == {CENTRAL}
    assert {unroll for unroll, is_central in draws if not is_central} == {OTHER}
    assert mixture.draw(3) == mixture.draw(3)
    assert dk.Mixture(other).central == OTHER, "the first draw, where the sampler names none"
    assert dk.Mixture(dk.CommonRecipes(central=CENTRAL)).central == CENTRAL


def test_a_draw_is_the_gradient_of_that_recipe(world):
    start = a_set(world)
    always = objective(world, dk.Mixture(other, central=CENTRAL, share=1e-9))
    mixed, alone = (dk.meta_gradient(start, goal, seed=3) for goal in (always, objective(world, OTHER)))
    assert mixed.embeds.abs().max() > 0 and mixed.loss != alone.loss, "the order of the batches is drawn too"
    whole = dataclasses.replace(OTHER, batch_size=None)
    always = objective(world, dk.Mixture(lambda draw: whole, central=CENTRAL, share=1e-9))
    mixed, alone = (dk.meta_gradient(start, goal, seed=3) for goal in (always, objective(world, whole)))
    assert mixed.loss == alone.loss and torch.equal(mixed.embeds, alone.embeds) and torch.equal(mixed.targets, alone.targets)
    assert mixed.step_sizes.tolist() == [0.0] * STEPS and len(alone.step_sizes) == OTHER.steps


def test_a_central_draw_learns_its_step_sizes(world):
    start, central = a_set(world), objective(world, dk.Mixture(other, central=CENTRAL, share=1))
    mixed, alone = (dk.meta_gradient(start, goal, seed=3) for goal in (central, objective(world, CENTRAL)))
    assert torch.equal(mixed.embeds, alone.embeds) and torch.equal(mixed.step_sizes, alone.step_sizes)
    assert mixed.step_sizes.abs().min() > 0


def test_a_set_learned_by_a_mixture(world, tmp_path):
    task, student = world
    goal = objective(world, dk.Mixture(other, central=CENTRAL, share=0.5))
    run = dk.Distiller(a_set(world), goal, lr=0.05, checkpoint=tmp_path / "run")
    sizes = [record.step_sizes for record in run.run(8)]
    assert len({*sizes}) > 1 and all(len(each) == STEPS for each in sizes)
    learned = run.distilled
    assert learned.meta["recipe"]["steps"] == STEPS and "mixture" in learned.meta["recipe"]
    score = dk.evaluate(learned, task, student, seeds=[0], recipe="own")
    assert score.recipe["steps"] == STEPS and score.recipe["optimizer"]["name"] == "SGD"
    assert dk.Distiller(a_set(world), goal, lr=0.05, checkpoint=tmp_path / "run").step == 8
    with pytest.raises(ValueError, match="mixture"):
        dk.Distiller(a_set(world), objective(world, CENTRAL), lr=0.05, checkpoint=tmp_path / "run")


def test_matching_takes_a_mixture(world, tmp_path):
    experts = dk.record_experts(*world, tmp_path / "experts", epochs=1, batch_size=16)
    goal = dk.TrajectoryMatching(*world, dk.Mixture(other, central=CENTRAL), experts, metagrad=dk.Replay())
    records = list(dk.Distiller(a_set(world), goal, lr=0.01).run(3))
    assert len({record.loss for record in records}) == 3


@pytest.mark.parametrize(("build", "message"), [
    (lambda world: dk.Mixture(3), "sampler"), (lambda world: dk.Mixture(other, share=0), "share"),
    (lambda world: dk.Mixture(other, central=3), "central"), (lambda world: dk.CommonRecipes(most_steps=2), "least_steps"),
    (lambda world: objective(world, 3), "Mixture"), (lambda world: dk.Mixture(lambda draw: 3), "central"),
])
def test_what_cannot_be(world, build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(world)
