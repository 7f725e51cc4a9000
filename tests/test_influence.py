"""LESS: gradients of single examples, their projection, Adam's direction, and which rows come out first."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.core.inner import loss_and_grads
from distillkit.core.optimizers import AdamW
from distillkit.evaluation.influence import (
    BLOCK,
    LessSettings,
    adam_direction,
    gradients,
    influence,
    sparse_projection,
    validation_groups,
    warm_up,
)
from standin_hub import SUBJECTS, rounding, sentences

SHORT = LessSettings(fraction=0.25, epochs=2, batch_size=8, projection=256)


def tiny(task, trainable, hub_id="bert-base-uncased"):
    return dk.load_student(hub_id, task, trainable=trainable, dtype="float64")


def flat(values):
    return torch.cat([v.flatten() for v in values.values()])


def single(task, student, params, split, row):
    """The gradient of one row's loss, from its own unpadded batch."""
    batch = task.batch(student.tokenizer, split, [row])
    return flat(loss_and_grads(student, params, [(1.0, batch, batch["labels"], None)])[1])


# --- projection ------------------------------------------------------------------------------------------------------


def test_projection_is_a_sparse_matrix():
    """Each coordinate goes to one output of each half."""
    n, draw = 5000, torch.Generator().manual_seed(0)
    matrix = sparse_projection(torch.eye(n, dtype=torch.float64), 40, seed=3)
    used = matrix.reshape(n, 2, -1) != 0
    assert (used.sum(2) == 1).all() and matrix.abs().unique().tolist() == pytest.approx([0.0, 2**-0.5])
    counts = (matrix != 0).sum(0) / 2  # n / 40 = 125 each, standard deviation 11 or less
    assert counts.min() > 75 and counts.max() < 175 and abs(matrix.sign().sum() / n / 2) < 0.05
    x = torch.randint(-9, 9, (5, n), generator=draw).double()
    assert torch.allclose(sparse_projection(x, 40, seed=3), x @ matrix)


def test_rows_blocks_and_seeds_of_a_projection():
    n = 3 * BLOCK + 777
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    whole = sparse_projection(x, 64, seed=1)
    assert torch.equal(sparse_projection(x[1:2], 64, seed=1), whole[1:2]), "a row's image does not depend on its batch"
    assert torch.equal(sparse_projection(x, 64, seed=1), whole), "drawn again from the seed"
    assert not torch.equal(sparse_projection(x, 64, seed=2), whole)
    first, second = (torch.zeros(1, n).index_fill(1, torch.arange(at, at + 50), 1.0) for at in (0, BLOCK))
    assert not torch.equal(*(sparse_projection(of, 64, seed=1) for of in (first, second))), "blocks have streams of their own"


