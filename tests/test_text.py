"""Ways to text: swaps that only help, gradients that pass through the projection, and labels that are learned apart."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.core.problem import MetaGradient
from distillkit.text.judges import FrozenJudge, StudentJudge, Swap
from distillkit.text.projection import ThroughProjection, allowed_tokens, corpus_tokens, relabel, with_tokens
from distillkit.text.relaxed import relax_tokens
from distillkit.text.sentences import nearest_sentences, search_sentences
from distillkit.text.swaps import SwapSearch


@pytest.fixture
def start(world):
    return dk.select(*world, "random", per_class=2, length=8)


@pytest.fixture
def goal(world):
    return dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)


def judges(world, goal):
    return [FrozenJudge(*world, steps=20, batch_size=16), *([StudentJudge(goal, tries=2)] if goal else [])]


@pytest.fixture(params=[0, 1], ids=["frozen", "student"])
def judge(request, world, goal):
    return judges(world, goal)[request.param]


def swapped(start, student, *swaps):
    tokens = start.tokens.clone()
    for swap in swaps:
        tokens[swap.example, swap.position] = swap.new
    return with_tokens(start, student, tokens)


# --- judges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["frozen", "student"])
def test_a_judges_gradient_is_that_of_its_loss(task, standin_hub, which):
    """Central differences in float64 along a few directions."""
    student = dk.load_student("bert-base-uncased", task, dtype="float64")
    goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
    judge, start = judges((task, student), goal)[which], dk.select(task, student, "random", per_class=2, length=8)
    _, gradient = judge.gradient(start, 3)
    assert gradient.shape == start.embeds.shape
    for seed in range(3):
        way = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(seed)).double()
        sides = [judge.gradient(dataclasses.replace(start, embeds=start.embeds + e * way), 3)[0] for e in (1e-7, -1e-7)]
        assert (sides[0] - sides[1]) / 2e-7 == pytest.approx(float((gradient * way).sum()), rel=1e-4, abs=1e-9)


def test_a_judge_tells_what_swaps_would_do(world, start, judge):
    one, other = Swap(0, 2, 30), Swap(3, 4, 40)
    found = judge.losses(start, [[], [one], [one, other]], 5)
    after = [swapped(start, world[1]), swapped(start, world[1], one), swapped(start, world[1], one, other)]
    assert found == pytest.approx([judge.gradient(s, 5)[0] for s in after], abs=1e-5)
    assert len({round(loss, 7) for loss in found}) == 3, "swaps make a difference"
    assert judge.losses(start, [[]], 6) != judge.losses(start, [[]], 5), "fresh rows at each address"


def test_the_frozen_judge_is_softmax_regression_on_what_it_says(world, start):
    """Against a linear layer trained by torch.optim on the same representations."""
    task, student = world
    judge = FrozenJudge(*world, steps=7, batch_size=None)
    every = parts(student, task.batch(student.tokenizer, "train", range(len(task.train))))
    ours = parts(student, {"inputs_embeds": start.embeds, "attention_mask": start.mask.long()})
    sizes = [(b - b.mean(0)).square().sum(1).mean().sqrt() for b in every]
    x, real = (
        torch.cat([(a - b.mean(0)) / size for a, b, size in zip(which, every, sizes, strict=True)], 1) / len(every) ** 0.5
        for which in (ours, every)
    )
    head = torch.nn.Linear(x.shape[1], 2, bias=False)
    torch.nn.init.zeros_(head.weight)
    sgd = torch.optim.SGD(head.parameters(), lr=float(2 * len(x) / torch.linalg.matrix_norm(x, 2) ** 2))
    for _ in range(7):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(head(x), start.targets).backward()
        sgd.step()
    expected = torch.nn.functional.cross_entropy(head(real), torch.from_numpy(task.labels("train"))).item()
    assert judge.losses(start, [[]], 0)[0] == pytest.approx(expected, abs=1e-5)
    assert judge.losses(start.soften(0.999999), [[]], 0)[0] == pytest.approx(expected, abs=1e-4), "soft labels too"


def parts(student, batch):
    """The mean over tokens and the first token of each layer, from the module itself."""
    inputs = batch.get("inputs_embeds", student.embedding[batch["input_ids"]] if "input_ids" in batch else None)
    mask = batch["attention_mask"]
    with torch.no_grad():
        found = student.module(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
    means = [(h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True) for h in found]
    return [*means, *(h[:, 0] for h in found)]


def test_judging_is_the_same_in_one_go_or_several(world, start, judge):
    swaps = [[Swap(i % 4, 1 + i % 6, 20 + i)] for i in range(9)]
    together = judge.losses(start, swaps, 1)
    assert together == pytest.approx([judge.losses(start, [group], 1)[0] for group in swaps], abs=1e-5)


def test_a_student_judge_stays_with_the_parts_that_fit(world, start, monkeypatch):
    """Only the first gradient pays for the attempt that runs out of memory."""
    loss = dk.Student.loss

    def of_four_at_most(self, params, batch, targets, **options):
        if len(targets) > 4:
            raise torch.OutOfMemoryError(f"{len(targets)} examples")
        return loss(self, params, batch, targets, **options)

    goal = dk.BPTT(*world, dk.Unroll(1, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8, micro_batch=8)
    judge = StudentJudge(goal, tries=2)
    expected = [judge.gradient(start, seed)[1] for seed in (0, 1)]
    monkeypatch.setattr(dk.Student, "loss", of_four_at_most)
    with pytest.warns(UserWarning, match="out of memory"):
        first = judge.gradient(start, 0)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = judge.gradient(start, 1)[1]
    assert judge.objective.micro_batch == 4 and goal.micro_batch == 8
    assert torch.allclose(first, expected[0], atol=1e-6) and torch.allclose(second, expected[1], atol=1e-6)


def test_the_frozen_judge_wants_classes(world):
    task = dk.load_task("docstrings_qa:library", max_length=64, limit=20)
    with pytest.raises(ValueError, match="needs classes.*StudentJudge"):
        FrozenJudge(task, world[1])


SECRET = 25


@dataclasses.dataclass
class Planted:
    """A judge of one's own, which the kit knows nothing of: it wants one word at one place and nothing else."""

    student: dk.Student

    def gradient(self, distilled, seed):
        embeds = distilled.embeds.clone().requires_grad_()
        loss = (embeds[0, 2] - self.student.embedding[SECRET]).square().sum()
        return loss.item(), torch.autograd.grad(loss, embeds)[0]

    def losses(self, distilled, swaps, seed):
        return [self.gradient(swapped(distilled, self.student, *group), seed)[0] for group in swaps]

    def describe(self):
        return {"name": "Planted"}


