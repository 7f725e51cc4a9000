"""Starting over, without losing what an earlier run has made before there is something new in its place.

``--fresh`` forgets an earlier run.  Nothing is deleted for its name: only what the kit itself wrote, and only while no other
run works there.  It is first set aside, under a hidden name beside its place.  When the new run ends, what was set aside is
deleted if the new run has written anything, and else put back.  A killed process leaves it set aside, and the next run
decides the same: the first of the places is set aside last, and says that all are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from distillkit.io.checkpoint import LOG
from distillkit.io.storage import Claim, StorageError, absolute, unwritten
from distillkit.io.verify import kind_of


@contextmanager
def started(claim: Claim, *paths: str | Path, fresh: bool = False) -> Iterator[None]:
    """Hold ``claim`` for a run that writes to ``paths``; where it is ``fresh``, without what an earlier one left there.

    Args:
        claim: of the run's folder; shared with others or not.
        paths: the folders and files that the run makes.
        fresh: set aside what is there until the run has begun to write; without it a run goes on with what is there.

    Raises:
        StorageError: another run works there; something that distillkit did not write lies there, named.
    """
    places = [absolute(f"{path}{suffix}") for path in paths for suffix in ("", LOG)]  # a checkpoint is worth its log
    with claim, ExitStack() as ending:
        if fresh:
            with claim.alone(), ExitStack() as locks:
                _settle(places)
                for place in places:
                    _check_written_by_kit(place)
                    for lock in place.rglob(".*.lock"):
                        locks.enter_context(Claim(lock.with_name(lock.name[1 : -len(".lock")])))
                for place in {*places[::2]} - {claim.path}:
                    locks.enter_context(Claim(place))
                ending.callback(_settle, places)
                _set_aside(places)
        else:
            with suppress(StorageError), claim.alone():  # or there are others, for whom it was decided
                _settle(places)
        yield


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.aside")


def _set_aside(places: list[Path]) -> None:
    for place in reversed(places):
        try:
            if os.path.lexists(place):
                os.rename(place, _aside(place))
            elif place == places[0]:
                _aside(place).mkdir(parents=True)  # an empty one: there was nothing, and all the others are set aside
        except OSError as error:
            raise unwritten(place, error) from error


def _settle(places: list[Path]) -> None:
    """Delete what was set aside if something new has been written at any of ``places``, else put it back."""
    complete = os.path.lexists(_aside(places[0]))  # otherwise a process was killed while it set aside or put back
    if complete and any(map(_is_written, places)):
        for place in reversed(places):
            _delete(_aside(place))
        return
    for place in places:
        aside = _aside(place)
        if os.path.lexists(aside):
            _delete(place)  # locks and logs
            os.rename(aside, place)
            with suppress(OSError):
                place.rmdir()  # it was empty, and stood for nothing


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_written(place: Path) -> bool:
    """Whether a run has written there more than its locks and its log."""
    paths = place.rglob("*") if place.is_dir() else [place]
    return any(path.is_file() and not path.name.endswith((".lock", LOG, ".new")) for path in paths)


def _check_written_by_kit(path: Path) -> None:
    """Raise StorageError unless distillkit wrote all that stands at ``path``."""
    try:
        if path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                _check_written_by_kit(inner)
        elif os.path.lexists(path) and not kind_of(path):
            raise StorageError(f"will not start over at {path}: distillkit did not write it; move it away, or give the run "
                               "another name")
    except OSError as error:
        raise unwritten(path, error) from error
