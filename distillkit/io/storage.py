"""The one way anything is written to disk and read back.

A stored thing is one safetensors file.  The metadata in its header are a JSON object: what the file is (``kind`` and
``identity``), what it says (``data``), and the SHA-256 of the whole file, computed with that field zeroed.  So every file
can be checked by itself, and two files that changed places are noticed.  Sets, snapshots, checkpoints and caches use it.

*Writing is atomic.*  A file is written beside its target under a random name, synced, and renamed into place, so a killed
process leaves either the old version or the new one.  What it left unfinished is removed by the next writer of that file:
an unfinished file is locked while its writer lives.

*Lines are sealed.*  A file that grows line by line has a SHA-256 in each line; a last line that a kill tore is dropped.

*Reading trusts nothing.*  Neither safetensors nor JSON notices a flipped bit, so every byte is hashed before it is used.
Nothing is unpickled, no link is followed, and each refusal names the file and what to do about it.

*Runs do not meet.*  A run holds its place with a :class:`Claim`, alone or shared.  The lock ends with the process.
"""

import dataclasses
import errno
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

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT, VERSION = "distillkit", 2
LAST_READER_OF_FOLDERS = "0.1"  # the last version that reads things of three files each
UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.new")
LARGEST_HEADER = 2**24  # bytes
ZEROS = "0" * 64
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
REMEDIES = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of its path is a file: choose another folder",
    errno.EEXIST: "a part of its path is a file: choose another folder",
}


class StorageError(ValueError):
    """A file that cannot be trusted to hold what was asked for, that must not be overwritten, or cannot be written."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds: its kind, what it is among its kind, JSON data, its own SHA-256, and named tensors."""

    kind: str
    identity: dict
    data: dict
    sha256: str
    tensors: dict[str, Tensor]


def cache_dir() -> Path:
    """Where rebuildable things are kept: `$DISTILLKIT_CACHE`, `$XDG_CACHE_HOME/distillkit` or `~/.cache/distillkit`."""
    if chosen := os.environ.get("DISTILLKIT_CACHE"):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "distillkit"


# --- files -----------------------------------------------------------------------------------------------------------


def write_file(path, *, kind: str, tensors: Mapping[str, Tensor] = {}, data: Mapping = {}, identity: Mapping = {}) -> str:
    """Write the file `path` in one atomic step, and return its SHA-256; an earlier file of the same kind is replaced.

    Args:
        tensors: finite ones.
        data: what strict JSON can say, in `LARGEST_HEADER` bytes at most.
        identity: what tells it from others of its kind, as JSON.

    Raises `StorageError`, and leaves `path` as it is, if something else stands there, if `data` or `tensors` cannot be
    stored, or if the operating system refuses.
    """
    path = absolute(path)
    refuse_to_overwrite(path, kind)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StorageError(f"cannot save {path}: the tensor {name!r} holds NaN or infinity; find out where they came "
                               "from, and save what was there before them")
    head = {"sha256": ZEROS, "format": FORMAT, "version": VERSION, "kind": kind, "identity": identity, "data": data}
    try:
        text = json.dumps(head, ensure_ascii=False, allow_nan=False)
        content = memoryview(safetensors.torch.save(_independent(tensors), {FORMAT: text}))
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot save {path}: its data are not strict JSON ({error}); store finite numbers, strings, "
                           "lists and dictionaries, and put arrays into tensors") from error
    header = 8 + int.from_bytes(content[:8], "little")
    if header > LARGEST_HEADER:
        raise StorageError(f"cannot save {path}: its data take {header} bytes, more than {LARGEST_HEADER}; put them into "
                           "tensors")
    digest = hashlib.sha256(content).hexdigest()
    field = bytes(content[:header]).index(ZEROS.encode())  # the first thing the header says
    with replacing(path) as file:
        for part in (content[:field], digest.encode(), content[field + len(ZEROS):]):
            file.write(part)
    return digest


def read_file(path, *, kind: str | None = None, identity: Mapping = {}, prefix: str = "", verify: bool = True) -> Stored:
    """Read a file that `write_file` wrote, after its SHA-256 has been checked.

    Args:
        kind: what it must be; None: anything.
        identity: what its identity must say.
        prefix: of the names of the tensors to read; the file is memory-mapped, so that others cost nothing.
        verify: False skips the SHA-256, for a file that this process has verified before.

    Raises `StorageError` if the file is absent, a link, not distillkit's, another than was asked for, or damaged.
    """
    path = absolute(path)
    with _opened(path) as file:
        stored, header = _parsed(path, file)
        summed = hashlib.sha256(header.replace(stored.sha256.encode(), ZEROS.encode(), 1))
        while verify and (block := file.read(2**20)):
            summed.update(block)
        if verify and summed.hexdigest() != stored.sha256:
            raise StorageError(f"{path} does not have its SHA-256: it was damaged or edited; delete it, and make or download "
                               "it again")
        if kind not in (None, stored.kind):
            raise StorageError(f"{path} holds {stored.kind!r}, not {kind!r}; pass a file saved as {kind!r}")
        for key, value in identity.items():
            if stored.identity.get(key) != value:
                raise StorageError(f"{path} is another one of its kind: its {key} is {stored.identity.get(key)!r}, not "
                                   f"{value!r}; put the right file there, or make it again")
        try:
            with safe_open(path, framework="pt") as mapped:
                tensors = {name: mapped.get_tensor(name) for name in mapped.keys() if name.startswith(prefix)}  # noqa: SIM118
        except SafetensorError as error:
            raise StorageError(f"{path} is not a safetensors file ({error}); make or download it again") from error
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # another process has replaced it meanwhile
            return read_file(path, kind=kind, identity=identity, prefix=prefix, verify=verify)
    return dataclasses.replace(stored, tensors=tensors)


