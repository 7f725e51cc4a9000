"""Runs that share their kernels against the same runs alone, in float64."""

import dataclasses

import pytest
import torch

import distillkit as dk
from distillkit.core.distiller import distil_together
from distillkit.core.stacked import meta_gradients, stack, stackable

OPTIMIZERS = (dk.SGD(0.3), dk.SGD(0.3, clip_norm=0.02), dk.Momentum(0.2), dk.AdamW(0.01, eps_root=1e-6, weight_decay=0.1))
FIELDS = ("embeds", "targets", "step_sizes")


@pytest.fixture(scope="module")
def world(standin_home):
    """A classification task and a function that loads a student for it, or for a task of questions, in float64."""
    import standin_hub

    with standin_hub.patched(standin_home):
        sentences, questions = dk.load_task("rotten_tomatoes", max_length=12), dk.load_task("arc_easy", max_length=48)
        kinds = {name: dk.load_student(name, sentences, dtype="float64", trainable=trainable)
                 for name, trainable in (("bert-base-uncased", "full"), ("roberta-base", "lora"), ("gpt2", "head"))}
        kinds["asked"] = dk.load_student("gpt2", questions, dtype="float64")
        return sentences, questions, kinds


def a_set(task, student, seed, soft=True):
    size = {"per_class": 2, "soft_labels": soft} if task.classes else {"fraction": 0.1}
    start = dk.DistilledSet.from_real(task, student, length=8, seed=seed, **size)
    noise = torch.Generator().manual_seed(seed)
    start.embeds = start.embeds + 0.1 * torch.randn(start.embeds.shape, generator=noise, dtype=torch.float64)
    return start


def an_objective(task, student, strategy, optimizer=OPTIMIZERS[0], **unroll):
    return dk.BPTT(task, student, dk.Unroll(3, optimizer=optimizer, **unroll), metagrad=strategy, batch_size=10, micro_batch=4)


def problems_of(task, student, strategy=None, members=3, soft=True, **options):
    objective = an_objective(task, student, strategy, **options)
    return [objective.problem(a_set(task, student, member, soft), 7 + member) for member in range(members)]


def assert_same(together, alone, tolerance):
    for joint, single in zip(together, alone, strict=True):
        assert joint.loss == pytest.approx(single.loss, rel=1e-9)
        for field in FIELDS:
            ours, expected = getattr(joint, field), getattr(single, field)
            if expected is not None:
                assert expected.abs().max() > 0
                assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("strategy", [dk.StoreAll(), dk.Replay(), dk.Replay(every=2), dk.Truncated(2)], ids=repr)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_exact_meta_gradients(world, strategy, optimizer):
    task, _, students = world
    problems = problems_of(task, students["bert-base-uncased"], optimizer=optimizer)
    assert stackable(problems)
    assert_same(meta_gradients(strategy, problems), [strategy(problem) for problem in problems], 1e-8)


@pytest.mark.parametrize("name", ["roberta-base", "gpt2", "asked"])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_other_students(world, name, soft):
    sentences, questions, students = world
    problems = problems_of(questions if name == "asked" else sentences, students[name], soft=soft)
    assert stackable(problems)
    # Decoders take their softmax in float32.
    tolerance = 1e-8 if name == "roberta-base" else 1e-4
    assert_same(meta_gradients(dk.Replay(), problems), [dk.Replay()(problem) for problem in problems], tolerance)


def test_differences_are_as_good_as_alone(world):
    task, _, students = world
    problems = problems_of(task, students["bert-base-uncased"])
    assert_same(meta_gradients(dk.ForwardDifference(), problems), [dk.Replay()(problem) for problem in problems], 2e-2)


def test_batches_of_a_set(world):
    task, _, students = world
    problems = problems_of(task, students["bert-base-uncased"], batch_size=3)
    assert stackable(problems)
    assert_same(meta_gradients(dk.Replay(), problems), [dk.Replay()(problem) for problem in problems], 1e-8)


@pytest.mark.parametrize("change", [{"micro_batch": 2}, {"dropout": True}, {"optimizer": dk.SGD(0.2)}], ids=repr)
def test_what_cannot_be_stacked_is_computed_alone(world, change):
    task, _, students = world
    student, strategy = students["bert-base-uncased"], dk.Replay()
    problems = problems_of(task, student, members=1) + problems_of(task, student, members=1, **change)
    assert not stackable(problems)
    alone = [strategy(problem) for problem in problems]
    for joint, single in zip(meta_gradients(strategy, problems), alone, strict=True):
        assert torch.equal(joint.embeds, single.embeds)


