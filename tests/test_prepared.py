"""A prepared folder: what it was made from comes out of it, bit by bit, on a machine that has next to nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import bare_machine
import distillkit as dk
import standin_hub
from distillkit.cli.main import main
from distillkit.data.rows import Rows
from distillkit.experiments import suite_jobs
from distillkit.experiments.classification import ClassificationJob
from distillkit.experiments.prepared import corpora_and_students, prepare
from distillkit.io.prepared import join, read_index
from distillkit.io.storage import StorageError, sealed, unsealed

SCRIPT = Path(bare_machine.__file__)
UPLOAD = 100_000  # bytes


@pytest.fixture(scope="module")
def prepared(standin_home, tmp_path_factory):
    """A prepared folder of stand-ins, in many uploads, and what was said."""
    folder = tmp_path_factory.mktemp("bare") / "prepared"
    with standin_hub.patched(standin_home):
        return prepare(folder, bare_machine.CORPORA, bare_machine.STUDENTS, upload_bytes=UPLOAD)


@pytest.fixture
def arrived(prepared, tmp_path, monkeypatch):
    """What was uploaded to another machine: no whole file; the stand-in hub is not there."""
    folder = tmp_path / "prepared"
    shutil.copytree(prepared.folder, folder, ignore=shutil.ignore_patterns("files", ".*"))
    monkeypatch.setenv("DISTILLKIT_PREPARED", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def parts(prepared, name):
    return [part["name"] for part in prepared.index["files"][name]["parts"]]


def test_a_bare_machine_computes_the_same_numbers(prepared, arrived, standin_home, tmp_path):
    """Distilling, scoring, an experiment, experts and their matching, with neither `datasets` nor a network."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "bare")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "empty")})
    assert done.returncode == 0, done.stderr[-3000:]
    bare = json.loads(done.stdout.splitlines()[-1])
    with standin_hub.patched(standin_home), pytest.MonkeyPatch.context() as patch:
        patch.delenv("DISTILLKIT_PREPARED")
        ordinary = json.loads(json.dumps(bare_machine.results(tmp_path / "ordinary")))
    assert ordinary["command"][0] == 0 and len(ordinary["experiment"]) == 4 and len(ordinary["classification"]["losses"]) == 3
    for part in ordinary:
        assert bare[part] == ordinary[part], part


def test_carries_are_as_small_as_asked_and_listed(prepared):
    listed = {part["name"]: part["size"] for entry in prepared.index["files"].values() for part in entry["parts"]}
    uploads = [path for path in prepared.folder.iterdir() if path.name.startswith("upload-")]
    assert len(uploads) > 2
    for upload in uploads:
        sizes = {f"{upload.name}/{path.name}": path.stat().st_size for path in upload.iterdir()}
        assert sum(sizes.values()) <= UPLOAD and sizes.items() <= listed.items()
    assert any(len(parts(prepared, name)) > 1 for name in prepared.index["files"])


def test_work_can_begin_before_the_last_upload(prepared, arrived):
    """Tasks come first, then the students in the order in which they were asked for."""
    bert, opt = "students/bert-base-uncased/model.safetensors", "students/facebook--opt-1.3b/model.safetensors"
    students = [parts(prepared, name)[-1] for name in (bert, opt)]
    assert parts(prepared, "tasks/4.safetensors") < students[:1] and students == sorted(students)
    for name in parts(prepared, opt):
        (arrived / name).unlink()
    task = dk.load_task(**bare_machine.CORPORA[0])
    assert dk.load_student("bert-base-uncased", task).name == "bert-base-uncased"
    with pytest.raises(FileNotFoundError, match="upload-"):
        dk.load_student("facebook/opt-1.3b", task)


def test_whole_files_stay_when_their_parts_are_gone(prepared, arrived):
    assert len(join(arrived)) == len(prepared.index["files"])
    for upload in arrived.glob("upload-*"):
        shutil.rmtree(upload)
    task = dk.load_task(**bare_machine.CORPORA[0])
    assert isinstance(task.train, Rows) and dk.load_student("bert-base-uncased", task).embedding.shape[1] == 32


@pytest.mark.parametrize("change", ["missing", "damaged", "swapped"])
def test_a_part_that_is_not_the_right_one_is_named(prepared, arrived, change):
    name = next(name for name in parts(prepared, "students/bert-base-uncased/model.safetensors"))
    path, other = arrived / name, arrived / parts(prepared, "tasks/1.safetensors")[0]
    if change == "missing":
        path.unlink()
    elif change == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        shutil.copyfile(other, path)
    task = dk.load_task(**bare_machine.CORPORA[0])
    with pytest.raises(FileNotFoundError if change == "missing" else StorageError, match=name.split("/")[0]) as refused:
        dk.load_student("bert-base-uncased", task)
    assert name in str(refused.value)
    assert not (arrived / "files" / "students/bert-base-uncased/model.safetensors").exists()


