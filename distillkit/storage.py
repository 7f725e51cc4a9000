"""The one way anything is written to disk and read back.

A stored thing is a folder of three files: `tensors.safetensors`, `data.json` and `manifest.json`, which names the kind
of the thing and the size and SHA-256 of the two others. Distilled sets, experts, checkpoints and caches all use it.

*Writing is atomic.* The folder is built beside its target under a hidden name, flushed to the disk, and renamed into
place, so a killed process leaves either the old folder or the new one. POSIX cannot swap two folders in one call: the
old one is set aside first, and `load_folder` reads the folder set aside if a crash fell between the two renames.

*Reading trusts nothing.* Neither safetensors nor JSON notices a flipped bit, so every byte is hashed before it is used.
Nothing is pickled, links are not followed, and each refusal names the folder, the file and what to do about it.

*Processes do not meet.* What is being written is locked, so that what a killed process left unfinished can be told from
what another one is writing, and is removed. A run holds its folder with a :class:`Claim` while it runs. Both locks are
the operating system's and end with the process, however it ends.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "distillkit", 1
TENSORS, DATA, MANIFEST = "tensors.safetensors", "data.json", "manifest.json"
ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
RIGHTS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
LARGEST_HEADER = 2**21  # bytes that describe the tensors of a file; parsing a hundred million takes minutes


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
    _refuse_to_overwrite(folder, kind)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StorageError(f"cannot save {folder}: the tensor {name!r} holds NaN or infinity; find out where they came "
                               "from, and save what was there before them")
    try:
        text = json.dumps(dict(data), ensure_ascii=False, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise StorageError(f"cannot save {folder}: data is not strict JSON ({error}); store finite numbers, strings, "
                           "lists and dictionaries, and put arrays into tensors") from error
    try:
        _write(folder, kind, _independent(tensors), text)
    except (OSError, SafetensorError) as error:
        raise unwritten(folder, error) from error
    return folder


def _write(folder: Path, kind: str, tensors: dict[str, Tensor], text: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = beside(folder, "new")
    with ExitStack() as stack:
        with _locked(folder.parent):  # or it would look like an orphan before it is locked
            _remove_orphans(folder)
            fresh.mkdir()
            stack.callback(shutil.rmtree, fresh, ignore_errors=True)  # already gone if all went well
            stack.enter_context(_locked(fresh))
        save_file(tensors, fresh / TENSORS)
        (fresh / DATA).write_text(text, encoding="utf-8")
        files = {name: _size_and_hash(fresh / name) for name in (DATA, TENSORS)}
        manifest = {"format": FORMAT, "version": VERSION, "kind": kind, "files": files}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (fresh / DATA, fresh / TENSORS, fresh / MANIFEST, fresh):
            _flush(path)
        move_into_place(fresh, folder)


def unwritten(folder: Path, error: Exception) -> StorageError:
    """What to raise where `folder` (or a file) could not be written: it says what to do about it."""
    # safetensors tells the operating system's number in words only: "... (os error 28)".
    said = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    existing = next(path for path in folder.parents if path.exists())
    remedy = "look at the message before this one"
    if number in ROOM:
        remedy = f"free some space on its disk ({shutil.disk_usage(existing).free / 1e9:.2f} GB are free), or use another disk"
    elif number in RIGHTS:
        remedy = f"get the right to write to {existing}, or use another folder"
    reason = os.strerror(number) if number else str(error)
    return StorageError(f"cannot save {folder}: {reason}; {remedy}, and go on from what was saved there before, which is "
                        "untouched")


def remove_orphans(folder) -> None:
    """Remove what killed processes left beside `folder`: unfinished versions of it, and replaced ones if it is there."""
    folder = Path(folder).expanduser().resolve()
    if folder.parent.is_dir():
        with _locked(folder.parent):
            _remove_orphans(folder)


def _remove_orphans(folder: Path) -> None:
    for path in _others(folder, "new"):
        try:
            with _locked(path, wait=False):
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its writer lives, or has just moved it into place
            continue
    if folder.exists():
        for path in _set_aside(folder):
            shutil.rmtree(path, ignore_errors=True)


class Claim:
    """Holds `folder` for one run, so that no other one, in this process or another, works in it at the same time.

    Use it in a ``with`` block; blocks of one object may be nested. The lock is a file beside the folder, which stays there;
    the lock on it ends with the block, or with the process.

    Args:
        folder: what is held; it need not exist.
        wait: whether to wait for another run's end, or else raise `StorageError`.
    """

    def __init__(self, folder, *, wait: bool = False):
        self.folder = Path(folder).expanduser().resolve()
        path = self.folder.with_name(f".{self.folder.name}.lock")
        self._lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)

    def __enter__(self):
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise StorageError(f"{self.folder} is in use by another run, in this process or in another one; wait for its end, "
                               "end it, or choose another folder") from error
        except OSError as error:
            raise unwritten(self.folder, error) from error
        return self

    def __exit__(self, *error):
        self._lock.release()


def load_folder(folder, *, kind: str, device="cpu", prefix: str = "", verify: bool = True) -> Stored:
    """Read a folder that `save_folder` wrote, with the tensors on `device`.

    The file of tensors is memory-mapped, so that of those whose names begin with `prefix` alone are read. `verify=False`
    skips the SHA-256, for a folder that this process has verified before.

    Raises `StorageError` if the folder is absent, not distillkit's, of another kind, from a newer version, or if any
    file is missing, a link, or differs by one bit from what was written.
    """
    folder = Path(folder).expanduser()
    while True:
        place = _standing(folder)
        try:
            return _read(place[0], kind, device, prefix, verify)
        except (StorageError, OSError) as error:
            if _standing(folder) != place:  # another process replaced it meanwhile, and parts of two versions were read
                continue
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{folder} cannot be read ({error}); check the disk and your rights") from error


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


def is_vacant(folder) -> bool:
    """Whether nothing is stored at `folder`: it is absent or empty, and no crash left its contents set aside."""
    folder = Path(folder).expanduser()
    if folder.exists():
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
    found = _size_and_hash(path)
    if found["size"] != expected.get("size"):
        raise StorageError(f"{path} has {found['size']} bytes, its manifest says {expected.get('size')}; {remedy}")
    if found["sha256"] != expected.get("sha256"):
        raise StorageError(f"{path} does not have the SHA-256 of its manifest: it was damaged or edited; {remedy}")


def _refuse_to_overwrite(folder: Path, kind: str) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    remedy = "choose another folder, or delete this one yourself"
    try:
        found = _read_manifest(folder)["kind"]
    except StorageError as error:
        raise StorageError(f"will not overwrite {folder}: {error}; {remedy}") from error
    strangers = sorted({path.name for path in folder.iterdir()} - {TENSORS, DATA, MANIFEST})
    if found != kind:
        raise StorageError(f"will not overwrite {folder}: it holds {found!r}, not {kind!r}; {remedy}")
    if strangers:
        raise StorageError(f"will not overwrite {folder}: it also holds {', '.join(strangers)}; {remedy}")


def move_into_place(fresh: Path, folder: Path) -> None:
    """Rename ``fresh`` to ``folder``; an earlier version is set aside first, and deleted last."""
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
        shutil.rmtree(old, ignore_errors=True)


def beside(folder: Path, suffix: str) -> Path:
    """A hidden name beside ``folder`` that nobody else has."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.{suffix}")