def test_inner_products_are_unbiased():
    """Mean and variance over 1000 seeds, against the exact ones; √(2/1000) = 0.04 is about a variance's relative error."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=draw, dtype=torch.float64)
    y = x + torch.randn(60, generator=draw, dtype=torch.float64)
    both = torch.stack([x, y])
    products = torch.stack([sparse_projection(both, 16, seed=s).prod(0).sum() for s in range(1000)])
    variance = (x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x * y).square().sum()) / 16
    assert abs(products.mean() - x @ y) < 4 * (variance / 1000).sqrt()
    assert products.var() / variance == pytest.approx(1, abs=0.15)


# --- gradients of single rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "trainable"), [("bert-base-uncased", "full"), ("facebook/opt-1.3b", "lora")])
def test_all_rows_at_once_have_the_gradients_of_each_alone(standin_hub, source, trainable):
    task = dk.load_task("arc_easy" if trainable == "lora" else "rotten_tomatoes", max_length=48)
    student, rows = tiny(task, trainable, source), torch.tensor([5, 0, 3])
    params = student.init(1)
    together = gradients(task, student, params, rows, at_once=True)
    alone = torch.stack([single(task, student, params, "train", int(row)) for row in rows])
    assert together.shape == alone.shape and alone.abs().max() > 0
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-9 * alone.abs().max().item())
    assert torch.equal(gradients(task, student, params, rows), alone)


# --- warming up, and Adam's direction --------------------------------------------------------------------------------


def test_warm_up_is_adamw_with_linear_decay(task, standin_hub):
    """On the whole split, one batch an epoch, whatever the order: three steps at 1, 2/3 and 1/3 of the step size."""
    student = tiny(task, "head")
    settings = LessSettings(fraction=1.0, epochs=3, batch_size=100, optimizer=AdamW(0.03))
    points = list(warm_up(task, student, settings=settings))
    assert [p.step_size for p in points] == pytest.approx([0.03, 0.02, 0.01])
    mirror = {n: p.clone().requires_grad_() for n, p in student.init(dk.derive_seed("less-init", 0)).items()}
    optimizer = torch.optim.AdamW(mirror.values(), lr=0.03, weight_decay=0.0)
    batch = task.batch(student.tokenizer, "train", range(80))
    for point in points:
        optimizer.param_groups[0]["lr"] = point.step_size
        optimizer.zero_grad()
        student.loss(mirror, batch, batch["labels"]).backward()
        optimizer.step()
        for name, parameter in mirror.items():
            kept = optimizer.state[parameter]
            assert point.state["count"] == kept["step"]
            assert (point.params[name] - parameter).abs().max() < 1e-9
            assert (point.state["m"][name] - kept["exp_avg"]).abs().max() < 1e-9
            assert (point.state["v"][name] - kept["exp_avg_sq"]).abs().max() < 1e-9


def test_epochs_of_several_steps(world):
    """A quarter of 80 rows in batches of 8 is 3 steps an epoch: sizes 1, 5/6, … 1/6, with means 5/6 and 2/6."""
    settings = LessSettings(fraction=0.25, epochs=2, batch_size=8, optimizer=AdamW(0.6))
    points = list(warm_up(*world, settings=settings))
    assert [p.state["count"] for p in points] == [3, 6] and [p.step_size for p in points] == pytest.approx([0.5, 0.2])


def test_direction_is_the_step_torch_would_take(task, standin_hub):
    """From a checkpoint, one step of torch.optim.AdamW on a single row moves θ by −η Γ, decay and clipping left out."""
    student = tiny(task, "lora")
    settings = LessSettings(fraction=0.2, epochs=2, batch_size=8,
                            optimizer=AdamW(0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1, clip_norm=0.5))
    *_, point = warm_up(task, student, settings=settings)
    rows = [5, 60]
    grads = torch.stack([single(task, student, point.params, "train", row) for row in rows])
    found = adam_direction(settings.optimizer, point.state, grads)
    for grad, direction in zip(grads, found, strict=True):
        theta = torch.nn.Parameter(flat(point.params))
        optimizer = torch.optim.AdamW([theta], lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.0)
        optimizer.state[theta] = {"step": torch.tensor(float(point.state["count"])),
                                  "exp_avg": flat(point.state["m"]).clone(), "exp_avg_sq": flat(point.state["v"]).clone()}
        before, theta.grad = theta.detach().clone(), grad.clone()
        optimizer.step()
        assert ((before - theta) / 0.01 - direction).abs().max() < 1e-9


# --- influence -------------------------------------------------------------------------------------------------------


def by_definition(task, student, settings, subtasks):
    """Scores straight from the formula, without projection."""
    scores = torch.zeros(len(task.train), len(subtasks), dtype=torch.float64)
    for point in warm_up(task, student, settings=settings):
        aims = [torch.stack([single(task, student, point.params, "validation", r) for r in rows]).mean(0) for rows in subtasks]
        for row in range(len(task.train)):
            grad = single(task, student, point.params, "train", row)
            step = adam_direction(settings.optimizer, point.state, grad[None])[0]
            cosines = [torch.nn.functional.cosine_similarity(aim, step, dim=0) for aim in aims]
            scores[row] += point.step_size * torch.stack(cosines)
    return scores.numpy()


def test_scores_by_definition(task, standin_hub):
    student = tiny(task, "lora")
    exact = dataclasses.replace(SHORT, projection=10**9)
    expected = by_definition(task, student, exact, [range(len(task.validation))])
    assert np.allclose(influence(task, student, settings=exact), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    projected = influence(task, student, settings=dataclasses.replace(exact, projection=256))
    assert not np.allclose(projected, expected, rtol=0.001) and np.corrcoef(projected[:, 0], expected[:, 0])[0, 1] > 0.9


@pytest.fixture
def questions(tmp_path, standin_hub):
    """An instruction task with three groups and a language model's adapters in float64."""
    folder = tmp_path / "questions"
    folder.mkdir()
    pools, responses = [iter(sentences(label, 40, "questions")) for label in range(3)], ("a river", "yes, profit", "match")
    for split, count in (("train", 20), ("validation", 9), ("test", 3)):
        rows = [{"prompt": next(pools[row % 3]), "response": responses[row % 3], "group": "cab"[row % 3]}
                for row in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dk.load_task(folder, max_length=40)
    return task, tiny(task, "lora", "facebook/opt-1.3b")


def test_groups_of_an_instruction_task(questions):
    """Its answers are the subtasks, in alphabetical order; all training rows are one pool, which they take from in turn."""
    task, student = questions
    exact = dataclasses.replace(SHORT, projection=10**9)
    answers = np.array(task.validation["response"][:])
    expected = by_definition(task, student, exact, [np.flatnonzero(answers == answer) for answer in np.unique(answers)])
    scores = influence(task, student, settings=exact)
    assert np.allclose(scores, expected, rtol=0, atol=rounding(student) * np.abs(expected).max())
    scores, rows = influence(task, student), []
    for turn in range(7):
        rows.append(next(row for row in np.argsort(-scores[:, turn % 3], kind="stable").tolist() if row not in rows))
    assert dk.select(task, student, "less", fraction=0.35).meta["rows"] == rows


def test_every_answer_is_served(questions):
    """However loud the gradients of one answer are, each is selected as often as the others."""
    task, student = questions
    responses = [task.train[row]["response"] for row in dk.select(task, student, "less", fraction=0.45).meta["rows"]]
    assert sorted(responses) == sorted(["a river", "yes, profit", "match"] * 3)


def test_answers_that_do_not_repeat_are_no_groups(tmp_path):
    """Then the column "group" says what the groups are."""
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"What is {n}?", "response": f"It is {n}.", "group": "ab"[n % 2]} for n in range(10)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [group.tolist() for group in validation_groups(dk.load_task(tmp_path))] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


