"""The one way anything is written to disk and read back.

A stored thing is a folder of three files: `tensors.safetensors`, `data.json` and `manifest.json`, which names the kind
of the thing and the size and SHA-256 of the two others. Distilled sets, experts, checkpoints and caches all use it.

*Writing is atomic.* A folder or a file is built beside its target under a hidden name that nobody else has, flushed to
the disk, and renamed into place (:func:`replacing`), so a killed process leaves either the old version or the new one.
POSIX cannot swap two folders in one call: the old one is set aside first. Readers fall back to it if a crash fell between
the two renames, and the next writer puts it back.

*Lines are sealed.* A file that grows line by line has a SHA-256 in each line; a last line that a kill tore is dropped.

*Reading trusts nothing.* Neither safetensors nor JSON notices a flipped bit, so every byte is hashed before it is used.
Nothing is pickled, links are not followed, and each refusal names the folder, the file and what to do about it.

*Processes do not meet.* What is being written is locked, so that what a killed process left unfinished can be told from
what another one is writing, and is removed. A run holds its folder with a :class:`Claim` while it runs, alone or shared
with its like. Both locks are the operating system's and end with the process, however it ends.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "distillkit", 1
TENSORS, DATA, MANIFEST = "tensors.safetensors", "data.json", "manifest.json"
SUFFIXES = ("new", "old", "aside")  # being written; replaced by what is being written; see distillkit.io.restart
LEFT_OVER = re.compile(rf"\..+\.[0-9a-f]{{16}}\.({'|'.join(SUFFIXES)})")
ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
LARGEST_HEADER = 2**21  # bytes that describe the tensors of a file; parsing a hundred million takes minutes
REMEDIES = {errno.ENAMETOOLONG: "choose a shorter name", errno.ENOTDIR: "a part of its path is a file: choose another folder",
            errno.EEXIST: "a part of its path is a file: choose another folder",
            errno.EISDIR: "a folder stands there: choose another name"}
T = TypeVar("T")


class StorageError(ValueError):
    """A folder that cannot be trusted to hold what was asked for, or that must not be overwritten."""


@dataclass(frozen=True)
class Stored:
    """What a folder held: named tensors, and whatever JSON can say."""

    tensors: dict[str, Tensor]
    data: dict


def cache_dir() -> Path:
    """Where rebuildable things are kept: `$DISTILLKIT_CACHE`, `$XDG_CACHE_HOME/distillkit` or `~/.cache/distillkit`."""
    if own := os.environ.get("DISTILLKIT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "distillkit"


def save_folder(folder, *, kind: str, tensors: Mapping[str, Tensor] = {}, data: Mapping = {}) -> Path:
    """Write `tensors` and `data` as the folder `folder`, in one atomic step, and return its path.

    An empty folder, or an earlier folder of the same kind, is replaced, and what killed processes left unfinished beside
    it is removed.

    Raises `StorageError`, and leaves what stands there as it is, if that is anything else; if `data` is not strict JSON or
    a tensor holds NaN or infinity, so that nothing stored and verified can hold them; and if it cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    refuse_to_overwrite(folder, kind)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StorageError(f"cannot save {folder}: the tensor {name!r} holds NaN or infinity; find out where they came "
                               "from, and save what was there before them")
    try:
        text = json.dumps(dict(data), ensure_ascii=False, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise StorageError(f"cannot save {folder}: data is not strict JSON ({error}); store finite numbers, strings, "
                           "lists and dictionaries, and put arrays into tensors") from error
    with replacing(folder) as fresh:
        save_file(_independent(tensors), fresh / TENSORS)
        (fresh / DATA).write_text(text, encoding="utf-8")
        files = {name: _size_and_hash(fresh / name) for name in (DATA, TENSORS)}
        manifest = {"format": FORMAT, "version": VERSION, "kind": kind, "files": files}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return folder


def save_text(path: str | Path, text: str) -> Path:
    """Write the file `path` in one atomic step, as :func:`save_folder` writes a folder, and return its path."""
    path = Path(path).expanduser().resolve()
    with replacing(path, folder=False) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


@contextmanager
def replacing(target: Path, *, folder: bool = True) -> Iterator[Path]:
    """A new folder (or file) beside `target`; flushed and renamed to `target` when the block ends without an exception.

    What killed processes left unfinished beside it is removed first.

    Raises `StorageError` where the operating system refuses any of it; `target` is then as it was.
    """
    try:
        with ExitStack() as stack:
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = beside(target, "new")
            remove_orphans(target, wait=False)
            with _locked(target.parent, shared=True):  # or it would look like an orphan before it is locked
                fresh.mkdir() if folder else fresh.touch()
                stack.callback(delete, fresh)  # already gone if all went well
                # Shared, so that a part of it can be written by this function too.
                stack.enter_context(_locked(fresh, shared=True))
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                _flush(path)
            move_into_place(fresh, target)
    except (OSError, SafetensorError) as error:
        raise unwritten(target, error) from error


def unwritten(folder: Path, error: Exception) -> StorageError:
    """What to raise where `folder` (or a file) could not be written: it says what to do about it."""
    # safetensors tells the operating system's number in words only: "... (os error 28)".
    said = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    existing = next(path for path in folder.absolute().parents if os.path.exists(path))
    remedy = REMEDIES.get(number, "look at the message before this one")
    if number in ROOM:
        remedy = f"free some space on its disk ({shutil.disk_usage(existing).free / 1e9:.2f} GB are free), or use another disk"
    elif number in RIGHTS:
        remedy = f"get the right to write to {existing}, or use another folder"
    reason = os.strerror(number) if number else str(error)
    return StorageError(f"cannot save {folder}: {reason}; {remedy}, and go on from what was saved there before, which is "
                        "untouched")


def remove_orphans(target, *, wait: bool = True) -> None:
    """Clear what killed processes left beside `target`: remove unfinished versions; put a replaced one back where the
    process ended before its successor was in place, or else remove it.

    Args:
        target: a folder or a file.
        wait: whether to wait for another process that is about to write there, or else leave it all to the next call.
    """
    target = Path(target).expanduser().resolve()
    if not target.parent.is_dir():
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(target.parent, wait=wait))
        except OSError:
            return
        for path in others(target, "new"):
            with suppress(OSError), _locked(path, wait=False):  # or its writer lives, or has just moved it into place
                delete(path)
        replaced = _set_aside(target)
        if replaced and not os.path.lexists(target):
            with suppress(OSError):  # its writer lives, and has just moved the successor into place
                os.rename(replaced[-1], target)
        for path in replaced if os.path.lexists(target) else ():
            delete(path)


