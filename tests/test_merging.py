"""Merging sets, streams of tasks, and knowledge brought up to date, on tiny models; what is exact is tested exactly."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.applications import merging
from distillkit.applications.merging import (
    Stream,
    continual,
    merge,
    renamed,
    replaced,
    rescaled,
    rows_of_bytes,
    united,
    with_classes,
    with_recipe,
    without,
)
from distillkit.core.inner import inner_step, set_parts
from distillkit.io.seeds import generator

NEWS = ("World", "Sports", "Business", "Sci/Tech")


@pytest.fixture(scope="module")
def news(standin_home):
    """Four classes, and a student for them."""
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("ag_news", max_length=12)
        return task, dk.load_student("bert-base-uncased", task)


@pytest.fixture(scope="module")
def halves(news):
    """Two tasks of two classes each, and a soft set of each with step sizes and a recipe."""
    task, student = news
    tasks = with_classes(task, NEWS[:2]), with_classes(task, NEWS[2:])
    made = []
    for number, half in enumerate(tasks):
        start = dk.DistilledSet.from_real(half, student, per_class=1, length=8 + number)
        targets = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
        unroll = dk.Unroll(2, optimizer=dk.SGD(0.1 * (number + 1)))
        made.append(dataclasses.replace(with_recipe(start, unroll, student), targets=targets))
    return tasks, made


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_task_of_some_classes(news):
    task, _ = news
    part = with_classes(task, ["Business", "World"])
    assert part.classes == ("Business", "World") and part.kind == "classification" and part.max_length == task.max_length
    for split in ("train", "validation", "test"):
        expected = [(t, {2: 0, 0: 1}[y]) for t, y in zip(task.split(split)["text"], task.split(split)["label"]) if y in (0, 2)]
        assert list(zip(part.split(split)["text"], part.split(split)["label"])) == expected
        assert part.split(split).features["label"].names == ["Business", "World"]
    assert part.fingerprint not in (task.fingerprint, with_classes(task, ["World", "Business"]).fingerprint)
    assert part.fingerprint == with_classes(task, ("Business", "World")).fingerprint
    assert with_classes(task, task.classes).fingerprint == task.fingerprint, "all of it is the same rows"


def test_classes_get_other_names_or_one(news):
    task, _ = news
    named = with_classes(task, {"World": "a", "Sports": "b", "Business": "a"})
    assert named.classes == ("a", "b")
    assert len(named.rows_by_class("train")[0]) == 2 * len(named.rows_by_class("train")[1])
    with pytest.raises(ValueError, match="two classes or more, not a"):
        with_classes(task, {"World": "a", "Sports": "a"})
    with pytest.raises(ValueError, match="a class of 'ag_news' must be one of World, .* not 'Weather'"):
        with_classes(task, ["World", "Weather"])


def test_united_tasks(news, halves):
    task, _ = news
    tasks, _ = halves
    whole = united(*tasks)
    assert whole.classes == NEWS
    assert {*zip(whole.train["text"], whole.train["label"])} == {*zip(task.train["text"], task.train["label"])}
    assert whole.test["text"][: len(tasks[0].test)] == tasks[0].test["text"][:], "one after the other"
    again = united(tasks[0], with_classes(task, ["Sports", "Business"]))
    assert again.classes == ("World", "Sports", "Business"), "a name is a class"
    with pytest.raises(ValueError, match=r"max_length must be the same, not \[12, 9\]"):
        united(tasks[0], dataclasses.replace(tasks[1], max_length=9))
    with pytest.raises(ValueError, match="one at least"):
        united()


# --- sets ------------------------------------------------------------------------------------------------------------


def test_merged_tensors(halves):
    tasks, (a, b) = halves
    both = merge(a, b)
    assert both.embeds.shape == (4, 9, a.embeds.shape[2]) and both.meta["classes"] == list(NEWS)
    assert torch.equal(both.embeds[:2, :8], a.embeds) and torch.equal(both.embeds[2:], b.embeds)
    assert not both.mask[:2, 8].any() and not both.free[:2, 8].any() and torch.equal(both.mask[2:], b.mask)
    assert torch.equal(both.tokens[2:], b.tokens) and both.meta["text"] == a.meta["text"] + b.meta["text"]
    assert both.meta["labels"] == [0, 1, 2, 3]
    assert [p["source"] for p in both.meta["parts"]] == [t.name for t in tasks]
    json.dumps(both.meta)
    assert (a.embeds.shape[1], len(a.meta["classes"])) == (8, 2), "what is merged stays as it was"


def test_merged_labels_by_hand(halves):
    _, (a, b) = halves
    both = merge(a, b)
    assert torch.equal(both.targets[:2, :2], a.targets) and torch.equal(both.targets[2:, 2:], b.targets)
    said = both.targets.softmax(1)
    assert torch.allclose(said[:2, :2], a.targets.softmax(1), atol=1e-6) and float(said[:2, 2:].max()) < 1e-12
    shared = merge(a, b, foreign=0.2).targets.softmax(1)
    assert torch.allclose(shared[:2, 2:], torch.full((2, 2), 0.1)), "the share in equal parts"
    assert torch.allclose(shared[:2, :2], 0.8 * a.targets.softmax(1)), "and the rest as it was"
    hard = merge(*(dataclasses.replace(s, targets=torch.tensor([1, 0])) for s in (a, b)))
    assert hard.targets.tolist() == [1, 0, 3, 2]


def test_the_same_classes_are_shared(halves):
    _, (a, b) = halves
    swapped = renamed(b, {"Business": "Sports", "Sci/Tech": "World"})
    both = merge(a, swapped)
    assert both.meta["classes"] == ["World", "Sports"] and both.meta["labels"] == [0, 1, 1, 0]
    assert torch.equal(both.targets[2:], b.targets[:, [1, 0]]), "columns follow the names"


def test_step_sizes_add_up(halves):
    """A step on the merged set with equal parts moves along the sum of the parts' own gradients, each at its own size."""
    _, (a, b) = halves
    both = merge(a, b)
    assert torch.allclose(both.step_sizes, torch.tensor([0.3, 0.3])), "0.1 and 0.2"
    assert both.meta["recipe"]["steps"] == 2 and both.meta["recipe"]["optimizer"]["name"] == "SGD"
    three = merge(both, a)
    assert torch.allclose(three.step_sizes, torch.tensor([0.4, 0.4])), "merged sets keep count of their parts"
    adam = {**a.meta["recipe"], "optimizer": {**a.meta["recipe"]["optimizer"], "name": "AdamW"}}
    pair = [dataclasses.replace(s, meta={**s.meta, "recipe": adam}) for s in (a, b)]
    assert torch.allclose(merge(*pair).step_sizes, torch.tensor([0.15, 0.15]))
    batched = [dataclasses.replace(s, meta={**s.meta, "recipe": {**a.meta["recipe"], "batch_size": 2}}) for s in (a, b)]
    assert merge(*batched).meta["recipe"]["batch_size"] == 4


