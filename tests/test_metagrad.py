"""The meta-gradient against its definition, in float64."""

import dataclasses

import pytest
import torch

import distillkit as dk
from distillkit.objectives import inner_problem

OPTIMIZERS = {"sgd": dk.SGD(0.3), "adamw": dk.AdamW(0.01, eps_root=1e-6)}


@pytest.fixture(scope="module")
def world(standin_home):
    """A tiny task, student and set in float64, with labels and step sizes off their symmetric starting values."""
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("rotten_tomatoes", max_length=12)
        students = {
            (name, trainable): dk.load_student(name, task, dtype="float64", trainable=trainable)
            for name in ("bert-base-uncased", "distilbert-base-uncased", "roberta-base")
            for trainable in ("full", "head")
        }
    return task, students


def a_set(task, student, steps, soft=True):
    found = dk.DistilledSet.from_real(task, student, per_class=2, length=8, soft_labels=soft)
    noise = torch.Generator().manual_seed(0)
    found.embeds = found.embeds + 0.1 * torch.randn(found.embeds.shape, generator=noise, dtype=torch.float64)
    if soft:
        found.targets = found.targets.double() + torch.randn(found.targets.shape, generator=noise, dtype=torch.float64)
    found.step_sizes = torch.linspace(0.2, 0.4, steps, dtype=torch.float64)
    return found


def objective(task, student, steps, metagrad, optimizer="sgd", batch_size=None):
    unroll = dk.Unroll(steps, optimizer=OPTIMIZERS[optimizer], metagrad=metagrad, batch_size=batch_size)
    # A small outer batch with several parts: the parts have to add up too.
    return dk.BPTT(task, student, unroll, batch_size=12, micro_batch=5)


def with_value(found, name, value):
    return dataclasses.replace(found, **{name: value})


@pytest.mark.parametrize("name", ["bert-base-uncased", "distilbert-base-uncased", "roberta-base"])
@pytest.mark.parametrize("what", ["embeds", "targets", "step_sizes"])
def test_store_all_is_the_derivative(world, name, what):
    """Central differences of the outer loss itself, at the entries with the largest gradient and some others."""
    task, students = world
    student = students[name, "full"]
    found, goal = a_set(task, student, 3), objective(task, student, 3, dk.StoreAll())
    gradient = getattr(dk.meta_gradient(found, goal, seed=5), what)
    value = getattr(found, what)
    order = gradient.abs().flatten().argsort(descending=True)
    entries = [int(i) for i in (*order[:4], *order[len(order) // 2 :][:2])]
    h = 1e-5
    for entry in entries:
        loss = {}
        for sign in (1, -1):
            moved = value.clone()
            moved.view(-1)[entry] += sign * h
            loss[sign] = dk.meta_gradient(with_value(found, what, moved), goal, seed=5).loss
        difference = (loss[1] - loss[-1]) / (2 * h)
        assert abs(difference - float(gradient.flatten()[entry])) <= 1e-6 * float(gradient.abs().max())


@pytest.mark.parametrize("name", ["bert-base-uncased", "distilbert-base-uncased", "roberta-base"])
@pytest.mark.parametrize("trainable", ["full", "head"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("batch_size", [None, 3])
def test_replay_equals_store_all(world, name, trainable, optimizer, batch_size):
    task, students = world
    student = students[name, trainable]
    found = a_set(task, student, 4)
    if optimizer == "adamw":  # a step of AdamW moves every parameter by the step size
        found.step_sizes = found.step_sizes * 0.02
    got = [
        dk.meta_gradient(found, objective(task, student, 4, m, optimizer, batch_size), seed=1)
        for m in (dk.StoreAll(), dk.Replay())
    ]
    assert got[0].loss == pytest.approx(got[1].loss, abs=1e-12)
    for field in ("embeds", "targets", "step_sizes"):
        ours, oracle = getattr(got[1], field), getattr(got[0], field)
        assert oracle.abs().max() > 0
        assert (ours - oracle).abs().max() <= 1e-10 * max(1.0, float(oracle.abs().max()))


def test_hard_labels_have_no_gradient(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    for metagrad in (dk.StoreAll(), dk.Replay()):
        got = dk.meta_gradient(a_set(task, student, 2, soft=False), objective(task, student, 2, metagrad))
        assert got.targets is None
        assert got.embeds.abs().max() > 0


def test_parts_of_the_outer_batch_add_up(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found = a_set(task, student, 2)
    whole, parts = (
        dk.meta_gradient(found, dk.BPTT(task, student, dk.Unroll(2), batch_size=12, micro_batch=m), seed=3)
        for m in (12, 5)
    )
    assert whole.loss == pytest.approx(parts.loss, abs=1e-12)
    assert (whole.embeds - parts.embeds).abs().max() <= 1e-12


def test_the_module_is_untouched(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    before = {n: p.clone() for n, p in student.module.named_parameters()}
    for metagrad in (dk.StoreAll(), dk.Replay()):
        dk.meta_gradient(a_set(task, student, 2), objective(task, student, 2, metagrad))
    for name, value in student.module.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
        assert not value.requires_grad


@pytest.mark.parametrize("metagrad", [dk.StoreAll(), dk.Replay()])
def test_fused_attention_is_refused(standin_hub, metagrad):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student("bert-base-uncased", task, attention="sdpa")
    found = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    with pytest.raises(ValueError, match="attention='sdpa'.*attention='eager'"):
        dk.meta_gradient(found, objective(task, student, 2, metagrad))


def test_another_models_embeddings_are_refused(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found = a_set(task, student, 2)
    found.embeds = found.embeds[..., :16]
    with pytest.raises(ValueError, match="16 wide.*wants 32"):
        dk.meta_gradient(found, objective(task, student, 2, dk.Replay()))


def test_a_set_bound_to_another_unroll_is_refused(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    with pytest.raises(ValueError, match="carries 2 step sizes but the unroll has 3"):
        inner_problem(a_set(task, student, 2), student, dk.Unroll(3), 0, [])


@pytest.mark.parametrize("field", ["steps", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_unroll_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a whole number"):
        dk.Unroll(**{"steps": 2, field: value})


def test_inner_order_is_a_permutation_per_pass_and_always_the_same():
    unroll = dk.Unroll(6, batch_size=2)
    rows = unroll.rows(6)
    assert sorted(torch.cat(rows[:3]).tolist()) == sorted(torch.cat(rows[3:]).tolist()) == list(range(6))
    assert torch.cat(rows[:3]).tolist() != torch.cat(rows[3:]).tolist()
    assert all(torch.equal(a, b) for a, b in zip(rows, unroll.rows(6), strict=True))
