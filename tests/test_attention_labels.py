"""Attention labels: their loss, their meta-gradient against its definition, and what carries them along."""

import dataclasses
import math

import pytest
import torch

import distillkit as dk
from benchmarks import attention_labels as benchmark
from distillkit.applications.costs import as_float16, set_bytes
from distillkit.applications.merging import merge, without
from distillkit.core.problem import Problem
from distillkit.core.stacked import meta_gradients, stackable

FIELDS = ("embeds", "targets", "step_sizes", "attention")


@pytest.fixture(scope="module")
def world(standin_home):
    """A tiny task, and encoders for it in float64."""
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("rotten_tomatoes", max_length=12)
        return task, {name: dk.load_student(name, task, dtype="float64")
                      for name in ("bert-base-uncased", "distilbert-base-uncased", "roberta-base")}


def a_set(task, student, seed=0, steps=3):
    """Two examples of each class, the first with hidden positions, and labels away from their start."""
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=8, seed=seed).with_attention(student)
    draw = torch.Generator().manual_seed(seed)
    start.mask[0, 5:] = start.free[0, 5:] = False
    for name in ("embeds", "targets", "attention"):
        value = getattr(start, name).double()
        setattr(start, name, value + 0.5 * torch.randn(value.shape, generator=draw, dtype=torch.float64))
    start.step_sizes = torch.linspace(0.2, 0.4, steps, dtype=torch.float64)
    return start


def an_objective(task, student, metagrad, steps=3, **unroll):
    unroll = dk.Unroll(steps, optimizer=dk.SGD(0.3), **unroll)
    return dk.BPTT(task, student, unroll, metagrad=metagrad, batch_size=12, micro_batch=5)


def assert_equal(expected, gradient, tolerance):
    assert gradient.loss == pytest.approx(expected.loss, abs=1e-12)
    for field in FIELDS:
        exact = getattr(expected, field)
        assert exact.abs().max() > 0
        assert (getattr(gradient, field) - exact).abs().max() <= tolerance * exact.abs().max(), field


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_that_of_the_labels_and_the_divergence(world, weight):
    """By hand, example by example, layer by layer and head by head, over the positions that are there."""
    task, students = world
    student, distilled = students["bert-base-uncased"], a_set(*(task, students["bert-base-uncased"]))
    params, mask = student.init(3), distilled.mask
    attentions = student.module(inputs_embeds=distilled.embeds, attention_mask=mask.long(), output_attentions=True).attentions
    divergences = []
    for example, layer, head in torch.cartesian_prod(*map(torch.arange, distilled.attention.shape[:3])).tolist():
        there = mask[example]
        label = distilled.attention[example, layer, head][there].softmax(0)
        looks = attentions[layer][example, head, 0][there]
        divergences.append(sum(p * math.log(p / q) for p, q in zip(label.tolist(), looks.tolist(), strict=True)))
    batch = {"inputs_embeds": distilled.embeds, "attention_mask": mask}
    plain = float(student.loss(params, batch, distilled.targets))
    weights = torch.full((len(distilled),), weight, dtype=torch.float64)
    labelled = batch | {"attention_labels": distilled.attention, "attention_weight": weights}
    expected = plain + weight * sum(divergences) / len(divergences)
    assert float(student.loss(params, labelled, distilled.targets)) == pytest.approx(expected, rel=1e-6)


