"""The outer loop: it learns, only what it may, the same each time, and goes on where it stopped."""

import copy
import hashlib
import math
import subprocess
import sys

import pytest
import torch

import distillkit as dk
from distillkit.core import distiller as distiller_module
from distillkit.core.distiller import LEARNABLE, constant, cosine
from distillkit.core.problem import MetaGradient

VALUES = ("embeds", "targets", "step_sizes")
OTHERS = ("mask", "free", "tokens")


@pytest.fixture
def start(world):
    return dk.DistilledSet.from_real(*world, per_class=1, length=8)


@pytest.fixture
def goal(world):
    return dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)


def finished(distiller, n):
    for _ in distiller.run(n):
        pass
    return distiller


def same(one, other, names=VALUES):
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.fixture
def scripted():
    """Makes objectives whose losses and gradients are given: `script(distilled, step)`."""

    class Scripted:
        def __init__(self, script):
            self.script, self.step = script, 0
            self.unroll = dk.Unroll(2, optimizer=dk.SGD(0.5))

        def problems(self, distilled, seed):
            return iter([distilled])

        def metagrad(self, distilled):
            self.step += 1
            return self.script(distilled, self.step)

        def recipe(self):
            return {"objective": "Scripted"}

    return Scripted


def gradients(distilled, loss=1.0, **given):
    every = {n: torch.ones_like(getattr(distilled, n)) for n in VALUES}
    return MetaGradient(loss, **every | given)


# --- learning --------------------------------------------------------------------------------------------------------


def test_the_loss_falls(world):
    """Two sentences, moved, train a head on MiniLM's features to tell two classes of sentences by their words."""
    task = world[0]
    student = dk.load_student("offline:minilm", task, trainable="head")
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    unroll = dk.Unroll(3, optimizer=dk.SGD(3.0))
    distiller = dk.Distiller(start, dk.BPTT(task, student, unroll, metagrad=dk.Replay(), batch_size=32), lr=0.03)
    losses = [record.loss for record in distiller.run(12)]
    assert losses[0] > 0.65 and max(losses[-3:]) < 0.58, "chance is ln 2 = 0.69"
    pairs = ((start, unroll), (distiller.distilled, "own"))
    before, after = (dk.evaluate(s, task, student, recipe=r) for s, r in pairs)
    assert after.mean > 0.9 > before.mean
    assert [record.step for record in distiller.records] == list(range(1, 13))
    record = distiller.records[-1]
    assert record.terms == {"outer": record.loss} and record.grad_norm > 0 and record.seconds > 0
    assert record.step_sizes == tuple(distiller.distilled.step_sizes.tolist())


@pytest.mark.parametrize("learn", [*LEARNABLE, ("targets", "step_sizes"), LEARNABLE[:3]])
def test_only_what_is_named_moves(world, start, goal, learn):
    learn = (learn,) if isinstance(learn, str) else learn
    start = start.with_attention(world[1]) if "attention" in learn else start
    found = finished(dk.Distiller(start, goal, learn=learn, lr=0.1), 2).distilled
    initial = dk.Distiller(start, goal, learn=learn).distilled
    names = LEARNABLE if "attention" in learn else VALUES
    assert {n for n in names if not same(found, initial, [n])} == set(learn)
    assert (found.tokens is None) == ("embeds" in learn)
    assert ("text" in found.meta) == ("embeds" not in learn)


def test_fixed_positions_never_move(world, goal):
    start = dk.DistilledSet.from_real(*world, per_class=2, length=8)
    start.free[:, 3:5] = False
    start.free[1] = False
    found = finished(dk.Distiller(start, goal, lr=1.0, schedule=constant), 3).distilled
    moved = (found.embeds != start.embeds).any(-1)
    assert torch.equal(moved, start.free)


