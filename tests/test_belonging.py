"""What a set belongs to: one embedding table, whatever else is as wide, and classes that are told by their names."""

import dataclasses
import hashlib

import pytest
import torch
from safetensors.torch import load_file

import distillkit as dk
from distillkit.applications import merging
from distillkit.applications.processes import team
from distillkit.applications.publish import card, load_published, save_published
from distillkit.applications.trainer import Examples
from distillkit.core.problem import bound_step_sizes
from distillkit.view.lens import panes
from distillkit.view.measures import attention, distance_to_words, history

# As wide as each other; the first two read the same tokens.
BERT, DISTILBERT, OPT = "bert-base-uncased", "distilbert-base-uncased", "facebook/opt-1.3b"
DTYPES = ("float32", "float64", "bfloat16")
UNROLL = dk.Unroll(2, optimizer=dk.SGD(0.3))


@pytest.fixture(scope="module")
def load(standin_home):
    import standin_hub

    def loaded(name, task, **options):
        with standin_hub.patched(standin_home):
            return dk.load_student(name, task, **options)

    return loaded


@pytest.fixture(scope="module")
def other(load, task):
    return load(DISTILBERT, task)


@pytest.fixture(scope="module")
def text(world):
    return dk.select(*world, "random", per_class=2, length=8)


@pytest.fixture(scope="module")
def learned(world, text):
    """Free embeddings with soft labels, step sizes and a recipe."""
    noise = 0.05 * torch.randn(text.embeds.shape, generator=torch.Generator().manual_seed(0))
    moved = dataclasses.replace(text.soften(), embeds=text.embeds + noise * text.free[..., None], tokens=None)
    return merging.with_recipe(moved, UNROLL, world[1])


# --- the embedding table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BERT, "roberta-base", OPT, "gpt2"])
def test_a_table_is_that_of_the_checkpoint(load, task, standin_home, name):
    """In whatever precision and for whatever training it is loaded."""
    folder = next((standin_home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())
    ends = ("word_embeddings.weight", "wte.weight", "embed_tokens.weight")
    table = next(value for key, value in load_file(folder / "model.safetensors").items() if key.endswith(ends))
    options = [*({"dtype": dtype} for dtype in DTYPES), {"trainable": "lora"}, {"weights": "random"}]
    found = {load(name, task, **chosen).table_sha256 for chosen in options}
    assert found == {hashlib.sha256(table.numpy().tobytes()).hexdigest()}


def test_a_checkpoint_saved_in_half_the_bits_has_a_table_of_its_own(world, load, task, tmp_path):
    """Rounded rows are other rows; and they are the same ones in every precision that holds them."""
    _, student = world
    rounded = load(BERT, task, dtype="bfloat16")
    rounded.module.save_pretrained(tmp_path / "model")
    rounded.tokenizer.save_pretrained(tmp_path / "model")
    rounded.module.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    rounded.tokenizer.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    folders = (tmp_path / "model", tmp_path / "parts")
    found = {dk.load_student(folder, task, dtype=dtype).table_sha256 for folder in folders for dtype in DTYPES}
    expected = hashlib.sha256(rounded.embedding.float().numpy().tobytes()).hexdigest()
    assert found == {expected} and expected != student.table_sha256 == rounded.table_sha256


def test_offline_students_share_a_table_or_have_their_own(task):
    minilm, distil, small = (dk.load_student(f"offline:{name}", task) for name in ("minilm", "distil-minilm", "small-bert"))
    assert minilm.table_sha256 == distil.table_sha256 != small.table_sha256
    assert dk.load_student("offline:small-bert", task, dtype="bfloat16").table_sha256 == small.table_sha256
    found = dk.DistilledSet.from_real(task, minilm, per_class=1, length=8)
    assert dk.evaluate(found, task, distil, seeds=(0,), recipe=UNROLL).examples == 2, "of one table, so it moves as it is"


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"dtype": "bfloat16"}, {"trainable": "lora"}])
def test_a_set_trains_on_its_student_in_another_precision(learned, load, task, options):
    student = load(BERT, task, **options)
    recipe = None if "dtype" in options else UNROLL  # a recipe of its own says what is trained
    found = dk.evaluate(learned, task, student, seeds=(0,), recipe=recipe)
    assert found.recipe["name"] == ("own" if recipe is None else "unroll") and 0 <= found.mean <= 1
    assert dk.project(learned, student).tokens.shape == learned.mask.shape