def test_a_joined_file_that_was_damaged_is_joined_again_or_refused(arrived, prepared):
    dk.load_task(**bare_machine.CORPORA[0])
    path = arrived / "files" / "tasks/1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    dk.load_task(**bare_machine.CORPORA[0])
    assert path.read_bytes() == content
    path.write_bytes(content[:-1] + b"?")
    (arrived / parts(prepared, "tasks/1.safetensors")[0]).unlink()
    with pytest.raises(FileNotFoundError, match="upload-1"):
        dk.load_task(**bare_machine.CORPORA[0])


@pytest.mark.parametrize("change", ["missing", "edited", "outside", "another student", "no task"])
def test_an_index_is_trusted_only_as_it_was_written(arrived, change):
    path = arrived / "index.json"
    if change == "missing":
        path.unlink()
    elif change == "edited":
        path.write_text(path.read_text().replace("rotten_tomatoes", "potten_romatoes"))
    else:
        index = unsealed(path.read_bytes())
        if change == "outside":
            index["files"]["../outside"] = next(iter(index["files"].values()))
        elif change == "another student":
            index["students"]["bert-base-uncased"]["folder"] = "../../elsewhere"
        else:
            index["tasks"][0]["file"] = "tasks/none.safetensors"
        path.write_text(json.dumps(sealed(index)))
    with pytest.raises(StorageError, match=r"index\.json"):
        dk.load_task(**bare_machine.CORPORA[0])


@pytest.mark.parametrize("arguments", [{"max_length": 16}, {"max_length": 12, "limit": 5}, {"max_length": 12, "seed": 1},
                                       {"max_length": 12, "text_column": "a", "label_column": "b"}])
def test_other_arguments_than_prepared_are_refused(arrived, arguments):
    with pytest.raises(ValueError, match="'rotten_tomatoes', max_length=12, limit={'train': 20}, seed=3"):
        dk.load_task("rotten_tomatoes", **arguments)


def test_a_student_that_was_not_prepared_is_refused(arrived):
    task = dk.load_task(**bare_machine.CORPORA[0])
    with pytest.raises(FileNotFoundError, match=r"bert-base-uncased, facebook/opt-1\.3b"):
        dk.load_student("roberta-base", task)
    assert dk.load_student("offline:tiny-opt", task).name == "offline:tiny-opt"  # comes with the package


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_nothing_is_tokenised_for_a_tokenizer_it_was_prepared_with(arrived, monkeypatch):
    task = dk.load_task(**bare_machine.CORPORA[0])
    student = dk.load_student("bert-base-uncased", task)
    counted, call = [], type(student.tokenizer).__call__

    def counting(self, text, *args, **options):
        counted.append(len(text))
        return call(self, text, *args, **options)

    monkeypatch.setattr(type(student.tokenizer), "__call__", counting)
    assert len(task.token_ids(student.tokenizer, "train")) == 80
    assert counted and max(counted) <= 20  # a few rows of each split


def test_another_tokenizer_gets_tokens_of_its_own(arrived):
    """One whose file differs, and one that was changed after it was loaded."""
    task = dk.load_task(**bare_machine.CORPORA[0])
    tokenizer = dk.load_student("bert-base-uncased", task).tokenizer
    word = task.train["text"][0].split()[0]
    before = task.token_ids(tokenizer, "train")[0]
    changed = dk.load_student("bert-base-uncased", task).tokenizer
    changed.add_tokens([f"{word} "], special_tokens=False)
    assert task.token_ids(changed, "train")[0] == changed(task.train["text"][0], truncation=True, max_length=12)["input_ids"]
    assert task.token_ids(changed, "train")[0] != before
    opt = dk.load_student("offline:tiny-opt", task).tokenizer
    assert task.token_ids(opt, "test")[0] == opt(task.test["text"][0], truncation=True, max_length=12)["input_ids"]


# --- preparing --------------------------------------------------------------------------------------------------------


def test_models_of_the_same_weights_share_them(standin_hub, tmp_path, monkeypatch):
    from distillkit.core import loading

    monkeypatch.setattr(loading, "_minilm_location", lambda: "bert-base-uncased")
    index = prepare(tmp_path / "prepared", bare_machine.CORPORA[:1], ["offline:minilm", "offline:distil-minilm"]).index
    assert index["students"]["offline:minilm"] == index["students"]["offline:distil-minilm"]
    assert sum(name.endswith("model.safetensors") for name in index["files"]) == 1
    ordinary = dk.load_task(**bare_machine.CORPORA[0])
    table = dk.load_student("offline:distil-minilm", ordinary).table_sha256
    monkeypatch.setenv("DISTILLKIT_PREPARED", str(tmp_path / "prepared"))
    assert dk.load_student("offline:distil-minilm", ordinary).table_sha256 == table