def test_equal_parts_take_the_step_each_took_alone(news, halves):
    """The claim behind adding up: θ moves by the mean of what the parts' own steps at the common size would add."""
    _, student = news
    _, (a, b) = halves
    a, b = (dataclasses.replace(s, step_sizes=torch.tensor([0.2])) for s in (a, b))
    recipe = {**a.meta["recipe"], "steps": 1}
    a, b = (dataclasses.replace(s, meta={**s.meta, "recipe": recipe}) for s in (a, b))
    both = merge(a, b)
    params = student.init(0)

    def moved(found):
        unroll = dk.Unroll(1)
        parts = set_parts(unroll.rows(len(found))[0], found.embeds, found.mask, found.targets,
                                  micro_batch=None, dropout=None)
        new, *_ = inner_step(student, unroll.optimizer, params, {}, parts, float(found.step_sizes[0]))
        return {n: new[n] - params[n] for n in params}

    # Alone, but among all classes: what merging with nothing of the other would train.
    alone = [moved(dataclasses.replace(s.in_classes(NEWS, foreign=0.0), step_sizes=s.step_sizes)) for s in (a, b)]
    together = moved(both)
    for name in params:
        assert torch.allclose(together[name], alone[0][name] + alone[1][name], atol=1e-6)


def test_sets_without_a_common_recipe_have_none(halves):
    _, (a, b) = halves
    plain = dataclasses.replace(b, step_sizes=None, meta={k: v for k, v in b.meta.items() if k != "recipe"})
    longer = dataclasses.replace(b, meta={**b.meta, "recipe": {**b.meta["recipe"], "steps": 5}})
    for other in (plain, longer):
        both = merge(a, other)
        assert both.step_sizes is None and "recipe" not in both.meta


