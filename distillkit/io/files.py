"""The one format in which anything but text is stored: a safetensors file that can be checked by itself.

The metadata in its header are a JSON object: what the file is (``kind`` and ``identity``), what it says (``data``), and the
SHA-256 of the whole file, computed with that field zeroed.  So a flipped bit is noticed, which neither safetensors nor JSON
would, and so are two files that changed places.  Sets, snapshots of experts, checkpoints and caches are such files.

Reading trusts nothing.  Every byte is hashed before it is used, nothing is unpickled, no link is followed, the header is of
bounded size, and each refusal names the file and what to do about it.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distillkit.io.checks import require
from distillkit.io.storage import StorageError, absolute, replacing

FORMAT, VERSION = "distillkit", 2
LAST_READER_OF_FOLDERS = "0.1"  # the last version that reads things of three files each
LARGEST_HEADER = 2**24  # bytes
ZEROS = "0" * 64


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds: its kind, what it is among its kind, JSON data, its own SHA-256, and named tensors."""

    kind: str
    identity: dict
    data: dict
    sha256: str
    tensors: dict[str, Tensor]


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
        require(tensor.isfinite().all(), f"cannot save {path}: the tensor {name!r} holds NaN or infinity; find out where they "
                "came from, and save what was there before them", StorageError)
    head = {"sha256": ZEROS, "format": FORMAT, "version": VERSION, "kind": kind, "identity": identity, "data": data}
    try:
        text = json.dumps(head, ensure_ascii=False, allow_nan=False)
        content = memoryview(safetensors.torch.save(_independent(tensors), {FORMAT: text}))
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot save {path}: its data are not strict JSON ({error}); store finite numbers, strings, "
                           "lists and dictionaries, and put arrays into tensors") from error
    header = 8 + int.from_bytes(content[:8], "little")
    require(header <= LARGEST_HEADER, f"cannot save {path}: its data take {header} bytes, more than {LARGEST_HEADER}; put them "
            "into tensors", StorageError)
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
        require(not verify or summed.hexdigest() == stored.sha256, f"{path} does not have its SHA-256: it was damaged or "
                "edited; delete it, and make or download it again", StorageError)
        require(kind in (None, stored.kind), f"{path} holds {stored.kind!r}, not {kind!r}; pass a file saved as {kind!r}",
                StorageError)
        for key, value in identity.items():
            stored_value = stored.identity.get(key)
            require(stored_value == value, f"{path} is another one of its kind: its {key} is {stored_value!r}, not {value!r}; "
                    "put the right file there, or make it again", StorageError)
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
    if not os.path.lexists(path):
        return
    try:
        standing = repr(read_header(path).kind)
    except StorageError as error:
        standing = str(error)
    require(standing == repr(kind), f"will not overwrite {path} by {kind!r}: it holds {standing}; choose another name, or "
            "delete it yourself", StorageError)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open for reading."""
    require(not path.is_symlink(), f"{path} is a link, which is not followed; copy the file there", StorageError)
    require(not (path / "manifest.json").is_file(), f"{path} is a folder that distillkit {LAST_READER_OF_FOLDERS} wrote, which "
            f"is the last version that reads it: pip install 'distillkit=={LAST_READER_OF_FOLDERS}.*', or make it again",
            StorageError)
    require(path.is_file(), f"{path} is {'not a file' if os.path.lexists(path) else 'not there'}; check the path, or make it "
            "again", StorageError)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error}); check the disk and your rights") from error


def _parsed(path: Path, file: BinaryIO) -> tuple[Stored, bytes]:
    """What the header of an open file says, and its bytes."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    require(size <= LARGEST_HEADER, f"{path} is no file of distillkit's, or damaged: its header would have {size} bytes, more "
            f"than {LARGEST_HEADER}; make or download it again", StorageError)
    header = file.read(size)
    try:
        head = json.loads(json.loads(header)["__metadata__"][FORMAT], parse_constant=_refuse_constant)
        version, stored = head["version"], Stored(head["kind"], head["identity"], head["data"], head["sha256"], {})
        whole = isinstance(stored.identity, dict) and isinstance(stored.data, dict) and isinstance(stored.kind, str)
        require(head["format"] == FORMAT and whole and re.fullmatch("[0-9a-f]{64}", stored.sha256), "another header")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} is no file of distillkit's, or damaged ({error!r}); check the path, or make or download it "
                           "again") from error
    require(version == VERSION, f"{path} has format version {version!r}, and this distillkit reads {VERSION}; update "
            "distillkit, or make the file again", StorageError)
    return stored, length + header


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous, and no two in one memory: safetensors refuses tensors that share storage."""
    return {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()}
