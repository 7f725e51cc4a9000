"""Honest scores: the recipe is the one named, trained as by hand, tuned on validation, judged on fresh seeds."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.evaluation import recipes
from distillkit.evaluation.evaluate import flop_counter
from distillkit.evaluation.recipes import as_recipe, warm_up_and_decay
from distillkit.evaluation.scoring import classified
from distillkit.io.seeds import derive_seed

STANDARD, TUNED = dk.Standard(least_steps=4), dk.Tuned({"step_size": (1e-3, 1e-2), "steps": (1, 3)})  # a few steps


@pytest.fixture(scope="module")
def tiny(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return dk.load_student("bert-base-uncased", task, dtype="float64")


@pytest.fixture(scope="module")
def minilm(task):
    """A student that learns something from a sentence of each class, so that its scores differ."""
    return dk.load_student("offline:minilm", task, trainable="head")


def a_set(task, student, per_class=4, steps=5, batch_size=3, optimizer=None):
    """A set with a recipe, every label and every step size another."""
    found = dk.DistilledSet.from_real(task, student, per_class=per_class, length=8)
    noise = torch.randn(found.targets.shape, generator=torch.Generator().manual_seed(0))
    unroll = dk.Unroll(steps, optimizer=optimizer or dk.SGD(0.5), batch_size=batch_size)
    meta = found.meta | {"recipe": dk.BPTT(task, student, unroll, metagrad=dk.Replay(), batch_size=8).recipe()}
    sizes = torch.linspace(0.2, 0.6, steps)
    return dataclasses.replace(found, targets=found.targets + noise, step_sizes=sizes, meta=meta), unroll


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["own", "unroll"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_score_is_that_of_training_by_hand(task, tiny, recipe, batch_size):
    """Stochastic gradient descent in ten lines of plain autograd: the same logits on every row of the test split."""
    found, unroll = a_set(task, tiny, batch_size=batch_size)
    params = tiny.init(derive_seed("evaluate-init", 7))
    for t, rows in enumerate(unroll.rows(len(found))):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        batch = {"inputs_embeds": found.embeds[rows], "attention_mask": found.mask[rows]}
        log_p = tiny.logits(leaves, batch).log_softmax(-1)
        loss = -(found.targets[rows].double().softmax(-1) * log_p).sum(-1).mean()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        size = float(found.step_sizes[t]) if recipe == "own" else 0.5
        params = {n: p.detach() - size * g for (n, p), g in zip(leaves.items(), grads)}
    plan = as_recipe(recipe if recipe == "own" else unroll).plan(found, task, tiny)(7)
    *_, ours = plan.train(tiny, tiny.init(derive_seed("evaluate-init", 7)))
    everything = task.batch(tiny.tokenizer, "test", range(len(task.test)))
    assert max(float((ours[n] - p).abs().max()) for n, p in params.items()) <= 1e-12
    right = tiny.logits(params, everything).argmax(-1) == everything["labels"]
    got = dk.evaluate(found, task, tiny, seeds=(7,), recipe=recipe if recipe == "own" else unroll)
    assert got.scores == (right.double().mean().item(),)
    by_class = [right[everything["labels"] == label].double().mean().item() for label in (0, 1)]
    assert got.groups == dict(zip(["neg", "pos"], by_class))


def test_distilling_and_evaluating_see_the_same_batches(task, tiny, monkeypatch):
    found, unroll = a_set(task, tiny)
    seen, loss = [], dk.Student.loss

    def record(self, params, batch, targets, **kwargs):
        if "inputs_embeds" in batch:
            seen.append(targets.detach().clone())
        return loss(self, params, batch, targets, **kwargs)

    monkeypatch.setattr(dk.Student, "loss", record)
    dk.meta_gradient(found, dk.BPTT(task, tiny, unroll, metagrad=dk.Replay(), batch_size=4))
    distilling = seen[:5]
    seen.clear()
    dk.evaluate(found, task, tiny, seeds=(0,), recipe="own")
    training = seen[:5]  # then come the steps whose operations are counted
    assert [len(t) for t in training] == [3, 3, 2, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(distilling, training, strict=True))


def test_the_recipe_is_the_one_reported(task, tiny):
    found, unroll = a_set(task, tiny)
    bare = dataclasses.replace(found, step_sizes=None, meta={k: v for k, v in found.meta.items() if k != "recipe"})
    own = dk.evaluate(found, task, tiny, seeds=(0,)).recipe
    assert own["name"] == "own" and own["steps"] == 5 and own["batch_size"] == 3 and own["optimizer"]["name"] == "SGD"
    assert own["step_sizes"] == pytest.approx(found.step_sizes.tolist())
    assert dk.evaluate(bare, task, tiny, seeds=(0,)).recipe["name"] == "tuned"
    with pytest.warns(UserWarning, match="step sizes and no stored recipe"):
        sized = dataclasses.replace(bare, step_sizes=torch.tensor([0.1]))
        assert dk.evaluate(sized, task, tiny, seeds=(0,)).recipe["name"] == "tuned"
    assert dk.evaluate(found, task, tiny, seeds=(0,), recipe=unroll).recipe == {"name": "unroll", **unroll.recipe()}
    standard = dk.evaluate(found, task, tiny, seeds=(0,), recipe=STANDARD).recipe
    assert (standard["name"], standard["steps"], standard["optimizer"]["step_size"]) == ("standard", 4, 5e-5)
    assert dk.evaluate(None, task, tiny, seeds=(0,), recipe=STANDARD).recipe["steps"] == 3 * 3


def test_an_unroll_ignores_learned_step_sizes(task, minilm):
    found, _ = a_set(task, minilm, optimizer=dk.SGD(3.0))
    unroll = dk.Unroll(4, optimizer=dk.SGD(2.0))
    sets = (found, dataclasses.replace(found, step_sizes=None))
    one, other = (dk.evaluate(s, task, minilm, seeds=(0, 1), recipe=unroll).scores for s in sets)
    assert one == other


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_mean_and_spread(task, minilm):
    found, _ = a_set(task, minilm, per_class=1)
    got = dk.evaluate(found, task, minilm, seeds=(3, 1, 4, 5), recipe=dk.Unroll(3, optimizer=dk.SGD(3.0)))
    assert len({*got.scores}) > 1
    assert got.mean == pytest.approx(statistics.fmean(got.scores))
    assert got.std == pytest.approx(statistics.stdev(got.scores))
    assert list(got.groups) == ["neg", "pos"] and np.mean([*got.groups.values()]) == pytest.approx(got.mean)
    assert got.groups["neg"] != got.groups["pos"]
    assert got.examples == 2 and got.nbytes == found.nbytes and got.seconds > 0
    assert str(got) == f"{got.mean:.3f} ± {got.std:.3f} (n=4, unroll)"
    one = dk.evaluate(found, task, minilm, seeds=(4,), recipe=dk.Unroll(3, optimizer=dk.SGD(3.0)))
    assert one.scores == got.scores[2:3] and math.isnan(one.std) and one.mean == one.scores[0]


@pytest.mark.parametrize("recipe", ["own", STANDARD, TUNED])
def test_the_same_seeds_give_the_same_scores(task, minilm, recipe):
    found, _ = a_set(task, minilm, per_class=1, optimizer=dk.SGD(3.0))
    twice = [dk.evaluate(found, task, minilm, recipe=recipe) for _ in range(2)]
    fixed = [{k: v for k, v in dataclasses.asdict(e).items() if k != "seconds"} for e in twice]
    assert fixed[0] == fixed[1]


def test_the_split_that_is_asked_for(task, minilm):
    """The stand-in's class words are the same in every split; the fewest rows are in test and validation."""
    found, _ = a_set(task, minilm, per_class=1)
    unroll, sizes = dk.Unroll(3, optimizer=dk.SGD(3.0)), {"train": 80, "validation": 40, "test": 40}
    for split, rows in sizes.items():
        (score,) = dk.evaluate(found, task, minilm, seeds=(3,), recipe=unroll, split=split).scores
        params = minilm.init(derive_seed("evaluate-init", 3))
        *_, params = dk.Fixed(unroll).plan(found, task, minilm)(3).train(minilm, params)
        assert score == classified(minilm, params, task, split, np.arange(rows)).mean()


