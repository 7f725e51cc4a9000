"""What looks and changes nothing: ``verify`` checks what is stored, ``doctor`` says what this machine and a model can do."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from distillkit.core.estimate import recommend
from distillkit.core.loading import load_student
from distillkit.core.model_files import inventory
from distillkit.data.corpora import KNOWN
from distillkit.data.load import load_task
from distillkit.io.escaping import one_line, say
from distillkit.io.storage import cache_dir
from distillkit.io.verify import DAMAGED, NOT_CHECKED
from distillkit.io.verify import verify as states
from distillkit.io.version import __version__

ROLES = {"classifier": "docstrings", "language model": "docstrings_qa"}  # what a model is tried as, and on which corpus


def verify(args: argparse.Namespace) -> int:
    """``python -m distillkit verify``: a line for each file at or below the paths; returns 1 if any is damaged.

    Raises:
        FileNotFoundError: one of the paths is not there, or none holds anything of distillkit's.
        OSError: a folder below one of them cannot be read.
    """
    counts = Counter()
    for top in args.paths:
        if not top.exists():
            raise FileNotFoundError(f"no file or folder {top}")
        for path, state, what in states(top):
            counts[state] += 1
            say(f"{state:11} {one_line(path)}: {one_line(what)}")
    if not counts.keys() - {NOT_CHECKED}:
        raise FileNotFoundError(f"nothing of distillkit's is stored below {', '.join(map(str, args.paths))}")
    say(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts[DAMAGED] else 0


def doctor(args: argparse.Namespace) -> None:
    """``python -m distillkit doctor``."""
    for part in (_versions(), _machine(), _hub(), _data(), _files(args.student), _model(args.student)):
        for line in part:
            say(line)


def _versions() -> Iterator[str]:
    installed = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    yield (f"distillkit {__version__}{'' if 'distillkit' in installed else ' (not installed as a package: pip install -e .)'}, "
           f"Python {platform.python_version()} on {platform.system()} ({platform.machine()})")
    for needed in map(Requirement, importlib.metadata.requires("distillkit") or () if "distillkit" in installed else ()):
        version, optional = installed.get(needed.name.lower().replace("_", "-")), needed.marker is not None
        if version is None:
            state = "optional" if optional else "NEEDED: pip install it"
        else:
            state = "ok" if needed.specifier.contains(version, prereleases=True) else "TOO OLD OR TOO NEW"
        yield f"  {needed.name} {version or 'absent'}: {state} ({needed.specifier or 'any'})"


def _machine() -> Iterator[str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}, memory {memory:.1f} GiB"
    yield f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here; cache: {cache_dir()}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield f"device: {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        yield "device: CPU (torch sees no GPU)"


def _hub() -> Iterator[str]:
    """Whether the Hugging Face hub answers, asked once and briefly."""
    if constants.HF_HUB_OFFLINE:
        yield "hub: not asked (HF_HUB_OFFLINE is set); only its cache is used"
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=3):
            yield f"hub: reachable ({constants.ENDPOINT})"
    except urllib.error.HTTPError as error:  # it answered
        yield f"hub: reachable ({constants.ENDPOINT}, status {error.code})"
    except (OSError, ValueError) as error:
        yield f"hub: NOT reachable ({constants.ENDPOINT}: {error}); corpora and models must be here already"


def _data() -> Iterator[str]:
    root = os.environ.get("DISTILLKIT_DATA")
    yield f"DISTILLKIT_DATA: {root or 'not set; corpora known by name come from the hub'}"
    for name in KNOWN if root else ():
        files = sorted(path.name for path in (Path(root).expanduser() / name).glob("*") if path.is_file())
        yield f"  {name}: {', '.join(files) or 'absent'}"


def _files(source: str) -> Iterator[str]:
    """Which files of a local model folder are read, and which pickles, code or weights never are."""
    for use, files in zip(("read", "left out"), inventory(source)):
        if files:
            yield f"  files {use}: {', '.join(one_line(name, 100) for name in files)}"


def _model(source: str) -> Iterator[str]:
    """What a model is as a classifier and as a language model, or why it is none; an error where it is neither."""
    errors = []
    for role, corpus in ROLES.items():
        task = load_task(corpus, max_length=16, limit=12)
        try:
            yield from _student(source, role, task)
        except ValueError as error:
            errors.append(error)
            yield f"student {source} as {role}: none ({error})"
    if len(errors) == len(ROLES):
        raise errors[-1]


def _student(source: str, role: str, task) -> Iterator[str]:
    """What a student is, which derivatives each kind of attention has, tried on a sentence, and its adapters."""
    student = load_student(source, task, trainable="full", attention="eager")
    trained = sum(parameter.numel() for parameter in student.init(0).values())
    yield (f"student {student.name} as {role}: {student.module.config.model_type}, {trained:,} parameters trained, "
           f"embeddings [{', '.join(map(str, student.embedding.shape))}], {student.max_positions} positions, on "
           f"{student.device}")
    yield _derivatives(student, task)
    try:
        yield _derivatives(load_student(source, task, trainable="full", attention="sdpa"), task)
    except ValueError as error:
        yield f"  attention sdpa: none ({error})"
    try:
        adapters = load_student(source, task, trainable="lora").init(0)
        yield f"  LoRA: {sum(value.numel() for name, value in adapters.items() if '.lora_' in name):,} parameters in adapters"
    except ValueError as error:
        yield f"  LoRA: none ({error})"


def _derivatives(student, task) -> str:
    first, second = (_derivative(student, task, order) for order in (1, 2))
    strategy, reason = recommend(student, task if first == "ok" else None)
    return (f"  attention {student.attention}: first derivatives {first}, second {second}; use {type(strategy).__name__} "
            f"({reason})")


def _derivative(student, task, order: int) -> str:
    """Whether the gradient of a loss, or of a gradient's norm, with respect to an input can be had, and is finite."""
    batch = task.batch(student.tokenizer, "train", [0, 1])
    embeds = student.embedding[batch["input_ids"].to(student.device)].clone().requires_grad_()
    params = {name: parameter.requires_grad_() for name, parameter in student.init(0).items()}
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    try:
        loss = student.loss(params, inputs, batch["labels"].to(student.device))
        if order == 2:
            gradients = torch.autograd.grad(loss, [*params.values()], create_graph=True, allow_unused=True)
            loss = torch.stack([gradient.square().sum() for gradient in gradients if gradient is not None]).sum()
        finite = torch.autograd.grad(loss, embeds)[0].isfinite().all()
    except RuntimeError as error:
        return f"none ({str(error).splitlines()[0][:80]})"
    return "ok" if finite else "NOT FINITE"
