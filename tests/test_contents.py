"""Contents that no set has are refused when it is made or read, by an error that says which; right sums do not help them."""

import copy
import dataclasses
import json
import math
import time

import pytest
import torch

import distillkit as dk
from distillkit.applications import merging
from distillkit.applications.publish import from_hub, load_published, save_published

DEEP = json.loads("[" * 400 + "]" * 400)


@pytest.fixture(scope="module")
def good(world):
    """A set that has everything: tokens, text, soft labels, step sizes, a recipe, rows."""
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=8)
    return merging.with_recipe(start, dk.Unroll(2, optimizer=dk.SGD(0.3)), student)


@pytest.fixture(scope="module")
def prompts(task, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        asked = dk.questions(task)
        return dk.DistilledSet.from_real(asked, dk.load_student("facebook/opt-1.3b", asked), fraction=0.05)


def at(place, value):
    """A change of one number of a tensor."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def meta(**changes):
    return lambda given: {**given, **changes}


def part(**changes):
    return {"source": "a", "examples": 4, "recipe": None, "step_sizes": None} | changes


# Name → the field and what it becomes.
ABSURD = {
    "NaN embedding": ("embeds", at((1, 2, 3), math.nan)),
    "infinite embedding": ("embeds", at((1, 2, 3), math.inf)),
    "whole embeddings": ("embeds", lambda t: t.long()),
    "complex embeddings": ("embeds", lambda t: t.to(torch.complex64)),
    "embeddings in eight bits": ("embeds", lambda t: t.to(torch.float8_e4m3fn)),  # for which nothing is computed
    "no width": ("embeds", lambda t: t[..., :0]),
    "mask of 3.7": ("mask", lambda t: 3.7 * t.float()),
    "mask of numbers": ("mask", lambda t: 2 * t.long()),
    "example without a position": ("mask", at((2,), False)),
    "mask of other examples": ("mask", lambda t: t[:3]),
    "free of numbers": ("free", lambda t: t.float()),
    "free outside mask": ("mask", at((0, slice(3, None)), False)),
    "negative token": ("tokens", at((0, 1), -1)),
    "token of a milliard": ("tokens", at((0, 1), 10**9)),
    "tokens with a point": ("tokens", lambda t: t.float()),
    "tokens of 64 unsigned bits": ("tokens", lambda t: t.to(torch.uint64)),
    "tokens of another length": ("tokens", lambda t: t[:, :3]),
    "NaN label": ("targets", at((0, 1), math.nan)),
    "infinite label": ("targets", at((0, 1), math.inf)),
    "a class too many": ("targets", lambda t: torch.zeros(4, 3)),
    "no classes": ("targets", lambda t: torch.zeros(4, 0)),
    "labels in three dimensions": ("targets", lambda t: torch.zeros(4, 2, 1)),
    "a class that does not exist": ("targets", lambda t: torch.tensor([0, 0, 1, 7])),
    "a class below 0": ("targets", lambda t: torch.tensor([0, 0, 1, -1])),
    "labels that are bits": ("targets", lambda t: torch.ones(4, dtype=torch.bool)),
    "labels of 8 bits": ("targets", lambda t: torch.ones(4, dtype=torch.int8)),
    "a label for all": ("targets", lambda t: torch.tensor(1)),
    "responses among classes": ("targets", lambda t: torch.tensor([[5, 6]] * 4)),
    "NaN step size": ("step_sizes", at((0,), math.nan)),
    "infinite step size": ("step_sizes", at((0,), math.inf)),
    "negative step size": ("step_sizes", at((0,), -0.1)),
    "step size of 0": ("step_sizes", at((0,), 0.0)),
    "whole step sizes": ("step_sizes", lambda t: torch.tensor([1, 2])),
    "no step sizes": ("step_sizes", lambda t: t[:0]),
    "step sizes in a table": ("step_sizes", lambda t: t[None]),
    "classes that are no names": ("meta", meta(classes=[0, 1])),
    "classes that are one name": ("meta", meta(classes="ab")),
    "two classes of one name": ("meta", meta(classes=["a", "a"])),
    "classes of another number": ("meta", meta(classes=["a", "b", "c"])),
    "labels that are no numbers": ("meta", meta(labels=["0", "0", "1", "1"])),
    "labels that do not exist": ("meta", meta(labels=[0, 0, 1, 2])),
    "labels below 0": ("meta", meta(labels=[0, 0, 1, -1])),
    "labels that are too few": ("meta", meta(labels=[0, 1])),
    "labels that are none": ("meta", meta(labels=[])),
    "labels that are nothing": ("meta", meta(labels=None)),
    "a recipe that is nothing": ("meta", meta(recipe=None)),
    "text that is nothing": ("meta", meta(text=None)),
    "what was learned that is a number": ("meta", meta(recipe={"distiller": {"learn": 3}})),
    "text that is too short": ("meta", meta(text=["one"])),
    "text that is none": ("meta", meta(text=[1, 2, 3, 4])),
    "text for all": ("meta", meta(text="four")),
    "rows that are no numbers": ("meta", meta(rows=["a"] * 4)),
    "rows that are too many": ("meta", meta(rows=[1] * 5)),
    "a table that is no sum": ("meta", meta(table_sha256="0" * 63 + "g")),
    "a table that is a number": ("meta", meta(table_sha256=5)),
    "a student that is a list": ("meta", meta(student=["bert"])),
    "a task that is a number": ("meta", meta(task=3)),
    "a recipe that is a list": ("meta", meta(recipe=[1])),
    "an optimiser that is text": ("meta", meta(recipe={"steps": 2, "optimizer": "SGD"})),
    "a selection that is text": ("meta", meta(selection="random")),
    "parts that are text": ("meta", meta(parts="two")),
    "parts of more examples": ("meta", meta(parts=[part(), part()])),
    "parts without a source": ("meta", meta(parts=[{"examples": 4}])),
    "step sizes of a part that are text": ("meta", meta(parts=[part(step_sizes=["a"])])),
}


def spoilt(found, field, change):
    """A set with contents that it would not be made with."""
    other = copy.copy(found)
    setattr(other, field, change(getattr(found, field)))
    return other


@pytest.mark.parametrize("name", ABSURD)
def test_no_set_is_made_of_it(good, name):
    field, change = ABSURD[name]
    with pytest.raises(ValueError):
        dataclasses.replace(good, **{field: change(getattr(good, field))})


@pytest.mark.parametrize("name", ABSURD)
def test_no_set_is_read_of_it(good, tmp_path, name):
    """Written by somebody who knows the format; what is not finite cannot even be written."""
    if name == "embeddings in eight bits":
        pytest.skip("not written either")
    with pytest.raises(dk.StorageError, match=str(tmp_path / "set")):
        dk.DistilledSet.load(spoilt(good, *ABSURD[name]).save(tmp_path / "set"))


def test_the_way_it_is_written_here_is_no_reason(good, prompts, tmp_path):
    for number, found in enumerate((good, prompts)):
        again = dk.DistilledSet.load(spoilt(found, "meta", dict).save(tmp_path / f"{number}"))
        assert torch.equal(again.embeds, found.embeds) and again.meta == found.meta


@pytest.mark.parametrize("change", [
    lambda t: torch.full_like(t, -100), at((0, 0), -1), at((0, 0), 10**9), lambda t: t.float(), lambda t: t[:, 0],
], ids=["nothing said", "below 0", "a milliard", "logits", "classes"])
def test_responses_are_checked_too(prompts, tmp_path, change):
    with pytest.raises(dk.StorageError, match=str(tmp_path / "set")):
        dk.DistilledSet.load(spoilt(prompts, "targets", change).save(tmp_path / "set"))


def test_labels_that_nobody_names_are_an_error_where_they_are_needed(good, world):
    task, student = world
    bare = dataclasses.replace(good, meta={"text": good.meta["text"]})
    for use in (bare.to_text, bare.soften, lambda: dk.nearest_sentences(bare, task, student),
                lambda: dk.describe_text(bare, task),
                lambda: dk.search_sentences(bare, task, student, dk.FrozenJudge(task, student), steps=1)):
        with pytest.raises(ValueError):
            use()
    scores = [dk.evaluate(s, task, student, seeds=(0,), recipe=dk.Unroll(2)).scores for s in (bare, good)]
    assert scores[0] == scores[1], "its targets are enough to train"


def test_no_examples_are_no_set(good):
    others = ("meta", "step_sizes", "attention")
    empty = {f.name: getattr(good, f.name)[:0] for f in dataclasses.fields(good) if f.name not in others}
    with pytest.raises(ValueError, match="one|an example"):
        dk.DistilledSet(**empty)


@pytest.mark.parametrize("deep", [{"a": DEEP}, {"recipe": {"steps": DEEP}}, {"parts": DEEP}])
def test_what_is_nested_too_deeply_is_refused(good, tmp_path, deep):
    with pytest.raises(dk.StorageError, match=str(tmp_path / "set")):
        dk.DistilledSet.load(spoilt(good, "meta", meta(**deep)).save(tmp_path / "set"))


def test_a_long_header_is_refused_before_it_is_read(good, tmp_path):
    """Its 30 MB of names alone would take half a minute to parse."""
    path = good.save(tmp_path / "set")
    entry = '"t%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % n for n in range(500_000)) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    begun = time.perf_counter()
    with pytest.raises(dk.StorageError, match=str(path)):
        dk.DistilledSet.load(path)
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize("name", ["mask of 3.7", "token of a milliard", "infinite step size", "rows that are too many"])
def test_neither_published_folders_nor_the_hub_let_it_in(good, tmp_path, monkeypatch, name):
    import huggingface_hub

    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: torch.ones_like(t, dtype=torch.bool))
    folder = save_published(spoilt(good, *ABSURD[name]), tmp_path / "published")
    monkeypatch.undo()
    with pytest.raises(dk.StorageError, match=str(folder)):
        load_published(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(folder))
    with pytest.raises(dk.StorageError, match="somebody/set"):
        from_hub("somebody/set")


@pytest.mark.parametrize("recipe", [
    {}, {"steps": 2}, {"steps": 10**12, "optimizer": {"name": "SGD"}, "batch_size": None},
    {"steps": 2, "optimizer": {"name": "Nobody"}, "batch_size": None},
    {"steps": 2, "optimizer": {"name": "SGD", "step_size": "much"}, "batch_size": None},
    {"steps": 2, "optimizer": {"name": "SGD", "unheard": 1}, "batch_size": None},
    {"steps": 2, "optimizer": {"name": ["SGD"]}, "batch_size": None},
    {"steps": 2, "optimizer": {"name": "SGD"}, "batch_size": "all"},
], ids=str)
def test_a_recipe_that_nobody_can_follow_is_an_error_of_ours(good, world, recipe):
    task, student = world
    found = dataclasses.replace(good, step_sizes=None, meta={**good.meta, "recipe": recipe})
    with pytest.raises(ValueError, match="recipe"):
        dk.evaluate(found, task, student, seeds=(0,), recipe="own")


def test_parts_with_such_a_recipe_are_not_merged(good):
    parts = [part(recipe={"steps": 2, "optimizer": {}}, step_sizes=[0.1, 0.2])]
    found = dataclasses.replace(good, meta={**good.meta, "parts": parts})
    with pytest.raises(ValueError, match="recipe"):
        merging.merge(found, found)
