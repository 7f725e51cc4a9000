"""The one way anything is written to disk and read back.

A stored thing is a folder of three files: `tensors.safetensors`, `data.json` and `manifest.json`, which names the kind
of the thing and the size and SHA-256 of the two others. Distilled sets, experts, checkpoints and caches all use it.

*Writing is atomic.* The folder is built beside its target under a hidden name, flushed to the disk, and renamed into
place, so a killed process leaves either the old folder or the new one. POSIX cannot swap two folders in one call: the
old one is set aside first, and `load_folder` reads the folder set aside if a crash fell between the two renames.

*Reading trusts nothing.* Neither safetensors nor JSON notices a flipped bit, so every byte is hashed before it is used.
Nothing is pickled, links are not followed, and each refusal names the folder, the file and what to do about it.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "distillkit", 1
TENSORS, DATA, MANIFEST = "tensors.safetensors", "data.json", "manifest.json"


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

    An empty folder, or an earlier folder of the same kind, is replaced. Anything else that stands there is left alone
    and a `StorageError` is raised; so it is if `data` is not strict JSON (NaN and infinity are not).
    """
    folder = Path(folder).expanduser().resolve()
    _refuse_to_overwrite(folder, kind)
    try:
        text = json.dumps(dict(data), ensure_ascii=False, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise StorageError(f"cannot save {folder}: data is not strict JSON ({error}); store finite numbers, strings, "
                           "lists and dictionaries, and put arrays into tensors") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(folder, "new")
    fresh.mkdir()
    try:
        save_file(_independent(tensors), fresh / TENSORS)
        (fresh / DATA).write_text(text, encoding="utf-8")
        files = {name: _size_and_hash(fresh / name) for name in (DATA, TENSORS)}
        manifest = {"format": FORMAT, "version": VERSION, "kind": kind, "files": files}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (fresh / DATA, fresh / TENSORS, fresh / MANIFEST, fresh):
            _flush(path)
        _move_into_place(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # already gone if all went well
    return folder


def load_folder(folder, *, kind: str, device="cpu", prefix: str = "", verify: bool = True) -> Stored:
    """Read a folder that `save_folder` wrote, with the tensors on `device`.

    The file of tensors is memory-mapped, so that of those whose names begin with `prefix` alone are read. `verify=False`
    skips the SHA-256, for a folder that this process has verified before.

    Raises `StorageError` if the folder is absent, not distillkit's, of another kind, from a newer version, or if any
    file is missing, a link, or differs by one bit from what was written.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        folder = _set_aside(folder)[-1] if _set_aside(folder) else folder
    manifest = _read_manifest(folder)
    if manifest["kind"] != kind:
        raise StorageError(f"{folder} holds {manifest['kind']!r}, not {kind!r}; pass a folder saved as {kind!r}")
    if verify:
        for name in (DATA, TENSORS):
            _verify(folder, name, manifest["files"])
    with safe_open(folder / TENSORS, framework="pt", device=str(device)) as stored:
        names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dictionary)
        tensors = {name: stored.get_tensor(name) for name in names}
    return Stored(tensors, json.loads((folder / DATA).read_text(encoding="utf-8")))


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
    except ValueError as error:
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


def _move_into_place(fresh: Path, folder: Path) -> None:
    while True:  # each round either succeeds or has lost a race against another writer of the same folder
        try:
            os.rename(fresh, folder)  # replaces an absent or an empty folder only
            break
        except OSError:
            if not (folder.is_dir() and fresh.is_dir()):
                raise
        try:
            os.rename(folder, _beside(folder, "old"))
        except FileNotFoundError:
            continue
    _flush(folder.parent)
    for old in _set_aside(folder):
        shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.{suffix}")


def _set_aside(folder: Path) -> list[Path]:
    """The earlier versions of `folder` that a crash kept from being deleted, newest last."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"[0-9a-f]{16}\.old")
    found = [path for path in folder.parent.glob(".*.old") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


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