# --- whole sentences -------------------------------------------------------------------------------------------------


def test_searched_sentences_are_real_of_their_class_and_never_worse(world, start):
    task, student = world
    judge = FrozenJudge(*world, steps=20, batch_size=None)
    found = search_sentences(start, task, student, judge, steps=6, candidates=8, sentences=24)
    losses = found.meta["search"]["losses"]
    assert all(after <= before for before, after in losses) and losses[-1][1] < losses[0][0], "the rows are all, so it falls"
    assert losses[-1][1] == pytest.approx(judge.losses(found, [[]], 0)[0], abs=1e-3), "what stands there is what was judged"
    assert found.meta["labels"] == start.meta["labels"] and torch.equal(found.targets, start.targets)
    ids = task.token_ids(student.tokenizer, "train")
    for row, free, label in zip(found.tokens, found.free, found.meta["labels"], strict=True):
        words = row[free].tolist()
        own = [i[1:-1] for i, y in zip(ids, task.labels("train"), strict=True) if y == label]
        assert any(words[: len(sentence)] == sentence[: len(words)] for sentence in own), "begins with a sentence of its class"
    assert len({tuple(row) for row in found.tokens.tolist()}) == len(found)


def test_a_step_finds_the_best_sentence_there_is(world):
    """One example of each class, every sentence a candidate: brute force says which single change is best."""
    start, judge = dk.select(*world, "random", per_class=1, length=8), FrozenJudge(*world, steps=20, batch_size=None)
    found = search_sentences(start, *world, judge, steps=1, candidates=500, sentences=30)
    from distillkit.text.sentences import _pool

    pool, labels = _pool(*world, 30, start.embeds.shape[1], 0), judge.labels(start)
    x, own = judge.features(pool), judge.features(start)
    every = [own.index_copy(0, torch.tensor([pool.meta["labels"][n]]), x[n][None]) for n in range(len(pool))]
    losses = judge.head_losses(torch.stack(every), labels, 0)
    assert found.meta["search"]["losses"][0][1] <= round(float(losses.min()), 4) + 1e-4


