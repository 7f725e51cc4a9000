"""A prediction against the run it predicts, on tiny models: minutes within a factor, memory more closely."""

import time

import pytest
import torch

import distillkit as dk
from distillkit.core.estimate import announce
from distillkit.io.memory import LiveBytes


@pytest.mark.parametrize("strategy", [dk.Replay(every=3), dk.ForwardDifference(), dk.StoreAll(), dk.Truncated(window=4)],
                         ids=str)
def test_a_prediction_comes_true(world, strategy):
    """Nine inner steps from runs of two and three; seconds within a factor of three in one of three tries, on busy machines."""
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=4, length=12)
    goal = dk.BPTT(task, student, dk.Unroll(9, optimizer=dk.Momentum()), metagrad=strategy, batch_size=24)
    prediction = dk.estimate(start, goal, steps=2)
    weights = sum(p.nbytes for p in (*student.module.parameters(), *student.module.buffers()))
    with LiveBytes() as live:
        dk.meta_gradient(start, goal)
    assert prediction.nbytes == pytest.approx(live.total.peak + weights, rel=0.3)
    ratios = []
    for _ in range(3):
        predicted, begun = dk.estimate(start, goal, steps=2).seconds, time.perf_counter()
        for seed in range(2):
            dk.meta_gradient(start, goal, seed=seed)
        ratios.append(predicted / (time.perf_counter() - begun))
    assert any(1 / 3 < ratio < 3 for ratio in ratios), ratios


def test_recommend_says_what_it_will_cost(world):
    task, student = world
    strategy, reason = dk.recommend(student)
    same, longer = dk.recommend(student, task)
    assert same == strategy and longer.startswith(reason)
    assert "minutes" in longer and "MB of tensors on cpu" in longer and "100 outer steps of 10 inner steps" in longer


def test_longer_runs_cost_more_and_trajectories_are_measured_too(world, tmp_path):
    task, student = world
    experts = dk.record_experts(task, student, tmp_path / "experts", count=1, snapshots_per_epoch=2, batch_size=40)
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    short, long = (dk.estimate(start, dk.TrajectoryMatching(task, student, dk.Unroll(steps), experts, expert_epochs=0.5), 1)
                   for steps in (3, 60))
    assert short.seconds < long.seconds and short.nbytes < long.nbytes


def test_memory_that_runs_out_names_what_to_lower(world):
    """Batches are halved down to single examples first."""
    task, student = world

    def exhausted(problem):
        raise torch.OutOfMemoryError("out of memory")

    goal = dk.BPTT(task, student, dk.Unroll(2), metagrad=exhausted, batch_size=2)
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    with pytest.warns(UserWarning, match="in parts of about 1"), pytest.raises(torch.OutOfMemoryError) as caught:
        dk.meta_gradient(start, goal)
    assert all(name in str(caught.value) for name in ("micro_batch", "length", "max_length", "Replay", "Truncated", "lora"))


def test_a_long_run_begins_with_its_prediction(world, capsys):
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    goal = dk.BPTT(task, student, dk.Unroll(2), batch_size=8)
    announce(start, goal, 5)
    assert capsys.readouterr().err == "", "measuring takes as long as two steps"
    announce(start, goal, 50)
    assert "minutes" in capsys.readouterr().err.splitlines()[-1]