class WordCounts:
    """A linear classifier on word counts, with as much of a student as this module asks for."""

    name, device = "word counts", torch.device("cpu")

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}

    def init(self, seed):
        return {"w": torch.zeros(len(self.tokenizer), 2)}

    def loss(self, params, batch, targets, *, dropout_seed=None):
        counts = (params["w"][batch["input_ids"]] * batch["attention_mask"].unsqueeze(-1)).sum(1)
        return torch.nn.functional.cross_entropy(counts, targets)


@pytest.mark.parametrize("projection", [10**9, 64])
def test_rows_with_the_wrong_label_come_last(world, tmp_path, projection):
    """Three words of one class make a row; a fifth of the training rows of each class are under the other one."""
    folder, draw, wrong = tmp_path / "mislabelled", random.Random(0), {row for row in range(100) if row % 10 in (3, 6)}
    folder.mkdir()
    for split, count in (("train", 100), ("validation", 40), ("test", 2)):
        rows = [{"text": " ".join(draw.sample(SUBJECTS[row % 2].split(), 3)),
                 "label": row % 2 ^ (split == "train" and row in wrong)} for row in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dk.load_task(folder, max_length=16)
    settings = dataclasses.replace(SHORT, projection=projection)
    scores = influence(task, WordCounts(world[1].tokenizer), settings=settings)[:, 0]
    for pool in task.rows_by_class("train"):
        assert {*pool[np.argsort(-scores[pool])[:40]].tolist()} == {*pool.tolist()} - wrong


def test_seeds(world, standin_hub):
    task, student = world
    first = influence(task, student, seed=1, settings=SHORT)
    again = influence(task, dk.load_student("bert-base-uncased", task), seed=1, settings=SHORT)
    assert np.array_equal(first, again) and not np.array_equal(first, influence(task, student, seed=2, settings=SHORT))


def test_a_diverging_warm_up_is_named(world):
    settings = dataclasses.replace(SHORT, optimizer=AdamW(1e30))
    with pytest.raises(ValueError, match=r"training row \d+ of task 'rotten_tomatoes' .*not finite; lower .* 1e\+30"):
        influence(*world, settings=settings)
