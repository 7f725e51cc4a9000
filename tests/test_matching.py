"""Trajectory matching and the neighbour term, on a tiny encoder and on a model whose optimum is known in closed form."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import distillkit as dk
from distillkit.core import objectives
from distillkit.core.experts import record_experts
from distillkit.core.objectives import meta_gradient, search_step_size, trained_loss
from distillkit.text.projection import allowed_tokens

ADAM = dk.AdamW(0.003, eps_root=1e-8)


@pytest.fixture(scope="module")
def exact(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return task, dk.load_student("bert-base-uncased", task, dtype="float64")


@pytest.fixture(scope="module")
def experts(exact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "adam"
    return record_experts(*exact, folder, count=2, epochs=2, batch_size=20, snapshots_per_epoch=2, optimizer=ADAM)


@pytest.fixture
def start(exact):
    return dk.DistilledSet.from_real(*exact, per_class=2, length=8)


def matching(exact, experts, steps=3, **options):
    unroll = dk.Unroll(steps, optimizer=options.pop("optimizer", dk.SGD(0.05)))
    options.setdefault("metagrad", dk.Replay())
    return dk.TrajectoryMatching(*exact, unroll, experts, **options)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand(exact, experts, start):
    goal = matching(exact, experts, expert_epochs=0.5)
    problem = goal.problem(start, 1, 2, 3)
    first, last = experts.snapshot(1, 2)[0], experts.snapshot(1, 3)[0]
    params = first
    for _ in range(3):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        batch = {"inputs_embeds": start.embeds, "attention_mask": start.mask}
        loss = exact[1].loss(leaves, batch, start.targets.double())
        grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True, materialize_grads=True)
        params = {n: p.detach() - 0.05 * g for (n, p), g in zip(leaves.items(), grads, strict=True)}
    gap = sum(((params[n] - last[n]) ** 2).sum() for n in last)
    went = sum(((first[n] - last[n]) ** 2).sum() for n in last)
    assert trained_loss(problem) == pytest.approx(float(gap / went), rel=1e-9)
    by_tensor = dataclasses.replace(goal, distance="tensor").problem(start, 1, 2, 3)
    moves = {n: float((first[n] - last[n]).square().mean().sqrt()) for n in last}
    moving = [n for n in last if moves[n] > 1e-6 * max(moves.values())]
    ratios = [((params[n] - last[n]) ** 2).sum() / ((first[n] - last[n]) ** 2).sum() for n in moving]
    assert not any("key.bias" in n for n in moving), "softmax does not see them, and rounding moves them"
    assert trained_loss(by_tensor) == pytest.approx(float(sum(ratios) / len(ratios)), rel=1e-9)
    head = dataclasses.replace(goal, match=lambda name: name.startswith("classifier")).problem(start, 1, 2, 3)
    names = [n for n in last if n.startswith("classifier")]
    gap, went = (sum(((a[n] - last[n]) ** 2).sum() for n in names) for a in (params, first))
    assert trained_loss(head) == pytest.approx(float(gap / went), rel=1e-9)


def test_standing_still_costs_one(exact, experts, start):
    goal = matching(exact, experts, steps=1, optimizer=dk.SGD(1e-300))
    assert trained_loss(goal.problem(start, 0, 0, 2)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("span", [(0, 0, 4), (1, 1, 3), (0, 3, 4)])
def test_an_expert_follows_itself(exact, experts, span):
    """With its own batches and its own optimiser's state: the same steps, the same end."""
    assert matching(exact, experts).replayed(*span) <= 1e-20


def test_the_experts_state_is_handed_over(exact, experts, start):
    with_state = matching(exact, experts, optimizer=ADAM, student_state="expert")
    problem, fresh = (g.problem(start, 0, 2, 4) for g in (with_state, dataclasses.replace(with_state, student_state="fresh")))
    assert problem.start()[1]["count"] == 4 and fresh.start()[1]["count"] == 0, "half of two epochs of four steps"
    assert trained_loss(problem) != trained_loss(fresh)


def test_segments_are_drawn_within_bounds(exact, experts):
    goal = matching(exact, experts, expert_epochs=1, max_start_epoch=0.5)
    drawn = {goal.segment(seed) for seed in range(60)}
    assert drawn == {(e, s, s + 2) for e in (0, 1) for s in (0, 1)}
    assert {goal.segment(s)[1] for s in range(99)} < {matching(exact, experts).segment(s)[1] for s in range(99)} == {0, 1, 2}


