"""A list of jobs in order of value, done as far as some minutes go: for a machine that is at hand for a short time.

A job is a list of *units*: single scores or measurements, each written to ``FOLDER/results`` as soon as it is done.  A unit has
an expected time: the median of those that its kind has taken in this folder, else a guess that its job states.  The suite takes
the units in order and does each one that fits into the time that is left.  A unit that would not end in time is left for a
later call, and a smaller one of less value may come before it.  Learning a set takes long but saves its progress, so it is
begun with any time left and gone on with by the next call.  Given the folder of an earlier call, the suite does what is
missing there.

Nothing waits for the end: however a call ends, what was done by then is in ``FOLDER``.  ``FOLDER/times.jsonl`` has a line for
each attempt at a unit.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from distillkit.experiments.results import now, processor
from distillkit.experiments.settings import Data
from distillkit.io.checks import check_choice
from distillkit.io.deadline import Deadline, TimeUp
from distillkit.io.escaping import one_line, say
from distillkit.io.storage import Claim, StorageError, append_line, read_lines

SLICE = 3.0  # seconds below which a unit that saves its progress is not taken up
MARGIN = 1.2  # a machine is not equally fast all the time


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a job that is done, and written, as a whole.

    Attributes:
        name: of this unit, different from all others of its job.
        kinds: what takes about as long as this unit, from like to less like.
        guess: seconds, where no unit of its kinds has been timed.
        run: does it; it raises TimeUp at a deadline of its own choice.
        done: whether its result is there.
        divisible: whether it saves its progress where it is cut short.
        world: what has to be loaded before it, such as a corpus and a student; units of one world share it.
        load: seconds that loading takes.
        builds_on: the sets that it needs or makes; of several processes, one does all units that build on the same.
    """

    name: str
    kinds: tuple[str, ...]
    guess: float
    run: Callable[[], object]
    done: bool = False
    divisible: bool = False
    world: str = ""
    load: float = 0.0
    builds_on: str = ""


class Job(Protocol):
    """What the suite needs of a job; :mod:`distillkit.experiments.suite_jobs` has them.

    ``measures_time`` says that its numbers are seconds, so that nothing else may run beside it.
    """

    name: str
    measures_time: bool

    def units(self, out: Path, deadline: Deadline, command: str) -> list[Unit]:
        """All units in order of value, done or not.

        Raises ValueError or an OSError where the job cannot be done here, with the reason.
        """

    def needs(self) -> list[Data]:
        """Settings that name the corpora and the students that its units load."""


class Times:
    """How long units took in a folder, on this kind of machine."""

    def __init__(self, out: Path):
        self.path = out / "times.jsonl"
        self._longest: dict[tuple, float] = defaultdict(float)  # of the attempts at a unit that were cut short
        self._spent: dict[tuple, float] = defaultdict(float)  # on a unit that saves its progress
        self._totals: dict[tuple, list[float]] = defaultdict(list)  # of the units of a kind that were done
        for line in read_lines(self.path):
            self._count(line)

    def expected(self, job: str, unit: Unit) -> float:
        """Seconds that a unit will take as a whole."""
        least = 0.0 if unit.divisible else 2 * self._longest[job, unit.name]  # that was not enough
        seconds = next((self._totals[job, kind] for kind in unit.kinds if self._totals[job, kind]), [unit.guess])
        return max(least, statistics.median(seconds))  # not the mean: some had to load their world, or stood still

    def _count(self, line: Mapping) -> None:
        place, seconds = (line["job"], line["unit"]), line["seconds"]
        if line["machine"] != processor():
            return
        if line["state"] == "cut":
            self._longest[place] = max(self._longest[place], seconds)
        if line["divisible"]:
            self._spent[place] += seconds
            seconds = self._spent[place]
        for kind in line["kinds"] if line["state"] == "done" else ():
            self._totals[line["job"], kind].append(seconds)

    def add(self, job: str, unit: Unit, seconds: float, state: str, reason: str = "") -> None:
        """Note an attempt at a unit."""
        line = {"job": job, "unit": unit.name, "kinds": list(unit.kinds), "seconds": round(seconds, 3), "state": state,
                "divisible": unit.divisible, "machine": processor(), "reason": reason, "ended": now()}
        append_line(self.path, line)
        self._count(line)