def test_a_search_for_sentences_wants_representations(world, start, goal):
    with pytest.raises(TypeError, match="^judge must .*features"):
        search_sentences(start, *world, StudentJudge(goal))


# --- swaps -----------------------------------------------------------------------------------------------------------


def test_no_step_makes_the_loss_on_its_rows_worse(world, start, judge):
    search = SwapSearch(start, world[1], judge, candidates=8)
    before = start
    for record in search.run(4):
        there = judge.losses(before, [[], list(record.swaps)], dk.derive_seed("swap", 0, record.step - 1))
        assert record.before == pytest.approx(there[0], abs=1e-6) and record.after == pytest.approx(there[1], abs=1e-6)
        assert record.after < record.before or (not record.swaps and record.after == record.before)
        before = swapped(before, world[1], *record.swaps)
    assert torch.equal(search.distilled.tokens, before.tokens)
    assert any(record.swaps for record in search.records), "something was found"


def test_a_step_may_look_at_a_few_sentences_in_turn(world, start):
    judge = FrozenJudge(*world, steps=20, batch_size=16)
    few = torch.tensor([1, 3])
    loss, gradient = judge.gradient(start, 3, few)
    whole, every = judge.gradient(start, 3)
    assert loss == pytest.approx(whole, abs=1e-6) and torch.allclose(gradient[few], every[few], atol=1e-6)
    assert not gradient[[0, 2]].any()
    search = SwapSearch(start, world[1], judge, candidates=8, examples=2)
    seen = [{swap.example for swap in record.swaps} for record in search.run(4)]
    assert any(seen) and all(len(examples) <= 2 for examples in seen)
    assert set(search._seen(0).tolist()) | set(search._seen(1).tolist()) == {0, 1, 2, 3}, "all have had their turn"


def test_only_allowed_tokens_at_free_positions(world, start):
    allowed = allowed_tokens(world[1].tokenizer, len(world[1].embedding)) & (torch.arange(len(world[1].embedding)) % 3 == 0)
    search = SwapSearch(start, world[1], judges(world, None)[0], candidates=16, allowed=allowed)
    list(search.run(6))
    found = search.distilled
    changed = found.tokens != start.tokens
    assert changed.any() and not (changed & ~start.free).any()
    assert allowed[found.tokens[changed]].all()
    assert torch.equal(found.embeds, world[1].embedding[found.tokens])
    assert found.meta["text"] != start.meta["text"] and "recipe" not in found.meta
    assert found.meta["search"]["swaps"] == sum(len(r.swaps) for r in search.records)


def test_a_planted_word_is_found(world):
    """One word's embedding makes every class of the judge what it is: the search puts it where it belongs."""
    start = dk.select(*world, "random", per_class=1, length=6)
    search = SwapSearch(start, world[1], Planted(world[1]), candidates=8)
    list(search.run(10))
    assert search.distilled.tokens[0, 2] == SECRET
    assert search.records[-1].after == 0 and (search.distilled.tokens != start.tokens).sum() == 1


def test_the_same_seed_finds_the_same_text(world, start):
    def found(seed):
        search = SwapSearch(start, world[1], judges(world, None)[0], candidates=8, seed=seed)
        list(search.run(3))
        return search.distilled.tokens

    assert torch.equal(found(1), found(1)) and not torch.equal(found(1), found(2))


def test_a_swap_is_not_judged_again_before_its_sentence_changes(world, start):
    class Deaf:
        seen: list = []

        def gradient(self, distilled, seed):
            return 1.0, torch.ones_like(distilled.embeds)

        def losses(self, distilled, swaps, seed):
            self.seen.extend(s for group in swaps for s in group)
            return [1.0] * len(swaps)

        def describe(self):
            return {"name": "Deaf"}

    search = SwapSearch(start, world[1], Deaf(), candidates=6)
    list(search.run(4))
    assert len(Deaf.seen) == len(set(Deaf.seen)) > 6


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(world, start, tmp_path):
    def search(**options):
        return SwapSearch(start, world[1], judges(world, None)[0], candidates=8, **options)

    whole = search()
    list(whole.run(5))
    half = search(checkpoint=tmp_path / "search", checkpoint_every=2)
    for record in half.run(5):
        if record.step == 3:
            break
    resumed = search(checkpoint=tmp_path / "search")
    assert len(resumed.records) == 3, "a search that is left saves its last step"
    list(resumed.run(5))
    assert torch.equal(resumed.distilled.tokens, whole.distilled.tokens)
    assert [r.swaps for r in resumed.records] == [r.swaps for r in whole.records]
    assert resumed.distilled.meta == whole.distilled.meta
    with pytest.raises(ValueError, match="other settings: seed is 0 there and 1 here"):
        search(checkpoint=tmp_path / "search", seed=1)
    other = dataclasses.replace(start, targets=1 - start.targets)
    with pytest.raises(ValueError, match="other settings: start is"):
        SwapSearch(other, world[1], judges(world, None)[0], candidates=8, checkpoint=tmp_path / "search")


