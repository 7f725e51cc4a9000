"""The meta-gradient against its definition, in float64."""

import dataclasses
from collections import Counter

import pytest
import torch

import distillkit as dk
from distillkit.core.metagrad import compare, step_contributions
from distillkit.core.problem import inner_problem

OPTIMIZERS = {
    "sgd": dk.SGD(0.3),
    "clipped": dk.SGD(0.3, clip_norm=0.02),
    "momentum": dk.Momentum(0.3, decay=0.8),
    "nesterov": dk.Momentum(0.3, decay=0.8, nesterov=True),
    "adamw": dk.AdamW(0.01, eps_root=1e-6, weight_decay=0.1),
}
FIELDS = ("embeds", "targets", "step_sizes")


@pytest.fixture(scope="module")
def world(standin_home):
    """A tiny task, student and set in float64, with labels and step sizes off their symmetric starting values."""
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("rotten_tomatoes", max_length=12)
        students = {
            (name, trainable): dk.load_student(name, task, dtype="float64", trainable=trainable)
            for name in ("bert-base-uncased", "distilbert-base-uncased", "roberta-base")
            for trainable in ("full", "head", "lora", "top:1")
        }
    return task, students


@pytest.fixture(scope="module")
def questions(standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return dk.load_task("arc_easy", max_length=48)


def a_set(task, student, steps, soft=True):
    found = dk.DistilledSet.from_real(task, student, per_class=2, length=8, soft_labels=soft)
    noise = torch.Generator().manual_seed(0)
    found.embeds = found.embeds + 0.1 * torch.randn(found.embeds.shape, generator=noise, dtype=torch.float64)
    if soft:
        found.targets = found.targets.double() + torch.randn(found.targets.shape, generator=noise, dtype=torch.float64)
    found.step_sizes = torch.linspace(0.2, 0.4, steps, dtype=torch.float64)
    return found


def objective(task, student, steps, metagrad, optimizer="sgd", **unroll):
    unroll = dk.Unroll(steps, optimizer=OPTIMIZERS[optimizer], **unroll)
    # A small outer batch with several parts: the parts have to add up too.
    return dk.BPTT(task, student, unroll, metagrad=metagrad, batch_size=12, micro_batch=5)


def assert_equal(oracle, ours, tolerance):
    assert ours.loss == pytest.approx(oracle.loss, abs=1e-12)
    for field in FIELDS:
        expected = getattr(oracle, field)
        assert expected.abs().max() > 0
        assert (getattr(ours, field) - expected).abs().max() <= tolerance * float(expected.abs().max())


def with_value(found, name, value):
    return dataclasses.replace(found, **{name: value})


@pytest.mark.parametrize(("name", "optimizer"), [
    ("bert-base-uncased", "sgd"), ("distilbert-base-uncased", "sgd"), ("roberta-base", "sgd"),
    *(("bert-base-uncased", optimizer) for optimizer in OPTIMIZERS if optimizer != "sgd"),
])
@pytest.mark.parametrize("what", ["embeds", "targets", "step_sizes"])
def test_store_all_is_the_derivative(world, name, optimizer, what):
    """Central differences of the outer loss itself, at the entries with the largest gradient and some others."""
    task, students = world
    student = students[name, "full"]
    found, goal = a_set(task, student, 3), objective(task, student, 3, dk.StoreAll(), optimizer)
    if optimizer == "adamw":  # a step of AdamW moves every parameter by the step size
        found.step_sizes = found.step_sizes * 0.02
    gradient = getattr(dk.meta_gradient(found, goal, seed=5), what)
    assert gradient.abs().max() > 0
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


@pytest.mark.parametrize(("name", "trainable", "optimizer"), [
    *((name, trainable, "adamw") for name in ("bert-base-uncased", "distilbert-base-uncased", "roberta-base")
      for trainable in ("full", "head", "lora", "top:1")),
    *(("bert-base-uncased", "full", optimizer) for optimizer in OPTIMIZERS if optimizer != "adamw"),
])
@pytest.mark.parametrize("unroll", [{}, {"batch_size": 3, "dropout": True}], ids=["whole", "batches, dropout"])
def test_replay_equals_store_all(world, name, trainable, optimizer, unroll):
    task, students = world
    student = students[name, trainable]
    found = a_set(task, student, 4)
    if optimizer == "adamw":  # a step of AdamW moves every parameter by the step size
        found.step_sizes = found.step_sizes * 0.02
    got = [
        dk.meta_gradient(found, objective(task, student, 4, m, optimizer, **unroll), seed=1)
        for m in (dk.StoreAll(), dk.Replay())
    ]
    assert_equal(*got, 1e-10)


@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "meta-llama/Llama-3.2-1B"])
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_decoders_agree_as_far_as_their_softmax_allows(standin_hub, name, trainable):
    """OPT and Llama take softmax and norms in float32 whatever the model's precision."""
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student(name, task, dtype="float64", trainable=trainable)
    found = a_set(task, student, 3)
    oracle, exact = (dk.meta_gradient(found, objective(task, student, 3, m)) for m in (dk.StoreAll(), dk.Replay()))
    for field in FIELDS:
        expected = getattr(oracle, field)
        assert (getattr(exact, field) - expected).abs().max() <= 1e-5 * float(expected.abs().max())


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
        dk.meta_gradient(found, dataclasses.replace(objective(task, student, 2, dk.Replay()), micro_batch=m), seed=3)
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