def test_labels_of_the_students_own_attention_cost_nothing_at_first(world):
    task, students = world
    student = students["bert-base-uncased"]
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=8).with_attention(student)
    problem, bare = (an_objective(task, student, dk.Replay()).problem(s, 0)
                     for s in (start, dataclasses.replace(start, attention=None)))
    losses = [float(sum(p.loss(p.params, 0, p.phi())).detach()) for p in (problem, bare)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


def test_without_weight_they_change_nothing(world):
    task, students = world
    student = students["bert-base-uncased"]
    labelled = a_set(task, student)
    silent, bare = (dk.meta_gradient(s, an_objective(task, student, dk.Replay(), attention_weight=weight))
                    for s, weight in ((labelled, 0.0), (dataclasses.replace(labelled, attention=None), 1.0)))
    assert bare.attention is None and not silent.attention.any()
    assert torch.allclose(silent.embeds, bare.embeds, rtol=1e-10, atol=1e-14) and silent.loss == pytest.approx(bare.loss)


# --- the meta-gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-base-uncased", "distilbert-base-uncased", "roberta-base"])
@pytest.mark.parametrize("what", ["embeds", "attention"])
def test_store_all_is_the_derivative(world, name, what):
    """Central differences of the outer loss, at the entries with the largest gradient and some others."""
    task, students = world
    student, h = students[name], 1e-4
    # Tiny random models look everywhere alike: a larger weight lifts the gradient above the rounding of the differences.
    distilled, goal = a_set(task, student), an_objective(task, student, dk.StoreAll(), attention_weight=10.0)
    gradient = getattr(dk.meta_gradient(distilled, goal, seed=5), what)
    assert gradient.abs().max() > 0
    order = gradient.abs().flatten().argsort(descending=True)
    for entry in map(int, (*order[:3], *order[len(order) // 2 :][:2])):
        losses = []
        for sign in (1, -1):
            moved = getattr(distilled, what).clone()
            moved.view(-1)[entry] += sign * h
            losses.append(dk.meta_gradient(dataclasses.replace(distilled, **{what: moved}), goal, seed=5).loss)
        difference = (losses[0] - losses[1]) / (2 * h)
        assert abs(difference - float(gradient.flatten()[entry])) <= 1e-6 * float(gradient.abs().max())


@pytest.mark.parametrize(("metagrad", "tolerance"), [
    (dk.Replay(), 1e-10), (dk.Replay(every=2), 1e-10), (dk.Truncated(3), 1e-10), (dk.ForwardDifference(central=True), 1e-3),
], ids=repr)
@pytest.mark.parametrize("unroll", [{}, {"batch_size": 3}, {"micro_batch": 2}], ids=str)
def test_strategies_agree(world, metagrad, tolerance, unroll):
    task, students = world
    student = students["bert-base-uncased"]
    distilled = a_set(task, student)
    exact, gradient = (dk.meta_gradient(distilled, an_objective(task, student, m, **unroll), seed=1)
                       for m in (dk.StoreAll(), metagrad))
    assert_equal(exact, gradient, tolerance)


def test_runs_that_share_their_kernels(world):
    task, students = world
    student, strategy = students["bert-base-uncased"], dk.Replay()
    goal = an_objective(task, student, strategy)
    problems = [goal.problem(a_set(task, student, seed), seed) for seed in (0, 1)]
    problems[0] = dataclasses.replace(problems[0], mask=problems[1].mask)
    assert stackable(problems) and not stackable([problems[0], dataclasses.replace(problems[1], attention=None)])
    for alone, together in zip(map(strategy, problems), meta_gradients(strategy, problems), strict=True):
        assert_equal(alone, together, 1e-8)


def test_hard_labels_may_have_them_too(world):
    task, students = world
    student = students["bert-base-uncased"]
    distilled = a_set(task, student)
    hard = dataclasses.replace(distilled, targets=torch.tensor(distilled.meta["labels"]))
    exact, gradient = (dk.meta_gradient(hard, an_objective(task, student, m)) for m in (dk.StoreAll(), dk.Replay()))
    assert exact.targets is gradient.targets is None
    assert torch.allclose(exact.attention, gradient.attention, rtol=1e-8, atol=1e-14) and exact.attention.any()


def test_halves_of_a_step_take_their_labels_along(world, monkeypatch):
    """Where memory runs out, a step is computed in halves, with the same gradient."""
    task, students = world
    student = students["bert-base-uncased"]
    problem = an_objective(task, student, dk.Replay()).problem(a_set(task, student), 0)
    whole, loss = problem.step(0, *problem.start(), problem.phi()), student.loss

    def small(params, batch, targets, **options):
        if len(targets) > 2:
            raise torch.OutOfMemoryError
        return loss(params, batch, targets, **options)

    monkeypatch.setattr(student, "loss", small)
    with pytest.warns(UserWarning, match="parts of about 2"):
        halved = problem.step(0, *problem.start(), problem.phi())
    for one, other in zip(whole.d_phi.tensors(), halved.d_phi.tensors(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)


# --- learning, scoring, keeping --------------------------------------------------------------------------------------


def test_a_distiller_learns_them_and_goes_on_where_it_stopped(world, tmp_path):
    task, students = world
    student = students["bert-base-uncased"]
    start, goal = a_set(task, student), an_objective(task, student, dk.Replay())

    def distiller(**options):
        return dk.Distiller(start, goal, lr=0.05, attention_lr=0.3, **options)

    whole = distiller()
    assert len([*whole.run(3)]) == 3
    first = distiller(checkpoint=tmp_path / "run")
    next(run := first.run(3))
    run.close()
    again = distiller(checkpoint=tmp_path / "run")
    assert again.step == 1 and len([*again.run(3)]) == 2
    for field in FIELDS:
        assert torch.equal(getattr(whole.distilled, field), getattr(again.distilled, field))
        assert not torch.equal(getattr(whole.distilled, field), getattr(start, field))


@pytest.mark.parametrize("learn", [("attention",), ("embeds", "targets", "step_sizes")])
def test_only_what_is_named_moves(world, learn):
    task, students = world
    student = students["bert-base-uncased"]
    start = a_set(task, student)
    distiller = dk.Distiller(start, an_objective(task, student, dk.Replay()), learn=learn)
    before = distiller.distilled
    [*distiller.run(1)]
    assert {n for n in FIELDS if not torch.equal(getattr(distiller.distilled, n), getattr(before, n))} == {*learn}


def test_a_set_without_them_has_none_to_learn(world):
    task, students = world
    student = students["bert-base-uncased"]
    bare, goal = dataclasses.replace(a_set(task, student), attention=None), an_objective(task, student, dk.Replay())
    distiller = dk.Distiller(bare, goal)
    assert distiller.learn == FIELDS[:3] and {*distiller.rates} == {*FIELDS[:3]} and distiller.distilled.attention is None
    with pytest.raises(ValueError, match="no attention labels to learn: use set.with_attention"):
        dk.Distiller(bare, goal, learn=("attention",))


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_evaluation_trains_with_the_loss_of_distilling(world, weight):
    task, students = world
    student = students["bert-base-uncased"]
    goal = an_objective(task, student, dk.Replay(), attention_weight=weight)
    distiller = dk.Distiller(a_set(task, student), goal)
    [*distiller.run(1)]
    distilled = distiller.distilled
    problem = goal.problem(distilled, 0)
    assert isinstance(problem, Problem) and problem.attention_weight == weight
    expected, _ = problem.trained(3)
    *_, params = dk.Own().plan(distilled, task, student)(0).train(student, problem.params)
    assert all(torch.equal(params[name], expected[name]) for name in params)
    bare = dataclasses.replace(distilled, attention=None)
    *_, others = dk.Own().plan(bare, task, student)(0).train(student, problem.params)
    assert any(not torch.equal(params[name], others[name]) for name in params)


def test_files_costs_and_halves(world, tmp_path):
    task, students = world
    distilled = dataclasses.replace(a_set(task, students["bert-base-uncased"]), tokens=None)
    loaded = dk.DistilledSet.load(distilled.save(tmp_path / "set"))
    assert torch.equal(loaded.attention, distilled.attention)
    bare = dataclasses.replace(distilled, attention=None)
    assert distilled.nbytes - bare.nbytes == distilled.attention.nbytes
    assert set_bytes(distilled, dtype="float16") - set_bytes(bare, dtype="float16") == 2 * distilled.attention.numel()
    assert torch.equal(as_float16(distilled).attention, distilled.attention.half().double())


def test_merged_sets_keep_them(world):
    task, students = world
    one, two = (a_set(task, students["bert-base-uncased"], seed) for seed in (0, 1))
    long = dk.DistilledSet.from_real(task, students["bert-base-uncased"], per_class=1, length=10)
    two = dataclasses.replace(two, meta={**two.meta, "task": "another"})
    both = merge(one, two)
    assert torch.equal(both.attention, torch.cat([one.attention, two.attention]))
    assert torch.equal(without(both, "another").attention, one.attention)
    padded = merge(one, long.with_attention(students["bert-base-uncased"]))
    assert padded.attention.shape[-1] == 10 and torch.equal(padded.attention[:4, ..., :8], one.attention)
    with pytest.raises(ValueError, match="some of the sets have attention labels and some none"):
        merge(one, long)


def test_projection_keeps_positions_and_text_has_none(world):
    task, students = world
    student = students["bert-base-uncased"]
    text = dk.project(a_set(task, student), student)
    assert text.attention is not None
    assert dk.retokenize(text, task, students["roberta-base"]).attention is None


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("bert-base-uncased", {"attention": "sdpa"}), ("gpt2", {})])
def test_students_without_attention_of_a_first_token(standin_hub, name, options):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student(name, task, **options)
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    with pytest.raises(ValueError, match="loaded with attention='eager'"):
        start.with_attention(student)
    eager = dk.load_student("bert-base-uncased", task)
    if name == eager.name:  # labels that come from elsewhere
        labelled = start.with_attention(eager)
        with pytest.raises(ValueError, match="loaded with attention='eager'"):
            dk.meta_gradient(labelled, dk.BPTT(task, student, dk.Unroll(1), batch_size=4))


def test_another_architecture_is_refused(world):
    task, students = world
    student = students["bert-base-uncased"]
    distilled = a_set(task, student)
    fewer = dataclasses.replace(distilled, attention=distilled.attention[:, :1])
    with pytest.raises(ValueError, match=r"labels are for \[1, .*attention=None"):
        dk.evaluate(fewer, task, student, seeds=(0,), recipe="tuned")


@pytest.mark.parametrize("change", [
    lambda t: t[:3], lambda t: t[..., :5], lambda t: t[:, 0], lambda t: t.long(), lambda t: t * math.nan, lambda t: t[:, :0],
])
def test_labels_that_no_set_has(world, tmp_path, change):
    task, students = world
    distilled = a_set(task, students["bert-base-uncased"])
    with pytest.raises(ValueError, match="attention must be"):
        dataclasses.replace(distilled, attention=change(distilled.attention))


def test_a_negative_weight_is_no_weight():
    with pytest.raises(ValueError, match="attention_weight"):
        dk.Unroll(1, attention_weight=-1.0)


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(standin_hub, monkeypatch):
    monkeypatch.setattr(benchmark, "LENGTH", 8)
    task = dk.load_task("rotten_tomatoes", max_length=8)
    return task, dk.load_student("bert-base-uncased", task)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_published_way_trains_as_the_kit_does(tiny, steps):
    """With labels that are probabilities both inner loops are the same, step for step."""
    task, student = tiny
    way = benchmark.Published(task, student, seed=0, total=10, steps=steps, first_size=0.3)
    way.labels.data = torch.randn(2, 2).softmax(-1)
    free = torch.ones(way.embeds.shape[:2], dtype=torch.bool)
    distilled = dk.DistilledSet(way.embeds.detach(), free, free, way.labels.detach().log(), attention=way.attention.detach())
    goal = dk.BPTT(task, student, dk.Unroll(steps, optimizer=dk.SGD(0.3)), metagrad=dk.Replay(), batch_size=4)
    problem = goal.problem(distilled, 0)
    expected, _ = problem.trained(steps)
    for name, value in way.trained_from(way.checkpoint(), 0).items():
        assert name in expected and value.shape == expected[name].shape
    ours = way.trained(problem.params)
    assert all(torch.allclose(ours[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


@pytest.mark.parametrize("way", ["published", "kit"])
def test_both_ways_are_scored_alike(tiny, monkeypatch, way):
    monkeypatch.setattr(benchmark, "SCORED", (1, 2))
    settings = {"total": 3} | ({"batch": 4} if way == "kit" else {"rate": 0.1})
    run = benchmark.timed(way, *tiny, seed=0, set_up=5.0, settings=settings)
    assert [score["step"] for score in run["scores"]] in ([1, 2], [1]) and run["scores"][0]["seconds"] >= 5
    assert {*run["reached"]} == {"0.70", "0.80"}
    assert all(score["accuracy"] >= 0.7 for score in run["scores"] if run["reached"]["0.70"] == score["seconds"])


def test_the_published_way_moves_everything_it_learns(tiny):
    way = benchmark.Published(*tiny, seed=0, total=4, rate=0.1)
    before = way.checkpoint()
    next(way.steps())
    assert not any(torch.equal(old, new) for old, new in zip(before, way.checkpoint(), strict=True))
