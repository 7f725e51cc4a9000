"""What lies on disk, file by file: whole, damaged, left over from a write that was interrupted, or not checked.

Every file that the kit writes can be checked by itself (:mod:`distillkit.io.files`, :mod:`distillkit.io.storage`).  Some
name others, which are checked too: an index its members, a checkpoint its log, ``SHA256SUMS`` the files of a published set.
No link is followed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from distillkit.io.checkpoint import logged_records
from distillkit.io.checks import require
from distillkit.io.files import FORMAT, read_file, read_header
from distillkit.io.storage import UNFINISHED, StorageError, read_lines, unsealed, unsealed_text

SUMS = "SHA256SUMS"
OK, DAMAGED, LEFT_OVER, NOT_CHECKED = "ok", "DAMAGED", "left over", "not checked"
SEALED_END = re.compile(rb'"sha256":\s*"[0-9a-f]{64}"\s*}\s*$')


def verify(top: Path) -> Iterator[tuple[Path, str, str]]:
    """The state of every file at or below ``top`` but empty locks: its path, its state, and what it is or what is wrong.

    Raises:
        OSError: a folder cannot be read.
    """
    if not top.is_dir():
        yield top, *_state(top)
        return
    summed: set[Path] = set()
    for place, folders, files in os.walk(top, onerror=_stop):
        folders.sort()
        folder = Path(place)
        if SUMS in files:
            summed |= {folder / name for name in (SUMS, *read_sums(folder))}
            yield folder, *_state_of_published(folder)
        for name in sorted(files + [name for name in folders if (folder / name).is_symlink()]):
            path = folder / name
            kind = kind_of(path)
            if kind != "lock" and (kind or path not in summed):
                yield path, *_state(path)


def kind_of(path: Path) -> str:
    """What the kit wrote to ``path``, by its name and its beginning or end: ``"file"``, ``"lines"``, ``"values"``, ``"text"``,
    ``"lock"`` or ``"unfinished"``; nothing if somebody else wrote it."""
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open("rb") as file:
        beginning = file.read(2**16)
        file.seek(-min(200, path.stat().st_size), os.SEEK_END)
        end = file.read()
    signs = {
        "unfinished": UNFINISHED.fullmatch(path.name),
        "lock": path.name.endswith(".lock") and not beginning,
        "file": beginning[8:].startswith(b'{"__metadata__":{"%b":' % FORMAT.encode()),
        "lines": path.suffix == ".jsonl" and b'"sha256": "' in beginning,
        "values": path.suffix == ".json" and (b"".join(beginning.split()).startswith(b'{"config":') or SEALED_END.search(end)),
        "text": b"\n# sha256 " in end,
    }
    return next((kind for kind, sign in signs.items() if sign), "")


def _state(path: Path) -> tuple[str, str]:
    kind = kind_of(path)
    if kind == "unfinished":
        return LEFT_OVER, "by a write, or a run that starts over; the next one clears it away, or puts it back"
    if not kind:
        return NOT_CHECKED, "a link, which is not followed" if path.is_symlink() else "not written by distillkit, it seems"
    try:
        return OK, CHECKS[kind](path)
    except ValueError as error:
        return DAMAGED, str(error)


def _check_lines(path: Path) -> str:
    return f"{len(read_lines(path))} lines"


def _check_values(path: Path) -> str:
    return f"JSON, {len(unsealed(path.read_bytes()))} keys"


def _check_text(path: Path) -> str:
    return f"text, {len(unsealed_text(path.read_text()).splitlines())} lines"


def _check_file(path: Path) -> str:
    """The kind of a file that is whole, as are those it names; StorageError otherwise."""
    stored = read_file(path)
    for name, sha256 in stored.data.get("members", {}).items():
        member = path.parent / name
        require(member.exists(), f"{path} names {name}, which is missing; put it there, or make it again")
        require(read_header(member).sha256 == sha256, f"{member} is not the file that {path.name} names: it was exchanged")
    if "records" in stored.data:
        logged_records(path, stored.data["records"])
    return stored.kind


CHECKS = {"file": _check_file, "lines": _check_lines, "values": _check_values, "text": _check_text}


# --- sums of a folder ---------------------------------------------------------------------------------------------------


def read_sums(folder: Path) -> dict[str, set[str]]:
    """What ``SHA256SUMS`` says of each file; two sums while a folder is published anew, of the earlier and the new file."""
    path = folder / SUMS
    require(path.is_file() and not path.is_symlink(), f"{folder} has no plain file {SUMS}: it is no published set, or lost a "
            "file; check the path, or publish or download it again", StorageError)
    sums = defaultdict(set)
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        sums[name].add(digest)
    return sums


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise StorageError unless ``names`` are plain files in ``folder`` with a SHA-256 that ``SHA256SUMS`` lists.

    No other name in that file is followed, so none can lead out of the folder.
    """
    sums, remedy = read_sums(folder), "publish or download it again"
    for name in names:
        path = folder / name
        require(name in sums, f"{folder / SUMS} does not list {name}; {remedy}", StorageError)
        require(path.is_file() and not path.is_symlink(), f"{path} is missing or not a plain file; {remedy}", StorageError)
        require(sha256_of(path) in sums[name],
                f"{path} does not have the SHA-256 of {SUMS}: it was damaged or edited; {remedy}", StorageError)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_of_published(folder: Path) -> tuple[str, str]:
    try:
        sums = read_sums(folder)
        check_sums(folder, [name for name in sums if not Path(name).is_absolute() and ".." not in Path(name).parts])
    except StorageError as error:
        return DAMAGED, str(error)
    interrupted = any(len(digests) > 1 for digests in sums.values())
    return (LEFT_OVER, "its publication was interrupted: publish it again") if interrupted else (OK, "files of " + SUMS)


def _stop(error: OSError):
    raise error