def read_header(path) -> Stored:
    """What a file says of itself: not verified, and without its tensors.  Raises `StorageError` as :func:`read_file` does."""
    path = absolute(path)
    with _opened(path) as file:
        return _parsed(path, file)[0]


def refuse_to_overwrite(path, kind: str) -> None:
    """Raise `StorageError` if something stands at `path` that :func:`write_file` must not replace with this `kind`."""
    path = absolute(path)
    try:
        standing = read_header(path).kind if os.path.lexists(path) else kind
    except StorageError as error:
        raise StorageError(f"will not overwrite {path}: {error}") from error
    except OSError as error:
        raise unwritten(path, error) from error
    if standing != kind:
        raise StorageError(f"will not overwrite {path}: it holds {standing!r}, not {kind!r}; choose another name, or delete "
                           "it yourself")


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
        sync(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error


def absolute(path: str | Path) -> Path:
    """`path` from the root, with its ``~`` filled in; links in it stay."""
    return Path(path).expanduser().absolute()


def unwritten(path: Path, error: OSError) -> StorageError:
    """What to raise where `path` could not be written: it says what to do about it."""
    existing = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    remedy = REMEDIES.get(error.errno or 0, "look at the message before this one")
    if error.errno in FULL:
        remedy = f"free some space on its disk ({shutil.disk_usage(existing).free / 1e9:.2f} GB are free), or use another disk"
    elif error.errno in FORBIDDEN:
        remedy = f"get the right to write to {existing}, or use another folder"
    return StorageError(f"cannot save {path}: {error.strerror or error}; {remedy}, and go on from what was saved there before, "
                        "which is untouched")


def delete(path: Path) -> None:
    """Remove a folder or a file, as far as it goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(folder: Path) -> None:
    """Make the names in a folder as lasting as what they name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open for reading."""
    remedy = "check the path, or make it again"
    if path.is_symlink():
        raise StorageError(f"{path} is a link, which is not followed; copy the file there")
    if (path / "manifest.json").is_file():
        raise StorageError(f"{path} is a folder that distillkit {LAST_READER_OF_FOLDERS} wrote, which is the last version that "
                           f"reads it: pip install 'distillkit=={LAST_READER_OF_FOLDERS}.*', or make it again")
    if not path.is_file():
        raise StorageError(f"{path} is {'not a file' if os.path.lexists(path) else 'not there'}; {remedy}")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error}); check the disk and your rights") from error


def _parsed(path: Path, file: BinaryIO) -> tuple[Stored, bytes]:
    """What the header of an open file says, and its bytes."""
    length = file.read(8)
    if (size := int.from_bytes(length, "little")) > LARGEST_HEADER:
        raise StorageError(f"{path} is no file of distillkit's, or damaged: its header would have {size} bytes, more than "
                           f"{LARGEST_HEADER}; make or download it again")
    header = file.read(size)
    try:
        head = strict_json(strict_json(header)["__metadata__"][FORMAT])
        version, stored = head["version"], Stored(head["kind"], head["identity"], head["data"], head["sha256"], {})
        whole = isinstance(stored.identity, dict) and isinstance(stored.data, dict) and isinstance(stored.kind, str)
        if head["format"] != FORMAT or not whole or not re.fullmatch("[0-9a-f]{64}", stored.sha256):
            raise ValueError("its header does not say what distillkit's do")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} is no file of distillkit's, or damaged ({error!r}); check the path, or make or download it "
                           "again") from error
    if version != VERSION:
        raise StorageError(f"{path} has format version {version!r}, and this distillkit reads {VERSION}; update distillkit, or "
                           "make the file again")
    return stored, length + header


def strict_json(text: str | bytes):
    """The value of UTF-8 JSON without NaN and infinity; ValueError or RecursionError where it is something else."""
    return json.loads(text.decode() if isinstance(text, bytes) else text, parse_constant=_refuse_constant)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in one memory: safetensors refuses tensors that share storage."""
    pointers, result = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in pointers else tensor
        pointers.add(pointer)
    return result


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
            raise StorageError(f"{self.path} is in use by another run, in this process or in another one; wait for its end, "
                               "end it, or choose another place") from error
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


def is_sealed_text(text: str) -> bool:
    """Whether a text is what :func:`sealed_text` returned."""
    return text == sealed_text(text.rpartition("# sha256 ")[0])


def append_line(path, values: Mapping) -> None:
    """Add a sealed line to the file `path`, after the lines of other processes; a torn last line is dropped first.

    Raises `StorageError` if it cannot be written.
    """
    path = absolute(path)
    with Claim(path, wait=True):
        try:
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as file:
                content = file.read()
                torn = _torn(content)
                file.seek(len(content) - len(torn))
                file.truncate()
                gap = b"" if torn or not content or content.endswith(b"\n") else b"\n"
                file.write(gap + sealed_line(values))
                file.flush()
                os.fsync(file.fileno())
            sync(path.parent)
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