@pytest.mark.parametrize("sign", [1, -1])
def test_step_sizes_stay_positive(start, scripted, monkeypatch, sign):
    monkeypatch.setattr(distiller_module, "RUNAWAY", math.inf)
    goal = scripted(lambda d, step: gradients(d, step_sizes=torch.full((2,), float(sign))))
    distiller = finished(dk.Distiller(start, goal, step_size_lr=1e4, schedule=constant), 3)
    sizes = distiller.distilled.step_sizes
    assert (sizes > 0).all() and sizes.isfinite().all()
    assert (sizes < 0.5).all() if sign > 0 else (sizes > 0.5).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_step_sizes_that_run_away_are_caught(start, scripted, sign):
    goal = scripted(lambda d, step: gradients(d, step_sizes=torch.full((2,), float(sign))))
    distiller = dk.Distiller(start, goal, step_size_lr=2.0 if sign > 0 else 2e3, schedule=constant)
    with pytest.raises(FloatingPointError, match=r"outer step \d: the step sizes have run from .* cannot follow"):
        finished(distiller, 9)
    assert (distiller.step >= 3) == (sign > 0), "a little at a time, or at once"


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.5, 30.0, 1e4])
def test_step_sizes_start_where_they_were(start, goal, size):
    start.step_sizes = torch.full((2,), size)
    assert dk.Distiller(start, goal).distilled.step_sizes.tolist() == pytest.approx([size] * 2, rel=1e-5)
    start.step_sizes = None
    assert dk.Distiller(start, goal).distilled.step_sizes.tolist() == pytest.approx([0.5] * 2, rel=1e-6)


def test_rates_and_schedule(start, scripted):
    """Adam's first step is the learning rate whatever the gradient, here times the schedule's 1 at the start."""
    rates = {"lr": 0.01, "label_lr": 0.3, "step_size_lr": 0.2}
    found = finished(dk.Distiller(start, scripted(lambda d, _: gradients(d)), **rates), 1).distilled
    assert (start.embeds - found.embeds)[start.free].flatten().tolist() == pytest.approx([0.01] * 12 * 32, rel=1e-3)
    assert (start.targets - found.targets).flatten().tolist() == pytest.approx([0.3] * 4, rel=1e-3)
    raw = torch.log(torch.expm1(found.step_sizes))
    assert raw.tolist() == pytest.approx([torch.log(torch.expm1(torch.tensor(0.5))).item() - 0.2] * 2, rel=1e-3)
    assert [cosine(p) for p in (0, 0.5, 1, 2)] == pytest.approx([1, 0.51, 0.02, 0.02])
    default = dk.Distiller(start, scripted(gradients), lr=0.01).rates
    assert default == pytest.approx({"embeds": 0.01, "targets": 0.05, "step_sizes": 0.02})


@pytest.mark.parametrize("size", [0.1, 1.0, 50.0, 1e4])
def test_a_meta_gradient_far_above_the_usual_ones_is_scaled_down(start, scripted, size):
    """All of it by one factor, to twice the median norm of the last ones; smaller ones stay as they are."""

    def script(unusual):
        def gradient(distilled, step):
            factor = unusual if step == 4 else 1.0
            return gradients(distilled, **{n: factor * torch.ones_like(getattr(distilled, n)) for n in VALUES})
        return scripted(gradient)

    clipped = finished(dk.Distiller(start, script(size), clip=2), 6)
    expected = finished(dk.Distiller(start, script(min(size, 2.0))), 6).distilled
    assert all(torch.allclose(getattr(clipped.distilled, n), getattr(expected, n), rtol=1e-5) for n in VALUES)
    norms = [record.grad_norm for record in clipped.records]
    assert norms[3] == pytest.approx(size * norms[0]), "the record says what it was before"


# --- repeating -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, hashlib, distillkit as dk
task = dk.load_task("rotten_tomatoes", max_length=12)
student = dk.load_student("bert-base-uncased", task)
start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
distiller = dk.Distiller(start, goal, seed=3)
print("losses", *[f"{record.loss:.4f}" for record in distiller.run(3)])
print(hashlib.sha256(distiller.distilled.save(sys.argv[1]).read_bytes()).hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_in_two_processes(standin_home, tmp_path):
    import standin_hub

    env = standin_hub.environment(standin_home) | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name)], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, env=env | {"PYTHONHASHSEED": str(number)})
        for number, name in enumerate("ab")
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1]
    assert outputs[0][0] == outputs[1][0] and outputs[0][0].startswith("losses 0.")


def test_another_seed_gives_another_set(start, goal):
    sets = [finished(dk.Distiller(start, goal, seed=s), 1).distilled for s in (0, 0, 1)]
    assert same(sets[0], sets[1])
    assert not same(sets[0], sets[2], ["embeds"])


