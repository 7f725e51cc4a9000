"""Prepare corpora and students for a machine that is at hand for minutes (:mod:`distillkit.io.prepared` says how they travel).

Everything slow, or that needs a network or a package which is missing there, is done here: corpora are read, checked and
tokenised for every student, models are found, verified and copied.  The folder that comes out is all that is uploaded besides
the project itself.  Models that are made from the same weights share them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from distillkit.core import model_files
from distillkit.core.loading import NO_CODE, PACKAGED, location_of
from distillkit.data.corpus import CorpusError
from distillkit.data.load import load_task
from distillkit.data.prepared import arguments, write_task
from distillkit.experiments.settings import Data
from distillkit.io.checks import check_choice, check_whole, require
from distillkit.io.escaping import one_line, say
from distillkit.io.prepared import INDEX, MIB, VARIABLE, begin, finish
from distillkit.io.storage import Claim, StorageError, absolute, unwritten

UPLOAD_BYTES = 44 * MIB  # small enough for one request beside the project itself
LARGEST_UPLOAD = 60 * MIB
CARD = "README.md"
IN_ORDER = ("source", "max_length", "limit")
WRITES = ("ForCausalLM", "LMHeadModel")  # ends of the names of language models


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was prepared: the index of the folder, and a line for everything that was left out, with how to get it."""

    folder: Path
    index: dict
    skipped: tuple[str, ...]


def prepare(folder: str | Path, corpora: Iterable[Mapping | tuple], students: Sequence[str], *, rounded: Sequence[str] = (),
            upload_bytes: int = UPLOAD_BYTES, command: str = "...") -> Prepared:
    """Write the prepared folder, and say what to upload in which order and what to run there.

    Args:
        corpora: the arguments of ``load_task`` for each task, such as ``{"source": "docstrings", "max_length": 32}``, or the
            source, ``max_length`` and ``limit`` in this order.
        students: as ``load_student`` takes them: offline names or hub ids.  A task is tokenised for all of them, one of
            prompts for those that were saved as language models.
        rounded: those whose weights are stored in float16, which halves what is uploaded; the folder and a warning say so.
        upload_bytes: largest size of an upload, at most 60 MiB.
        command: what to run there, behind ``python3 -m distillkit``.

    Returns:
        what was prepared; a corpus or a student that cannot be had here is left out, with a line that says how to get it.

    Raises:
        ValueError: nothing to prepare, ``DISTILLKIT_PREPARED`` is set, or one of ``rounded`` is not among the students.
        StorageError: the folder holds other things, or cannot be written.
    """
    check_whole("upload_bytes", upload_bytes, most=LARGEST_UPLOAD)
    require(not os.environ.get(VARIABLE), f"{VARIABLE} is set, so corpora would come from a prepared folder; unset it")
    for source in rounded:
        check_choice("each of rounded", source, [name for name in students if name not in PACKAGED])
    folder = absolute(folder)
    with Claim(folder):
        try:
            files, skipped = begin(folder), []
            stored = _store_students(files, list(dict.fromkeys(students)), rounded, skipped)
            tokenizers = [_tokenizer(files, source, entry) for source, entry in stored.items()]
            asked = [dict(corpus if isinstance(corpus, Mapping) else zip(IN_ORDER, corpus, strict=False)) for corpus in corpora]
            tasks = _store_tasks(files, asked, tokenizers, skipped)
            require(tasks or stored, f"nothing can be prepared: {'; '.join(skipped) or 'no corpus and no student is named'}")
            kept = {source: entry for source, entry in stored.items() if entry}
            index = finish(folder, tasks=tasks, students=kept, upload_bytes=upload_bytes)
        except OSError as error:
            raise unwritten(folder, error) from error
    prepared = Prepared(folder, index, tuple(skipped))
    say(report(prepared, command))
    return prepared


def corpora_and_students(jobs: Iterable[Data]) -> tuple[list[dict], list[str]]:
    """The corpora and the students that experiments of these settings load, for :func:`prepare`."""
    jobs, of_corpus = list(jobs), ("max_length", "limit", "text_column", "label_column")
    corpora = [{"source": job.corpus, **{name: getattr(job, name) for name in of_corpus}} for job in jobs]
    students = [student for job in jobs for student in (job.student, getattr(job, "target", job.student))]
    return corpora, list(dict.fromkeys(students))


