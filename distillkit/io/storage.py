"""The ground on which everything is written to disk: atomic writes, locks, and sealed text.

*Writing is atomic.*  A file is written beside its target under a random name, synced, and renamed into place, so a killed
process leaves either the old version or the new one.  What it left unfinished is removed by the next writer of that file:
an unfinished file is locked while its writer lives.

*Runs do not meet.*  A run holds its place with a :class:`Claim`, alone or shared.  The lock ends with the process.

*Text is sealed.*  JSON, YAML and the lines of a log carry a SHA-256 of what they say, so that a changed character is
noticed; a last line that a kill tore is dropped.  Tensors are in files of their own format (:mod:`distillkit.io.files`).
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = re.compile(r"\..+\.([0-9a-f]{16}\.new|aside)")  # being written; set aside by a run that starts over


class StorageError(ValueError):
    """A file that cannot be trusted to hold what was asked for, that must not be overwritten, or cannot be written."""


class InUse(StorageError):
    """Another run holds the place."""


def cache_dir() -> Path:
    """Where rebuildable things are kept: `$DISTILLKIT_CACHE`, `$XDG_CACHE_HOME/distillkit` or `~/.cache/distillkit`."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DISTILLKIT_CACHE") or f"{shared}/distillkit").expanduser()


# --- files -----------------------------------------------------------------------------------------------------------


def save_text(path: str | Path, text: str) -> Path:
    """Write a text file in one atomic step, and return its path."""
    path = absolute(path)
    with replacing(path) as file:
        file.write(text.encode())
    return path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, open for writing; synced and renamed to `path` when the block ends without an exception.

    Raises `StorageError` where the operating system refuses any of it; `path` is then as it was.
    """
    try:
        if path.is_symlink() or path.is_dir():
            raise StorageError(f"will not overwrite {path}: it is a {'link' if path.is_symlink() else 'folder'}; choose "
                               "another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path)
        unfinished, file = _new_beside(path)
        with file:  # its lock ends when it is closed
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name is as lasting as the file
        os.close(folder)
    except OSError as error:
        raise unwritten(path, error) from error


def absolute(path: str | Path) -> Path:
    """`path` from the root, with its ``~`` filled in; links in it stay."""
    return Path(path).expanduser().absolute()


def unwritten(path: Path, error: OSError) -> StorageError:
    """What to raise where `path` could not be written: it says what to do about it."""
    existing = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    space = f"{shutil.disk_usage(existing).free / 1e9:.2f} GB"
    return StorageError(f"cannot save {path}: {error.strerror or error}; free some space on its disk ({space} are free), get "
                        f"the right to write to {existing}, or choose another place, and go on from what was saved there "
                        "before, which is untouched")


def _new_beside(path: Path) -> tuple[Path, BinaryIO]:
    """A locked file under a hidden name beside `path` that nobody else has."""
    while True:
        name = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
        file = open(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "r+b")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks: then nothing is held to be unfinished
            fcntl.flock(file, fcntl.LOCK_EX)
        if name.exists():
            return name, file
        file.close()  # another process has removed it before it was locked


def _remove_unfinished(path: Path) -> None:
    """Remove what killed processes left beside `path`; a file whose writer lives is locked."""
    for name in path.parent.glob(f".*.{'[0-9a-f]' * 16}.new"):
        if name.name.startswith(f".{path.name}."):
            with suppress(OSError), open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                name.unlink()


# --- who works where --------------------------------------------------------------------------------------------------


class Claim:
    """Holds `path` for one run, so that no other one, in this process or another, works there at the same time.

    Use it in a ``with`` block; blocks of one object may be nested. The lock is a file beside `path`, which stays there;
    the lock on it ends with the block, or with the process.

    Args:
        path: the folder or file that is held; it need not exist.
        wait: whether to wait for another run's end, or else raise `StorageError`.
        shared: whether others that share it too may hold it at the same time.
    """

    def __init__(self, path, *, wait: bool = False, shared: bool = False):
        self.path = absolute(path)
        self._mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        self._descriptor, self._blocks = -1, 0

    def __enter__(self):
        if not self._blocks:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock_file = self.path.with_name(f".{self.path.name}.lock")
                self._descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise unwritten(self.path, error) from error
            try:
                self._hold(self._mode)
            except BaseException:
                os.close(self._descriptor)
                raise
        self._blocks += 1
        return self

    def __exit__(self, *error):
        self._blocks -= 1
        if not self._blocks:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing would not do where a fork has the descriptor too
            os.close(self._descriptor)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within a block of this object: hold it without those that share it; `StorageError` while there are any."""
        try:
            self._hold(fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            self._hold(self._mode)  # also where it was refused: the operating system gives up the one for the other

    def _hold(self, mode: int) -> None:
        try:
            fcntl.flock(self._descriptor, mode)
        except BlockingIOError as error:
            raise InUse(f"{self.path} is in use by another run, in this process or in another one; wait for its end, end it, "
                        "or choose another place") from error
        except OSError as error:
            raise unwritten(self.path, error) from error


# --- sealed text ------------------------------------------------------------------------------------------------------


def digest_of(values: Mapping) -> str:
    """The SHA-256 of what a dictionary says as JSON."""
    as_read = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping) -> dict:
    """`values` with the SHA-256 of what they say, as JSON, under ``sha256``."""
    return {**values, "sha256": digest_of({key: value for key, value in values.items() if key != "sha256"})}