def test_work_is_counted(task, tiny):
    found, _ = a_set(task, tiny, batch_size=None)
    flops = {t: dk.evaluate(found, task, tiny, seeds=(0,), recipe=dk.Unroll(t)).flops for t in (1, 2, 6)}
    assert flops[1] > 0 and flops[2] == 2 * flops[1] and flops[6] == 6 * flops[1]
    # The matrices of the body, forward once and backward twice, two operations a multiplication; attention on top.
    matrices = sum(p.numel() for n, p in tiny.init(0).items() if "layer" in n and p.ndim == 2)
    assert 1 < flops[1] / (6 * 8 * 8 * matrices) < 1.5


def test_steps_of_one_shape_are_counted_once(task, minilm, monkeypatch):
    """A count costs a training step, so equal steps share it, also those of a later evaluation; other shapes do not."""
    student, counted = dataclasses.replace(minilm, cache={}), []
    monkeypatch.setattr("distillkit.evaluation.evaluate.flop_counter", lambda: counted.append(1) or flop_counter())
    found, _ = a_set(task, student, batch_size=None)
    longer = dk.DistilledSet.from_real(task, student, per_class=2, length=6)
    flops = [dk.evaluate(chosen, task, student, seeds=(0,), recipe=dk.Unroll(t)).flops
             for chosen, t in ((found, 2), (found, 4), (longer, 2))]
    assert len(counted) == 2 and flops[1] == 2 * flops[0] and flops[2] > 0
    assert dk.evaluate(found, task, student, seeds=(0,), recipe=dk.Unroll(2, optimizer=dk.AdamW())).flops == flops[0]
    assert len(counted) == 3, "another optimiser may compute more"


