"""Runs that survive: whatever ends one, what it had saved stands, goes on to the bit, and nothing wrong is taken for right."""

import dataclasses
import errno
import fcntl
import html
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import distillkit as dk
from distillkit.core.distiller import constant
from distillkit.core.experts import Experts, record_experts
from distillkit.core.inner import loss_and_grads
from distillkit.data import docstrings
from distillkit.data.corpus import CorpusError
from distillkit.experiments import results
from distillkit.io.files import read_file, write_file
from distillkit.io.storage import StorageError, read_lines

WORKER = Path(__file__).with_name("survival_worker.py")
VALUES = ("embeds", "targets", "step_sizes")


@pytest.fixture(scope="module")
def start(world):
    return dk.DistilledSet.from_real(*world, per_class=1, length=8)


@pytest.fixture(scope="module")
def goal(world):
    return dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)


def finished(distiller, n):
    for _ in distiller.run(n):
        pass
    return distiller


def same(one, other):
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in VALUES)


# --- ended from outside: real processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(standin_home):
    """What survival_worker.py saw; it ends with an assertion where a resumed run is not the uninterrupted one to the bit."""
    import standin_hub

    command = [sys.executable, str(WORKER), "--kills", "5", "--interrupts", "3", "--home", str(standin_home)]
    env = standin_hub.environment(standin_home) | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_step_can_be_resumed_to_the_bit(outcome):
    assert outcome["each"] == list(range(1, 8)), "with dropout on, a process for each step"


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(outcome):
    assert len(outcome["kills"]["saved"]) == 5 and all(0 <= step <= 8 for step in outcome["kills"]["saved"])


def test_an_interrupted_run_saves_its_last_step(outcome):
    assert len(outcome["interrupts"]) == 3 and all(1 <= step <= 8 for step in outcome["interrupts"])


def test_killed_at_every_stage_experts_can_be_recorded_and_sets_published(outcome):
    assert outcome["recordings"] > 5 and outcome["publications"] > 10


def test_a_file_that_may_not_grow_and_a_folder_that_may_not_be_written(outcome):
    assert "File too large; free some space on its disk (" in outcome["no_room"]
    assert "go on from what was saved there before, which is untouched" in outcome["no_room"]
    assert "Permission denied; " in outcome["no_right"]