# --- its gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "state"), [(dk.SGD(0.05), "fresh"), (ADAM, "fresh"), (ADAM, "expert")])
def test_meta_gradient_against_differences(exact, experts, start, optimizer, state):
    goal = matching(exact, experts, optimizer=optimizer, student_state=state, metagrad=dk.StoreAll())
    span, step = (1, 1, 3), 1e-7
    found = goal.metagrad(goal.problem(start, *span))
    replay = dk.Replay()(goal.problem(start, *span))
    assert torch.allclose(found.embeds, replay.embeds, rtol=0, atol=1e-9 * float(found.embeds.abs().max()))
    direction = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [
        trained_loss(goal.problem(dataclasses.replace(start, embeds=start.embeds + s * step * direction, tokens=None), *span))
        for s in (1, -1)
    ]
    assert float((found.embeds * direction).sum()) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5)


def test_several_segments_are_averaged(exact, experts, start):
    goal = matching(exact, experts, segments=3, expert_epochs=0.5)
    whole = meta_gradient(start, goal, seed=5)
    single = [goal.metagrad(goal.problem(start, *goal.segment(5, member))) for member in range(3)]
    assert whole.loss == pytest.approx(sum(s.loss for s in single) / 3)
    assert torch.allclose(whole.embeds, sum(s.embeds for s in single) / 3)


def test_a_segment_that_comes_again_draws_other_windows_and_masks(exact, experts, start):
    """There is one segment only, from epoch 0 to 2, of either expert."""
    windows = matching(exact, experts, steps=5, expert_epochs=2, metagrad=dk.Truncated(2, place="random"))
    ends = [int(meta_gradient(start, windows, seed=seed).step_sizes.nonzero().max()) for seed in range(24)]
    assert sorted(set(ends)) == [1, 2, 3, 4] and min(map(ends.count, set(ends))) >= 2
    dropout = matching(exact, experts, expert_epochs=2)
    dropout = dataclasses.replace(dropout, unroll=dataclasses.replace(dropout.unroll, dropout=True))
    first, *others = (seed for seed in range(9) if dropout.segment(seed)[0] == 0)
    losses = [meta_gradient(start, dropout, seed=seed).loss for seed in (first, first, *others[:2])]
    assert losses[0] == losses[1] and len(set(losses)) == 3


# --- learning --------------------------------------------------------------------------------------------------------


class Line:
    """Least squares on one example: one SGD step of size η from 0 leads to 2ηyx."""

    name, trainable, weights, device, dtype, width, tokenizer = "line", "full", "random", "cpu", torch.float64, 3, None
    attention, trained_names = "eager", ("w",)
    device = torch.device("cpu")

    def loss(self, params, batch, targets, *, dropout_seed=None):
        said = batch["inputs_embeds"][:, 0] @ params["w"]
        return (said - targets[:, 0]).square().mean()


class OneExpert:
    """From 0 to ``end`` in one epoch."""

    def __init__(self, end):
        self.end, self.folder, self.epochs, self.snapshots, self.sha256 = end, "memory", 1, 2, "0"
        self.settings = {"snapshots_per_epoch": 1, "optimizer": {"name": "SGD", "step_size": 0.1, "clip_norm": None}}

    def __len__(self):
        return 1

    def check(self, student, task):
        pass

    def snapshot(self, expert, index, *, state=True):
        return {"w": self.end if index else torch.zeros_like(self.end)}, {}


def test_the_known_optimum_is_found():
    """The example that leads from 0 to w* in one step of size η at target y is x = w*/(2ηy)."""
    end, eta, y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.1, 1.5
    goal = dk.TrajectoryMatching(None, Line(), dk.Unroll(1, optimizer=dk.SGD(eta)), OneExpert(end), metagrad=dk.Replay())
    one = torch.ones(1, 1, dtype=torch.bool)
    start = dk.DistilledSet(
        torch.ones(1, 1, 3, dtype=torch.float64), one, one, torch.tensor([[y]], dtype=torch.float64),
        meta={"task": "line", "task_fingerprint": "0"},
    )
    distiller = dk.Distiller(start, goal, lr=0.3, learn=("embeds",))
    losses = [record.loss for record in distiller.run(300)]
    assert losses[-1] < 1e-6 < losses[0]
    assert torch.allclose(distiller.distilled.embeds[0, 0], end / (2 * eta * y), rtol=1e-3)


def test_a_few_steps_bring_the_student_nearer(exact, experts, start):
    goal = matching(exact, experts, optimizer=ADAM, expert_epochs=0.5, max_start_epoch=0)
    distiller = dk.Distiller(start, goal, lr=0.003, regularizers=[dk.NeighborLoss(exact[1], weight=0.01)])
    records = list(distiller.run(12))
    before, after = (sum(trained_loss(goal.problem(d, e, 0, 1)) for e in (0, 1)) for d in (start, distiller.distilled))
    assert after < before
    assert all(r.loss == pytest.approx(r.terms["outer"] + 0.01 * r.terms["neighbor"]) for r in records)
    recipe = distiller.distilled.meta["recipe"]
    assert recipe["objective"] == "TrajectoryMatching" and recipe["experts"]["epochs"] == 2
    assert dk.evaluate(distiller.distilled, *exact, seeds=(0,)).recipe["name"] == "own"