def test_a_stacked_run_is_one_call_of_the_model_per_step(world):
    task, _, students = world
    problem, calls = stack(problems_of(task, students["bert-base-uncased"], members=5)), []
    handle = students["bert-base-uncased"].module.register_forward_hook(lambda *_: calls.append(1))
    params, _ = problem.trained(3)
    handle.remove()
    assert len(calls) == 3 and all(len(value) == 5 for value in params.values())


def test_initialisations_of_one_set(world):
    task, _, students = world
    student = students["bert-base-uncased"]
    objective = dataclasses.replace(an_objective(task, student, dk.Replay()), inits=3)
    start = a_set(task, student, 0)
    alone, calls = dk.meta_gradient(start, objective, seed=4), []
    handle = student.module.register_forward_hook(lambda *_: calls.append(1))
    together = dk.meta_gradient(start, dataclasses.replace(objective, stacked=True), seed=4)
    handle.remove()
    assert_same([together], [alone], 1e-8)
    assert len(calls) == 2 * 3 + 3  # inner steps there and back, parts of the real batch


def a_distiller(task, student, seed, checkpoint=None):
    objective = an_objective(task, student, dk.Replay())
    return dk.Distiller(a_set(task, student, seed), objective, lr=0.05, seed=seed, checkpoint=checkpoint)


def test_sets_learned_together_are_those_learned_alone(world, tmp_path):
    task, _, students = world
    student, seeds = students["bert-base-uncased"], (3, 4)
    alone = [a_distiller(task, student, seed) for seed in seeds]
    for distiller in alone:
        losses = [record.loss for record in distiller.run(6)]
        assert len(set(losses)) == 6
    first = [a_distiller(task, student, seed, tmp_path / f"{seed}") for seed in seeds]
    for rounds, records in enumerate(distil_together(first, 6), start=1):
        assert len(records) == 2
        if rounds == 2:
            break  # an interrupted run
    ahead = a_distiller(task, student, seeds[0], tmp_path / f"{seeds[0]}")
    assert ahead.step == 2
    for record in ahead.run(6):  # one of the two goes on alone for a step
        if record.step == 3:
            break
    together = [a_distiller(task, student, seed, tmp_path / f"{seed}") for seed in seeds]
    assert [distiller.step for distiller in together] == [3, 2]
    assert [len(records) for records in distil_together(together, 6)] == [2, 2, 2, 1]
    for one, other in zip(together, alone, strict=True):
        assert (one.distilled.embeds - other.distilled.embeds).abs().max() < 1e-8
        assert [r.loss for r in one.records] == pytest.approx([r.loss for r in other.records], rel=1e-8)
    assert not torch.allclose(together[0].distilled.embeds, together[1].distilled.embeds)


def test_all_initialisations_of_each_set_count(world):
    task, _, students = world
    student, strategy = students["bert-base-uncased"], dk.Replay()
    objective = dataclasses.replace(an_objective(task, student, strategy), inits=3)
    alone, together = ([dk.Distiller(a_set(task, student, seed), objective, lr=0.05, seed=seed) for seed in (3, 4)]
                       for _ in range(2))
    for distiller in alone:
        list(distiller.run(2))
    assert len(list(distil_together(together, 2))) == 2
    for one, other in zip(together, alone, strict=True):
        assert (one.distilled.embeds - other.distilled.embeds).abs().max() < 1e-8
        assert [r.loss for r in one.records] == pytest.approx([r.loss for r in other.records], rel=1e-8)


def test_where_memory_runs_out_each_set_is_computed_alone(world, monkeypatch):
    task, _, students = world
    student = students["bert-base-uncased"]
    monkeypatch.setattr("distillkit.core.stacked.stack", lambda problems: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    together = [a_distiller(task, student, seed) for seed in (3, 4)]
    assert len(list(distil_together(together, 2))) == 2
    alone = a_distiller(task, student, 3)
    list(alone.run(2))
    assert torch.equal(together[0].distilled.embeds, alone.distilled.embeds)


def test_strategies_must_agree(world):
    task, _, students = world
    one, other = (a_distiller(task, students["bert-base-uncased"], seed) for seed in (0, 1))
    other.objective = dataclasses.replace(other.objective, metagrad=dk.StoreAll())
    with pytest.raises(ValueError, match="metagrad"):
        next(distil_together([one, other], 1))
