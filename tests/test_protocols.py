"""An optimiser, a strategy, an objective, a recipe and a judge defined outside the package, in use from end to end."""

import dataclasses

import pytest
import torch

import distillkit as dk
from distillkit.core.inner import from_recipe
from distillkit.core.problem import inner_problem
from distillkit.evaluation.recipes import Plan
from distillkit.evaluation.scoring import classified


@pytest.fixture(scope="module")
def exact(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return task, dk.load_student("bert-base-uncased", task, dtype="float64")


@pytest.fixture
def start(exact):
    distilled = dk.DistilledSet.from_real(*exact, per_class=1, length=8, soft_labels=True)
    noise = torch.randn(distilled.embeds.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dataclasses.replace(distilled, embeds=distilled.embeds + 0.1 * noise, tokens=None)


class NormedSteps:
    """θ ← θ − η g / √n with n ← 0.9 n + ‖g‖²: no dataclass, and a state that is one tensor for all parameters."""

    step_size = 0.1

    def init(self, params):
        return {"n": torch.zeros((), dtype=torch.float64)}

    def update(self, params, grads, state, step_size):
        n = 0.9 * state["n"] + sum(g.square().sum() for g in grads.values())
        return {name: p - step_size * grads[name] / n.sqrt() for name, p in params.items()}, {"n": n}


@dataclasses.dataclass(frozen=True)
class Signs:
    """The signs of the exact meta-gradient."""

    inner: object = dk.Replay()

    def __call__(self, problem):
        exact = self.inner(problem)
        return dataclasses.replace(exact, embeds=exact.embeds.sign(), targets=exact.targets.sign())


class FarFromStart:
    """Asks training on the set to move the student as far as it can."""

    unroll, metagrad = dk.Unroll(2, optimizer=dk.SGD(0.5)), dk.StoreAll()

    def __init__(self, student):
        self.student = student

    def problems(self, distilled, seed):
        first = self.student.init(seed)

        def outer(params):
            return -sum((params[name] - p).square().sum() for name, p in first.items())

        yield inner_problem(distilled, self.student, self.unroll, seed, [outer])

    def recipe(self):
        return {"objective": "FarFromStart", **self.unroll.recipe()}


def test_an_optimiser_of_ones_own(exact, start):
    goal = dk.BPTT(*exact, dk.Unroll(3, optimizer=NormedSteps()), metagrad=dk.StoreAll(), batch_size=8)
    oracle = dk.meta_gradient(start, goal, seed=1)
    for strategy in (dk.Replay(), dk.Replay(every=2, host=True)):
        found = dk.meta_gradient(start, dataclasses.replace(goal, metagrad=strategy), seed=1)
        for field in ("embeds", "targets", "step_sizes"):
            expected = getattr(oracle, field)
            assert expected.abs().max() > 0
            assert (getattr(found, field) - expected).abs().max() <= 1e-10 * expected.abs().max()
    best, losses = dk.search_step_size(start, goal, candidates=(0.01, 0.3), tries=1)
    assert losses[best] == min(losses.values()) and losses[0.01] != losses[0.3]
    distiller = dk.Distiller(start, goal)
    assert len(list(distiller.run(2))) == 2
    learned = distiller.distilled
    assert dk.evaluate(learned, *exact, seeds=(0,), recipe=goal.unroll).recipe["name"] == "unroll"
    with pytest.raises(ValueError, match=r"NormedSteps.*Own\(optimizer"):  # a recipe is data, and cannot hold the object
        from_recipe(learned.meta["recipe"])
    trained = dk.evaluate(learned, *exact, seeds=(0,), recipe=dk.Own(optimizer=NormedSteps()))
    assert trained.recipe["step_sizes"] == learned.step_sizes.tolist()


@pytest.mark.parametrize("lacking", ["init", "update", "step_size"])
def test_what_an_optimiser_lacks_is_named(lacking):
    members = {"init": NormedSteps.init, "update": NormedSteps.update, "step_size": 0.1}
    members.pop(lacking)
    with pytest.raises(TypeError, match=f"lacks {lacking}"):
        dk.Unroll(2, optimizer=type("Incomplete", (), members)())


def test_a_strategy_of_ones_own(exact, start):
    goal = dk.BPTT(*exact, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=Signs(), batch_size=8)
    distiller = dk.Distiller(start, goal, lr=0.01)
    (record,) = distiller.run(1)
    gradient = dk.Replay()(next(goal.problems(start, dk.derive_seed("distil", 0, 0)))).embeds
    assert record.grad_norm == pytest.approx(float(gradient.sign().norm()))
    moved = distiller.distilled.embeds - start.embeds
    assert torch.equal(moved.sign()[start.free], -gradient.sign()[start.free])
    assert distiller.distilled.meta["recipe"]["metagrad"] == repr(Signs())


def test_an_objective_of_ones_own(exact, start):
    goal = FarFromStart(exact[1])
    through = dk.meta_gradient(start, dk.ThroughProjection(goal), seed=2)
    assert through.embeds.abs().max() > 0
    best, _ = dk.search_step_size(start, goal, candidates=(0.01, 0.1), tries=1)
    assert best == 0.1
    distiller = dk.Distiller(start, goal, lr=0.05, schedule=lambda done: 1.0)
    losses = [record.loss for record in distiller.run(8)]
    assert losses[-1] < losses[0] < 0
    assert dk.evaluate(distiller.distilled, *exact, seeds=(0,)).recipe["name"] == "own"


class Backwards:
    """A recipe: two steps of SGD on the examples from last to first, one at a time."""

    def plan(self, distilled, task, student):
        def feed(t):
            row = [len(distilled) - 1 - t]
            batch = {"inputs_embeds": distilled.embeds[row].to(student.dtype), "attention_mask": distilled.mask[row]}
            return [(1.0, batch, distilled.targets[row].to(student.dtype), None)]

        return lambda seed: Plan(dk.SGD(2.0), torch.full((2,), 2.0), feed, {"name": "backwards", "seed": seed})


def test_a_recipe_of_ones_own(exact):
    task, student = exact
    distilled = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    score = dk.evaluate(distilled, task, student, seeds=(3,), recipe=Backwards())
    assert score.recipe == {"name": "backwards", "seed": 3} and str(score).endswith("backwards)") and score.flops > 0
    params = student.init(dk.derive_seed("evaluate-init", 3))
    for row in (1, 0):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        batch = {"inputs_embeds": distilled.embeds[[row]], "attention_mask": distilled.mask[[row]]}
        loss = -(distilled.targets[row].softmax(-1) * student.logits(leaves, batch).log_softmax(-1)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        params = {n: p.detach() - 2.0 * g for (n, p), g in zip(leaves.items(), grads)}
    assert score.scores == (classified(student, params, task, "test").mean(),)
    text = dk.select(task, student, "random", per_class=1, length=8)
    assert dk.transfer(text, task, student, seeds=(0,), recipe=Backwards()).recipe["name"] == "backwards"


@dataclasses.dataclass
class Length:
    """A judge: the squared norm of all embeddings, which the shortest vector of the table lowers most."""

    student: dk.Student

    def gradient(self, distilled, seed):
        return float(distilled.embeds.square().sum()), 2 * distilled.embeds

    def losses(self, distilled, swaps, seed):
        sets = [distilled.tokens.clone() for _ in swaps]
        for tokens, group in zip(sets, swaps, strict=True):
            for swap in group:
                tokens[swap.example, swap.position] = swap.new
        return [float(self.student.embedding[tokens].square().sum()) for tokens in sets]

    def describe(self):
        return {"name": "Length"}


def test_a_judge_of_ones_own(exact):
    task, student = exact
    start = dk.select(task, student, "random", per_class=1, length=6)
    allowed = dk.corpus_tokens(task, student)
    search = dk.SwapSearch(start, student, Length(student), candidates=16, allowed=allowed)
    records = list(search.run(12))
    assert records[-1].after < records[0].before and search.distilled.meta["search"]["judge"] == {"name": "Length"}
    relaxed = dk.relax_tokens(start, student, Length(student), steps=40, allowed=allowed)
    assert relaxed.embeds.square().sum() < start.embeds.square().sum() and (relaxed.tokens != start.tokens).any()