@pytest.mark.parametrize(("change", "message"), [
    (lambda a, b: (a, dataclasses.replace(b, meta={**b.meta, "student": "other"})), "different students .*other.*go through"),
    (lambda a, b: (a, dataclasses.replace(b, targets=torch.tensor([0, 1]))), "some hard ones; soften"),
    (lambda a, b: (a, dataclasses.replace(b, meta={**b.meta, "classes": []})), "labelled examples"),
    (lambda a, b: (), "one at least"),
])
def test_sets_that_cannot_be_merged(halves, change, message):
    with pytest.raises(ValueError, match=message):
        merge(*change(*halves[1]))


def test_foreign_is_a_share(halves):
    with pytest.raises(ValueError, match=r"foreign: the share of probability must be a number in .0, 1., not 1"):
        merge(*halves[1], foreign=1)


def test_a_merged_set_trains_and_is_saved(news, halves, tmp_path):
    task, student = news
    both = merge(*halves[1])
    found = dk.evaluate(both, task, student, seeds=(0,))
    assert found.recipe["name"] == "own" and found.examples == 4 and found.recipe["step_sizes"] == both.step_sizes.tolist()
    assert dk.DistilledSet.load(both.save(tmp_path / "both")).meta["parts"] == both.meta["parts"]


def test_a_source_is_taken_out_and_replaced(halves):
    (one, two), (a, b) = halves
    both = merge(a, b)
    left = without(both, one.name)
    assert len(left) == 2 and torch.equal(left.embeds, both.embeds[2:]) and left.meta["labels"] == [2, 3]
    assert left.meta["text"] == b.meta["text"] and left.meta["classes"] == list(NEWS)
    assert torch.allclose(left.step_sizes, b.step_sizes), "its share of the step sizes goes with it"
    fresh = dataclasses.replace(a, embeds=a.embeds + 1, meta={**a.meta, "task": "fresh"})
    new = replaced(both, one.name, fresh)
    assert [p["source"] for p in new.meta["parts"]] == [two.name, "fresh"] and new.meta["classes"] == list(NEWS)
    assert torch.equal(new.embeds[2:, :8], a.embeds + 1) and new.meta["labels"] == [2, 3, 0, 1]
    assert torch.allclose(new.step_sizes, both.step_sizes)
    assert torch.allclose(new.targets.softmax(1)[2:], merge(a, b).targets.softmax(1)[:2])
    with pytest.raises(ValueError, match="source must be one of .*, not 'nobody'"):
        without(both, "nobody")
    with pytest.raises(ValueError, match="nothing is left"):
        without(a, one.name)


def test_names_of_a_set(halves):
    _, (a, _) = halves
    assert renamed(a, {"World": "Earth"}).meta["classes"] == ["Earth", "Sports"] and a.meta["classes"][0] == "World"
    with pytest.raises(ValueError, match="a class of the set must be one of World, Sports, not 'x'"):
        renamed(a, {"x": "y"})
    with pytest.raises(ValueError, match="two classes would have one name"):
        renamed(a, {"World": "Sports"})


def test_rescaling_takes_the_best_factor(news, halves, monkeypatch):
    task, student = news
    both, asked = merge(*halves[1]), []

    def scored(found, task, student, *, seeds, recipe, split):
        asked.append((float(found.step_sizes[0]), tuple(seeds), recipe, split))
        return dataclasses.make_dataclass("Found", ["worth"])(0.7 if 0.5 < found.step_sizes[0] < 1.3 else 0.3)

    monkeypatch.setattr(merging, "evaluate", scored)
    best, found = rescaled(both, task, student, factors=(0.5, 2.0, 4.0))
    assert torch.allclose(best.step_sizes, 2 * both.step_sizes) and found == {0.5: 0.3, 2.0: 0.7, 4.0: 0.7}, "the nearer to 1"
    assert [a[2:] for a in asked] == [("own", "validation")] * 3 and len({a[1] for a in asked}) == 1
    assert not {0, 1} & {*asked[0][1]}, "initialisations that no score is taken on"
    plain = dataclasses.replace(both, meta={k: v for k, v in both.meta.items() if k != "recipe"})
    with pytest.raises(ValueError, match="no recipe .*with_recipe"):
        rescaled(plain, task, student)