def test_a_search_needs_tokens_and_something_to_choose_from(world, start):
    judge = judges(world, None)[0]
    with pytest.raises(ValueError, match="project it first"):
        SwapSearch(dataclasses.replace(start, tokens=None), world[1], judge)
    with pytest.raises(ValueError, match="no token to choose"):
        SwapSearch(start, world[1], judge, allowed=torch.zeros(len(world[1].embedding), dtype=torch.bool))
    with pytest.raises(ValueError, match="candidates must be"):
        SwapSearch(start, world[1], judge, candidates=0)


def test_corpus_tokens_are_words_that_occur(world):
    task, student = world
    once, often = corpus_tokens(task, student, least=1), corpus_tokens(task, student, least=30)
    seen = {i for ids in task.token_ids(student.tokenizer, "train") for i in ids}
    assert set(once.nonzero().flatten().tolist()) <= seen and often.sum() < once.sum()
    assert not once[student.tokenizer.all_special_ids].any()


# --- relaxed choice --------------------------------------------------------------------------------------------------


def test_a_relaxed_choice_finds_a_planted_word_and_leaves_the_others(world):
    start = dk.select(*world, "random", per_class=1, length=6)
    found = relax_tokens(start, world[1], Planted(world[1]), steps=60)
    assert found.tokens[0, 2] == SECRET and (found.tokens != start.tokens).sum() == 1
    losses = found.meta["search"]["losses"]
    assert losses[-1] < 0.01 * losses[0]


def test_a_relaxed_choice_ends_in_allowed_words_that_the_judge_likes_better(world, start, judge):
    student = world[1]
    allowed = allowed_tokens(student.tokenizer, len(student.embedding)) & (torch.arange(len(student.embedding)) % 3 == 0)
    found = relax_tokens(start, student, judge, steps=12, allowed=allowed)
    assert allowed[found.tokens[start.free]].all() and torch.equal(found.tokens[~start.free], start.tokens[~start.free])
    assert torch.equal(found.embeds, student.embedding[found.tokens])
    assert torch.equal(found.targets, start.targets) and "recipe" not in found.meta
    assert found.meta["text"] == with_tokens(start, student, found.tokens).meta["text"] != start.meta["text"]
    again = [relax_tokens(start, student, judge, steps=12, allowed=allowed, seed=seed) for seed in (0, 1)]
    assert torch.equal(again[0].tokens, found.tokens) and not torch.equal(again[1].tokens, found.tokens)
    everything = FrozenJudge(*world, steps=20, batch_size=None)
    better = relax_tokens(start, student, everything, steps=40)
    assert everything.losses(better, [[]], 0) < everything.losses(start, [[]], 0)


def test_the_first_mixture_is_mostly_the_text_itself(world, start):
    """Its loss is that of the embeddings put together by hand: nine tenths the token, the rest of all the others."""
    judge, student = judges(world, None)[0], world[1]
    words = allowed_tokens(student.tokenizer, len(student.embedding))
    table, here = student.embedding[words], student.embedding[start.tokens]
    others = (table.sum(0) - here) / (len(table) - 1)
    mixed = torch.where(start.free.unsqueeze(-1), 0.9 * here + 0.1 * others, here)
    expected, _ = judge.gradient(dataclasses.replace(start, embeds=mixed), dk.derive_seed("relax", 0, 0))
    found = relax_tokens(start, student, judge, steps=1)
    assert words[start.tokens[start.free]].all()
    assert found.meta["search"]["losses"] == [pytest.approx(expected, abs=2e-4)]


def test_a_relaxed_choice_stops_where_the_judge_is_lost(world, start):
    class Lost(Planted):
        def gradient(self, distilled, seed):
            return float("nan"), torch.zeros_like(distilled.embeds)

    with pytest.raises(FloatingPointError, match="step 1: the judge's loss is nan"):
        relax_tokens(start, world[1], Lost(world[1]))
    with pytest.raises(ValueError, match="project it first"):
        relax_tokens(dataclasses.replace(start, tokens=None), world[1], Planted(world[1]))


