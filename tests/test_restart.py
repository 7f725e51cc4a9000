"""Data that could be lost: a kill at every stage, a run that starts over, and several runs in one place."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import threading

import pytest
import torch

import distillkit as dk
from distillkit.applications.publish import load_published, save_published
from distillkit.core import distiller as distiller_module
from distillkit.core.experts import Experts, record_experts
from distillkit.experiments.results import read, write
from distillkit.experiments.runner import Cell, Run
from distillkit.experiments.settings import Settings
from distillkit.io.checkpoint import Checkpoint
from distillkit.io.files import read_file, write_file
from distillkit.io.restart import started
from distillkit.io.signals import ENDING, Ended, ending_signals
from distillkit.io.storage import Claim, StorageError, append_line, read_lines, save_text
from killed import at_every_stage, forked, leftovers


@pytest.fixture(scope="module")
def start(world):
    return dk.DistilledSet.from_real(*world, per_class=1, length=8)


def number(path):
    return read_file(path, kind="test").data["number"] if path.exists() else None


# --- killed at every stage -------------------------------------------------------------------------------------------


def test_a_file_killed_at_every_stage_of_its_replacement(tmp_path):
    """An old version or the new one, and the next write clears away what was left."""
    target, text, seen = tmp_path / "run", tmp_path / "settings.yaml", []

    def write(value):
        write_file(target, kind="test", data={"number": value})
        save_text(text, str(value))

    write(0)
    for stage in at_every_stage(lambda: write(len(seen) + 1), tmp_path):
        seen.append((number(target), int(text.read_text())))
        assert seen[-1] in ((stage - 1, stage - 1), (stage, stage - 1), (stage, stage))
        write(stage)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "settings.yaml"]
    assert len(seen) > 6


@dataclasses.dataclass
class Addition:
    step: int
    loss: float


class Adding:
    """A run whose state after a step is the sum of all steps."""

    def __init__(self):
        self.records, self.total = [], torch.tensor(0)

    def make_step(self, n):
        self.total = self.total + len(self.records) + 1
        self.records = [*self.records, Addition(len(self.records) + 1, 0.5)]
        return self.records[-1]

    def state(self):
        return {"total": self.total}, {}

    def restore(self, tensors, data, records):
        self.total, self.records = tensors["total"], [Addition(**fields) for fields in records]


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_killed_at_every_stage_can_be_taken_up(tmp_path, every):
    """Also while it is being taken up, when the log is written anew."""
    def checkpoint():
        return Checkpoint(tmp_path / "run", kind="test", settings={"every": every}, every=every, activity="adding")

    saved = [0]
    for _ in at_every_stage(lambda: list(checkpoint().steps(Adding(), 12)), tmp_path):
        run = Adding()
        checkpoint().resume(run)
        saved.append(len(run.records))
        assert saved[-1] >= saved[-2] and int(run.total) == sum(range(saved[-1] + 1))
    assert len(saved) > 6 and max(saved) > 0
    checkpoint().resume(run := Adding())
    assert [record.step for record in run.records] == list(range(1, 13)) and int(run.total) == 78


def test_publishing_leaves_what_is_not_its_own(start, tmp_path):
    folder = save_published(start, tmp_path / "published")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    save_published(start, folder)
    assert (folder / ".git" / "HEAD").read_text() == "ref" and load_published(folder).meta == start.meta


# --- starting over ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """The place of a run, its result and its checkpoint, which say 0."""
    write(tmp_path / "results" / "small.json", {"config": {}, "number": 0})
    write_file(tmp_path / "work" / "small" / "checkpoint", kind="test", data={"number": 0})
    return tmp_path


def places(made):
    return made / "results" / "small.json", made / "work" / "small"


def state(made):
    result, work = places(made)
    return read(result)["number"] if result.exists() else None, number(work / "checkpoint")


def run(made, *, fresh=True, value=1, fails=None):
    result, work = places(made)
    with started(Claim(work), result, work, fresh=fresh):
        if fails == "before":
            raise RuntimeError
        if fails == "begun":
            with Claim(work / "checkpoint"):
                append_line(work / "checkpoint.log.jsonl", {"kind": "test"})
                (work / f".checkpoint.{'0a' * 8}.new").touch()
            raise RuntimeError
        write(result, {"config": {}, "number": value})
        if fails == "between":
            raise RuntimeError
        write_file(work / "checkpoint", kind="test", data={"number": value})


def test_starting_over_replaces_what_was_there(made):
    (made / "work" / "small" / ".checkpoint.lock").touch()
    append_line(made / "work" / "small" / "checkpoint.log.jsonl", {"kind": "test"})
    write_file(made / "work" / "small" / "experts" / "index.safetensors", kind="experts")
    write(made / "work" / "small" / "cells" / "one.json", {"config": {}})
    run(made)
    assert state(made) == (1, 1) and leftovers(made) == []
    assert [path.name for path in (made / "work" / "small").iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("fails", "left"), [("before", (0, 0)), ("begun", (0, 0)), ("between", (1, None))])
def test_a_run_that_fails_brings_back_what_it_has_not_replaced(made, fails, left):
    with pytest.raises(RuntimeError):
        run(made, fails=fails)
    assert state(made) == left and leftovers(made) == []


@pytest.mark.parametrize("absent", [(), ("results",), ("work",)])
def test_starting_over_killed_at_every_stage(made, absent):
    """Old or new as a whole, and never one beside the other."""
    old = tuple(None if name in absent else 0 for name in ("results", "work"))
    states = set()
    for name in absent:
        shutil.rmtree(made / name)
    template = made.parent / f"{made.name}-template"
    shutil.copytree(made, template)
    for _ in at_every_stage(lambda: run(made), made):
        result, work = places(made)
        with started(Claim(work), result, work):  # what any command does next
            states.add(state(made))
            assert states <= {old, (1, None), (1, 1)}
            assert not [name for name in leftovers(made) if name.endswith(".aside")]
        run(made, fresh=False, value=2)
        assert state(made) == (2, 2) and leftovers(made) == []
        shutil.rmtree(made)
        shutil.copytree(template, made)
    assert states == {old, (1, None), (1, 1)}


@pytest.mark.parametrize("harm", ["file", "nested", "link", "inside", "published", "json"])
def test_what_distillkit_did_not_write_is_not_taken(made, start, harm):
    result, work = places(made)
    if harm == "published":
        save_published(start, work / "for-friends")
    elif harm == "link":
        (work / "link").symlink_to(made)
    elif harm == "json":
        result.write_text('{"name": "package", "sha256": "0"}')
    else:
        name = {"file": "notes.txt", "nested": "a/b/thesis.txt", "inside": "experts/notes.safetensors"}[harm]
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("precious")
    before = sorted(str(path) for path in made.rglob("*") if path.suffix != ".lock")
    with pytest.raises(StorageError, match="will not start over at"):
        run(made)
    assert sorted(str(path) for path in made.rglob("*") if path.suffix != ".lock") == before


def test_a_damaged_result_can_be_made_anew(made):
    result, _ = places(made)
    result.write_bytes(result.read_bytes()[:-9])
    run(made)
    assert state(made) == (1, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_what_another_run_holds_is_not_taken(made, shared):
    _, work = places(made)
    holders = [Claim(work, shared=shared), Claim(work / "checkpoint", shared=shared)]
    for holder in holders:
        with holder, pytest.raises(StorageError, match="in use by another run"):
            run(made)
        assert state(made) == (0, 0) and leftovers(made) == []
    run(made)
    assert state(made) == (1, 1)


def test_runs_that_share_a_place_exclude_only_one_that_starts_over(made):
    _, work = places(made)
    one, other = (Claim(work, shared=True, wait=True) for _ in range(2))
    with started(one, work), started(other, work):
        with pytest.raises(StorageError, match="in use"), started(Claim(work, shared=True), work, fresh=True):
            pass
        assert state(made) == (0, 0)
        with pytest.raises(StorageError, match="in use"), Claim(work):
            pass


def test_experts_are_not_taken_from_a_recording_or_a_reader(world, tmp_path):
    folder = tmp_path / "experts"
    record_experts(*world, folder, batch_size=80)
    with Claim(folder, shared=True):
        record_experts(*world, folder, batch_size=80, epochs=2)  # those that share go on
        with pytest.raises(StorageError, match="in use"), started(Claim(folder, shared=True), folder, fresh=True):
            pass
    assert Experts.load(folder).epochs == 2
    with started(Claim(folder, shared=True), folder, fresh=True):
        record_experts(*world, folder, batch_size=80)
    assert Experts.load(folder).epochs == 1 and leftovers(tmp_path) == []


# --- scores ----------------------------------------------------------------------------------------------------------


def test_lines_of_several_processes_are_all_there(tmp_path):
    path = tmp_path / "scores.jsonl"
    pids = []
    for writer in range(3):
        pid = os.fork()
        if not pid:
            for line in range(20):
                append_line(path, {"writer": writer, "line": line})
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    rows = read_lines(path)
    assert sorted((row["writer"], row["line"]) for row in rows) == [(w, line) for w in range(3) for line in range(20)]
    assert [row["line"] for row in rows if row["writer"] == 1] == list(range(20))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_and_swallows_nothing(tmp_path, cut):
    path = tmp_path / "scores.jsonl"
    for mean in (0.25, 0.5):
        append_line(path, {"mean": mean})
    path.write_bytes(path.read_bytes()[:-cut])
    whole = [{"mean": 0.25}] + [{"mean": 0.5}] * (cut == 1)  # nothing but the end of the line is lost
    assert read_lines(path) == whole
    append_line(path, {"mean": 0.75})
    assert read_lines(path) == [*whole, {"mean": 0.75}]


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("edit", [lambda row: row | {"mean": 0.99}, lambda row: {"mean": row["mean"]}, lambda row: [row]])
def test_an_edited_line_is_named(tmp_path, line, edit):
    path = tmp_path / "scores.jsonl"
    for mean in (0.25, 0.5):
        append_line(path, {"mean": mean})
    lines = path.read_text().splitlines()
    lines[line] = json.dumps(edit(json.loads(lines[line])))
    for end in ("\n", ""):
        path.write_text("\n".join(lines) + end)
        with pytest.raises(StorageError, match=rf"scores\.jsonl, line {line + 1}: "):
            read_lines(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Settings):
    name: str = "small"
    seeds: tuple[int, ...] = tuple(range(24))
    rows: tuple[str, ...] = ("random/own",)

    def seeds_of(self, row):
        return self.seeds


class Seeds(Cell):
    def score(self, method, recipe, seed):
        return [{"accuracy": seed / 100}], {}

    def columns(self, method, recipe):
        return {"method": method, "recipe": recipe}


def test_work_folders_that_share_a_folder_of_results_lose_no_score(world, tmp_path):
    pids = []
    for process in range(3):
        pid = os.fork()
        if not pid:
            cell = functools.partial(Seeds, task=world[0], student=world[1])
            Run(cell, Job(), tmp_path / "results", tmp_path / f"work-{process}")(seeds=tuple(range(process, 24, 3)))
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    scores = read(tmp_path / "results" / "small.json")["scores"]
    assert [(score["set_seed"], score["accuracy"]) for score in scores] == [(seed, seed / 100) for seed in range(24)]
    assert leftovers(tmp_path) == []


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def goal(world):
    return dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)


def signalled(monkeypatch, module, name, signum, at):
    """Send this process ``signum`` in the ``at``-th call of a function."""
    plain, calls = getattr(module, name), iter(range(1, 10**6))

    def call(*args, **kwargs):
        if next(calls) == at:
            os.kill(os.getpid(), signum)
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_saves_the_last_step(start, goal, tmp_path, monkeypatch, capsys, signum):
    whole = dk.Distiller(start, goal)
    assert len(list(whole.run(3))) == 3
    with monkeypatch.context() as patch:
        signalled(patch, distiller_module, "meta_gradient", signum, at=3)
        with pytest.raises(Ended) as ended:
            list(dk.Distiller(start, goal, checkpoint=tmp_path / "run", checkpoint_every=100).run(3))
    assert ended.value.code == 128 + signum and "distilling ended after step 2 of 3" in capsys.readouterr().err
    assert signal.getsignal(signum) is signal.SIG_DFL
    resumed = dk.Distiller(start, goal, checkpoint=tmp_path / "run")
    assert resumed.step == 2 and len(list(resumed.run(3))) == 1
    assert torch.equal(resumed.distilled.embeds, whole.distilled.embeds)


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_leaves_a_recording_and_a_search_that_can_go_on(world, start, goal, tmp_path, monkeypatch, signum):
    from distillkit.core import experts
    from distillkit.text import swaps

    settings = {"batch_size": 27, "snapshots_per_epoch": 3, "optimizer": dk.SGD(0.1)}
    with monkeypatch.context() as patch:
        signalled(patch, experts, "inner_step", signum, at=3)
        with pytest.raises(Ended):
            record_experts(*world, tmp_path / "experts", **settings)
    with pytest.raises(StorageError, match="the recording was interrupted"):
        Experts.load(tmp_path / "experts")
    assert record_experts(*world, tmp_path / "experts", **settings).snapshots == 4

    def search():
        return dk.SwapSearch(start, world[1], dk.StudentJudge(goal, tries=1), candidates=1, checkpoint=tmp_path / "search")

    with monkeypatch.context() as patch:
        signalled(patch, swaps, "combined", signum, at=2)
        with pytest.raises(Ended):
            list(search().run(2))
    assert len(search().records) == 1 and len(list(search().run(2))) == 1
    assert signal.getsignal(signum) is signal.SIG_DFL


def test_handlers_come_back_in_any_order_and_those_of_others_stay(monkeypatch):
    one, other = ending_signals(), ending_signals()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    with pytest.raises(Ended):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the saving
    other.__exit__(None, None, None)
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in ENDING)
    heard = []
    for handler in (signal.SIG_IGN, lambda *_: heard.append("own")):
        signal.signal(signal.SIGHUP, handler)
        try:
            with ending_signals():
                os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is handler
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert heard == ["own"]


def test_another_thread_changes_no_handler():
    def inner():
        with ending_signals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers = []
    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def test_an_unhandled_end_is_the_exit_code_of_a_script(tmp_path):
    def script():
        with ending_signals():
            os.kill(os.getpid(), signal.SIGTERM)

    assert forked(script, tmp_path) == 143
