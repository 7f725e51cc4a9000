"""Runs that are ended from outside, each in a process of its own: what tests/test_survival.py asserts on.

    python tests/survival_worker.py --kills 50

One process loads the stand-in hub's task and a tiny BERT, and forks a child for each run, so that nothing is imported twice.
It prints what it saw as one line of JSON; the first thing that is not as it should be ends it with an assertion.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import distillkit as dk
import standin_hub
from distillkit.applications.publish import load_published, save_published
from distillkit.io.files import read_file, write_file
from distillkit.io.storage import StorageError
from killed import at_every_stage, forked, leave, leftovers

STEPS = 8
NOBODY = 65534


class World:
    """A run with dropout, whose every step is known from an uninterrupted one."""

    def __init__(self, home: Path, work: Path):
        self.work = work
        with standin_hub.patched(home):
            task = dk.load_task("rotten_tomatoes", max_length=12)
            student = dk.load_student("bert-base-uncased", task)
        unroll = dk.Unroll(2, optimizer=dk.AdamW(0.01, eps_root=1e-6), dropout=True)
        self.start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
        self.goal = dk.BPTT(task, student, unroll, metagrad=dk.Replay(), batch_size=8)
        self.folder = work / "run"
        out = work / "reference"
        status, _ = self.child(lambda tell: self.write_states(out))
        assert status == 0, said(work)
        *self.states, self.pace = json.loads(out.read_text())

    def distiller(self, every: int = 1, folder: Path | None = None) -> dk.Distiller:
        return dk.Distiller(self.start, self.goal, seed=5, checkpoint=folder or self.folder, checkpoint_every=every)

    def write_states(self, out: Path) -> None:
        """The state before the first step and after each, and the seconds of a step."""
        whole, begun = self.distiller(every=10**6, folder=self.work / "whole"), time.perf_counter()
        states = [state(whole), *(state(whole) for _ in whole.run(STEPS))]
        out.write_text(json.dumps([*states, (time.perf_counter() - begun) / STEPS]))

    def child(self, run, *, kill=None, after: float = 0.0, first: bool = False) -> tuple[int, list[int]]:
        """Fork, call ``run(tell)``, send the signal ``kill`` after some seconds (of the ``first`` number told, if so).

        Returns:
            the exit status (minus the signal that ended it), and the numbers it told.
        """
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            leave(lambda: run(lambda number: os.write(writing, b"%d\n" % number)), self.work / "said")
        os.close(writing)
        with os.fdopen(reading) as lines:
            told = [lines.readline()] if first else []
            if kill:
                time.sleep(after)
                os.kill(pid, kill)
            told += lines.readlines()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), [int(line) for line in told if line]

    def taken_up(self) -> int:
        """The step that is saved, after a check that it is verified and to the bit what it should be."""
        found = self.distiller()
        assert state(found) == self.states[found.step], f"step {found.step} is another one"
        return found.step

    def go(self, tell, every: int, limit: int | None = None) -> None:
        for record in self.distiller(every).run(STEPS):
            tell(record.step)
            if record.step == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> None:
        """Run to the end; then the log tells every step once, and nothing lies about that does not belong there."""
        status, _ = self.child(lambda tell: self.go(tell, 1))
        assert status == 0, said(self.work)
        assert self.taken_up() == STEPS
        records = [dict(r) for r in logged(self.folder)[1:]]
        assert [r["step"] for r in records] == list(range(1, STEPS + 1))
        assert [r["loss"] for r in records] == [r.loss for r in self.distiller().records]
        about = {path.name for path in self.work.iterdir() if "run" in path.name}
        assert about == {"run", ".run.lock", "run.log.jsonl"}, about
        self.clear()

    def clear(self) -> None:
        self.folder.unlink(missing_ok=True)

    def orphans(self) -> int:
        return sum(path.name.startswith(".run.") and path.suffix == ".new" for path in self.work.iterdir())


def said(work: Path) -> str:
    """What the last child wrote to stderr."""
    return (work / "said").read_text()


def state(distiller: dk.Distiller) -> str:
    """A hash of all that a step changes: embeddings, labels, step sizes, Adam's moments, records (but for their seconds)."""
    found, (tensors, data) = hashlib.sha256(), distiller.state()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    found.update(json.dumps(data).encode())
    for r in distiller.records:
        found.update(repr((r.step, r.loss, sorted(r.terms.items()), r.grad_norm, r.step_sizes)).encode())
    return found.hexdigest()