def test_operations_are_counted_where_a_module_is_given_a_parameter(task, standin_hub):
    """As DeBERTa's norm is given its table of positions, on which torch's notes of modules break."""
    student = dk.load_student("microsoft/deberta-v3-base", task)
    real = dk.DistilledSet.from_real(task, student, per_class=1, length=6)
    flops = {t: dk.evaluate(real, task, student, seeds=(0,), recipe=dk.Unroll(t)).flops for t in (1, 2)}
    assert flops[2] == 2 * flops[1] > 0


def test_size_of_the_full_data(task, tiny):
    got = dk.evaluate(None, task, tiny, seeds=(0,), recipe=STANDARD)
    assert got.examples == 80 and got.nbytes == sum(len(t.encode()) for t in task.train["text"])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scoring_does_not_depend_on_the_batch_size(task, minilm, batch_size):
    params = minilm.init(0)
    expected = classified(minilm, params, task, "test")
    assert 0 < expected.mean() < 1
    assert np.array_equal(classified(minilm, params, task, "test", batch_size=batch_size), expected)
    rows = np.array([31, 2, 17, 2])
    assert np.array_equal(classified(minilm, params, task, "test", rows, batch_size=batch_size), expected[rows])


def test_a_student_that_fell_apart_is_never_right(task, tiny):
    broken = {n: torch.full_like(p, float("nan")) for n, p in tiny.init(0).items()}
    assert not classified(tiny, broken, task, "test").any(), "argmax of NaN would be class 0"


# --- standard and full -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warm"), [(200, 20), (21, 2), (5, 1), (1, 1)])
def test_warm_up_and_decay(steps, warm):
    sizes = warm_up_and_decay(steps, 3.0).tolist()
    assert len(sizes) == steps and min(sizes) > 0 and max(sizes) == sizes[warm - 1] == pytest.approx(3.0)
    slopes = np.diff(sizes)
    assert slopes[: warm - 1] == pytest.approx(3.0 / warm, rel=1e-4)
    assert slopes[warm - 1 :] == pytest.approx(-3.0 / (steps + 1 - warm), rel=1e-4)


def test_the_standard_recipe(task, tiny):
    distilled = dk.DistilledSet.from_real(task, tiny, per_class=20, length=6)
    plan, other = map(as_recipe("standard").plan(distilled, task, tiny), (0, 1))
    assert plan.optimizer == dk.AdamW(5e-5, weight_decay=0.01)
    assert len(plan.step_sizes) == 200
    assert [[len(part[2]) for part in plan.feed(t)] for t in range(4)] == [[16, 16], [8], [16, 16], [8]]
    first = [torch.cat([part[1]["inputs_embeds"] for part in of.feed(0)]) for of in (plan, other)]
    assert not torch.equal(*first), "a seed is another order"