def test_stop_early_and_go_on(start, goal):
    whole = finished(dk.Distiller(start, goal), 5)
    distiller = dk.Distiller(start, goal)
    for record in distiller.run(5):
        if record.step == 2:
            break
    assert distiller.step == 2
    assert [record.step for record in distiller.run(5)] == [3, 4, 5]
    assert list(distiller.run(5)) == [] and list(distiller.run(4)) == []
    assert same(distiller.distilled, whole.distilled)
    assert [r.loss for r in distiller.records] == [r.loss for r in whole.records]


def test_no_steps(start, goal):
    distiller = dk.Distiller(start, goal)
    assert list(distiller.run(0)) == [] and distiller.step == 0
    assert same(distiller.distilled, start, ["embeds", "targets", *OTHERS])
    assert distiller.distilled.meta["text"] == start.meta["text"]


@pytest.mark.parametrize(("every", "clip"), [(1, None), (2, None), (2, 0.9)])
def test_a_resumed_run_is_bit_equal(start, goal, tmp_path, every, clip):
    whole = finished(dk.Distiller(start, goal, seed=4, clip=clip), 5)
    interrupted = dk.Distiller(start, goal, seed=4, clip=clip, checkpoint=tmp_path / "run", checkpoint_every=every)
    for record in interrupted.run(5):
        if record.step == 3:
            break
    resumed = dk.Distiller(start, goal, seed=4, clip=clip, checkpoint=tmp_path / "run", checkpoint_every=every)
    assert resumed.step == 3, "a run that is left saves its last step"
    assert resumed.records == interrupted.records
    finished(resumed, 5)
    assert same(resumed.distilled, whole.distilled)
    assert resumed.distilled.meta == whole.distilled.meta
    again = dk.Distiller(start, goal, seed=4, clip=clip, checkpoint=tmp_path / "run")
    assert again.step == 5 and list(again.run(5)) == []
    assert same(again.distilled, whole.distilled)


def test_more_steps_than_first_asked_for(start, goal, tmp_path):
    """Without a decay that depends on n, three steps and three more are six."""
    settings = {"schedule": constant, "checkpoint": tmp_path / "run"}
    finished(dk.Distiller(start, goal, **settings), 3)
    resumed = finished(dk.Distiller(start, goal, **settings), 6)
    assert [record.step for record in resumed.records] == [1, 2, 3, 4, 5, 6]
    assert same(resumed.distilled, finished(dk.Distiller(start, goal, schedule=constant), 6).distilled)


@pytest.mark.parametrize(("name", "change"), [
    ("rates", {"lr": 0.5}),
    ("rates", {"step_size_lr": 0.5}),
    ("learn", {"learn": ("embeds",)}),
    ("schedule", {"schedule": constant}),
    ("seed", {"seed": 9}),
    ("clip", {"clip": 2.0}),
    ("objective", {"unroll": dk.Unroll(2, optimizer=dk.SGD(0.4))}),
    ("objective", {"batch_size": 9}),
    ("start", {"per_class": 2}),
    ("start", {"another": True}),
])
def test_resuming_with_other_settings_names_them(world, start, goal, tmp_path, name, change):
    finished(dk.Distiller(start, goal, checkpoint=tmp_path / "run"), 1)
    if set(change) & {"unroll", "batch_size"}:
        goal = dk.BPTT(*world, change.pop("unroll", goal.unroll), metagrad=dk.Replay(), batch_size=change.pop("batch_size", 8))
    if change.pop("another", False):
        start = dk.DistilledSet.from_real(*world, per_class=1, length=8, seed=1)
    if "per_class" in change:
        start = dk.DistilledSet.from_real(*world, length=8, **change)
        change = {}
    with pytest.raises(ValueError, match=rf"{tmp_path / 'run'} holds a run with other settings: {name}\S* is "):
        dk.Distiller(start, goal, checkpoint=tmp_path / "run", **change)


def test_a_foreign_file_is_no_checkpoint(start, goal, tmp_path):
    start.save(tmp_path / "set")
    with pytest.raises(dk.StorageError, match="holds 'distilled-set', not 'distiller-checkpoint'"):
        dk.Distiller(start, goal, checkpoint=tmp_path / "set")