def report(prepared: Prepared, command: str) -> str:
    """What to upload in which order, what to run there, and what was left out."""
    folder, index, sizes, last = os.path.relpath(prepared.folder), prepared.index, {}, {}
    for name, entry in index["files"].items():
        for part in entry["parts"]:
            upload = part["name"].split("/")[0]
            sizes[upload] = sizes.get(upload, 0) + part["size"]
            last[name.rpartition("/")[0]] = upload
    lines = [f"left out: {line}" for line in prepared.skipped]
    lines.append(f"{len(index['tasks'])} tasks and {len(index['students'])} students in {folder}, which git must ignore, to be "
                 f"uploaded in {len(sizes)} parts:")
    use = f"{VARIABLE}={folder} HF_HUB_OFFLINE=1 python3 -m distillkit {command}"
    for upload, size in sizes.items():
        whole = [source for source, student in index["students"].items() if last[student["folder"]] == upload]
        lines.append(f"  upload {folder}/{INDEX} {folder}/{upload} ({size / MIB:.1f} MiB{'; completes ' * bool(whole)}"
                     f"{', '.join(whole)}) and run: {use if whole or len(sizes) == 1 else 'true'}")
    lines.append("the files are joined at first use and stay there: nothing has to be uploaded again")
    return "\n".join(lines)


# --- students ---------------------------------------------------------------------------------------------------------


def _store_students(files: Path, students: Sequence[str], rounded: Sequence[str], skipped: list[str]) -> dict[str, dict | None]:
    """The entry of each student in the index; None for those that come with the project and need not be uploaded."""
    stored: dict[str, dict | None] = {}
    folders: dict[tuple, str] = {}  # the same weights are stored once
    for source in students:
        if source in PACKAGED:
            stored[source] = None
            continue
        say(f"preparing {source}", error=True)
        try:
            location, dtype = location_of(source), "float16" if source in rounded else "float32"
            if (location, dtype) not in folders:
                folders[location, dtype] = _store_model(location, files, source, dtype)
        except StorageError:
            raise
        except (ValueError, FileNotFoundError) as error:
            skipped.append(f"{source}: {one_line(error)}")
        else:
            stored[source] = {"folder": folders[location, dtype], "dtype": dtype}
    return stored


def _store_model(location: str, files: Path, source: str, dtype: str) -> str:
    """Copy the files that transformers may see of a model, write a card, and return the name of their folder."""
    name = f"students/{source.removeprefix('offline:').replace('/', '--')}"
    with model_files.readable(location, installed=True) as clean, tempfile.TemporaryDirectory(dir=files) as temporary:
        for path in sorted(clean.iterdir()):
            if dtype == "float16" and path.suffix == ".safetensors":
                _round(path, Path(temporary) / path.name)
            else:
                shutil.copyfile(path, Path(temporary) / path.name)
        change = "rounded to float16, and read back as float32" if dtype == "float16" else "as they were"
        card = f"# {source}\n\nThe tokenizer and the weights of {source}, the weights {change}.\n"
        Path(temporary, CARD).write_text(card, encoding="utf-8")
        shutil.copytree(temporary, files / name)
    return name


def _round(path: Path, target: Path) -> None:
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(torch.float16)
            require(tensors[name].isfinite().all(), f"the tensor {name} has numbers that float16 cannot hold; do not round it")
    save_file(tensors, target, {"format": "pt"})


def _tokenizer(files: Path, source: str, entry: Mapping | None) -> tuple[Any, bool]:
    """The tokenizer of a student, loaded as it will be loaded there, and whether the student is a language model."""
    location = str(files / entry["folder"]) if entry else location_of(source)
    with model_files.readable(location, installed=True) as clean, model_files.quiet():
        config = transformers.AutoConfig.from_pretrained(clean, **NO_CODE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(clean, config=config, **NO_CODE)
    tokenizer.name_or_path = location
    return tokenizer, any(name.endswith(WRITES) for name in config.architectures or ())


# --- tasks ------------------------------------------------------------------------------------------------------------


def _store_tasks(files: Path, corpora: Sequence[dict], tokenizers: Sequence[tuple[Any, bool]],
                 skipped: list[str]) -> list[dict]:
    """The entries of the tasks in the index."""
    entries = []
    for number, corpus in enumerate(corpora, 1):
        asked, name = arguments(**corpus), f"tasks/{number}.safetensors"
        if any(asked == entry["arguments"] for entry in entries):
            continue
        say(f"preparing {asked['source']}", error=True)
        try:
            task = load_task(**corpus)
            readers = [tokenizer for tokenizer, writes in tokenizers if writes or task.kind == "classification"]
            write_task(task, files / name, asked, readers)
        except CorpusError as error:
            skipped.append(f"{asked['source']}: {one_line(error)}")
        else:
            entries.append({"file": name, "arguments": asked, "fingerprint": task.fingerprint})
    return entries
