"""A bad value for any public argument is an error that names the argument, and says so before any work is done."""

import inspect
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import distillkit as dk
from distillkit.core.experts import record_experts

NAN, INF = math.nan, math.inf
WHOLE = st.one_of(st.integers(-9, 0), st.floats(), st.booleans(), st.text(max_size=3), st.just([1]))
RATE = st.one_of(st.floats(max_value=-1e-9), st.sampled_from([NAN, INF, True, "0.1", [0.1]]))
POSITIVE = st.one_of(RATE, st.just(0))
CHOICE = st.one_of(st.text(max_size=8).map("no {}".format), st.integers(), st.none(), st.just(["a"]))
FLAG = st.sampled_from([0, 1, None, "no", "False"])
THING = st.one_of(st.integers(), st.text(max_size=8), st.just({"a": 1}))
SHARE = st.one_of(st.floats(max_value=0), st.floats(min_value=1.01), st.sampled_from([True, "0.5", [0.5]]))
SEED = st.one_of(st.floats(), st.booleans(), st.none(), st.just([1]))
SEEDS = st.sampled_from([(), [], 3, None, (1.5,), ("a",), (True,), (0, 0)])


def or_none(bad):
    """Bad values of an argument that may be None."""
    return bad.filter(lambda value: value is not None)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """What good arguments are made of."""
    task, student = world
    folder = tmp_path_factory.mktemp("bad")
    experts = record_experts(task, student, folder / "experts", batch_size=40, optimizer=dk.SGD(0.1))
    start, unroll = dk.DistilledSet.from_real(task, student, per_class=1, length=8), dk.Unroll(2, optimizer=dk.SGD(0.5))
    goal = dk.BPTT(task, student, unroll, batch_size=8)
    return {
        "task": task, "student": student, "experts": experts, "distilled": start, "unroll": unroll, "objective": goal,
        "judge": dk.StudentJudge(goal, tries=1), "folder": folder / "others", "queries": torch.ones(2, 3),
        "table": torch.ones(4, 3), "n": 1,
    }


def distil(n, **given):
    return next(dk.Distiller(**given).run(n))


def sentences(**given):
    judge = given["judge"] if "judge" in given else dk.FrozenJudge(given["task"], given["student"])
    return dk.search_sentences(**given | {"judge": judge})