def _set_aside(folder: Path) -> list[Path]:
    """The earlier versions of `folder` that a crash kept from being deleted, newest last."""
    aged = []
    for path in _others(folder, "old"):
        try:
            aged.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # another process has just removed it
            continue
    return [path for _, path in sorted(aged)]


def _others(folder: Path, suffix: str) -> list[Path]:
    """What :func:`beside` named for `folder`, by whichever process."""
    pattern = re.compile(re.escape(f".{folder.name}.") + rf"[0-9a-f]{{16}}\.{suffix}")
    return [path for path in folder.parent.glob(f".*.{suffix}") if pattern.fullmatch(path.name)]


def _standing(folder: Path) -> tuple[Path, int | None]:
    """Where the newest version of `folder` is, and the number that tells it from another one at the same place."""
    place = folder if folder.exists() else next(reversed(_set_aside(folder)), folder)
    try:
        return place, place.stat().st_ino
    except OSError:
        return place, None


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """`folder` itself locked by this process; `OSError` if it cannot be had and this process does not `wait` for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not wait:
            os.close(descriptor)
            raise
        if error.errno == errno.EWOULDBLOCK:  # or this file system has no locks: then nothing is held to be an orphan
            fcntl.flock(descriptor, fcntl.LOCK_EX)
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