def test_inner_order_is_a_permutation_per_pass_and_always_the_same():
    unroll = dk.Unroll(6, batch_size=2)
    rows = unroll.rows(6)
    assert sorted(torch.cat(rows[:3]).tolist()) == sorted(torch.cat(rows[3:]).tolist()) == list(range(6))
    assert torch.cat(rows[:3]).tolist() != torch.cat(rows[3:]).tolist()
    assert all(torch.equal(a, b) for a, b in zip(rows, unroll.rows(6), strict=True))


@pytest.mark.parametrize(
    "metagrad",
    [dk.Replay(every=2), dk.Replay(every=3, host=True), dk.Replay(every=99), dk.Truncated(5), dk.Truncated(9),
     dk.Truncated(5, inner=dk.StoreAll()), dk.Truncated(5, place="random")],
    ids=repr,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ways_to_keep_less_change_nothing(world, metagrad, optimizer):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found = a_set(task, student, 5)
    found.step_sizes = found.step_sizes * (0.02 if optimizer == "adamw" else 1)
    oracle, ours = (
        dk.meta_gradient(found, objective(task, student, 5, m, optimizer, dropout=True), seed=2)
        for m in (dk.Replay(), metagrad)
    )
    assert_equal(oracle, ours, 1e-12)


@pytest.mark.parametrize("metagrad", [dk.StoreAll(), dk.Replay(), dk.ForwardDifference(change=1e-4)], ids=repr)
def test_micro_batches_add_up(world, metagrad):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found = a_set(task, student, 3)
    whole, parts = (
        dk.meta_gradient(found, objective(task, student, 3, metagrad, micro_batch=m), seed=2) for m in (None, 3)
    )
    # A difference of gradients amplifies rounding by 1 / change.
    assert_equal(whole, parts, 1e-6 if isinstance(metagrad, dk.ForwardDifference) else 1e-12)


def test_several_initialisations_are_averaged(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found, goal = a_set(task, student, 2), objective(task, student, 2, dk.Replay())
    singles = [goal.metagrad(goal.problem(found, 4, member)) for member in range(3)]
    mean = dk.meta_gradient(found, dataclasses.replace(goal, inits=3), seed=4)
    assert not torch.equal(singles[0].embeds, singles[1].embeds)
    for field in FIELDS:
        expected = torch.stack([getattr(s, field) for s in singles]).mean(0)
        assert torch.allclose(getattr(mean, field), expected, rtol=1e-12, atol=1e-15)


def test_truncation_leaves_out_the_early_steps(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found = a_set(task, student, 5)
    full = dk.meta_gradient(found, objective(task, student, 5, dk.Replay()))
    last = dk.meta_gradient(found, objective(task, student, 5, dk.Truncated(2)))
    assert last.loss == pytest.approx(full.loss, abs=1e-12)
    assert torch.equal(last.step_sizes[:3], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(last.step_sizes[3:], full.step_sizes[3:], rtol=1e-10)


@pytest.mark.parametrize(("name", "trainable"), [("gpt2", "full"), ("gpt2", "head"), ("bert-base-uncased", "head")])
def test_random_windows_end_everywhere_alike(standin_hub, questions, name, trainable):
    """Also where a student has nothing to draw, and so begins every run alike: a pretrained language model."""
    task = questions if name == "gpt2" else dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student(name, task, trainable=trainable)
    found = dk.DistilledSet.from_real(task, student, fraction=0.1)
    goal = dk.BPTT(task, student, dk.Unroll(5), metagrad=dk.Truncated(2, place="random"), batch_size=2)
    windows = [dk.meta_gradient(found, goal, seed=seed).step_sizes.nonzero().flatten().tolist() for seed in range(60)]
    assert windows[7] == dk.meta_gradient(found, goal, seed=7).step_sizes.nonzero().flatten().tolist()
    counts = Counter(map(tuple, windows))
    assert set(counts) == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert sum((count - 15) ** 2 / 15 for count in counts.values()) < 16.3, "chi squared of 3 degrees, at one in a thousand"
    several = dk.meta_gradient(found, dataclasses.replace(goal, inits=12), seed=0).step_sizes
    assert several.ne(0).sum() > 2, "each of the runs of an outer step has a window of its own"


def test_a_random_window_wants_a_seed(world):
    task, students = world
    student = students["bert-base-uncased", "head"]
    problem = objective(task, student, 5, dk.Replay()).problem(a_set(task, student, 5), 0)
    with pytest.raises(ValueError, match="seed of a Problem"):
        dk.Truncated(2, place="random")(dataclasses.replace(problem, seed=None))


@pytest.mark.parametrize(("central", "tolerance"), [(False, 5e-4), (True, 1e-6)])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_forward_difference_approaches_replay(world, central, tolerance, optimizer):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found = a_set(task, student, 4)
    found.step_sizes = found.step_sizes * (0.02 if optimizer == "adamw" else 1)
    difference = dk.ForwardDifference(central=central, change=1e-4)
    exact, near = (
        dk.meta_gradient(found, objective(task, student, 4, m, optimizer), seed=1) for m in (dk.Replay(), difference)
    )
    assert_equal(exact, near, tolerance)


def test_forward_difference_reports_its_error(world):
    task, students = world
    student = students["bert-base-uncased", "full"]
    goal = objective(task, student, 4, dk.ForwardDifference())
    problem = goal.problem(a_set(task, student, 4), 1)
    rough, fine = (dk.ForwardDifference(change=c).report_error(problem) for c in (0.3, 1e-5))
    assert [r["step"] for r in fine] == [0, 1, 2, 3]
    assert 0 < max(r["error"] for r in fine) < 0.1 * max(r["error"] for r in rough)
    assert min(r["cosine"] for r in fine) > 0.9999
    assert max(r["share"] for r in fine) == 1.0


def test_differences_hold_where_training_has_come_to_rest(standin_hub):
    """There the gradient is next to nothing, and an ε that is a share of it would leave nothing but rounding."""
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student("bert-base-uncased", task)
    found = a_set(task, student, 3)
    found.embeds, found.targets, found.step_sizes = found.embeds.float(), found.targets.float(), torch.full((3,), 0.5)
    problem = objective(task, student, 3, dk.Replay()).problem(found, 1)
    ((_, batch, _, _),) = problem.parts(0)
    problem = dataclasses.replace(problem, targets=student.logits(problem.params, batch).detach())  # nothing left to learn
    _, _, grads, _ = problem.step(0, *problem.start())
    assert max(float(g.norm()) for g in grads.values()) < 1e-5
    report = dk.ForwardDifference().report_error(problem)
    assert min(r["cosine"] for r in report) > 0.99
    rule, least = dk.ForwardDifference().epsilon, pytest.approx(0.03 * 200 * 2**-11.5)
    assert rule(200.0, 1e-5, slope=1.0, unit=2**-23) == (least, least, True)
    assert rule(200.0, 1.0, slope=1.0, unit=2**-23) == (pytest.approx(800 * 2**-23), pytest.approx(0.003), False)


def test_forward_difference_runs_with_fused_attention(standin_hub):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    eager, fused = (dk.load_student("bert-base-uncased", task, dtype="float64", attention=a) for a in ("eager", "sdpa"))
    found = a_set(task, eager, 3)
    exact = dk.meta_gradient(found, objective(task, eager, 3, dk.Replay()))
    near = dk.meta_gradient(found, objective(task, fused, 3, dk.ForwardDifference(central=True, change=1e-4)))
    assert_equal(exact, near, 1e-6)


@pytest.mark.parametrize("metagrad", [dk.StoreAll(), dk.Replay(), dk.ForwardDifference()], ids=repr)
def test_bfloat16_is_refused(standin_hub, metagrad):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student("bert-base-uncased", task, dtype="bfloat16")
    found = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    with pytest.raises(ValueError, match="bfloat16.*dtype='float32'"):
        dk.meta_gradient(found, objective(task, student, 1, metagrad))


def test_a_hundred_steps_of_adamw_stay_finite(world):
    task, students = world
    student = students["bert-base-uncased", "head"]
    found = a_set(task, student, 100)
    found.step_sizes = torch.full((100,), 0.01, dtype=torch.float64)
    got = dk.meta_gradient(found, objective(task, student, 100, dk.Replay(every=10), "adamw"))
    assert all(bool(getattr(got, field).isfinite().all()) for field in FIELDS)
    assert got.embeds.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({}, dk.ForwardDifference, "two gradients"),
        ({"trainable": "lora"}, dk.ForwardDifference, "costs three"),
        ({"trainable": "top:1"}, dk.ForwardDifference, "costs three and a half"),
        ({"trainable": "head"}, dk.Replay, "frozen"),
        ({"dtype": "float64"}, dk.Replay, "exact"),
        ({"trainable": "head", "attention": "sdpa"}, dk.ForwardDifference, "no second derivative"),
    ],
)
def test_recommendation(standin_hub, options, kind, why):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student("bert-base-uncased", task, **options)
    strategy, reason = dk.recommend(student)
    assert isinstance(strategy, kind)
    assert why in reason
    goal = objective(task, student, 2, strategy)
    assert dk.meta_gradient(dk.DistilledSet.from_real(task, student, per_class=1, length=8), goal).embeds.isfinite().all()


def test_recommendation_is_exact_where_there_are_kinks(standin_hub):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    for name, kinks in (("distilbert-base-uncased", True), ("facebook/opt-1.3b", True), ("roberta-base", False)):
        assert isinstance(dk.recommend(dk.load_student(name, task))[0], dk.Replay if kinks else dk.ForwardDifference)


@pytest.mark.parametrize("strategy", [dk.StoreAll(), dk.Replay(), dk.ForwardDifference(), dk.Truncated(2)], ids=repr)
def test_the_contributions_of_the_steps_add_up(world, strategy):
    task, students = world
    student = students["bert-base-uncased", "full"]
    found, goal = a_set(task, student, 4), objective(task, student, 4, strategy, batch_size=3)
    parts, whole = step_contributions(strategy, goal.problem(found, 3)), dk.meta_gradient(found, goal, seed=3).embeds
    assert parts.shape == (4, *whole.shape) and all(part.any() for part in parts[-2:])
    assert (parts.sum(0) - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_the_cosine_of_contributions_does_not_depend_on_their_size():
    direction = torch.tensor([[[3.0, 4.0]]])
    report = compare(torch.stack([direction, 1e-12 * direction]), torch.stack([direction, 2e-12 * direction]))
    assert [step["cosine"] for step in report] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert [step["error"] for step in report] == pytest.approx([0.0, 0.5], abs=1e-6)
    assert [step["share"] for step in report] == pytest.approx([1.0, 2e-12], rel=1e-6)