def named(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs of these names, in their order of value; all where no name is given."""
    for name in names:
        check_choice("jobs", name, [job.name for job in jobs])
    return [job for job in jobs if not names or job.name in names]


@dataclasses.dataclass(frozen=True)
class Share:
    """Which units a process does: every ``of``-th group of those that build on the same sets, from ``number`` on."""

    number: int = 0
    of: int = 1

    def mine(self, units: Sequence[Unit]) -> list[Unit]:
        """The units of this process, in their order."""
        places = {group: place for place, group in enumerate(dict.fromkeys(unit.builds_on for unit in units))}
        return [unit for unit in units if places[unit.builds_on] % self.of == self.number]


def run(jobs: Sequence[Job], out: Path, deadline: Deadline, command: str = "", share: Share = Share()) -> None:
    """Do what fits before the deadline, and say what was done and what is left.

    Args:
        share: what this process does of it, where several work in ``out``.

    Raises:
        StorageError: another suite works in ``out``, or it cannot be written.
    """
    with Claim(out, shared=share.of > 1):
        times = Times(out)
        for job in jobs:
            alone = share.of > 1 and job.measures_time
            outcome = "skipped: it measures time; run it in one process" if alone else _run_job(
                job, out, deadline, times, command, share)
            say(f"{job.name}: {outcome}")
    say(f"{max(0.0, deadline.left()):.0f} s were left; the results are in {out / 'results'}; the same command goes on")


def _run_job(job: Job, out: Path, deadline: Deadline, times: Times, command: str, share: Share) -> str:
    """Do the units of a job that fit; returns how many are done and left, in words."""
    try:
        units = share.mine(job.units(out, deadline, command))
    except (ValueError, OSError, ImportError) as error:
        return f"skipped: {one_line(error)}"
    done, cut, reasons = sum(unit.done for unit in units), 0, Counter()
    earlier, worlds = done, set()
    for unit in units:
        load = 0.0 if unit.world in worlds else unit.load
        if not unit.done and _fits(times.expected(job.name, unit), load, unit, deadline):
            worlds.add(unit.world)
            state, reason, seconds = _attempt(unit)
            done, cut = done + (state == "done"), cut + (state == "cut")
            if reason not in reasons:  # what is missing for one is missing for many
                times.add(job.name, unit, seconds, state, reason)
                say(f"  {job.name}, {one_line(unit.name)}: {state} after {seconds:.1f} s{reason and f' ({reason})'}")
            reasons.update([reason] if reason else [])
    left = len(units) - done - sum(reasons.values())
    words = f"{done} of {len(units)} units done, {done - earlier} of them now; {left} left"
    words += f" ({cut} cut short by the end of the time)" if cut else ""
    return "; ".join([words, *(f"{count} cannot be done here: {reason}" for reason, count in reasons.items())])


def _fits(expected: float, load: float, unit: Unit, deadline: Deadline) -> bool:
    return deadline.left() > MARGIN * load + (min(SLICE, expected) if unit.divisible else MARGIN * expected)


def _attempt(unit: Unit) -> tuple[str, str, float]:
    """Do a unit; returns "done", "cut" or "failed", the reason of a failure, and the seconds it took."""
    begun, state, reason = time.monotonic(), "done", ""
    try:
        unit.run()
    except TimeUp:
        state = "cut"
    except StorageError:
        raise
    except Exception as error:  # whatever is wrong with one unit, it must not cost the minutes of the others
        state, reason = "failed", one_line(f"{type(error).__name__}: {error}")
    return state, reason, time.monotonic() - begun


def listed(jobs: Sequence[Job], out: Path) -> Iterator[str]:
    """A line for each job and each of its units: what is done, and how long the others will take."""
    times = Times(out)
    for job in jobs:
        try:
            units = job.units(out, Deadline(), "")
        except (ValueError, OSError, ImportError) as error:
            yield f"{job.name}: skipped: {one_line(error)}"
            continue
        left = sum(times.expected(job.name, unit) for unit in units if not unit.done)
        yield f"{job.name}: {sum(unit.done for unit in units)} of {len(units)} units done, about {left / 60:.1f} minutes left"
        for unit in units:
            yield f"  {'done' if unit.done else f'{times.expected(job.name, unit):.0f} s':>8}  {one_line(unit.name)}"