def test_a_recipe_for_real_sentences(news):
    task, student = news
    real = with_recipe(dk.select(task, student, "random", per_class=1, length=8), dk.Unroll(3, optimizer=dk.SGD(0.4)), student)
    assert real.step_sizes.tolist() == pytest.approx([0.4] * 3) and not real.soft
    assert dk.evaluate(real, task, student, seeds=(0,)).recipe["name"] == "own"


# --- streams ---------------------------------------------------------------------------------------------------------


def test_average_and_forgetting_by_hand():
    r = np.array([[[0.9, 0.1, 0.0], [0.5, 0.8, 0.2], [0.3, 0.9, 0.7]]])
    stream = Stream(r, {})
    assert stream.average[0] == pytest.approx((0.3 + 0.9 + 0.7) / 3)
    assert stream.forgetting[0] == pytest.approx(((0.9 - 0.3) + (0.8 - 0.9)) / 2), "from the best before the last task"
    late = Stream(np.array([[[0.2, 0.0], [0.6, 0.5]]]), {})
    assert late.forgetting[0] == pytest.approx(-0.4), "what got better is forgotten less than not at all"


SMALL = {"steps": 15, "batch_size": 8, "memory_batch": 8, "optimizer": dk.AdamW(0.01), "seeds": (0, 1)}


def test_without_memory_the_past_is_gone_and_with_it_less_so(news, halves):
    _, student = news
    tasks, _ = halves
    rows = [list(range(len(tasks[0].train))), []]
    bare, kept = continual(tasks, student, **SMALL), continual(tasks, student, rows, **SMALL)
    assert bare.accuracy.shape == (2, 2, 2)
    assert np.array_equal(bare.accuracy[:, 0], kept.accuracy[:, 0]), "up to the first task's end they are the same"
    assert (bare.accuracy[:, 0, 1] == 0).all(), "classes never seen are never said"
    assert (bare.accuracy[:, 1, 0] == 0).all() and bare.forgetting.mean() > kept.forgetting.mean() + 0.1
    assert np.array_equal(kept.accuracy, continual(tasks, student, rows, **SMALL).accuracy), "seeded"


def test_kinds_of_memory(news, halves):
    _, student = news
    tasks, (a, b) = halves
    ways = [continual(tasks, student, memory, **SMALL) for memory in ([a, []], [a, b])]
    assert np.array_equal(ways[0].accuracy, ways[1].accuracy), "what is kept of the last task is never looked at"
    real = dk.select(tasks[0], student, "random", per_class=1, length=8)
    assert continual(tasks, student, [real, []], **SMALL).accuracy.shape == (2, 2, 2)


def test_the_first_task_of_a_stream_is_training(news, halves):
    """By hand: the same initialisation, the same batches, the one inner step of the kit."""
    student, tasks = news[1], halves[0]
    whole = united(*tasks)
    found = continual(tasks, student, **SMALL | {"steps": 3, "seeds": (5,)})
    params, adam = student.init(dk.derive_seed("continual-init", 5)), SMALL["optimizer"]
    state = adam.init(params)
    for t in range(3):
        rows = tasks[0].balanced_rows("train", 8, generator("continual-batch", 5, 0, t))
        batch = whole.batch(student.tokenizer, "train", rows)
        params, state, *_ = inner_step(student, adam, params, state, [(1.0, batch, batch["labels"], None)], 0.01)
    test = whole.batch(student.tokenizer, "test", range(len(tasks[0].test)))
    right = student.logits(params, test).argmax(1) == test["labels"]
    assert found.accuracy[0, 0, 0] == pytest.approx(right.double().mean().item())