def test_the_search_for_a_step_size(exact, experts, start, monkeypatch):
    goal = matching(exact, experts)
    best, losses = search_step_size(start, goal, candidates=(1e-4, 1e-2, 1e30), tries=2)
    assert losses[1e30] > 1e6 and losses[best] == min(losses.values())
    trial = dataclasses.replace(goal, unroll=dataclasses.replace(goal.unroll, optimizer=dk.SGD(1e-2)))
    problems = [next(trial.problems(start, dk.derive_seed("search-step-size", 0, member))) for member in (0, 1)]
    assert losses[1e-2] == pytest.approx(sum(map(trained_loss, problems)) / 2)
    monkeypatch.setattr(objectives, "trained_loss", lambda problem: float("nan"))
    with pytest.raises(ValueError, match=r"training diverges at every step size tried, 1e\+30; try smaller ones"):
        search_step_size(start, goal, candidates=(1e30,), tries=1)


# --- the neighbour term ----------------------------------------------------------------------------------------------


def test_neighbor_loss_against_brute_force(exact, start):
    student, term = exact[1], dk.NeighborLoss(exact[1], weight=2.0)
    noise = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = (start.embeds + 0.02 * noise).requires_grad_()
    words = student.embedding[allowed_tokens(student.tokenizer, len(student.embedding))]
    expected = torch.cdist(moved[start.free], words).min(1).values.square().mean()
    (gradient,) = torch.autograd.grad(expected, moved)
    value, found = term(dataclasses.replace(start, embeds=moved.detach(), tokens=None))
    assert value == pytest.approx(float(expected), rel=1e-9)
    assert torch.allclose(found, gradient, atol=1e-12) and not found[~start.free].any()
    assert term(start)[0] == pytest.approx(0, abs=1e-15), "real tokens are their own neighbours"


def test_the_neighbor_term_pulls_towards_words(exact, experts, start):
    goal, ends = matching(exact, experts), []
    noise = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    away = dataclasses.replace(start, embeds=start.embeds + 0.05 * noise * start.free.unsqueeze(-1), tokens=None)
    for weight in (0.0, lambda progress: 1000 * progress):
        term = dk.NeighborLoss(exact[1], weight=weight)
        distiller = dk.Distiller(away, goal, lr=0.005, learn=("embeds",), regularizers=[term])
        list(distiller.run(10))
        ends.append(term(distiller.distilled)[0])
    assert ends[1] < 0.5 * ends[0]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), "much", True, lambda progress: -progress])
def test_a_bad_weight(exact, start, experts, weight):
    with pytest.raises(ValueError, match="the weight of NeighborLoss"):
        list(dk.Distiller(start, matching(exact, experts), regularizers=[dk.NeighborLoss(exact[1], weight=weight)]).run(2))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"expert_epochs": 3}, r"expert_epochs must be a number in \(0, 2\], not 3"),
    ({"expert_epochs": 0.3}, "expert_epochs must be a whole number of snapshots, 2 of which make an epoch, not 0.3"),
    ({"expert_epochs": 0}, "expert_epochs must be .* not 0"),
    ({"max_start_epoch": 1.5}, r"max_start_epoch must be a number in \[0, 1\], not 1.5"),
    ({"student_state": "both"}, "student_state must be one of fresh, expert, not 'both'"),
    ({"student_state": "expert"}, "student_state='expert' hands over the state of AdamW, which SGD cannot use"),
    ({"distance": "far"}, "distance must be one of whole, tensor, not 'far'"),
    ({"segments": 0}, "segments must be a whole number of at least 1, not 0"),
    ({"match": lambda name: False}, "match must be a function .* true for at least one"),
])
def test_bad_settings(exact, experts, options, message):
    with pytest.raises(ValueError, match=message):
        matching(exact, experts, **options)


def test_experts_of_another_student(exact, experts, standin_hub):
    other = dk.load_student("distilbert-base-uncased", exact[0], dtype="float64")
    with pytest.raises(ValueError, match="were made with another student"):
        dk.TrajectoryMatching(exact[0], other, dk.Unroll(1), experts)


def test_an_expert_that_did_not_move(exact, experts, start):
    still = SimpleNamespace(settings=experts.settings, folder="here", epochs=2, snapshots=5, check=lambda *a: None,
                            snapshot=lambda e, i, state=True: experts.snapshot(0, 0))
    with pytest.raises(ValueError, match="the expert did not move between the two snapshots"):
        matching(exact, still).problem(start, 0, 0, 2)