# --- learned embeddings ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlantedGradient:
    """A way to form the meta-gradient that wants what :class:`Planted` wants."""

    student: dk.Student
    name = "Planted"

    def __call__(self, problem):
        loss, gradient = Planted(self.student).gradient(problem, 0)
        return MetaGradient(loss, gradient, None, torch.zeros_like(problem.step_sizes))

    def describe(self):
        return {"name": self.name}


@pytest.mark.parametrize("way", ["projection", "neighbor loss", "through projection"])
def test_embeddings_that_are_learned_end_at_a_planted_word(world, way):
    start = dk.select(*world, "random", per_class=1, length=6)
    goal = dk.BPTT(*world, dk.Unroll(2), metagrad=PlantedGradient(world[1]), batch_size=8)
    terms = [dk.NeighborLoss(world[1], weight=lambda at: 0.1 * at)] if way == "neighbor loss" else []
    if way == "through projection":
        goal = ThroughProjection(goal)
    distiller = dk.Distiller(start, goal, lr=0.02, regularizers=terms)
    list(distiller.run(60))
    found = dk.project(distiller.distilled, world[1])
    assert start.tokens[0, 2] != SECRET and found.tokens[0, 2] == SECRET
    assert (found.tokens != start.tokens).sum() == 1


# --- through the projection ------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_projected_set(world, start, goal):
    """Straight through: embeddings that moved within their tokens' cells get the gradient taken at the tokens."""
    start = start.soften()
    noise = 1e-3 * torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(0)) * start.free.unsqueeze(-1)
    moved = dataclasses.replace(start, embeds=start.embeds + noise, tokens=None)
    through = dk.meta_gradient(moved, ThroughProjection(goal), seed=4)
    at_tokens = dk.meta_gradient(start, goal, seed=4)
    assert through.loss == at_tokens.loss
    assert torch.equal(through.embeds, at_tokens.embeds) and torch.equal(through.targets, at_tokens.targets)
    assert not torch.equal(dk.meta_gradient(moved, goal, seed=4).embeds, at_tokens.embeds)


def test_learning_through_the_projection_changes_tokens(world, start, goal):
    distiller = dk.Distiller(start.soften(), ThroughProjection(goal), lr=0.05)
    list(distiller.run(6))
    found = dk.project(distiller.distilled, world[1])
    assert (found.tokens != start.tokens).any()
    assert found.meta["recipe"]["through_projection"] == "l2"
    assert dk.evaluate(found, *world, seeds=(0,), recipe="own").recipe["steps"] == 2


# --- references ------------------------------------------------------------------------------------------------------


def test_nearest_sentences_are_real_and_none_twice(world, start):
    task, student = world
    found = nearest_sentences(start, task, student)
    assert found.meta["labels"] == start.meta["labels"] and len(found) == len(start)
    real = [task.train[int(r)]["text"].lower().split()[0] for r in range(len(task.train))]
    assert all(text.split()[0] in real for text in found.meta["text"])
    again = nearest_sentences(dk.select(*world, "k_center", per_class=3, length=12), task, student)
    assert len({tuple(row) for row in again.tokens.tolist()}) == len(again)


def test_the_nearest_sentence_of_a_real_sentence_is_itself(world):
    task, student = world
    rows = [r[:1] for r in task.rows_by_class("train")]
    batch = task.batch(student.tokenizer, "train", np.concatenate(rows))
    mask = batch["attention_mask"].bool()
    real = dk.DistilledSet(
        student.embedding[batch["input_ids"]], mask, mask, batch["labels"], tokens=batch["input_ids"],
        meta={"labels": batch["labels"].tolist(), "classes": list(task.classes)},
    )
    found = nearest_sentences(real, task, student)
    for said, ids, there in zip(found.tokens, batch["input_ids"], mask, strict=True):
        words = ids[there][1:-1]
        assert torch.equal(said[1 : 1 + len(words)], words)


def test_relabelling_leaves_the_words_alone(world, start, goal):
    found = relabel(start, goal, steps=3)
    assert torch.equal(found.tokens, start.tokens) and torch.equal(found.embeds, start.embeds)
    assert found.soft and not torch.equal(found.targets, start.soften().targets)
    assert found.step_sizes.shape == (2,) and "recipe" in found.meta
    assert found.meta["text"] == start.meta["text"]