def test_rounded_weights_say_so(standin_hub, tmp_path, monkeypatch):
    whole = dk.load_student("bert-base-uncased", dk.load_task(**bare_machine.CORPORA[0]))
    prepare(tmp_path / "prepared", bare_machine.CORPORA[:1], ["bert-base-uncased"], rounded=["bert-base-uncased"])
    folder = tmp_path / "prepared/files/students/bert-base-uncased"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert "float16" in (folder / "README.md").read_text()
    monkeypatch.setenv("DISTILLKIT_PREPARED", str(tmp_path / "prepared"))
    with pytest.warns(UserWarning, match="float16"):
        student = dk.load_student("bert-base-uncased", dk.load_task(**bare_machine.CORPORA[0]))
    assert torch.equal(student.embedding, whole.embedding.half().float())


def test_what_cannot_be_had_is_left_out_and_said(standin_hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "empty"))
    done = prepare(tmp_path / "prepared", [*bare_machine.CORPORA[:1], {"source": "no_such_corpus"}],
                   ["bert-base-uncased", "offline:mpnet"])
    printed = capsys.readouterr().out
    assert "distillkit fetch offline:mpnet" in printed and "no_such_corpus" in printed
    assert len(done.skipped) == 2 and len(done.index["tasks"]) == len(done.index["students"]) == 1
    assert "upload-1" in printed and "DISTILLKIT_PREPARED" in printed


def test_bad_wishes_are_refused(standin_hub, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing can be prepared"):
        prepare(tmp_path / "a", [], [])
    with pytest.raises(ValueError, match="rounded"):
        prepare(tmp_path / "a", [], ["bert-base-uncased"], rounded=["gpt2"])
    with pytest.raises(ValueError, match="upload_bytes"):
        prepare(tmp_path / "a", [], ["bert-base-uncased"], upload_bytes=2**30)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        prepare(tmp_path / "b", [], ["bert-base-uncased"])
    monkeypatch.setenv("DISTILLKIT_PREPARED", str(tmp_path))
    with pytest.raises(ValueError, match="DISTILLKIT_PREPARED"):
        prepare(tmp_path / "a", [], ["bert-base-uncased"])


def test_the_command_line_prepares_what_the_jobs_load(standin_hub, tmp_path, monkeypatch, capsys):
    settings = ClassificationJob(name="small", corpus="rotten_tomatoes", student="bert-base-uncased", max_length=12)
    job = SimpleNamespace(name="small", needs=lambda: [settings])
    monkeypatch.setattr(suite_jobs, "dry", lambda: (job,))
    folder = tmp_path / "prepared"
    assert main(["suite", "--tiny", "--prepare", str(folder), "--float16", "bert-base-uncased"]) == 0
    assert "suite --tiny --minutes 8" in capsys.readouterr().out
    index = read_index(folder)
    assert [entry["arguments"]["source"] for entry in index["tasks"]] == ["rotten_tomatoes"]
    assert index["students"]["bert-base-uncased"]["dtype"] == "float16"


def test_preparing_again_replaces_what_was_there(standin_hub, tmp_path):
    for count in (2, 1):
        index = prepare(tmp_path / "prepared", [("rotten_tomatoes", 12, None)] * 2, bare_machine.STUDENTS[:count]).index
    assert [entry["arguments"] for entry in index["tasks"]] == [
        {"source": "rotten_tomatoes", "max_length": 12, "limit": {}, "seed": 0}]
    assert sorted(path.name for path in (tmp_path / "prepared/files/students").iterdir()) == ["bert-base-uncased"]


def test_settings_name_their_corpora_and_students():
    jobs = [ClassificationJob(**bare_machine.JOB | changes) for changes in ({}, {"student": "gpt2"}, {"max_length": 16})]
    corpora, students = corpora_and_students(jobs)
    assert [corpus["max_length"] for corpus in corpora] == [12, 12, 16] and students == ["bert-base-uncased", "gpt2"]


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["text", 1, -1, slice(1, 3), [2, 0], []])
def test_rows_are_read_as_a_dataset_is(key):
    import datasets

    columns = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    rows, dataset = Rows(columns), datasets.Dataset.from_dict(columns)
    expected = dataset[key][:] if isinstance(key, str) else dataset[key]
    assert rows[key] == expected
    assert [*rows] == [*dataset] == rows.to_list() and rows.column_names == dataset.column_names and len(rows) == 3
    assert rows.select([2, 0]).to_list() == dataset.select([2, 0]).to_list()


def test_rows_refuse_what_is_not_there():
    with pytest.raises(ValueError, match="different lengths"):
        Rows({"a": [1], "b": []})
    for key in (3, "b", [3]):
        with pytest.raises((IndexError, KeyError)):
            Rows({"a": [1]})[key]