def delete(path: Path) -> None:
    """Remove a folder or a file, as far as it goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


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
        self.path = Path(path).expanduser().resolve()
        self.lock_file = self.path.with_name(f".{self.path.name}.lock")
        self._mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        self._descriptor, self._blocks = -1, 0

    def __enter__(self):
        if not self._blocks:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o666)
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
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise unwritten(self.path, error) from error
            raise in_use(self.path) from error


def in_use(path: Path) -> StorageError:
    """What to raise where another run works at `path`."""
    return StorageError(f"{path} is in use by another run, in this process or in another one; wait for its end, end it, or "
                        "choose another folder")


def load_folder(folder, *, kind: str, device="cpu", prefix: str = "", verify: bool = True) -> Stored:
    """Read a folder that `save_folder` wrote, with the tensors on `device`.

    The file of tensors is memory-mapped, so that of those whose names begin with `prefix` alone are read. `verify=False`
    skips the SHA-256, for a folder that this process has verified before.

    Raises `StorageError` if the folder is absent, not distillkit's, of another kind, from a newer version, or if any
    file is missing, a link, or differs by one bit from what was written.
    """
    return read_standing(folder, lambda place: _read(place, kind, device, prefix, verify))


def read_standing(folder, read: Callable[[Path], T]) -> T:
    """What `read` makes of the newest version of `folder`: called with its place, and again if that was replaced meanwhile.

    Raises `StorageError` as `read` does, and in place of its `OSError`.
    """
    folder = Path(folder).expanduser()
    while True:
        place = _standing(folder)
        try:
            return read(place[0])
        except (StorageError, OSError) as error:
            if _standing(folder) != place:  # another process replaced it meanwhile, and parts of two versions were read
                continue
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{folder} cannot be read ({error}); check the path, the disk and your rights") from error


def standing(folder) -> Path:
    """Where the newest version of `folder` is: there, or, if a crash fell between two renames, set aside beside it."""
    return _standing(Path(folder).expanduser())[0]


def _read(folder: Path, kind: str, device, prefix: str, verify: bool) -> Stored:
    manifest = _read_manifest(folder)
    if manifest["kind"] != kind:
        raise StorageError(f"{folder} holds {manifest['kind']!r}, not {kind!r}; pass a folder saved as {kind!r}")
    if verify:
        for name in (DATA, TENSORS):
            _verify(folder, name, manifest["files"])
    remedy = f"another program wrote it; delete {folder} and make it again"
    with (folder / TENSORS).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > LARGEST_HEADER:
        raise StorageError(f"{folder / TENSORS} has a header of {header} bytes, more than the {LARGEST_HEADER} that are read; "
                           f"{remedy}")
    try:
        with safe_open(folder / TENSORS, framework="pt", device=str(device)) as stored:
            names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dictionary)
            tensors = {name: stored.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise StorageError(f"{folder / TENSORS} is not a safetensors file ({error}); {remedy}") from error
    try:
        data = json.loads((folder / DATA).read_bytes())
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{folder / DATA} is not JSON ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise StorageError(f"{folder / DATA} is not a JSON object; {remedy}")
    return Stored(tensors, data)


# --- sealed JSON ------------------------------------------------------------------------------------------------------


def sealed(values: Mapping) -> dict:
    """`values` with the SHA-256 of what they say, as JSON, under ``sha256``."""
    return {**values, "sha256": _digest(values)}


def unsealed(text: str | bytes) -> dict:
    """The values that :func:`sealed` gave a SHA-256, from JSON; ValueError if they say something else, or are no object."""
    try:
        values = json.loads(text)
        whole = isinstance(values, dict) and values.pop("sha256", None) == _digest(values)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not whole:
        raise ValueError("it does not say what was written, by its SHA-256")
    return values


def _digest(values: Mapping) -> str:
    said = json.loads(json.dumps({key: value for key, value in values.items() if key != "sha256"}))  # as it will be read
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def append_line(path, values: Mapping) -> None:
    """Add a sealed line to the file `path`, after the lines of other processes; a torn last line is dropped first.

    Raises `StorageError` if it cannot be written.
    """
    path = Path(path).expanduser().resolve()
    with Claim(path, wait=True):
        try:
            with path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                torn = _torn(content)
                file.truncate(len(content) - len(torn))
                gap = b"" if torn or not content or content.endswith(b"\n") else b"\n"
                file.write(gap + json.dumps(sealed(values)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            _flush(path.parent)
        except OSError as error:
            raise unwritten(path, error) from error


def read_lines(path) -> list[dict]:
    """What :func:`append_line` has written to `path`, without a torn last line; nothing where there is no file.

    Raises `StorageError` that names the line if one does not say what was written.
    """
    path = Path(path).expanduser()
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


# --- names and places -------------------------------------------------------------------------------------------------


def is_vacant(folder) -> bool:
    """Whether nothing is stored at `folder`: it is absent or empty, and no crash left its contents set aside."""
    folder = Path(folder).expanduser()
    if os.path.lexists(folder):
        return folder.is_dir() and not any(folder.iterdir())
    return not _set_aside(folder)


def _read_manifest(folder: Path) -> dict:
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a folder; check the path, or make it again")
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise StorageError(f"{folder} has no plain file {MANIFEST}: it was not written by distillkit, or lost a file; "
                           "check the path, or make it again")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error}); delete {folder} and make it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError(f"{path} is not a distillkit manifest; check the path")
    if manifest.get("version") != VERSION:
        raise StorageError(f"{path} has format version {manifest.get('version')!r}, this distillkit reads {VERSION}; "
                           "update distillkit, or make the folder again")
    if not isinstance(manifest.get("kind"), str) or not isinstance(manifest.get("files"), dict):
        raise StorageError(f"{path} is damaged (no kind or no files); delete {folder} and make it again")
    return manifest


def _verify(folder: Path, name: str, files: dict) -> None:
    path, expected = folder / name, files.get(name)
    remedy = f"delete {folder} and make or download it again"
    if not isinstance(expected, dict):
        raise StorageError(f"{folder / MANIFEST} does not list {name}; {remedy}")
    if path.is_symlink() or not path.is_file():
        raise StorageError(f"{path} is missing or not a plain file; {remedy}")
    actual = _size_and_hash(path)
    if actual["size"] != expected.get("size"):
        raise StorageError(f"{path} has {actual['size']} bytes, its manifest says {expected.get('size')}; {remedy}")
    if actual["sha256"] != expected.get("sha256"):
        raise StorageError(f"{path} does not have the SHA-256 of its manifest: it was damaged or edited; {remedy}")


def refuse_to_overwrite(folder: Path, kind: str) -> None:
    """Raise `StorageError` if something stands at `folder` that :func:`save_folder` must not replace with this `kind`."""
    remedy = "choose another folder, or delete this one yourself"
    try:
        if not os.path.lexists(folder) or is_vacant(folder):
            return
        stored_kind = kind_of(folder)
    except StorageError as error:
        raise StorageError(f"will not overwrite {folder}: {error}; {remedy}") from error
    except OSError as error:
        raise unwritten(folder, error) from error
    if stored_kind != kind:
        raise StorageError(f"will not overwrite {folder}: it holds {stored_kind!r}, not {kind!r}; {remedy}")


def kind_of(folder: Path) -> str:
    """The kind of what :func:`save_folder` wrote to `folder`.

    Raises `StorageError` if the manifest is absent or damaged, or does not list all that lies there.
    """
    kind = _read_manifest(standing(folder))["kind"]
    listed = {TENSORS, DATA, MANIFEST}
    if strangers := sorted({path.name for path in standing(folder).iterdir() if not LEFT_OVER.fullmatch(path.name)} - listed):
        raise StorageError(f"{folder} also holds {', '.join(strangers)}, which distillkit did not write")
    return kind


def move_into_place(fresh: Path, folder: Path) -> None:
    """Rename ``fresh`` to ``folder`` (both may be files); an earlier folder is set aside first, and deleted last."""
    while True:  # each round either succeeds or has lost a race against another writer of the same folder
        try:
            os.rename(fresh, folder)  # replaces an absent or an empty folder only
            break
        except OSError:
            if not (folder.is_dir() and fresh.is_dir()):
                raise
        try:
            os.rename(folder, beside(folder, "old"))
        except FileNotFoundError:
            continue
    _flush(folder.parent)
    for old in _set_aside(folder):
        delete(old)


def beside(folder: Path, suffix: str) -> Path:
    """A hidden name beside ``folder`` that nobody else has."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.{suffix}")