# public name → what is called, the arguments it needs (taken from `made`, or as they stand), and bad values by argument
CALLS = {
    "SGD": (dk.SGD, {}, {"step_size": POSITIVE, "clip_norm": POSITIVE}),
    "Momentum": (dk.Momentum, {}, {"step_size": POSITIVE, "clip_norm": POSITIVE, "nesterov": FLAG,
                                   "decay": st.one_of(RATE, st.just(1))}),
    "AdamW": (dk.AdamW, {}, {"step_size": POSITIVE, "clip_norm": POSITIVE, "eps": RATE, "eps_root": RATE, "weight_decay": RATE,
                             "betas": st.sampled_from([None, 0.9, (0.9,), (0.9, 1.0), ("a", "b"), (NAN, 0.9)])}),
    "Unroll": (dk.Unroll, {"steps": 2}, {"steps": WHOLE, "batch_size": WHOLE, "micro_batch": WHOLE, "dropout": FLAG,
                                         "optimizer": THING, "attention_weight": RATE}),
    "Mixture": (dk.Mixture, {"sampler": dk.CommonRecipes()}, {
        "sampler": THING, "central": THING, "share": SHARE, "micro_batch": or_none(WHOLE)}),
    "CommonRecipes": (dk.CommonRecipes, {}, {
        "central": THING, "least_steps": st.one_of(WHOLE, st.just(61)), "most_steps": WHOLE}),
    "Replay": (dk.Replay, {}, {"every": WHOLE, "host": FLAG}),
    "StoreAll": (dk.StoreAll, {}, {}),
    "ForwardDifference": (dk.ForwardDifference, {}, {"every": WHOLE, "host": FLAG, "change": st.one_of(POSITIVE, st.just(1)),
                                                     "central": FLAG.filter(lambda v: v is not None)}),
    "Truncated": (dk.Truncated, {"window": 1}, {"window": WHOLE, "inner": THING, "place": CHOICE}),
    "BPTT": (dk.BPTT, dict.fromkeys(("task", "student", "unroll")), {
        "task": THING, "student": THING, "unroll": THING, "metagrad": THING, "micro_batch": WHOLE, "inits": WHOLE,
        "stacked": FLAG, "batch_size": st.one_of(WHOLE, st.just(81))}),
    "TrajectoryMatching": (dk.TrajectoryMatching, dict.fromkeys(("task", "student", "unroll", "experts")), {
        "task": THING, "student": THING, "unroll": THING, "metagrad": THING, "experts": THING, "segments": WHOLE,
        "student_state": CHOICE, "expert_epochs": st.one_of(POSITIVE, st.just(2)), "max_start_epoch": RATE,
        "distance": CHOICE}),
    "record_experts": (record_experts, {"task": None, "student": None, "folder": None}, {
        "task": THING, "student": THING, "count": WHOLE, "epochs": WHOLE, "optimizer": THING, "batch_size": WHOLE,
        "micro_batch": WHOLE, "snapshots_per_epoch": WHOLE, "seed": SEED}),
    "Experts": (dk.Experts.load, {"folder": None}, {"folder": st.just("no-such-folder")}),
    "NeighborLoss": (dk.NeighborLoss, {"student": None, "weight": 1.0}, {"student": THING, "weight": RATE}),
    "nearest_tokens": (dk.nearest_tokens, dict.fromkeys(("queries", "table")), {
        "queries": THING, "table": THING, "k": st.one_of(WHOLE, st.just(5)), "metric": CHOICE, "allowed": THING}),
    "project": (dk.project, dict.fromkeys(("distilled", "student")), {"distilled": THING, "student": THING, "metric": CHOICE}),
    "select": (dk.select, {"task": None, "student": None, "method": "random", "per_class": 1, "length": 8}, {
        "task": THING, "student": THING, "method": CHOICE, "per_class": or_none(WHOLE), "length": or_none(WHOLE),
        "seed": SEED}),
    "bootstrap": (dk.bootstrap, {"task": None, "seed": 0}, {"task": THING, "seed": SEED}),
    "with_teacher_labels": (dk.with_teacher_labels, dict.fromkeys(("distilled", "task")), {"distilled": THING, "task": THING}),
    "DistilledSet": (dk.DistilledSet.from_real, {"task": None, "student": None, "fraction": 0.05}, {
        "task": THING, "student": THING, "fraction": or_none(SHARE), "length": or_none(WHOLE), "soft_labels": FLAG,
        "fill": FLAG, "seed": SEED}),
    "meta_gradient": (dk.meta_gradient, dict.fromkeys(("distilled", "objective")), {
        "distilled": THING, "objective": THING, "seed": SEED, "on_retry": THING}),
    "search_step_size": (dk.search_step_size, {"distilled": None, "objective": None, "candidates": (0.1,)}, {
        "distilled": THING, "objective": THING, "tries": WHOLE, "seed": SEED,
        "candidates": st.sampled_from([(), None, 0.1, (0.0,), (NAN,), ("a",)])}),
    "Distiller": (distil, {"distilled": None, "objective": None, "n": None}, {
        "distilled": THING, "objective": THING, "lr": RATE, "label_lr": RATE, "step_size_lr": RATE, "n": WHOLE.filter(bool),
        "learn": st.sampled_from([None, "embeds", (), ("labels",), 3, ([],)]), "schedule": THING, "regularizers": THING,
        "seed": SEED, "checkpoint_every": WHOLE, "writes": FLAG, "normalize": FLAG, "clip": RATE, "attention_lr": RATE}),
    "evaluate": (dk.evaluate, dict.fromkeys(("distilled", "task", "student")), {
        "distilled": THING, "task": THING, "student": THING, "seeds": SEEDS, "recipe": or_none(CHOICE), "split": CHOICE,
        "also": st.sampled_from([3, ["mmlu"], [None]])}),
    "Own": (dk.Own, {}, {"optimizer": st.sampled_from(["sgd", dk.SGD, 3])}),
    "Standard": (dk.Standard, {}, {"least_steps": WHOLE}),
    "Tuned": (dk.Tuned, {}, {"grid": st.sampled_from([
        3, "steps", {"steps": (1,)}, {"step_size": (), "steps": (1,)}, {"step_size": (0.0,), "steps": (1,)},
        {"step_size": (0.1,), "steps": (0,)}, {"step_size": 0.1, "steps": (1,)}]), "initialisations": WHOLE, "rows": WHOLE}),
    "Fixed": (dk.Fixed, {"unroll": None}, {"unroll": THING}),
    "transfer": (dk.transfer, dict.fromkeys(("distilled", "task", "student")), {
        "distilled": THING, "task": THING, "student": THING, "seeds": SEEDS, "recipe": CHOICE, "split": CHOICE,
        "method": CHOICE, "source": THING}),
    "retokenize": (dk.retokenize, dict.fromkeys(("distilled", "task", "student")), {
        "distilled": THING, "task": THING, "student": THING}),
    "recommend": (dk.recommend, dict.fromkeys(("student", "task")), {
        "student": THING, "task": THING}),
    "estimate": (dk.estimate, {"distilled": None, "objective": None, "steps": 1}, {
        "distilled": THING, "objective": THING, "steps": WHOLE}),
    "corpus_tokens": (dk.corpus_tokens, dict.fromkeys(("task", "student")), {
        "task": THING, "student": THING, "least": WHOLE}),
    "FrozenJudge": (dk.FrozenJudge, dict.fromkeys(("task", "student")), {
        "task": THING, "student": THING, "steps": WHOLE, "batch_size": WHOLE, "reads": CHOICE}),
    "StudentJudge": (dk.StudentJudge, {"objective": None}, {"objective": THING, "tries": WHOLE}),
    "SwapSearch": (dk.SwapSearch, dict.fromkeys(("distilled", "student", "judge")), {
        "distilled": THING, "student": THING, "judge": THING, "candidates": WHOLE, "examples": WHOLE,
        "allowed": THING, "seed": SEED, "checkpoint_every": WHOLE}),
    "ThroughProjection": (dk.ThroughProjection, {"objective": None}, {"objective": THING}),
    "nearest_sentences": (dk.nearest_sentences, dict.fromkeys(("distilled", "task", "student")), {
        "distilled": THING, "task": THING, "student": THING}),
    "search_sentences": (sentences, dict.fromkeys(("distilled", "task", "student")), {
        "distilled": THING, "task": THING, "student": THING, "judge": THING, "steps": WHOLE, "candidates": WHOLE,
        "sentences": WHOLE, "pool": THING, "seed": SEED}),
    "search_keywords": (dk.search_keywords, dict.fromkeys(("distilled", "task", "student", "judge")), {
        "distilled": THING, "task": THING, "student": THING, "judge": THING, "steps": WHOLE, "candidates": WHOLE,
        "words": WHOLE, "seed": SEED}),
    "JointJudge": (dk.JointJudge, {}, {"judges": st.one_of(THING, st.just([]), st.just([1]))}),
    "relax_tokens": (dk.relax_tokens, dict.fromkeys(("distilled", "student", "judge")), {
        "distilled": THING, "student": THING, "judge": THING, "steps": WHOLE, "lr": RATE,
        "allowed": THING, "seed": SEED}),
    "relabel": (dk.relabel, {"distilled": None, "objective": None, "steps": 1}, {
        "distilled": THING, "objective": THING, "steps": WHOLE.filter(bool), "lr": RATE, "seed": SEED}),
    "load_task": (dk.load_task, {"source": "docstrings"}, {
        "source": st.one_of(st.integers(), st.none(), st.just(""), st.just("no such task")), "max_length": WHOLE,
        "limit": st.one_of(or_none(WHOLE), st.sampled_from([{"tset": 9}, {"test": 0}, {1: 1}])), "seed": SEED,
        **dict.fromkeys(["text_column", "label_column"], st.one_of(st.integers(), st.sampled_from(["", "tweet", ["a"]])))}),
    "load_student": (dk.load_student, {"source": "offline:nobody", "task": None}, {
        "source": st.just("offline:nobody"), "task": THING, "trainable": or_none(CHOICE), "dtype": CHOICE,
        "weights": or_none(CHOICE), "attention": CHOICE}),
    "derive_seed": (dk.derive_seed, {"purpose": "test"}, {"purpose": st.one_of(st.integers(), SEED)}),
}
# Made by other names, and only read.
RESULTS = {"Estimate", "Evaluation", "FewShot", "InstructionTask", "MetaGradient", "StepRecord", "StorageError", "Student",
           "Task", "Wording", "WrittenSentences"}
