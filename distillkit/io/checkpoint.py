"""A run that can be ended at any moment and taken up again: one checkpoint file, and a log of its records beside it.

The checkpoint holds the settings of the run, the versions of what computes, and the state after a step.  The log,
``<name>.log.jsonl``, has a sealed line of settings and one for each record.  A checkpoint says how many records the log holds
by then, and their SHA-256, so that saving costs the same after ten steps as after ten thousand, and a checkpoint with
another run's log is noticed.  What the log holds beyond the checkpoint belongs to steps that are made again.

A run that resumes must have the settings of the checkpoint; the first difference is named.  While it runs, a lock keeps
other runs out.  However it ends (Ctrl-C, SIGTERM, SIGHUP, an error, a loop that was left), its last complete step is saved
and stderr says how to go on; after SIGKILL the steps since the last checkpoint are made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import warnings
from collections.abc import Generator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distillkit.io.checks import require
from distillkit.io.escaping import say
from distillkit.io.files import read_file, write_file
from distillkit.io.progress import progress
from distillkit.io.signals import ending_signals
from distillkit.io.storage import Claim, StorageError, absolute, digest_of, read_lines, replacing, sealed_line, write_end

LOG = ".log.jsonl"
VERSIONED = ("torch", "transformers", "numpy")


class Resumable(Protocol):
    """What a checkpoint saves: an object that changes by steps, each of which happens as a whole or not at all.

    Attributes:
        records: a dataclass for each step made, with its ``loss``.
    """

    @property
    def records(self) -> list: ...

    def make_step(self, n: int) -> Any:
        """Make one of ``n`` steps, and return its record."""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """All that steps change but the records, as tensors and JSON."""

    def restore(self, tensors: dict[str, Tensor], data: dict, records: list[dict]) -> None:
        """Become what ``state`` returned, with these records as JSON."""


class Checkpoint:
    """Saves a run to a file, and takes it up again.

    Args:
        path: of the file; None: nothing is saved.
        kind: what the file is, such as ``"distiller-checkpoint"``.
        settings: all that decides what the run computes, as JSON.
        every: steps between checkpoints.
        activity: what the run does, for its progress bar and its messages.
        writes: whether this process saves, logs and holds the lock; of several that make the same steps one does.  Another
            one saves only where it ends early and that one is gone.

    Attributes:
        claim: the lock on ``path``; a run takes it, and a ``with`` block may hold it longer.
    """

    def __init__(self, path: str | Path | None, *, kind: str, settings: Mapping, every: int, activity: str,
                 writes: bool = True):
        self.path = None if path is None else absolute(path)
        self.kind, self.every, self.activity = kind, every, activity
        self.settings = json.loads(json.dumps(settings))
        self.writes = writes and path is not None
        self.claim = nullcontext() if self.path is None else Claim(self.path)
        self._saved = self._logged = self._end = 0  # steps in the checkpoint, steps in the log, bytes in the log
        self._sum: Any = None  # of the log's records, once this process has begun to write it

    @property
    def log(self) -> Path:
        """Where the log is."""
        assert self.path is not None
        return self.path.with_name(self.path.name + LOG)

    def resume(self, run: Resumable) -> None:
        """Take up the checkpoint, if there is one with more steps than ``run`` has made.

        Raises:
            ValueError: it was made with other settings; the first is named.
            StorageError: it cannot be trusted.
        """
        if self.path is None or not os.path.lexists(self.path):
            return
        stored = read_file(self.path, kind=self.kind)
        try:
            check_settings(self.path, stored.data["settings"], self.settings)
            steps = stored.data["records"]["count"]
            self._saved = steps
            if steps <= len(run.records):
                return
            run.restore(stored.tensors, stored.data["state"], logged_records(self.path, stored.data["records"]))
        except (KeyError, TypeError) as error:
            raise StorageError(f"{self.path} is no checkpoint of this distillkit: it has no {error}; choose another "
                               "file") from error
        if stored.data["versions"] != versions():
            warnings.warn(f"{self.path} was made with {stored.data['versions']}, and goes on with {versions()}: what comes may "
                          "differ by rounding from an uninterrupted run", stacklevel=3)

    def steps(self, run: Resumable, n: int) -> Generator[Any, None, None]:
        """Make steps until ``n`` in all have been made, saving on the way, and yield the record of each.

        Raises:
            StorageError: another run works at ``path``, or it cannot be written.
        """
        with self.claim if self.writes else nullcontext(), ending_signals():
            self.resume(run)  # another run may have gone on since this object was made
            if self.writes:
                self._begin_log(run)
            try:
                with progress(total=n, initial=len(run.records), desc=self.activity, unit="step") as bar:
                    while len(run.records) < n:
                        record = run.make_step(n)
                        if self.writes:
                            self._extend_log(run)
                            if record.step % self.every == 0 or record.step == n:
                                self.save(run)
                        bar.update()
                        bar.set_postfix(loss=f"{record.loss:.3f}")
                        yield record
            except BaseException:
                self._end_early(run, n)
                raise

    def save(self, run: Resumable) -> None:
        """Write the checkpoint of ``run``.

        Raises:
            ValueError: there is no ``path``.
            StorageError: another run works at ``path``, or it cannot be written.
        """
        require(self.path, f"this {type(run).__name__} has no checkpoint to save to; make it with checkpoint=FILE")
        with self.claim:
            if self._sum is None:
                self._begin_log(run)
            self._extend_log(run)
            tensors, state = run.state()
            records = {"count": self._logged, "sha256": self._sum.hexdigest()}
            write_file(self.path, kind=self.kind, tensors=tensors, identity={"settings": digest_of(self.settings)},
                       data={"settings": self.settings, "versions": versions(), "records": records, "state": state})
            self._saved = self._logged

    def _end_early(self, run: Resumable, n: int) -> None:
        """Save what an early end would lose, and say how to go on."""
        if self.path is None:
            return
        # Where another process writes, it holds the lock for as long as it lives, and saves the step itself.
        with nullcontext() if self.writes else suppress(StorageError), self.claim:
            if not self.writes:
                self.resume(run)
            if len(run.records) > self._saved:
                self.save(run)
            if len(run.records) < n:
                say(f"{self.activity} ended after step {len(run.records)} of {n}, which is saved in {self.path}; to go on, "
                    f"make a {type(run).__name__} with the same settings and call run({n})", error=True)

    def _begin_log(self, run: Resumable) -> None:
        """Write the log anew up to the last record: it may end with steps after the checkpoint, or with a torn line."""
        head = sealed_line({"kind": self.kind, "settings": self.settings, "versions": versions()})
        lines = _sealed(run.records)
        with replacing(self.log) as file:  # in one piece: the checkpoint needs the records at every moment
            file.write(head + lines)
        self._sum, self._logged, self._end = hashlib.sha256(lines), len(run.records), len(head) + len(lines)

    def _extend_log(self, run: Resumable) -> None:
        """Append the records that the log lacks."""
        lines = _sealed(run.records[self._logged :])
        write_end(self.log, self._end, lines)  # an attempt that failed may have left a part of a line
        self._sum.update(lines)
        self._logged, self._end = len(run.records), self._end + len(lines)


def _sealed(records: list) -> bytes:
    return b"".join(sealed_line(_strict(dataclasses.asdict(record))) for record in records)


def logged_records(path: Path, records: Mapping) -> list[dict]:
    """The records of the checkpoint ``path`` from its log; ``records`` is what it says of them.

    Raises:
        StorageError: the log is damaged, or another run's.
    """
    log = path.with_name(path.name + LOG)
    lines = read_lines(log)[1 : 1 + records["count"]]
    total = hashlib.sha256(b"".join(map(sealed_line, lines))).hexdigest()
    require(total == records["sha256"], f"{log} is not the log of {path}: it has {len(lines)} of its {records['count']} "
            "records, or those of another run; put the right log there, or start over", StorageError)
    return lines


def check_settings(path: Path, stored: Mapping, current: Mapping) -> None:
    """Raise ValueError unless the ``stored`` settings are the ``current`` ones; the message names the first difference."""
    difference = first_difference(stored, current)
    require(not difference, f"{path} holds a run with other settings: {difference}; go on with the same settings, or choose "
            "another checkpoint")


def first_difference(stored, current, name: str = "") -> str:
    """Where two JSON values differ first, in words; nothing where they are equal."""
    if stored == current:
        return ""
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        for key in (*current, *stored):
            if stored.get(key) != current.get(key):
                return first_difference(stored.get(key), current.get(key), f"{name}.{key}" if name else key)
    return f"{name} is {stored!r} there and {current!r} here"


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {package: importlib.metadata.version(package) for package in VERSIONED} | {"python": platform.python_version()}


def _strict(value):
    """A JSON value in which NaN and infinity, which JSON has not, are words that ``float`` reads."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