def test_full_data_goes_through_every_row_once_an_epoch(task, tiny, monkeypatch):
    seen, batch = [], dk.Task.batch
    monkeypatch.setattr(dk.Task, "batch", lambda self, *a: seen.append((a[1], a[2].tolist())) or batch(self, *a))
    for seed in (0, 1):
        plan = dk.Standard(least_steps=1).plan(None, task, tiny)(seed)
        for t in range(len(plan.step_sizes)):
            plan.feed(t)
    assert {split for split, _ in seen} == {"train"} and len(seen) == 2 * 9
    epochs = [sum((rows for _, rows in seen[i : i + 3]), []) for i in range(0, 18, 3)]
    assert all(sorted(epoch) == list(range(80)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


# --- tuned -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracy", "best"), [
    ({(1, 1e-3): 0.1, (3, 1e-3): 0.2, (1, 1e-2): 0.9, (3, 1e-2): 0.3}, (1, 1e-2)),
    ({(1, 1e-3): 0.1, (3, 1e-3): 0.8, (1, 1e-2): 0.7, (3, 1e-2): 0.3}, (3, 1e-3)),
    ({(1, 1e-3): 0.1, (3, 1e-3): 0.5, (1, 1e-2): 0.5, (3, 1e-2): 0.5}, (1, 1e-2)),  # a tie: fewer steps
    ({(1, 1e-3): 0.5, (3, 1e-3): 0.5, (1, 1e-2): 0.5, (3, 1e-2): 0.5}, (1, 1e-3)),  # then the smaller step
])
def test_tuned_takes_the_best_point_of_the_grid(task, tiny, monkeypatch, accuracy, best):
    """The scores are given: for each step size and each of two seeds, after one step and after three."""
    spread = {s: iter([p for _ in range(2) for p in ((1, s), (3, s))]) for s in (1e-3, 1e-2)}
    order = iter([next(spread[s]) for s in (1e-3, 1e-2) for _ in range(4)])
    wobble = iter([0.05] * 2 + [-0.05] * 2 + [0.05] * 2 + [-0.05] * 2)

    def judged(student, params, task, split, rows=None):
        assert split == "validation"
        return accuracy[next(order)] + next(wobble)

    monkeypatch.setattr(recipes, "worth", judged)
    plan = TUNED.plan(a_set(task, tiny)[0], task, tiny)(0)
    assert next(order, None) is None, "every point is tried"
    recipe = plan.recipe
    assert best == (recipe["steps"], recipe["optimizer"]["step_size"])
    assert best == (len(plan.step_sizes), plan.optimizer.step_size)
    assert recipe["name"] == "tuned" and recipe["validation"] == pytest.approx(accuracy[best])
    assert recipe["grid"] == {"step_size": [1e-3, 1e-2], "steps": [1, 3]}
    assert plan.step_sizes.tolist() == pytest.approx([best[1]] * best[0])


def test_tuned_finds_what_works(task, minilm):
    found, _ = a_set(task, minilm, per_class=4)
    got = dk.evaluate(found, task, minilm, recipe=dk.Tuned({"step_size": (1e-7, 0.03), "steps": (1, 10)}))
    assert got.recipe["optimizer"]["step_size"] == 0.03 and got.recipe["validation"] > 0.85 and got.mean > 0.85


def test_tuned_judges_each_point_on_two_seeds(task, tiny, monkeypatch):
    seen, worth = [], recipes.worth
    monkeypatch.setattr(recipes, "worth", lambda *given: seen.append(len(given[-1])) or worth(*given))
    dk.Tuned({"step_size": (1e-3,), "steps": (1, 2)}).plan(a_set(task, tiny)[0], task, tiny)
    assert seen == [len(task.validation)] * 4, "two numbers of steps, two seeds; there are fewer than 300 rows"
    del seen[:]
    dk.Tuned({"step_size": (1e-3,), "steps": (1, 2)}, initialisations=1, rows=6).plan(a_set(task, tiny)[0], task, tiny)
    assert seen == [6] * 2