def _set_aside(folder: Path) -> list[Path]:
    """The earlier versions of `folder` that a crash kept from being deleted, newest last."""
    aged = []
    for path in others(folder, "old"):
        try:
            aged.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # another process has just removed it
            continue
    return [path for _, path in sorted(aged)]


def others(folder: Path, suffix: str) -> list[Path]:
    """What :func:`beside` named for `folder`, by whichever process."""
    pattern = re.compile(re.escape(f".{folder.name}.") + rf"[0-9a-f]{{16}}\.{suffix}")
    return [path for path in folder.parent.glob(f".*.{suffix}") if pattern.fullmatch(path.name)]


def _standing(folder: Path) -> tuple[Path, int | None]:
    """Where the newest version of `folder` is, and the number that tells it from another one at the same place."""
    place = folder if os.path.lexists(folder) else next(reversed(_set_aside(folder)), folder)
    try:
        return place, place.stat().st_ino
    except OSError:
        return place, None


@contextmanager
def _locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """`path` itself locked by this process, perhaps `shared` with others that share it; `OSError` if it cannot be had and
    this process does not `wait` for it."""
    descriptor, mode = os.open(path, os.O_RDONLY), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except OSError as error:
        if not wait:
            os.close(descriptor)
            raise
        if error.errno == errno.EWOULDBLOCK:  # or this file system has no locks: then nothing is held to be an orphan
            fcntl.flock(descriptor, mode)
    try:
        yield
    finally:
        os.close(descriptor)


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in one memory: safetensors refuses tensors that share storage."""
    seen, result = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _size_and_hash(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