HOLDER = """
import sys
from distillkit.io.storage import Claim
with Claim(sys.argv[1]), Claim(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_on_one_folder(world, start, goal, tmp_path):
    """A second distillation is refused, a second recording waits; the lock goes with the process."""
    run, experts = tmp_path / "run", tmp_path / "experts"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run, experts], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    distiller = dk.Distiller(start, goal, checkpoint=run)
    for what in (lambda: next(distiller.run(1)), lambda: distiller.checkpoint.save(distiller)):
        with pytest.raises(StorageError, match=f"{run} is in use by another run"):
            what()
    assert not run.exists() and distiller.step == 0
    waiting = threading.Thread(target=record_experts, args=(*world, experts), kwargs={"batch_size": 40}, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and not experts.exists()
    holder.kill()
    holder.communicate()
    waiting.join()
    assert len(Experts.load(experts)) == 1
    assert finished(distiller, 1).step == 1


def test_two_runs_of_one_process_on_one_folder(start, goal, tmp_path):
    one, other = (dk.Distiller(start, goal, schedule=constant, checkpoint=tmp_path / "run") for _ in range(2))
    records = one.run(3)
    next(records)
    with pytest.raises(StorageError, match="in use by another run, in this process"):
        next(other.run(3))
    records.close()
    assert finished(other, 2).step == 2
    assert [r.step for r in one.run(3)] == [3], "what the other made is not made again"
    assert same(one.distilled, finished(dk.Distiller(start, goal, schedule=constant), 3).distilled)


# --- the log and the configuration -----------------------------------------------------------------------------------


def test_a_run_says_what_replays_it(start, goal, tmp_path):
    distiller = finished(dk.Distiller(start, goal, seed=3, checkpoint=tmp_path / "run"), 2)
    data = read_file(tmp_path / "run", kind="distiller-checkpoint").data
    head, *lines = read_lines(distiller.checkpoint.log)
    assert [r["step"] for r in lines] == [1, 2] and data["records"]["count"] == 2
    assert head == {"kind": "distiller-checkpoint", "settings": data["settings"], "versions": data["versions"]}
    assert head["settings"]["seed"] == 3 and head["versions"]["torch"] == torch.__version__


def test_the_log_is_repaired_and_rewound(start, goal, tmp_path):
    """As a kill in the middle of a line leaves it, two steps after the checkpoint."""
    distiller = finished(dk.Distiller(start, goal, checkpoint=tmp_path / "run"), 3)
    log, longer = distiller.checkpoint.log, finished(dk.Distiller(start, goal, checkpoint=tmp_path / "longer"), 5)
    later = longer.checkpoint.log.read_text().splitlines()[-2:]
    log.write_text(log.read_text() + f"{later[0]}\n{later[1][:20]}")
    resumed = dk.Distiller(start, goal, checkpoint=tmp_path / "run")
    assert len(log.read_text().splitlines()) == 6, "until it runs, the log is another's"
    finished(resumed, 4)
    assert [line.get("step") for line in read_lines(log)] == [None, 1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["missing", "shorter", "another's"])
def test_a_checkpoint_without_its_log_is_named(start, goal, tmp_path, harm):
    log, other = (finished(dk.Distiller(start, goal, checkpoint=tmp_path / name), 2).checkpoint.log for name in "ab")
    content = other.read_bytes() if harm == "another's" else log.read_bytes()[:-1].rpartition(b"\n")[0] + b"\n"
    log.unlink() if harm == "missing" else log.write_bytes(content)
    with pytest.raises(StorageError, match=f"{log} is not the log of {tmp_path / 'a'}"):
        dk.Distiller(start, goal, checkpoint=tmp_path / "a")


def test_a_checkpoint_does_not_grow_with_its_run(start, goal, tmp_path):
    distiller, sizes = dk.Distiller(start, goal, checkpoint=tmp_path / "run", checkpoint_every=1), []
    for _ in distiller.run(6):
        sizes.append((tmp_path / "run").stat().st_size)
    assert max(sizes) == min(sizes)


def test_other_versions_are_said(start, goal, tmp_path, monkeypatch):
    finished(dk.Distiller(start, goal, checkpoint=tmp_path / "run"), 1)
    monkeypatch.setattr("distillkit.io.checkpoint.versions", lambda: {"torch": "9.9"})
    with pytest.warns(UserWarning, match=r"was made with .*, and goes on with \{'torch': '9.9'\}"):
        assert dk.Distiller(start, goal, checkpoint=tmp_path / "run").step == 1


def test_a_process_that_does_not_write_leaves_it_to_another(start, goal, tmp_path):
    """Of several that make the same steps one saves; a survivor can."""
    distiller = dk.Distiller(start, goal, checkpoint=tmp_path / "run")
    distiller.checkpoint.writes = False
    finished(distiller, 1)
    assert not any(tmp_path.iterdir())
    records = distiller.run(3)
    next(records)
    distiller.checkpoint.writes = True
    records.close()
    assert dk.Distiller(start, goal, checkpoint=tmp_path / "run").records == distiller.records


# --- what cannot be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_last_version(tmp_path, monkeypatch, call, number):
    write_file(tmp_path / "run", kind="test", tensors={"x": torch.ones(3)}, data={"number": 1})

    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(StorageError) as caught:
            write_file(tmp_path / "run", kind="test", tensors={"x": torch.zeros(3)}, data={"number": 2})
    assert str(tmp_path / "run") in str(caught.value) and os.strerror(number) in str(caught.value)
    assert "free some space" in str(caught.value) and "get the right to write" in str(caught.value)
    assert read_file(tmp_path / "run", kind="test").data == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left lying about"


def test_a_full_disk_ends_a_run_that_can_go_on(start, goal, tmp_path, monkeypatch):
    distiller = dk.Distiller(start, goal, checkpoint=tmp_path / "run", checkpoint_every=2)
    records, whole = distiller.run(6), finished(dk.Distiller(start, goal), 6)
    for _ in range(3):
        next(records)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            next(records)
    assert read_file(tmp_path / "run", kind="distiller-checkpoint").data["records"]["count"] == 2
    assert same(finished(distiller, 6).distilled, whole.distilled)


def test_what_killed_writers_left_is_removed_and_the_living_ones_stays(tmp_path):
    dead, living, link = (tmp_path / f".run.{'0' * 15}{i}.new" for i in range(3))
    dead.touch()
    (tmp_path / "precious").write_text("x")
    link.symlink_to(tmp_path / "precious")
    with living.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_file(tmp_path / "run", kind="test")
        assert {path.name for path in tmp_path.iterdir()} == {"run", "precious", living.name, link.name}
    write_file(tmp_path / "run", kind="test")
    assert not living.exists() and (tmp_path / "precious").read_text() == "x"


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefacts(world, start, goal, tmp_path_factory):
    """A folder of each kind that the kit writes, and how it is read."""
    task, student = world
    home = tmp_path_factory.mktemp("artefacts")
    finished(dk.Distiller(start, goal, checkpoint=home / "run"), 1)
    experts = record_experts(task, student, home / "experts", batch_size=40, optimizer=dk.SGD(0.1))
    start.save(home / "set")
    judge = dk.StudentJudge(goal, tries=1)
    list(dk.SwapSearch(start, student, judge, candidates=1, checkpoint=home / "search").run(1))
    snapshot = experts.folder / "expert-000" / "0001.safetensors"
    return {
        home / "set": lambda: dk.DistilledSet.load(home / "set"),
        home / "run": lambda: dk.Distiller(start, goal, checkpoint=home / "run"),
        home / "run.log.jsonl": lambda: dk.Distiller(start, goal, checkpoint=home / "run"),
        home / "search": lambda: dk.SwapSearch(start, student, judge, candidates=1, checkpoint=home / "search"),
        experts.folder / "index.safetensors": lambda: Experts.load(experts.folder),
        snapshot: lambda: Experts.load(experts.folder).snapshot(0, 1),
    }


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_an_error_by_name(artefacts, data):
    path = data.draw(st.sampled_from(list(artefacts)))
    content = path.read_bytes()
    end = len(content) - (1 if path.suffix == ".jsonl" else 0)  # without the end of its last line, a log is whole
    position = data.draw(st.integers(0, end - 1))
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged if data.draw(st.booleans()) else content[:position])
    try:
        with pytest.raises(StorageError) as caught:
            artefacts[path]()
        assert str(path) in str(caught.value)
    finally:
        path.write_bytes(content)


def test_artefacts_that_changed_places_are_an_error_by_name(artefacts, tmp_path):
    for path, read in artefacts.items():
        content = path.read_bytes()
        for other in artefacts:
            if other != path and path.suffix != ".jsonl":
                path.write_bytes(other.read_bytes())
                with pytest.raises(StorageError, match=str(path)):
                    read()
        path.write_bytes(content)


def test_a_result_says_what_was_written_or_is_an_error_by_name(tmp_path):
    path, result = tmp_path / "small.json", {"rows": {"random/own": {"mean": 0.25, "scores": (0.2, 0.3)}}, "config": {1: None}}
    results.write(path, result)
    written, content = results.read(path), path.read_bytes()
    assert written["rows"]["random/own"] == {"mean": 0.25, "scores": [0.2, 0.3]}
    errors = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        for damaged in (flipped, content[:position]):
            path.write_bytes(damaged)
            try:
                assert results.read(path) == written, "white space, at most"
            except StorageError as error:
                errors += str(path) in str(error) and "make it again with --fresh" in str(error)
    assert errors > 1.5 * len(content)
    path.write_text(json.dumps(result))
    with pytest.raises(StorageError, match="does not say what was written"):
        results.read(path)


def test_the_same_artefacts_undamaged_are_read(artefacts):
    for read in artefacts.values():
        read()


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, harm):
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path))
    made = []

    def build():
        made.append(1)
        return {"train": {"texts": ["a"], "labels": [0]}}

    found, _ = docstrings.built("tiny", build, 1)
    assert docstrings.built("tiny", build, 1)[0] == found and len(made) == 1
    (path,) = tmp_path.glob("corpora/tiny-*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-3] if harm == "cut" else content.replace(b'"a"', b'"b"'))
    with pytest.warns(UserWarning, match=f"is built again: {path}"):
        assert docstrings.built("tiny", build, 1)[0] == found
    assert len(made) == 2


# --- what is not finite ----------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch, goal):
    """Makes the meta-gradient of the steps that are given not finite: ``broken({3: {"embeds": nan}})``."""

    def breaks(steps):
        from distillkit.core.objectives import meta_gradient

        count = iter(range(1, 10**6))

        def given(distilled, objective, **options):
            found, bad = meta_gradient(distilled, objective, **options), steps.get(next(count), {})
            values = {n: v if n == "loss" else torch.full_like(getattr(found, n), v) for n, v in bad.items()}
            return dataclasses.replace(found, **values)

        monkeypatch.setattr("distillkit.core.distiller.meta_gradient", given)

    return breaks


def test_values_that_overflow_are_never_saved(start, goal, tmp_path, broken):
    """A finite gradient, and a learning rate that throws the labels beyond what float32 can say."""
    broken({1: {"targets": -1.0}})
    high = dataclasses.replace(start, targets=torch.full_like(start.targets, 3.3e38))
    distiller = dk.Distiller(high, goal, label_lr=3e37, checkpoint=tmp_path / "run")
    before = distiller.distilled
    with pytest.raises(FloatingPointError, match="outer step 1"):
        finished(distiller, 1)
    assert same(distiller.distilled, before) and not (tmp_path / "run").exists()


def test_data_that_are_not_finite_stop_a_run(start, goal, tmp_path):
    bad = dataclasses.replace(start, embeds=start.embeds.clone())
    bad.embeds[0, 2] = math.nan
    with pytest.raises(FloatingPointError, match="outer step 1: loss nan"):
        finished(dk.Distiller(bad, goal, checkpoint=tmp_path / "run"), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_stored_is_not_finite(tmp_path, value):
    write_file(tmp_path / "run", kind="test", data={"number": 1})
    with pytest.raises(StorageError, match="the tensor 'x' holds NaN or infinity"):
        write_file(tmp_path / "run", kind="test", tensors={"x": torch.tensor([0, value])})
    assert read_file(tmp_path / "run", kind="test").data == {"number": 1}


# --- memory that runs out --------------------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch):
    """Room for so many examples at a time; returns the sizes that were tried."""
    whole, tried = dk.Student.loss, []

    def limited(most):
        def loss(self, params, batch, targets, **kwargs):
            tried.append(len(targets))
            if len(targets) > most:
                raise torch.OutOfMemoryError("out of memory")
            return whole(self, params, batch, targets, **kwargs)

        monkeypatch.setattr(dk.Student, "loss", loss)
        return tried

    return limited


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("metagrad", [dk.Replay(), dk.StoreAll(), dk.ForwardDifference(central=True)], ids=repr)
def test_what_does_not_fit_is_taken_in_parts_with_the_same_gradient(task, standin_home, room, metagrad):
    import standin_hub

    with standin_hub.patched(standin_home):
        student = dk.load_student("bert-base-uncased", task, dtype="float64")
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=8)
    goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=metagrad, batch_size=8)
    whole = dk.meta_gradient(start, goal, seed=1)
    tried = room(3)
    with pytest.warns(UserWarning, match=r"out of memory with \d examples at a time: .* rounding only; set micro_batch=\d"):
        parts = dk.meta_gradient(start, goal, seed=1)
    tolerance = 1e-4 if isinstance(metagrad, dk.ForwardDifference) else 1e-9
    assert parts.loss == pytest.approx(whole.loss, rel=1e-9)
    for name in VALUES:
        one, other = getattr(whole, name), getattr(parts, name)
        assert float((one - other).norm() / one.norm()) < tolerance, name
    assert max(tried) > 3


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_distiller_goes_on_with_the_size_that_fits_and_shows_it(start, goal, room):
    tried, distiller = room(4), dk.Distiller(start, goal)
    records = distiller.run(2)
    next(records)
    fits = distiller.objective
    assert max(tried) > 4 >= max(fits.micro_batch, fits.unroll.micro_batch) and goal.micro_batch == 16
    tried.clear()
    next(records)
    assert max(tried) <= 4 and distiller.objective is fits


def test_training_that_does_not_fit_is_taken_in_parts(world, start, room):
    task, student = world
    batch = task.batch(student.tokenizer, "train", range(7))
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    params = student.init(0)
    loss, grads, _ = loss_and_grads(student, params, [(1.0, inputs, labels, None)])
    tried = room(2)
    with pytest.warns(UserWarning, match="out of memory with 7 examples at a time"):
        again, parts, _ = loss_and_grads(student, params, [(1.0, inputs, labels, None)])
    assert tried == [7, 3, 1, 2, 4, 2, 2] and float(again) == pytest.approx(float(loss))
    assert all(torch.allclose(grads[n], parts[n], atol=1e-6) for n in grads)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_where_nothing_fits_the_run_ends_with_what_it_had(start, goal, tmp_path, room):
    distiller = dk.Distiller(start, goal, checkpoint=tmp_path / "run")
    records = distiller.run(3)
    next(records)
    room(0)
    with pytest.raises(torch.OutOfMemoryError):
        next(records)
    assert dk.Distiller(start, goal, checkpoint=tmp_path / "run").step == 1


# --- strangers -------------------------------------------------------------------------------------------------------

MARK = "<script>alert(1)</script>"
HOSTILE = {
    "html": f"{MARK}<img src=x onerror=alert(1)> & &amp;",
    "dollar": "it cost $5 and $\\frac{1}{0}$ and \\$ more",
    "markup": "| a | **b** `c` [d](javascript:e) # f \\textbf{g} {{h}} %s {i}",
    "nul": "a\x00b\x01c\x1bd\x7f",
    "right to left": "\u202eabc\u202c שלום مرحبا",
    "lines": "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven",
    "emoji": "🙂 👩‍👩‍👧 é\u0301 ﷽ \ufeff \U0010ffff",
    "long": "word " * 200_000,
}


def write_split(folder, split, rows, suffix):
    import csv
    import io

    path = folder / f"{split}{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(out.getvalue().encode())
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_hostile_text_is_read_as_it_is(world, tmp_path, suffix):
    """Every text comes back as it was, and can be trained on and scored; a NUL, which CSV cannot hold, is refused by line."""
    texts = [text for name, text in HOSTILE.items() if (suffix, name) != (".csv", "nul")]
    rows = [{"text": text, "label": f"{MARK}{i % 2}"} for i, text in enumerate(texts * 2)]
    for split in ("train", "validation", "test"):
        write_split(tmp_path, split, rows, suffix)
    task = dk.load_task(tmp_path, max_length=12)
    assert task.train["text"][:] == texts * 2 and task.classes == (f"{MARK}0", f"{MARK}1")
    found = dk.DistilledSet.from_real(task, world[1], per_class=1, length=12)
    assert found.embeds.isfinite().all() and len(found.to_text()) == 2
    if suffix == ".csv":
        write_split(tmp_path, "train", [{"text": HOSTILE["nul"], "label": 1}], suffix)
        with pytest.raises(CorpusError, match=r"train\.csv, line 2: a NUL"):
            dk.load_task(tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("train.jsonl", b'{"text": "a\xff", "label": 0}\n', "cannot be read"),
    ("train.jsonl", b'{"text": "\\ud800 a", "label": 0}\n', "half a surrogate pair"),
    ("train.jsonl", b'{"text": "a", "label": "\\ud800"}\n{"text": "b", "label": "x"}\n', "half a surrogate pair"),
    ("train.jsonl", b'{"text": "  ", "label": 0}\n', "the text is '  '"),
    ("train.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ("train.jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
    ("train.jsonl", b"cos\nsystem\n(S'true'\ntR.", "line 1: not JSON"),
    ("train.csv", b"text,label\na\xff,0\n", "cannot be read"),
    ("train.csv", b'text,label\n"a,0\n', "not CSV"),
    ("train.parquet", b"PAR1 and nothing else PAR1", "cannot be read"),
    ("labels.json", b'["\\ud800", "x"]', "must be a list of distinct class names"),
    ("labels.json", b'["", "x"]', "must be a list of distinct class names"),
    ("labels.json", b"[" * 100_000, "not JSON"),
])
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message):
    good = [{"text": f"{word} day", "label": i % 2} for i, word in enumerate(("dull", "warm", "flat", "kind"))]
    for split in ("train", "validation", "test"):
        if not name.startswith(split):
            write_split(tmp_path, split, good, ".jsonl")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        dk.load_task(tmp_path)
    assert name in str(caught.value)


def test_bytes_that_are_no_text_in_a_parquet_column_of_strings(tmp_path):
    import pyarrow
    from pyarrow import parquet

    raw = pyarrow.array([b"a\xff", b"b"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(CorpusError, match=r"train\.parquet"):
        dk.load_task(tmp_path)


def test_hostile_text_in_tables_is_text():
    from distillkit.view.figures import text_table
    from distillkit.view.set_figures import label_table

    classes = [MARK, HOSTILE["markup"]]
    rows = [{"text": text, "label": MARK, "probabilities": [0.5, 0.5]} for text in HOSTILE.values()]
    page = text_table(rows, classes)
    assert "<script" not in page and "<img" not in page and html.escape(MARK) in page
    table = label_table(rows, classes)
    assert "<" not in table and "javascript:" not in table
    assert len(table.splitlines()) == len(rows) + 2 and {line.count("|") for line in table.splitlines()} == {5}
    for line in label_table(rows, classes, "latex").splitlines():
        assert "<" not in line and "frac" not in line.replace(r"\textbackslash{}frac", "")


def test_hostile_text_in_figures_is_drawn():
    import numpy as np

    from distillkit.view import figures as plots
    from pictures import attention_figures, prompt_figures

    names = list(HOSTILE.values())
    m = len(names)
    weights = np.full((m, m), 1 / m)
    demonstrations, scores = [(name, name) for name in names], {"without": dict.fromkeys(names, -1.0)}
    figures = [
        plots.curves([(names[0], names[1], names[2], {name: ([1], [1.0]) for name in names})]),
        attention_figures.thumbnails({names[1]: weights[None]}, title=names[0]),
        prompt_figures.labels_given({names[0]: {names[1]: 3}}, names[:2], names[2]),
        prompt_figures.prompt_and_labels(demonstrations, names[0], scores, names[0], title=names[1]),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font does not have
        for figure in figures:
            assert figure._repr_png_().startswith(b"\x89PNG") and plots.describe(figure)


@pytest.fixture
def model(standin_home, tmp_path):
    """A model folder to be tampered with."""
    (found,) = (standin_home / "hub" / "models--bert-base-uncased" / "snapshots").iterdir()
    shutil.copytree(found, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["bert", "unheard-of"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(task, model, file, kind):
    ran = model.parent / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil:\n    pass\n")
    names = ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification")
    own = {"auto_map": {n: ["evil.Evil", "evil.Evil"] if n == "AutoTokenizer" else "evil.Evil" for n in names}}
    if file == "config.json":
        own |= {"model_type": kind, "trust_remote_code": True}
    elif kind != "bert":
        own |= {"tokenizer_class": "Evil"}
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    if (file, kind) != ("config.json", "unheard-of"):
        dk.load_student(model, task)  # by transformers' own classes
    else:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            dk.load_student(model, task)
        assert str(model) in str(caught.value)
    assert not ran.exists()


def test_pickled_weights_are_refused(task, model):
    (model / "model.safetensors").unlink()
    ran = model.parent / "ran"
    (model / "pytorch_model.bin").write_bytes(b"cbuiltins\nopen\n(S'" + str(ran).encode() + b"'\nS'w'\ntR.")
    with pytest.raises((ValueError, FileNotFoundError), match=str(model)):
        dk.load_student(model, task)
    assert not ran.exists()


def test_a_file_with_the_right_sum_and_strange_tensors_is_refused(tmp_path):
    """Its maker can sum anything; nothing of it is taken for what it is not."""
    write_file(tmp_path / "set", kind="distilled-set", tensors={"__class__": torch.ones(1)})
    with pytest.raises(StorageError, match=f"{tmp_path / 'set'} holds no set that this distillkit can read"):
        dk.DistilledSet.load(tmp_path / "set")
