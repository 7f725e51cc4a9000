"""How often an outer step waits for the device: not once per parameter, and exact strategies not once per inner step."""

import pytest
import torch

import distillkit as dk
from distillkit.evaluation.recipes import as_recipe
from host_reads import HostReads

OUTER_STEP = 19  # reads of an outer step beside those of its strategy: it is checked, recorded and moved to the host
EXACT = (dk.StoreAll(), dk.Replay(), dk.Replay(every=2), dk.Truncated(2))


@pytest.fixture(scope="module")
def world(standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("rotten_tomatoes", max_length=12)
        return task, dk.load_student("bert-base-uncased", task)


def bptt(world, steps, strategy, **unroll):
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=8)
    unroll = dk.Unroll(steps, optimizer=dk.SGD(0.3), **unroll)
    return start, dk.BPTT(task, student, unroll, metagrad=strategy, batch_size=12, micro_batch=5)


def matching(world, steps, strategy, folder, distance="whole"):
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=8)
    experts = dk.record_experts(task, student, folder, epochs=1, batch_size=16)
    unroll = dk.Unroll(steps, optimizer=dk.SGD(0.3))
    return start, dk.TrajectoryMatching(task, student, unroll, experts, metagrad=strategy, distance=distance)


def reads_of(start, objective):
    problem = next(objective.problems(start, 1))
    with HostReads() as reads:
        objective.metagrad(problem)
    return reads.count


def test_what_is_a_read():
    tensor = torch.tensor([1.0, 2.0])
    for read in (lambda: float(tensor[0]), lambda: bool(tensor[0]), tensor.tolist, tensor.cpu, lambda: tensor[tensor > 1],
                 lambda: torch.equal(tensor, tensor), lambda: tensor.sum().item()):
        with HostReads() as reads:
            read()
        assert reads.count == 1
    with HostReads() as reads:
        tensor[torch.tensor([0])] + tensor.sum()
    assert reads.count == 0


@pytest.mark.parametrize("unroll", [{}, {"batch_size": 3, "micro_batch": 2}], ids=["whole", "batches"])
@pytest.mark.parametrize("strategy", EXACT, ids=repr)
def test_exact_strategies_read_the_loss_and_nothing_else(world, strategy, unroll):
    window = isinstance(strategy, dk.Truncated)  # a run of its own, whose lengths are read too
    assert [reads_of(*bptt(world, steps, strategy, **unroll)) for steps in (3, 9)] == [1 + window] * 2


def test_a_difference_is_looked_at_twice(world):
    """The norms that ε follows from, and whether it was right; at the first inner step, the last to be walked, the former."""
    strategy = dk.ForwardDifference(change=0.3)  # so wide that no difference is taken again
    assert [reads_of(*bptt(world, steps, strategy)) for steps in (2, 3, 6)] == [4, 6, 12]


def test_an_outer_step(world):
    counts = []
    for steps in (2, 6):
        run = dk.Distiller(*bptt(world, steps, dk.Replay())).run(2)
        next(run)
        with HostReads() as reads:
            next(run)
        counts.append(reads.count)
        run.close()
    assert counts[0] == counts[1] <= OUTER_STEP


@pytest.mark.parametrize("distance", ["whole", "tensor"])
def test_matching_reads_the_distance_alone(world, tmp_path, distance):
    assert reads_of(*matching(world, 3, dk.Replay(), tmp_path / "experts", distance)) == 1


@pytest.mark.parametrize("recipe", ["standard", dk.Unroll(40, optimizer=dk.SGD(0.1))], ids=["standard", "fixed"])
def test_training_on_a_set(world, recipe):
    task, student = world
    real = dk.DistilledSet.from_real(task, student, per_class=2, length=8)
    plan, start = as_recipe(recipe).plan(real, task, student)(0), student.init(0)
    with HostReads() as reads:
        for _ in plan.train(student, start):
            pass
    # The fused kernel of AdamW takes its step size, which is on the host, as a number, for matrices and for other tensors.
    assert reads.count == len(plan.step_sizes) * 2 * (recipe == "standard")