def unsealed(text: str | bytes) -> dict:
    """The values that :func:`sealed` gave a SHA-256, from JSON; ValueError if they say something else, or are no object."""
    try:
        values = json.loads(text)
        whole = isinstance(values, dict) and values.pop("sha256", None) == digest_of(values)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not whole:
        raise ValueError("it does not say what was written, by its SHA-256")
    return values


def sealed_text(text: str) -> str:
    """A text, such as YAML, with its SHA-256 in a comment at its end."""
    return f"{text}# sha256 {hashlib.sha256(text.encode()).hexdigest()}\n"


def unsealed_text(text: str) -> str:
    """The text that :func:`sealed_text` sealed; ValueError if it has changed since."""
    body = text.rpartition("# sha256 ")[0]
    if text != sealed_text(body):
        raise ValueError("it does not have its SHA-256: it was damaged or edited")
    return body


def append_line(path, values: Mapping) -> None:
    """Add a sealed line to the file `path`, after the lines of other processes; a torn last line is dropped first.

    Raises `StorageError` if it cannot be written.
    """
    path = absolute(path)
    with Claim(path, wait=True):
        content = path.read_bytes() if path.exists() else b""
        whole = content.removesuffix(_torn(content))
        gap = b"\n" if whole and not whole.endswith(b"\n") else b""
        write_end(path, len(whole), gap + sealed_line(values))


def write_end(path: Path, start: int, lines: bytes) -> None:
    """Put ``lines`` in the place of all that stands in a file from byte ``start`` on.  Raises `StorageError`."""
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(path, error) from error


def sealed_line(values: Mapping) -> bytes:
    """A line that :func:`read_lines` reads."""
    return json.dumps(sealed(values)).encode() + b"\n"


def read_lines(path) -> list[dict]:
    """The values of the sealed lines of a file, without a torn last line; nothing where there is no file.

    Raises `StorageError` that names the line if one does not say what was written.
    """
    path = absolute(path)
    if not path.is_file():
        return []
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content.removesuffix(_torn(content)).splitlines(), start=1):
        try:
            rows.append(unsealed(line))
        except ValueError as error:
            raise StorageError(f"{path}, line {number}: {error}; it was damaged or edited: delete the line, and make it "
                               "again") from error
    return rows


def _torn(content: bytes) -> bytes:
    """The last line, if a kill or a full disk cut it short: no part of a JSON object is one."""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
    except RecursionError:
        return b""
    except ValueError:
        return last
    return b""