def test_a_checkpoint_between_its_times(start, goal, tmp_path):
    distiller = dk.Distiller(start, goal, checkpoint=tmp_path / "run")
    records = distiller.run(9)
    next(records)
    assert not (tmp_path / "run").exists()
    distiller.checkpoint.save(distiller)
    assert dk.Distiller(start, goal, checkpoint=tmp_path / "run").step == 1


# --- what belongs to whom --------------------------------------------------------------------------------------------


def test_distillers_share_no_memory(start, goal):
    """Whatever is done in place to one set, the others stay as they are."""
    before = copy.deepcopy(start)
    one, other = dk.Distiller(start, goal), dk.Distiller(start, goal)
    for _ in range(2):
        for name in (*VALUES, *OTHERS):
            if getattr(one.distilled, name) is not None:
                getattr(one.distilled, name).zero_()
        one.distilled.meta["classes"].clear()
        finished(one, 1)
    assert same(start, before, ["embeds", "targets", *OTHERS]) and start.meta == before.meta
    assert same(other.distilled, before, ["embeds", "targets", *OTHERS])
    assert one.distilled.mask.any() and one.distilled.meta["classes"] == ["neg", "pos"]
    for name in ("embeds", "mask", "free", "tokens"):
        getattr(start, name).zero_()
    assert same(other.distilled, before, ["embeds", "targets", *OTHERS])
    finished(other, 1)
    assert same(other.distilled, one.distilled)


def test_the_recipe_travels_with_the_set(start, goal, tmp_path):
    distiller = finished(dk.Distiller(start, goal, seed=7, lr=0.03), 2)
    recipe = dk.DistilledSet.load(distiller.distilled.save(tmp_path / "set")).meta["recipe"]
    assert recipe["steps"] == 2 and (recipe["optimizer"]["name"], recipe["optimizer"]["step_size"]) == ("SGD", 0.5)
    assert recipe["student"] == "bert-base-uncased" and recipe["objective"] == "BPTT" and recipe["outer_steps"] == 2
    assert recipe["distiller"]["seed"] == 7 and recipe["distiller"]["rates"]["embeds"] == 0.03
    assert "recipe" not in start.meta


def test_normalized_gradients_count_alike(start, scripted):
    """The scale of a step's gradients does not matter, and a gradient of 0 moves nothing."""
    scales = {1: 1.0, 2: 1e5, 3: 1e-4, 4: 10.0}

    def run(scales, step_sizes=1.0, **options):
        def script(distilled, step):
            embeds = torch.randn(distilled.embeds.shape, generator=torch.Generator().manual_seed(step))
            return gradients(distilled, embeds=scales[step] * embeds, step_sizes=torch.full((2,), step_sizes))
        return finished(dk.Distiller(start, scripted(script), schedule=constant, **options), 4)

    plain, scaled = run(dict.fromkeys(scales, 1.0), normalize=True).distilled, run(scales, normalize=True).distilled
    assert torch.allclose(plain.embeds, scaled.embeds, atol=1e-5)
    moved, apart = plain.embeds - start.embeds, run(scales).distilled.embeds - plain.embeds
    assert apart[start.free].abs().mean() > 0.1 * moved[start.free].abs().mean(), "unscaled ones do not count alike"
    still = run(scales, step_sizes=0.0, normalize=True)
    assert still.distilled.step_sizes.tolist() == pytest.approx([0.5, 0.5])
    assert still.records[1].grad_norm > 1e4, "records say the norm before scaling"


def test_seed_streams_are_disjoint(world, start, goal, monkeypatch):
    """No initialisation that is scored was tuned or distilled on."""
    task, student = world
    drawn = []
    init = dk.Student.init
    monkeypatch.setattr(dk.Student, "init", lambda self, seed, **kw: drawn.append(seed) or init(self, seed, **kw))

    def seeds(what, *args, **kwargs):
        drawn.clear()
        result = what(*args, **kwargs)
        return result, set(drawn)

    tuned = dk.Tuned({"step_size": (1e-3,), "steps": (1, 2)})
    runs = [seeds(finished, dk.Distiller(start, goal, seed=s), 4) for s in (0, 1, 2)]
    distilling = set().union(*(found for _, found in runs))
    _, tuning = seeds(tuned.plan, start, task, student)
    _, evaluating = seeds(dk.evaluate, runs[0][0].distilled, task, student, seeds=range(5))
    assert [len(s) for s in (distilling, tuning, evaluating)] == [12, 2, 5]
    assert len(distilling | tuning | evaluating) == 12 + 2 + 5