def test_every_set_says_which_table_it_belongs_to(world, text, learned, tmp_path, load, asked):
    task, student = world
    swapped = dk.SwapSearch(text, student, dk.FrozenJudge(task, student), candidates=2)
    next(swapped.run(1))
    distiller = dk.Distiller(text.soften(), dk.BPTT(task, student, UNROLL, metagrad=dk.Replay(), batch_size=8))
    next(distiller.run(1))
    sets = {
        "real": dk.DistilledSet.from_real(task, student, per_class=1, length=8),
        "chosen": dk.select(*world, "k_center", per_class=1),
        "written": dk.DistilledSet.from_text(["dull day"], ["neg"], task, student), "distilled": distiller.distilled,
        "projected": dk.project(learned, student), "swapped": swapped.distilled,
        "searched": dk.search_sentences(text, task, student, dk.FrozenJudge(task, student), steps=1, sentences=16),
        "snapped": dk.nearest_sentences(learned, task, student), "merged": merging.merge(learned, learned),
        "retokenized": dk.retokenize(text, task, student), "saved": dk.DistilledSet.load(learned.save(tmp_path / "set")),
        "published": load_published(save_published(learned, tmp_path / "published")),
        "softer": text.soften(), "renamed": merging.renamed(text, {"neg": "bad"}),
    }
    assert {name: found.meta["table_sha256"] for name, found in sets.items()} == dict.fromkeys(sets, student.table_sha256)
    reader = load(OPT, asked)
    prompts = dk.DistilledSet.from_real(asked, reader, fraction=0.05)
    assert prompts.meta["table_sha256"] == reader.table_sha256
    moved = dk.retokenize(text, task, load(DISTILBERT, task))
    assert moved.meta["table_sha256"] != student.table_sha256


@pytest.fixture(scope="module")
def asked(task):
    return dk.questions(task)


def objective(task, student):
    return dk.BPTT(task, student, UNROLL, metagrad=dk.Replay(), batch_size=8)