# Their bad values are tested where they are: test_publish, test_prompting, test_wording, test_lesson, test_pairs,
# test_lens, test_writing.
ELSEWHERE = {"from_hub", "push_to_hub", "few_shot", "questions", "describe_text", "wording_table", "sizes",
             "search_pairs", "Lens", "record_film", "write_sentences"}
# Paths and switches that have no bad value of their own here, or whose effects are tested where they belong.
APART = {"checkpoint", "optimizer", "folder", "device", "parts", "settings", "per_class", "fraction", "length"}


def names_it(error: Exception, argument: str) -> bool:
    """Whether the argument's name stands in the message as a word; "a seed" or "objective" are not the argument n."""
    return re.search(rf"(?<![\w-]){re.escape(argument)}(?![\w-])", str(error)) is not None


@pytest.mark.parametrize(("message", "argument", "named"), [
    ("n must be a whole number, not 0", "n", True), ("length must be a number", "n", False), ("lr= is 0", "lr", True),
    ("label_lr must be positive", "lr", False), ("per-class", "class", False), ("limit['test'] must be 1", "limit", True),
])
def test_a_name_is_a_word_of_the_message(message, argument, named):
    assert names_it(ValueError(message), argument) == named


@pytest.mark.parametrize(("name", "argument"), [(n, a) for n, (_, _, bad) in CALLS.items() for a in bad])
@hypothesis_settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_bad_value_is_named(made, name, argument, data):
    call, needed, bad = CALLS[name]
    value = data.draw(bad[argument])
    given = {key: made[key] if good is None else good for key, good in needed.items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        call(**given | {argument: value})
    assert names_it(caught.value, argument), f"{argument}={value!r}: {caught.value}"
    assert not made["folder"].exists(), "nothing was begun"


def test_good_values_are_no_errors(made):
    for name in ("SGD", "Momentum", "AdamW", "Unroll", "Replay", "StoreAll", "ForwardDifference", "Truncated",
                 "BPTT", "TrajectoryMatching", "nearest_tokens", "project", "select", "DistilledSet", "meta_gradient",
                 "search_step_size", "Distiller", "retokenize", "recommend", "estimate", "corpus_tokens", "FrozenJudge",
                 "StudentJudge", "SwapSearch", "ThroughProjection", "NeighborLoss", "with_teacher_labels",
                 "bootstrap", "derive_seed"):
        call, needed, _ = CALLS[name]
        call(**{key: made[key] if good is None else good for key, good in needed.items()})


def test_every_public_argument_has_its_bad_values():
    others = {n for n in dk.__all__ if n not in CALLS} - RESULTS - ELSEWHERE
    for name, (call, _, bad) in CALLS.items():
        found = {"Distiller": dk.Distiller, "search_sentences": dk.search_sentences}.get(name, call)
        missing = {p for p in inspect.signature(found).parameters if p not in bad} - APART - {"_"}
        assert not missing, f"{name}: {missing}"
    assert not others, f"public names without a test of their arguments: {others}"


@pytest.mark.parametrize(("field", "value"), [
    ("embeds", torch.ones(2, 3)), ("embeds", torch.ones(2, 8, 4, dtype=torch.long)), ("mask", None), ("targets", [1, 2]),
    ("meta", None),
])
def test_a_set_of_the_wrong_parts(made, field, value):
    import dataclasses

    with pytest.raises((ValueError, TypeError), match=f"{field} must be"):
        dataclasses.replace(made["distilled"], **{field: value})