# --- bad input and bad luck ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"loss": float("nan")}, {"loss": float("inf")},
                                   *({n: float("nan")} for n in VALUES)])
def test_a_loss_that_is_not_finite_stops_the_run(start, scripted, tmp_path, given):
    def script(distilled, step):
        bad = {n: v if n == "loss" else torch.full_like(getattr(distilled, n), v) for n, v in given.items()}
        return gradients(distilled, **(bad if step == 3 else {}))

    distiller = dk.Distiller(start, scripted(script), schedule=constant, checkpoint=tmp_path / "run", checkpoint_every=1)
    records = distiller.run(5)
    next(records), next(records)
    good = distiller.distilled
    with pytest.raises(FloatingPointError, match="outer step 3: loss .* gradient norm .* step sizes .* lower lr"):
        next(records)
    again = dk.Distiller(start, scripted(script), schedule=constant, checkpoint=tmp_path / "run")
    assert distiller.step == again.step == 2 and same(distiller.distilled, good) and same(again.distilled, good)
    assert all(getattr(good, n).isfinite().all() for n in VALUES)


def test_a_real_run_that_explodes(world, start):
    goal = dk.BPTT(*world, dk.Unroll(4, optimizer=dk.SGD(1e20)), metagrad=dk.Replay(), batch_size=4)
    with pytest.raises(FloatingPointError, match="outer step 1"):
        finished(dk.Distiller(start, goal), 2)


def test_hard_labels_cannot_be_learned(world, goal):
    hard = dk.DistilledSet.from_real(*world, per_class=1, length=8, soft_labels=False)
    with pytest.raises(ValueError, match="hard targets cannot be learned: use set.soften()"):
        dk.Distiller(hard, goal, learn=("embeds", "targets"))
    found = finished(dk.Distiller(hard, goal), 1).distilled
    assert found.meta["recipe"]["distiller"]["learn"] == ["embeds", "step_sizes"], "the default leaves them out"
    assert torch.equal(found.targets, hard.targets) and not same(found, hard, ["embeds"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"lr": -0.1}, r"learning rate of embeds must be a number in \[0, inf\), not -0.1"),
    ({"lr": float("nan")}, "learning rate of embeds .* not nan"),
    ({"label_lr": float("inf")}, "learning rate of targets .* not inf"),
    ({"step_size_lr": -1.0}, "learning rate of step_sizes .* not -1.0"),
    ({"learn": ()}, r"learn must name some of embeds, targets, step_sizes, attention, not \(\)"),
    ({"learn": ("labels",)}, r"not \('labels',\)"),
    ({"clip": 0}, r"clip must be a number in \(0, inf\), not 0"),
    ({"checkpoint_every": 0}, "checkpoint_every must be a whole number of at least 1, not 0"),
])
def test_bad_settings_are_named(start, goal, settings, message):
    with pytest.raises(ValueError, match=message):
        dk.Distiller(start, goal, **settings)


@pytest.mark.parametrize("n", [-1, 2.0, None, "3"])
def test_bad_numbers_of_steps_are_named(start, goal, n):
    with pytest.raises(ValueError, match=f"n must be a whole number of at least 0, not {n!r}"):
        next(dk.Distiller(start, goal).run(n))


def test_another_number_of_steps_than_the_set_has(start, goal):
    start.step_sizes = torch.ones(3)
    with pytest.raises(ValueError, match="carries 3 step sizes but the unroll has 2 steps"):
        dk.Distiller(start, goal)


def test_the_module_is_untouched(world, start, goal):
    student = world[1]

    def digest():
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in student.module.state_dict().values())).hexdigest()

    before = digest()
    finished(dk.Distiller(start, goal), 2)
    assert digest() == before
    assert not any(m.training for m in student.module.modules())