# Entrance → what is done with a set, a task and a student there. All of them take embeddings as they are.
ENTRANCES = {
    "evaluate": lambda s, t, m: dk.evaluate(s, t, m, seeds=(0,), recipe=UNROLL),
    "project": lambda s, t, m: dk.project(s, m),
    "meta_gradient": lambda s, t, m: dk.meta_gradient(s, objective(t, m)),
    "through projection": lambda s, t, m: dk.meta_gradient(s, dk.ThroughProjection(objective(t, m))),
    "search_step_size": lambda s, t, m: dk.search_step_size(s, objective(t, m), candidates=(0.1,)),
    "Distiller": lambda s, t, m: dk.Distiller(s, objective(t, m)),
    "relabel": lambda s, t, m: dk.relabel(s, objective(t, m), steps=1),
    "nearest_sentences": lambda s, t, m: dk.nearest_sentences(s, t, m),
    "NeighborLoss": lambda s, t, m: dk.NeighborLoss(m, weight=1.0)(s),
    "FrozenJudge.gradient": lambda s, t, m: dk.FrozenJudge(t, m).gradient(s, 0),
    "FrozenJudge.features": lambda s, t, m: dk.FrozenJudge(t, m).features(s),
    "StudentJudge.gradient": lambda s, t, m: dk.StudentJudge(objective(t, m), tries=1).gradient(s, 0),
    "outer_loss": lambda s, t, m: panes.outer_loss(dk.FrozenJudge(t, m), s),
    "Examples": lambda s, t, m: Examples(s, m),
    "card": lambda s, t, m: card(s, "a", student=dataclasses.replace(m, name=s.meta["student"])),
    "continual": lambda s, t, m: merging.continual([t, t], m, [s, s], steps=1, seeds=(0,)),
    "rescaled": lambda s, t, m: merging.rescaled(merging.with_recipe(s, UNROLL, m), t, m, factors=(1.0,), seeds=(0,)),
    "attention": lambda s, t, m: attention(m, s),
    "distance_to_words": lambda s, t, m: distance_to_words(s, m),
    "history": lambda s, t, m: history([s, s], m),
    "candidates": lambda s, t, m: panes.candidates(s, m, 0, 1, k=1),
    "Lens": lambda s, t, m: dk.Lens(s, m),
}
# Those that go by tokens.
TEXT_ENTRANCES = {
    "SwapSearch": lambda s, t, m: dk.SwapSearch(s, m, dk.FrozenJudge(t, m)),
    "relax_tokens": lambda s, t, m: dk.relax_tokens(s, m, dk.FrozenJudge(t, m), steps=1),
    "search_sentences": lambda s, t, m: dk.search_sentences(s, t, m, dk.FrozenJudge(t, m), steps=1, sentences=8),
    "FrozenJudge.losses": lambda s, t, m: dk.FrozenJudge(t, m).losses(s, [[]], 0),
    "StudentJudge.losses": lambda s, t, m: dk.StudentJudge(objective(t, m), tries=1).losses(s, [[]], 0),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_embeddings_of_another_table_are_refused_everywhere(learned, world, other, entrance):
    assert learned.embeds.shape[-1] == other.width, "it is as wide"
    ENTRANCES[entrance](learned, *world)
    with pytest.raises(ValueError, match=f"table of '{BERT}'.* '.*' has another.*text moves.*dk.project"):
        ENTRANCES[entrance](learned, world[0], other)


@pytest.mark.parametrize("entrance", [*ENTRANCES, *TEXT_ENTRANCES])
def test_text_of_another_table_is_refused_and_the_way_across_named(text, world, other, entrance):
    entrances = ENTRANCES | TEXT_ENTRANCES
    entrances[entrance](text, *world)
    with pytest.raises(ValueError, match="has another.*text moves.*dk.transfer"):
        entrances[entrance](text, world[0], other)


def test_text_is_the_way_across(text, world, other):
    """The same sentences arrive as the other student reads them, and are worth the same as if chosen for it."""
    task, _ = world
    moved, chosen = dk.retokenize(text, task, other), dk.select(task, other, "random", per_class=2, length=8)
    assert torch.equal(moved.tokens, chosen.tokens) and torch.equal(moved.embeds, chosen.embeds)
    assert moved.meta["rows"] == chosen.meta["rows"]
    found = dk.transfer(text, task, other, seeds=(0, 1), recipe=UNROLL)
    assert found.scores == dk.evaluate(chosen, task, other, seeds=(0, 1), recipe=UNROLL).scores


def test_sets_of_two_tables_are_not_merged(text, learned, world, other):
    foreign = dk.select(world[0], other, "random", per_class=1, length=8)
    named_alike = dataclasses.replace(foreign, meta={**foreign.meta, "student": BERT})
    for stranger in (foreign, named_alike):
        with pytest.raises(ValueError, match="go through text"):
            merging.merge(text, stranger)
    assert len(merging.merge(text, dk.retokenize(foreign, *world))) == 6


def test_demonstrations_are_read_by_whoever_has_their_table(task, load, asked):
    shots = dk.select(task, load(OPT, task), "random", per_class=1, length=8)
    free = dataclasses.replace(shots, tokens=None)
    reader, stranger = (load(name, asked, trainable="full") for name in (OPT, "gpt2"))
    rows = range(6)
    own = dk.few_shot(asked, reader, free, rows=rows)
    assert dk.few_shot(asked, dataclasses.replace(reader, name="a copy"), free, rows=rows).scores == own.scores
    with pytest.raises(ValueError, match="has another.*text moves"):
        dk.few_shot(asked, stranger, free, rows=rows)
    assert 0 <= dk.few_shot(asked, stranger, shots, rows=rows).mean <= 1, "its text is read by all"


def unsigned(found):
    """As sets were saved before they said which table they belong to."""
    return dataclasses.replace(found, meta={k: v for k, v in found.meta.items() if k != "table_sha256"})


def test_old_sets_are_told_by_what_they_have_of_the_table(text, learned, world, other):
    task, student = world
    scores = [dk.evaluate(s, task, student, seeds=(0,), recipe=UNROLL).scores for s in (unsigned(text), text)]
    assert scores[0] == scores[1]
    assert torch.equal(dk.project(unsigned(learned), student).tokens, dk.project(learned, student).tokens)
    for found in (text, learned):
        with pytest.raises(ValueError, match="its tokens have other embeddings"):
            dk.evaluate(unsigned(found), task, other, seeds=(0,))
    narrow = dataclasses.replace(unsigned(learned), embeds=learned.embeds[..., :16])
    assert dk.project(unsigned(learned), student).meta["table_sha256"] == student.table_sha256
    assert "table_sha256" not in merging.merge(unsigned(learned), learned).meta, "nobody knows of all of it"
    with pytest.raises(ValueError, match="16 wide"):
        dk.evaluate(narrow, task, student, seeds=(0,))


def test_tokens_beyond_the_table_are_named(text, world):
    task, student = world
    end = len(student.embedding)
    tokens = text.tokens.clone()
    tokens[0, 1] = end
    for found in (dataclasses.replace(text, tokens=tokens), unsigned(dataclasses.replace(text, tokens=tokens))):
        with pytest.raises(ValueError, match=f"token {end}, .* ends at {end - 1}"):
            dk.evaluate(found, task, student, seeds=(0,))


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turned(task):
    """The same rows with the classes in the other order."""
    return merging.with_classes(task, ["pos", "neg"])


def in_both_orders(world, turned, rows, **options):
    """Training sentences as a set for each order of the classes."""
    task, student = world
    texts, names = task.train["text"][:rows], [task.classes[label] for label in task.train["label"][:rows]]
    return [dk.DistilledSet.from_text(texts, names, t, student, **options) for t in (task, turned)]


@pytest.fixture(scope="module")
def by_name(world, turned):
    return in_both_orders(world, turned, 12)


@pytest.mark.parametrize("soft", [True, False])
def test_an_order_of_classes_is_no_score(world, turned, soft, load):
    """Scored on the corpus whose classes stand in another order, a set is worth what one made for that order is worth."""
    recipe = dk.Unroll(60, optimizer=dk.AdamW(3e-3))
    one, two = in_both_orders(world, turned, 80, soft_labels=soft)
    assert one.meta["classes"] != two.meta["classes"] and not torch.equal(one.targets, two.targets)
    expected = dk.evaluate(two, turned, load(BERT, turned), seeds=(0,), recipe=recipe)
    assert expected.mean > 0.7, "it teaches, so that a wrong order would show"
    found = dk.evaluate(one, turned, world[1] if soft else load(BERT, turned), seeds=(0,), recipe=recipe)
    assert found.scores == expected.scores and found.groups == expected.groups


def test_retokenized_labels_follow_their_names(by_name, turned, load):
    one, two = by_name
    student = load(DISTILBERT, turned)
    found = dk.retokenize(one, turned, student)
    assert found.meta["classes"] == ["pos", "neg"] and torch.equal(found.targets, two.targets)
    assert found.to_text()["label"][:] == one.to_text()["label"][:]
    scores = [dk.transfer(s, turned, student, seeds=(0,), recipe=UNROLL).scores for s in (one, two)]
    assert scores[0] == scores[1]


def test_judges_gradients_and_searches_follow_the_names(by_name, world, turned):
    one, two = by_name
    student = world[1]
    judge, goal = dk.FrozenJudge(turned, student), objective(turned, student)
    assert judge.losses(one, [[]], 3) == judge.losses(two, [[]], 3)
    assert dk.StudentJudge(goal, tries=1).losses(one, [[]], 3) == dk.StudentJudge(goal, tries=1).losses(two, [[]], 3)
    mine, theirs = (dk.meta_gradient(s, goal, seed=1) for s in (one, two))
    assert mine.loss == theirs.loss and torch.equal(mine.embeds, theirs.embeds)
    assert torch.equal(mine.targets, theirs.targets.flip(1)), "in the order of the set that was asked about"
    with team() as ranks:
        assert torch.equal(dk.meta_gradient(one, ranks.shared(goal), seed=1).targets, mine.targets)
    losses = [dk.search_step_size(s, goal, candidates=(0.1,), tries=1)[1] for s in (one, two)]
    assert losses[0] == losses[1]
    found = [dk.nearest_sentences(s, turned, student) for s in (one, two)]
    assert torch.equal(found[0].tokens, found[1].tokens)
    searched = [dk.search_sentences(s, turned, student, judge, steps=2, sentences=20) for s in (one, two)]
    assert torch.equal(searched[0].tokens, searched[1].tokens) and searched[0].meta["classes"] == ["pos", "neg"]
    assert torch.equal(Examples(one, student.for_task(turned)).labels, two.targets.softmax(1))


def test_what_is_learned_stands_in_the_order_of_the_task(by_name, world, turned):
    one, two = by_name
    results = []
    for start in (one, two):
        distiller = dk.Distiller(start, objective(turned, world[1]), lr=0.05)
        assert len(list(distiller.run(2))) == 2
        results.append(distiller.distilled)
    assert torch.equal(results[0].targets, results[1].targets) and not torch.equal(results[0].targets, two.targets)
    assert results[0].meta["classes"] == ["pos", "neg"] and results[0].meta["labels"] == two.meta["labels"]
    relabelled = dk.relabel(one, objective(turned, world[1]), steps=1)
    assert relabelled.meta["classes"] == ["pos", "neg"]


def test_demonstrations_and_descriptions_go_by_name(by_name, task, load, asked):
    one, two = by_name
    reader, rows = load(OPT, asked, trainable="full"), range(8)
    pairs = [(text, name) for text, name in zip(one.meta["text"], one.to_text()["label"], strict=True)]
    assert len({dk.few_shot(asked, reader, shots, k=2, rows=rows).scores for shots in (one, two, pairs)}) == 1
    assert dk.describe_text(one, task) == dk.describe_text(two, task)


def test_merged_sets_agree_on_names(by_name):
    one, two = by_name
    both = merging.merge(one, two)
    assert both.meta["classes"] == ["neg", "pos"] and torch.equal(both.targets, one.targets.repeat(2, 1))
    assert both.meta["labels"] == one.meta["labels"] * 2


def test_a_stream_replays_by_name(by_name, world, turned):
    one, two = by_name
    student = world[1]
    found = [merging.continual([turned, turned], student, [s, s], steps=3, seeds=(0,)).accuracy for s in (one, two)]
    assert (found[0] == found[1]).all()


@pytest.fixture(scope="module")
def strangers(task):
    """The same rows under names that mean the same to a person."""
    return merging.with_classes(task, {"neg": "negative", "pos": "positive"})


MEETINGS = {
    "evaluate": lambda s, t, m: dk.evaluate(s, t, m, seeds=(0,), recipe=UNROLL),
    "retokenize": lambda s, t, m: dk.retokenize(s, t, m),
    "transfer": lambda s, t, m: dk.transfer(s, t, m, seeds=(0,), recipe=UNROLL),
    "meta_gradient": lambda s, t, m: dk.meta_gradient(s, objective(t, m)),
    "Distiller": lambda s, t, m: dk.Distiller(s, objective(t, m)),
    "FrozenJudge": lambda s, t, m: dk.FrozenJudge(t, m).losses(s, [[]], 0),
    "StudentJudge": lambda s, t, m: dk.StudentJudge(objective(t, m), tries=1).losses(s, [[]], 0),
    "nearest_sentences": lambda s, t, m: dk.nearest_sentences(s, t, m),
    "search_sentences": lambda s, t, m: dk.search_sentences(s, t, m, dk.FrozenJudge(t, m), steps=1, sentences=8),
    "Examples": lambda s, t, m: Examples(s, m),
    "continual": lambda s, t, m: merging.continual([t, t], m, [s, s], steps=1, seeds=(0,)),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_other_names_are_refused_with_both_lists(by_name, strangers, load, meeting):
    student = load(BERT, strangers)
    both = r"\['neg', 'pos'\].*\['negative', 'positive'\]"
    with pytest.raises(ValueError, match=both):
        MEETINGS[meeting](by_name[0], strangers, student)
    renamed = merging.renamed(by_name[0], {"neg": "negative", "pos": "positive"})
    MEETINGS[meeting](renamed, strangers, student)


def test_a_student_for_other_names_is_refused(world, strangers, by_name, tmp_path):
    task, student = world
    for use in (lambda: dk.evaluate(None, strangers, student, seeds=(0,)), lambda: objective(strangers, student),
                lambda: dk.record_experts(strangers, student, tmp_path / "experts"),
                lambda: merging.continual([strangers, strangers], student, steps=1, seeds=(0,))):
        with pytest.raises(ValueError, match=r"\['neg', 'pos'\].*\['negative', 'positive'\]"):
            use()


def test_responses_and_classes_do_not_mix(by_name, world, load, asked):
    reader = load(OPT, asked, trainable="full")
    prompts = dk.DistilledSet.from_real(asked, reader, fraction=0.05)
    with pytest.raises(ValueError, match="different kinds of task"):
        dk.retokenize(prompts, *world)
    with pytest.raises(ValueError, match="different kinds of task"):
        dk.retokenize(by_name[0], asked, reader)


# --- step sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_for", ["float32", "float64"])
def test_step_sizes_are_as_exact_as_the_student(load, task, made_for):
    """0.3 in float32 is 0.300000011920929, which a student in float64 would follow."""
    student = load(BERT, task, dtype="float64")
    start = dk.DistilledSet.from_real(task, load(BERT, task, dtype=made_for), per_class=1, length=8)
    assert bound_step_sizes(start, UNROLL, student).tolist() == [0.3, 0.3]
    first = dk.Distiller(start, objective(task, student)).distilled.step_sizes
    assert first.tolist() == pytest.approx([0.3, 0.3], rel=1e-14)
    given = merging.with_recipe(start, UNROLL, student)
    assert dk.evaluate(given, task, student, seeds=(0,)).recipe["step_sizes"] == [0.3, 0.3]
    assert merging.merge(given, given).step_sizes.tolist() == (
        [0.6, 0.6] if made_for == "float64" else pytest.approx([0.6, 0.6], rel=1e-6))


def test_step_sizes_come_back_exactly(load, task, tmp_path):
    student = load(BERT, task, dtype="float64")
    start = merging.with_recipe(dk.DistilledSet.from_real(task, student, per_class=1, length=8), UNROLL, student)
    assert dk.DistilledSet.load(start.save(tmp_path / "set")).step_sizes.tolist() == [0.3, 0.3]
