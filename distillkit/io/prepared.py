"""A prepared folder: corpora and models made ready on one machine, to be uploaded to another in parts.

A machine that is at hand for minutes may have no network, and may take only so many bytes at a time.  So tasks and models are
prepared where everything is at hand (:mod:`distillkit.experiments.prepared`), as ordinary files below ``files``, and cut into
parts.  The parts that travel together lie in one folder, an *upload*::

    FOLDER/index.json       every file and every part with its size and SHA-256, sealed
    FOLDER/upload-1/*.part   what travels first, upload-2/*.part what travels next, ...
    FOLDER/files/...        the whole files: here from the start, there once their parts have been joined

``DISTILLKIT_PREPARED=FOLDER`` makes ``load_task`` and ``load_student`` read from it.  A file is joined when it is first needed:
each part is verified, and the whole appears in one atomic step.  It stays, so that its parts are not needed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from distillkit.io.checks import require
from distillkit.io.storage import Claim, StorageError, absolute, replacing, save_text, sealed, unsealed
from distillkit.io.verify import sha256_of

VARIABLE = "DISTILLKIT_PREPARED"
INDEX, FILES, UPLOAD = "index.json", "files", "upload-"
FORMAT, VERSION = "distillkit-prepared", 1
COMMAND = "python -m distillkit suite --prepare"
MIB = 2**20
_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")  # of a file or part below the folder


def prepared_folder() -> Path | None:
    """The folder that ``DISTILLKIT_PREPARED`` names; None where it is not set."""
    name = os.environ.get(VARIABLE)
    return absolute(name) if name else None


def read_index(folder: Path) -> dict:
    """What a prepared folder holds: ``files`` with their parts, ``tasks`` and ``students``.  Raises `StorageError`."""
    path = folder / INDEX
    require(path.is_file(), f"{path} is not there; upload it there, or prepare the folder: {COMMAND} {folder.name}",
            StorageError)
    try:
        index = unsealed(path.read_bytes())
        require((index["format"], index["version"]) == (FORMAT, VERSION), f"it is {index['format']!r}, version "
                f"{index['version']!r}, and this distillkit reads {FORMAT!r}, version {VERSION}")
        names = [*index["files"], *(part["name"] for entry in index["files"].values() for part in entry["parts"]),
                 *(student["folder"] for student in index["students"].values())]
        require(all(map(_NAME.fullmatch, names)), "it names a file outside of the folder")
        require({entry["file"] for entry in index["tasks"]} <= index["files"].keys(), "it lacks the file of a task")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} cannot be used ({error}); upload it again, or prepare the folder again: {COMMAND} "
                           f"{folder.name}") from error
    return index


def whole_file(folder: Path, index: Mapping, name: str) -> Path:
    """The file ``name`` of a prepared folder, verified; joined from its parts if it is not there yet.

    Raises `FileNotFoundError` for a part that has not been uploaded, and `StorageError` for one that is damaged, by its name
    and that of its upload.
    """
    entry, path = index["files"][name], folder / FILES / name
    if _is(path, entry):
        return path
    with Claim(folder / FILES, wait=True):
        if _is(path, entry):  # another process has joined it meanwhile
            return path
        for part in (folder / part["name"] for part in entry["parts"]):
            require(part.is_file(), f"{part} is not there, which {name} is joined from; upload "
                    f"{folder.name}/{part.parent.name} there", FileNotFoundError)
        with replacing(path) as file:
            for part in entry["parts"]:
                file.write(_verified(folder, part))
    require(_is(path, entry), f"{path} does not have the SHA-256 of {INDEX} although its parts do; prepare the folder again: "
            f"{COMMAND} {folder.name}", StorageError)
    return path


def join(folder: str | Path) -> list[Path]:
    """Join every file of a prepared folder, and return them.  Raises as :func:`whole_file` does."""
    folder = absolute(folder)
    index = read_index(folder)
    return [whole_file(folder, index, name) for name in index["files"]]


def student_folder(folder: Path, source: str) -> tuple[Path, str]:
    """The folder of a student's files, whole and verified, and the precision of its weights.

    Raises `FileNotFoundError` that lists what there is where it was not prepared, and as :func:`whole_file` does.
    """
    index = read_index(folder)
    student = index["students"].get(source)
    if student is None:
        students = ", ".join(index["students"]) or "none"
        raise FileNotFoundError(f"{folder} has no student {source!r}; it was prepared with {students}. Prepare it again "
                                f"({COMMAND} {folder.name}), or unset {VARIABLE}")
    for name in index["files"]:
        if name.startswith(f"{student['folder']}/"):
            whole_file(folder, index, name)
    return folder / FILES / student["folder"], student["dtype"]


def _is(path: Path, entry: Mapping) -> bool:
    return path.is_file() and path.stat().st_size == entry["size"] and sha256_of(path) == entry["sha256"]


def _verified(folder: Path, part: Mapping) -> bytes:
    path = folder / part["name"]
    content = path.read_bytes()
    require(hashlib.sha256(content).hexdigest() == part["sha256"], f"{path} does not have the SHA-256 of {INDEX}: it is "
            f"damaged, or another file; upload {folder.name}/{path.parent.name} there again", StorageError)
    return content


# --- writing ----------------------------------------------------------------------------------------------------------


def begin(folder: Path) -> Path:
    """Empty a prepared folder, or make a new one, and return the place for its files.

    Raises `StorageError` if it holds anything that preparing does not write.
    """
    known = re.compile(rf"{INDEX}|{FILES}|{UPLOAD}\d+|\..*")
    strange = [path.name for path in folder.iterdir() if not known.fullmatch(path.name)] if folder.is_dir() else []
    require(not strange, f"{folder} holds {strange[:1]}, which preparing did not write; choose an empty or a new folder",
            StorageError)
    (folder / INDEX).unlink(missing_ok=True)  # first: what is left after a kill is then no prepared folder
    for place in (folder / FILES, *folder.glob(f"{UPLOAD}*")):
        shutil.rmtree(place, ignore_errors=True)
    (folder / FILES).mkdir(parents=True)
    return folder / FILES


def finish(folder: Path, *, tasks: list, students: Mapping, upload_bytes: int) -> dict:
    """Cut the files of a prepared folder into uploads of ``upload_bytes`` at most, write its index and return it.

    Tasks come first, then the students in their order, so that work can begin before the last upload.
    """
    files: dict[str, dict] = {}
    upload, room, parts = 0, 0, 0
    order = [folder / FILES / "tasks", *(folder / FILES / student["folder"] for student in students.values())]
    paths = [path for place in dict.fromkeys(order) for path in sorted(place.glob("*")) if not path.name.startswith(".")]
    for path in paths:
        entry = {"size": path.stat().st_size, "sha256": sha256_of(path), "parts": []}
        with path.open("rb") as file:
            while not entry["parts"] or file.tell() < entry["size"]:
                if not room:
                    upload, room, parts = upload + 1, upload_bytes, 0
                content, parts = file.read(room), parts + 1
                room -= len(content)
                name = f"{UPLOAD}{upload}/{parts:03}.part"
                with replacing(folder / name) as part:
                    part.write(content)
                entry["parts"].append({"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        files[path.relative_to(folder / FILES).as_posix()] = entry
    values = {"format": FORMAT, "version": VERSION, "files": files, "tasks": tasks, "students": dict(students)}
    save_text(folder / INDEX, json.dumps(sealed(values), indent=1) + "\n")
    return values