def test_replayed_examples_have_their_share_of_the_loss(news, halves):
    """The parts of a step add up to one loss: the new task's real rows, and the past tasks' memory in equal shares."""
    task, student = news
    tasks, (a, _) = halves
    stream, kept = [*tasks, tasks[0]], [a.in_classes(NEWS, foreign=0.0), torch.arange(5)]
    way = merging._Run(stream, united(*stream), student, kept, 1, 4, 4, SMALL["optimizer"])
    parts = list(way.parts(2, 0.6, torch.Generator().manual_seed(0)))
    assert [round(share, 3) for share, *_ in parts] == [0.4, 0.3, 0.3]
    assert [len(targets) for _, _, targets, _ in parts] == [4, 2, 2], "the batch of memory is split between the tasks"
    assert [share for share, *_ in way.parts(0, 0.6, torch.Generator().manual_seed(0))] == [1.0]


def test_the_end_of_a_stream_is_the_last_row_of_its_accuracies(news, halves):
    tasks, (a, _) = halves
    kept = [a.in_classes(NEWS, foreign=0.0)]
    way = merging._Run(tasks, united(*tasks), news[1], kept, 2, 4, 4, SMALL["optimizer"])
    assert np.array_equal(way(0, 0.01, 0.5, "test", last_only=True), way(0, 0.01, 0.5, "test")[-1:])


def test_weight_and_step_size_are_tuned_on_validation(news, halves, monkeypatch):
    tasks, (a, _) = halves
    asked = []

    def way(self, seed, step_size, weight, split, last_only=False):
        asked.append((seed, step_size, weight, split))
        assert last_only == (split == "validation"), "only the end of the stream is looked at for tuning"
        return np.full((1 if last_only else 2, 2), 0.9 if (step_size, weight) == (0.1, 0.3) else 0.5)

    monkeypatch.setattr(merging._Run, "__call__", way)
    found = continual(tasks, news[1], [a, []], **SMALL | {"step_sizes": (0.01, 0.1), "weights": (0.3, 0.6)})
    assert (found.settings["step_size"], found.settings["weight"]) == (0.1, 0.3) and len(found.settings["tried"]) == 4
    tuned, scored = asked[:-2], asked[-2:]
    assert {s for *_, s in tuned} == {"validation"} and [x[0] for x in scored] == [0, 1] and {x[3] for x in scored} == {"test"}
    assert not {x[0] for x in tuned} & {0, 1}
    asked.clear()
    continual(tasks, news[1], None, **SMALL | {"weights": (0.3, 0.6)})
    assert len(asked) == 2, "without a memory there is no weight to choose"


@pytest.mark.parametrize(("change", "message"), [
    ({"memory": []}, "these are 2 tasks and 0 memories"), ({"tasks": []}, "these are 0 tasks"),
    ({"steps": 0}, "steps must be"),
    ({"weights": (0.5, 1.0)}, "weights: each share of the loss must be a number in .0, 1., not 1.0"),
])
def test_streams_that_cannot_be(news, halves, change, message):
    with pytest.raises(ValueError, match=message):
        continual(**{"tasks": halves[0], "student": news[1], **SMALL, **change})


def test_a_stream_wants_a_student_for_all_classes(world, halves):
    with pytest.raises(ValueError, match=r"\['neg', 'pos'\].*\['World', 'Sports', 'Business', 'Sci/Tech'\]"):
        continual(halves[0], world[1], **SMALL)
    with pytest.raises(ValueError, match="these are 1 tasks"):
        continual(halves[0][:1], world[1], **SMALL)


def test_rows_of_bytes(news):
    task, _ = news
    rows = rows_of_bytes(task, 200)
    size = sum(len(task.train[r]["text"].encode()) for r in rows)
    assert 0 < size <= 200 and len(set(rows)) == len(rows)
    counts = np.bincount(task.labels("train")[rows], minlength=4)
    assert counts.max() - counts.min() <= 1, "the classes in turn"
    assert rows_of_bytes(task, 0) == [] and rows == rows_of_bytes(task, 200) != rows_of_bytes(task, 200, seed=1)
    assert sorted(rows_of_bytes(task, 10**9)) == list(range(len(task.train)))