def logged(folder: Path) -> list[dict]:
    lines = folder.with_name(f"{folder.name}.log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def each_step(world: World) -> list[int]:
    """A process for every step, each killed after it."""
    saved = []
    for step in range(1, STEPS):
        status, told = world.child(lambda tell, step=step: world.go(tell, 1, limit=step))
        assert status == -signal.SIGKILL and told == [step], said(world.work)
        saved.append(world.taken_up())
    world.finish()
    return saved


def kills(world: World, times: int, draw: random.Random) -> dict:
    """SIGKILL at random moments of a run that saves after every step."""
    saved, seen = [], 0
    while len(saved) < times:
        last = saved[-1] if saved and saved[-1] < STEPS else 0
        status, told = world.child(
            lambda tell: world.go(tell, 1), kill=signal.SIGKILL, after=draw.uniform(0, 3 * world.pace)
        )
        assert status in (0, -signal.SIGKILL), said(world.work)
        seen += world.orphans()
        found = world.taken_up()
        assert found >= max([last, *told]), f"step {found} is saved, and {[last, *told]} had been"
        saved.append(found)
        if found == STEPS:
            world.clear()
    world.finish()
    return {"saved": saved, "unfinished": seen}


def interrupts(world: World, times: int, draw: random.Random) -> list[int]:
    """SIGINT, SIGTERM and SIGHUP at random moments of a run that saves at its end only."""
    saved = []
    while len(saved) < times:
        number = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[len(saved) % 3]
        status, told = world.child(
            lambda tell: world.go(tell, 10**6), kill=number, after=draw.uniform(0, 3 * world.pace), first=True
        )
        found = world.taken_up()
        if status == 0:
            assert found == STEPS
        else:
            assert status == 128 + number and found - told[-1] in (0, 1), (status, found, told, said(world.work))
            if found < STEPS:  # else the last checkpoint was interrupted, and written after all
                assert f"distilling ended after step {found} of {STEPS}, which is saved in" in said(world.work)
                assert f"call run({STEPS})" in said(world.work)
            saved.append(found)
        if found == STEPS:
            world.clear()
    world.finish()
    return saved


def no_room(world: World) -> str:
    """No file may grow beyond some bytes: the checkpoint before stays, and what to do is said."""

    def run(tell):
        records = world.distiller().run(STEPS)
        tell(next(records).step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        try:
            next(records)
        finally:  # or no room were left to say it
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    status, told = world.child(run)
    assert status == 1 and told == [1] and world.taken_up() == 1, said(world.work)
    message = said_last(world)
    world.finish()
    return message


def no_right(world: World) -> str:
    """The folder above may no longer be written to; as somebody who is not root, whom no permission binds."""
    home = Path(tempfile.mkdtemp(prefix="distillkit-"))

    def run(tell):
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        write_file(home / "run", kind="test", data={"number": 1})
        home.chmod(0o555)
        write_file(home / "run", kind="test", data={"number": 2})

    status, _ = world.child(run)
    assert status == 1 and read_file(home / "run", kind="test").data == {"number": 1}, said(world.work)
    home.chmod(0o755)
    shutil.rmtree(home)
    return said_last(world)


def recordings(world: World) -> int:
    """SIGKILL at every stage of recording experts: the same call makes the rest, and what nobody killed would have made."""
    folder, whole = world.work / "experts", world.work / "uninterrupted"

    def record(place: Path = folder):
        dk.record_experts(world.goal.task, world.goal.student, place, batch_size=80, optimizer=dk.SGD(0.1), seed=1)

    assert forked(lambda: record(whole), world.work) == 0, "autograd must not have run in a process that forks"
    stages = 0
    for _ in at_every_stage(record, folder, step=5):
        assert forked(record, world.work) == 0
        for index in range(2):
            one, other = (dk.Experts.load(place).snapshot(0, index)[0] for place in (whole, folder))
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert leftovers(folder) == []
        shutil.rmtree(folder)
        stages += 1
    return stages


def publications(world: World) -> int:
    """SIGKILL at every stage of publishing a set anew: the earlier one or the new one can be read, and replaced."""
    target, stages, seen = world.work / "published", 0, set()
    first, second = (dataclasses.replace(world.start, meta={**world.start.meta, "task": name}) for name in ("first", "second"))

    def publish(distilled):
        assert forked(lambda: save_published(distilled, target), world.work) == 0

    publish(first)
    for _ in at_every_stage(lambda: save_published(second, target), world.work, step=2):
        seen.add(load_published(target).meta["task"])
        publish(first)
        assert load_published(target).meta["task"] == "first" and leftovers(world.work) == []
        stages += 1
    assert load_published(target).meta["task"] == "second" and "first" in seen <= {"first", "second"}
    return stages


def said_last(world: World) -> str:
    """The message of the exception that ended the last child that failed."""
    return next(line for line in reversed(said(world.work).splitlines()) if line.startswith(StorageError.__module__))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--kills", type=int, default=5)
    args.add_argument("--interrupts", type=int, default=3)
    args.add_argument("--seed", type=int, default=0, help="of the moments")
    args.add_argument("--home", type=Path, help="a filled stand-in hub; default: one is made")
    given = args.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        world = World(given.home or standin_hub.fill(Path(folder) / "hub"), work)
        print(json.dumps({
            "each": each_step(world),
            "kills": kills(world, given.kills, draw),
            "interrupts": interrupts(world, given.interrupts, draw),
            "no_room": no_room(world),
            "no_right": no_right(world),
            "recordings": recordings(world),
            "publications": publications(world),
        }))


if __name__ == "__main__":
    main()
