"""Starting over, without losing what an earlier run has made before there is something new in its place.

``--fresh`` forgets an earlier run.  Nothing is deleted for its name: only what the kit itself wrote, by the manifests that
lie with it, and only while no other run works there.  It is first set aside, under a hidden name beside its place.  When the
new run ends, what was set aside is deleted if the new run has written anything, and else put back.  A killed process leaves
it set aside, and the next run decides the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from distillkit.io.storage import (
    LEFT_OVER,
    MANIFEST,
    Claim,
    StorageError,
    beside,
    delete,
    is_vacant,
    kind_of,
    others,
    remove_orphans,
    unwritten,
)

LOG = ".log.jsonl"


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
    places = [Path(path).expanduser().absolute() for path in paths]
    with claim, ExitStack() as ending:
        if fresh:
            with claim.alone():
                _decide(places)
                for place in places:
                    _check_own(place)
                with _unused(places, claim):
                    ending.callback(_decide, places)
                    _set_aside(places)
        else:
            with suppress(StorageError), claim.alone():  # or there are others, for whom it was decided
                _decide(places)
        yield


def _set_aside(places: list[Path]) -> None:
    for place in places:
        aside = beside(place, "aside")
        try:
            if os.path.lexists(place):
                os.rename(place, aside)
            else:  # says that there was nothing, for a process that finds this one killed
                aside.mkdir(parents=True)
        except OSError as error:
            raise unwritten(place, error) from error


def _decide(places: list[Path]) -> None:
    """Delete what was set aside if something new has been written at any of ``places``, else put it back."""
    for place in places:
        remove_orphans(place, wait=False)
    asides = {place: others(place, "aside") for place in places}
    complete = all(asides.values())  # otherwise a process was killed while it set them aside, before it wrote anything
    begun = complete and any(map(_is_written, places))
    stale = []

    def discard(path: Path, place: Path) -> None:  # in two steps: what is killed while it is deleted must not come back
        stale.append(beside(place, "new"))
        os.rename(path, stale[-1])

    for place, paths in asides.items():
        if paths and not begun and not _is_written(place) and not is_vacant(paths[-1]):
            if os.path.lexists(place):  # locks and logs
                discard(place, place)
            os.rename(paths.pop(), place)
        for path in paths:
            discard(path, place)
    for path in stale:
        delete(path)


def _is_written(place: Path) -> bool:
    """Whether a run has written there more than its locks and its log."""
    if not place.is_dir():
        return os.path.lexists(place)
    paths = (path for path in place.rglob("*") if path.is_file() and not path.name.endswith((".lock", LOG)))
    return any(not any(map(LEFT_OVER.fullmatch, path.relative_to(place).parts)) for path in paths)


@contextmanager
def _unused(places: list[Path], claim: Claim) -> Iterator[None]:
    """Hold the locks of all that runs below ``places``."""
    with ExitStack() as locks:
        for place in places:
            found = {path.with_name(path.name[1 : -len(".lock")]) for path in place.rglob(".*.lock")}
            for path in sorted({place.resolve(), *found} - {claim.path}):
                locks.enter_context(Claim(path))
        yield


def _check_own(path: Path) -> None:
    """Raise StorageError unless distillkit wrote all that stands at ``path``, as its manifests say."""
    if not os.path.lexists(path) or (LEFT_OVER.fullmatch(path.name) and not path.is_symlink()):
        return
    try:
        if path.is_symlink():
            raise StorageError("it is a link")
        if path.is_file():
            _check_own_file(path)
        elif (path / MANIFEST).is_file():
            kind_of(path)
        else:
            for inner in sorted(path.iterdir()):
                _check_own(inner)
            return
    except OSError as error:
        raise unwritten(path, error) from error
    except StorageError as error:
        if str(error).startswith("will not start over"):
            raise
        raise StorageError(f"will not start over at {path}: {error}; move it away, or give the run another name") from error


def _check_own_file(path: Path) -> None:
    """Raise StorageError unless ``path`` is a lock, a log or a result (which may be damaged)."""
    with path.open("rb") as file:
        begin = file.read(200).split()
    own = path.name.endswith(".lock") and not begin
    own = own or (path.name.endswith(LOG) and b"".join(begin).startswith(b'{"settings":'))
    if path.suffix == ".json" and b"".join(begin).startswith(b'{"config":'):
        try:
            own = "sha256" in json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            own = True  # the beginning of a result, damaged
    if not own:
        raise StorageError("distillkit did not write it")
