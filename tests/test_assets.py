"""The two models that come with the package: whole, of the kind they say, and not shown what they are judged on."""

import importlib.metadata
import json

import pytest
import torch

import distillkit as dk
from distillkit.assets import pretrain
from distillkit.assets.pretrain import KINDS
from distillkit.data import docstrings
from distillkit.evaluation.scoring import answered
from distillkit.io.packaged import asset


@pytest.fixture(scope="module", params=list(KINDS))
def name(request):
    return request.param


def test_it_is_small_whole_and_documented(name):
    folder = asset(name)  # compares every file with its SHA-256
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    record, card = json.loads((folder / "training.json").read_text()), (folder / "README.md").read_text()
    assert pretrain.card(record) == card
    assert record["steps"] >= 1500 and len(record["curve"]) >= 10
    assert record["curve"][-1]["validation_loss"] < record["curve"][0]["validation_loss"] - 1
    assert 1e6 < record["parameters"] < 3e6 and f"--steps {record['steps']}" in card


def test_what_models_are_asked_about_was_left_out(name):
    text = json.loads((asset(name) / "training.json").read_text())["text"]
    installed = {library: importlib.metadata.version(library) for library in docstrings.LIBRARIES}
    if text["libraries"] != installed:
        pytest.skip("the questions of other versions of the libraries are other questions")
    for name, splits in {"held_out": ("validation", "test"), "training": ("train",)}.items():
        keys = docstrings.sentence_keys(*splits)
        assert text[name] == {"sentences": len(keys), "sha256": pretrain._digest(sorted(keys))}


def test_it_has_learned_to_continue_documentation(name, tmp_path):
    right = "Return the sum of the array elements over a given axis."
    wrong = " ".join(reversed(right.split()))
    row = json.dumps({"prompt": "numpy.sum:", "response": f" {right}", "choices": [f" {right}", f" {wrong}"], "answer": 0})
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f"{row}\n")
    task = dk.load_task(str(tmp_path), max_length=64)
    student = dk.load_student(f"offline:{name}", task, trainable="full")
    batch = task.batch(student.tokenizer, "test", [0])
    loss = float(student.loss(student.init(0), batch, batch["labels"]))
    assert loss < 0.75 * torch.tensor(float(len(student.embedding))).log(), "guessing a token costs ln v"
    assert all(right.all() for right in answered(student, student.init(0), task, "test"))


def test_their_tokenizers_differ():
    task = dk.load_task("docstrings_qa:library", max_length=64, limit=20)
    one, other = (dk.load_student(f"offline:{name}", task).tokenizer for name in KINDS)
    text = task.train["prompt"][0]
    assert one.tokenize(text) != other.tokenize(text) and len(one) != len(other)
    for tokenizer in (one, other):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()