def test_tuned_sees_no_test_row_before_it_has_chosen(task, tiny, monkeypatch):
    events = []
    token_ids, batch, init = dk.Task.token_ids, dk.Task.batch, dk.Student.init
    monkeypatch.setattr(dk.Task, "token_ids", lambda self, tok, split: events.append(split) or
                        token_ids(self, tok, split))
    monkeypatch.setattr(dk.Task, "batch", lambda self, tok, split, rows: events.append(split) or
                        batch(self, tok, split, rows))
    monkeypatch.setattr(dk.Student, "init", lambda self, seed: events.append(seed) or init(self, seed))
    found, _ = a_set(task, tiny)
    events.clear()
    dk.evaluate(found, task, tiny, seeds=(0,), recipe=TUNED)
    chosen = events.index(derive_seed("evaluate-init", 0))
    assert {e for e in events[:chosen] if isinstance(e, str)} == {"validation"}
    assert "test" in events[chosen:] and "validation" not in events[chosen:]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "recipe"), [("own", dk.Own()), ("standard", dk.Standard()), ("tuned", dk.Tuned())])
def test_a_name_is_short_for_its_recipe(name, recipe):
    assert as_recipe(name) == recipe
    assert as_recipe(dk.Unroll(3)).unroll.steps == 3 and as_recipe(recipe) is recipe


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    ({"recipe": "own"}, "recipe='own' asked for, but this set carries none .* use 'tuned' or 'standard'"),
    ({"recipe": "best"}, "recipe must be .*'own'.*'standard'.*'tuned'.*Unroll.*not 'best'"),
    ({"recipe": dk.Tuned}, "recipe must be .*not <class"),  # an object of it is meant
    ({"seeds": ()}, r"seeds must name at least one seed, each once, such as \(0, 1, 2\), not \(\)"),
    ({"seeds": (0, 1, 0)}, r"seeds must name .* each once, .* not \(0, 1, 0\)"),
    ({"split": "dev"}, "no split 'dev'; a task has train, validation, test"),
])
def test_bad_requests_are_named(task, tiny, given, message):
    bare = dk.select(task, tiny, "random", per_class=1)
    with pytest.raises(ValueError, match=message):
        dk.evaluate(bare, task, tiny, **given)


@pytest.mark.parametrize("recipe", ["own", "tuned", dk.Unroll(2)])
def test_the_full_data_has_one_recipe(task, tiny, recipe):
    with pytest.raises(ValueError, match="by recipe='standard' only, not "):
        dk.evaluate(None, task, tiny, recipe=recipe)


def test_a_bad_split_is_found_before_anything_is_trained(task, tiny, monkeypatch):
    monkeypatch.setattr(dk.Student, "init", None)
    with pytest.raises(ValueError, match="no split 'tset'"):
        dk.evaluate(a_set(task, tiny)[0], task, tiny, split="tset")


def test_what_does_not_fit_is_named(task, tiny, standin_hub):
    found, _ = a_set(task, tiny)
    narrow = dataclasses.replace(found, embeds=found.embeds[..., :8])
    with pytest.raises(ValueError, match="embeddings are 8 wide, student 'bert-base-uncased' wants 32"):
        dk.evaluate(narrow, task, tiny)
    shorter = dataclasses.replace(found, step_sizes=found.step_sizes[:3])
    with pytest.raises(ValueError, match="carries 3 step sizes but the unroll has 5"):
        dk.evaluate(shorter, task, tiny, recipe="own")
    four = dk.load_task("ag_news", max_length=12)
    with pytest.raises(ValueError, match=r"student .*\['neg', 'pos'\].*\['World', 'Sports', 'Business', 'Sci/Tech'\]"):
        dk.evaluate(found, four, tiny)
    with pytest.raises(ValueError, match=r"the set has .*\['neg', 'pos'\].*\['World', 'Sports', 'Business', 'Sci/Tech'\]"):
        dk.evaluate(found, four, dk.load_student("bert-base-uncased", four))
