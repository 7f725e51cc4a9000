"""Expert trajectories: where training on all the data leads, written down to be matched.

An expert is a student trained on the whole training split.  Along the way it leaves *snapshots*: its parameters and its
optimiser's state at evenly spaced steps, and, by a seed, the order of its batches.  With them any segment of its path can
be walked again, step for step.  Trajectory matching (Cazenavette et al., 2022) asks a distilled set to lead a student
along the same segment in fewer steps.

On disk each snapshot is a file that says which expert's it is and with which settings it was made, so that an interrupted
recording goes on after its last snapshot.  An index names the SHA-256 of each, so that a snapshot that is damaged, missing,
or another one's is noticed; whatever matches experts records the SHA-256 of their index.  Several processes that record into
one folder share the work.  Snapshots are memory-mapped when read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from distillkit.core.inner import Part, inner_step, to_device
from distillkit.core.optimizers import AdamW, Optimizer, State, check_optimizer, described
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.io.checkpoint import check_settings
from distillkit.io.checks import check_are, check_whole, check_wholes, require
from distillkit.io.escaping import say
from distillkit.io.files import read_file, read_header, write_file
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator
from distillkit.io.signals import Ended, ending_signals
from distillkit.io.storage import Claim, InUse, StorageError, absolute, digest_of

KIND, SNAPSHOT = "experts", "expert-snapshot"
INDEX = "index.safetensors"
EXTENDABLE = ("count", "epochs")  # more of these may be asked of a folder than it holds


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """Recorded experts, read from their folder as they are needed; made by :func:`record_experts`.

    Attributes:
        folder: where they are.
        settings: how they were made: ``count``, ``epochs``, ``snapshots_per_epoch``, ``steps_per_epoch``, ``optimizer``,
            ``batch_size``, ``seed``, and what identifies student, tokenizer and task.
        members: the SHA-256 of each snapshot by its name in ``folder``.
        sha256: of the index, which stands for all of them.
    """

    folder: Path
    settings: dict
    members: dict[str, str]
    sha256: str
    _verified: set = dataclasses.field(default_factory=set, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Experts:
        """Open a folder of experts.

        Raises:
            StorageError: it holds none, is damaged, or its recording was interrupted.
        """
        experts = cls._open(absolute(folder))
        absent = [place for place in experts.places if not (experts.folder / _name(*place)).is_file()]
        unnamed = [place for place in experts.places if _name(*place) not in experts.members]
        for expert, index in absent or unnamed:
            if (expert, index) not in unnamed:
                raise StorageError(f"{experts.folder / _name(expert, index)} is missing, and {INDEX} names it; put it there, "
                                   "or call record_experts with the same settings to make it again")
            raise StorageError(f"{folder}: expert {expert} ends before snapshot {index} of {experts.snapshots - 1}; its "
                               "recording was interrupted: call record_experts with the same settings to finish it")
        return experts

    @classmethod
    def _open(cls, folder: Path) -> Experts:
        if not folder.is_dir():
            raise StorageError(f"there is no folder {folder}; check the path, or record experts there with record_experts")
        if (folder / "settings").is_dir():
            read_header(folder / "settings")  # says which version reads it
        index = read_file(folder / INDEX, kind=KIND)
        return cls(folder, index.data["settings"], index.data["members"], index.sha256)

    def __len__(self) -> int:
        return self.settings["count"]

    @property
    def epochs(self) -> int:
        return self.settings["epochs"]

    @property
    def snapshots(self) -> int:
        """Snapshots of each expert, its start included."""
        return self.epochs * self.settings["snapshots_per_epoch"] + 1

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every snapshot there is to be, by expert and index."""
        return [(expert, index) for expert in range(len(self)) for index in range(self.snapshots)]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def snapshot(self, expert: int, index: int, *, state: bool = True) -> tuple[Params, State]:
        """Parameters and optimiser state (empty unless ``state``) on the CPU.

        Args:
            expert: 0 … len − 1.
            index: 0 (the start) … ``snapshots`` − 1.
        """
        require((expert, index) in self.places, f"there is no snapshot {index} of expert {expert}: {self.folder} holds "
                f"{len(self)} experts of {self.snapshots} snapshots")
        name, prefix = _name(expert, index), "" if state else "params."
        stored = read_file(self.folder / name, kind=SNAPSHOT, identity=_identity_of(self.settings, expert, index),
                           prefix=prefix, verify=name not in self._verified)
        # While it is recorded, the index is behind.
        require(stored.sha256 == self.members.get(name, stored.sha256), f"{self.folder / name} is not the snapshot that "
                f"{INDEX} names: it comes from another recording; put the right file there, or record the experts anew",
                StorageError)
        self._verified.add(name)
        return _unpacked(stored.tensors, stored.data)

    def step(self, index: int) -> int:
        """The number of training steps made before snapshot ``index``."""
        return index * self.settings["steps_per_epoch"] // self.settings["snapshots_per_epoch"]

    def batches(self, expert: int, first: int, last: int) -> Iterator[Tensor]:
        """The training rows of each step between two snapshots."""
        size, per_epoch = self.settings["batch_size"], self.settings["steps_per_epoch"]
        for step in range(self.step(first), self.step(last)):
            epoch, place = divmod(step, per_epoch)
            draw = generator("expert-order", self.settings["seed"], expert, epoch)
            yield torch.randperm(self.settings["rows"], generator=draw)[place * size :][:size]

    def check(self, student: Student, task) -> None:
        """Raise ValueError if another student, tokenizer or task made these experts."""
        for key, value in _identity(student, task).items():
            if self.settings[key] != value:
                raise ValueError(
                    f"the experts in {self.folder} were made with another {key.replace('_', ' ')} "
                    f"({self.settings[key]!r:.20}) than student {student.name!r} on task {task.name!r} has "
                    f"({value!r:.20}); load what they were made with, or record experts anew"
                )


def record_experts(
    task,
    student: Student,
    folder: str | Path,
    *,
    count: int = 1,
    epochs: int = 1,
    optimizer: Optimizer = AdamW(step_size=1e-3),  # noqa: B008 (frozen)
    batch_size: int = 32,
    micro_batch: int | None = None,
    snapshots_per_epoch: int = 1,
    seed: int = 0,
) -> Experts:
    """Train experts on the whole training split and write their trajectories to ``folder``.

    A recording that was interrupted, by Ctrl-C, SIGTERM, SIGHUP or a kill, goes on after its last snapshot when called
    again; more experts or epochs may be asked of a finished one.

    Several processes that are given the same folder and settings share the work, an expert each at a time, and return when
    all are recorded.

    Args:
        count: experts; each has its own order of batches (and, where the student draws any, fresh parameters).
        epochs: passes through the training split.
        optimizer: how they train, at its constant step size.
        batch_size, micro_batch: rows of a step, and of them at a time.
        snapshots_per_epoch: evenly spaced.
        seed: of orders and initialisations.

    Raises:
        ValueError: settings that cannot be, or others than the folder's, naming which.
        OSError: the disk has less room than the trajectories will take.
    """
    check_are(task=(task, Task), student=(student, Student))
    student = student.for_task(task)
    check_optimizer(optimizer)
    check_whole("batch_size", batch_size, most=len(task.split("train")))
    check_wholes(count=count, epochs=epochs, micro_batch=1 if micro_batch is None else micro_batch)
    derive_seed("expert-order", seed)  # an error now if it is none
    folder, steps = absolute(folder), -(-len(task.train) // batch_size)
    check_whole("snapshots_per_epoch", snapshots_per_epoch, most=steps)
    settings = json.loads(json.dumps({
        "count": count, "epochs": epochs, "snapshots_per_epoch": snapshots_per_epoch, "steps_per_epoch": steps,
        "optimizer": described(optimizer), "batch_size": batch_size, "rows": len(task.train), "seed": seed,
        **_identity(student, task),
    }))
    with Claim(folder, wait=True, shared=True), ending_signals():
        experts, missing = _indexed(folder, settings, student, optimizer)
        try:
            _record_missing(experts, missing, task, student, optimizer, micro_batch)
        except (KeyboardInterrupt, Ended):
            say(f"recording ended; what is whole is saved in {folder}: call record_experts with the same settings to go on",
                error=True)
            raise
        _indexed(folder, settings, student, optimizer)
        return Experts.load(folder)


def _indexed(folder: Path, settings: dict, student: Student, optimizer: Optimizer) -> tuple[Experts, list[tuple[int, int]]]:
    """The experts in a folder, after an index of their snapshots has been written, and the snapshots that are missing."""
    with Claim(folder.with_name(f"{folder.name}.index"), wait=True):
        if (folder / INDEX).exists():
            stored = Experts._open(folder).settings
            settings = settings | {key: max(settings[key], stored[key]) for key in EXTENDABLE}
            check_settings(folder, stored | {key: settings[key] for key in EXTENDABLE}, settings)
        else:
            require(all(path.name.startswith(".") for path in folder.glob("*")),
                    f"{folder} holds something else than experts; choose another folder", StorageError)
        experts = Experts(folder, settings, {}, "")
        missing = [place for place in experts.places if not (folder / _name(*place)).exists()]
        for expert, index in sorted({*experts.places}.difference(missing)):
            path = folder / _name(expert, index)
            snapshot = read_header(path)
            require(snapshot.identity == _identity_of(settings, expert, index),
                    f"{path} is not of this recording: it is {snapshot.identity}; delete it", StorageError)
            experts.members[_name(expert, index)] = snapshot.sha256
        _need_room(folder, student, optimizer, len(missing))
        write_file(folder / INDEX, kind=KIND, identity={"settings": _recording(settings)},
                   data={"settings": settings, "members": experts.members})
        return experts, missing


def _record_missing(experts: Experts, missing: list, task, student: Student, optimizer: Optimizer, micro_batch) -> None:
    """Every expert that lacks something: first those that no other process has in hand, then, when they are free, the rest."""
    total = sum(experts.step(index) - experts.step(index - 1) for _, index in missing if index)
    waiting = sorted({expert for expert, _ in missing})
    with progress(total=total, desc="recording experts", unit="step") as bar:
        for wait in (False, True):
            for expert in tuple(waiting):
                with suppress(InUse), Claim(experts.folder / f"expert-{expert:03d}", wait=wait):
                    _record(experts, expert, task, student, optimizer, micro_batch, bar)
                    waiting.remove(expert)


def _record(experts: Experts, expert: int, task, student: Student, optimizer: Optimizer, micro_batch, bar) -> None:
    """Train one expert from its last snapshot on."""
    absent = (i for i in range(experts.snapshots) if not (experts.folder / _name(expert, i)).exists())
    done = next(absent, experts.snapshots) - 1
    if done < 0:
        params = student.init(derive_seed("expert-init", experts.settings["seed"], expert))
        state, done = optimizer.init(params), 0
        _save(experts, expert, 0, params, state)
    else:
        params, state = to_device(experts.snapshot(expert, done), student.device)
    for index in range(done + 1, experts.snapshots):
        for rows in experts.batches(expert, index - 1, index):
            parts = real_parts(task, student, rows, micro_batch)
            params, state, *_ = inner_step(student, optimizer, params, state, parts, optimizer.step_size)
            bar.update()
        require(all(bool(tensor.isfinite().all()) for tensor in _flat(params, state).values()),
                f"expert {expert} is not finite after {experts.step(index)} steps at step size {optimizer.step_size}; lower "
                "it, or clip gradients (clip_norm)", FloatingPointError)
        _save(experts, expert, index, params, state)


def real_parts(task, student: Student, rows: Tensor, micro_batch: int | None = None, split: str = "train") -> Iterator[Part]:
    """The micro-batches of one step on real rows."""
    for part in rows.split(micro_batch or len(rows)):
        batch = task.batch(student.tokenizer, split, part.tolist())
        yield len(part) / len(rows), batch, batch["labels"].to(student.device), None


def _name(expert: int, index: int) -> str:
    return f"expert-{expert:03d}/{index:04d}.safetensors"


def _recording(settings: dict) -> str:
    """What all snapshots of a recording share, whatever is added to it later."""
    return digest_of({key: value for key, value in settings.items() if key not in EXTENDABLE})


def _identity_of(settings: dict, expert: int, index: int) -> dict:
    return {"expert": expert, "index": index, "settings": _recording(settings)}


def _flat(params: Params, state: State) -> dict[str, Tensor]:
    """All tensors of a snapshot by name: ``params.NAME``, and such as ``m.NAME`` for the optimiser's."""
    parts = {"params": params} | {key: value for key, value in state.items() if isinstance(value, dict)}
    return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


def _save(experts: Experts, expert: int, index: int, params: Params, state: State) -> None:
    write_file(experts.folder / _name(expert, index), kind=SNAPSHOT, tensors=_flat(params, state),
               identity=_identity_of(experts.settings, expert, index),
               data={key: value for key, value in state.items() if not isinstance(value, dict)})


def _unpacked(tensors: dict[str, Tensor], numbers: dict) -> tuple[Params, State]:
    parts: dict[str, dict] = {"params": {}}
    for name, tensor in tensors.items():
        part, _, name = name.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts.pop("params"), numbers | parts


def _need_room(folder: Path, student: Student, optimizer: Optimizer, snapshots: int) -> None:
    """Raise OSError unless the disk has room for so many snapshots."""
    params = {n: p for n, p in student.module.named_parameters() if n in student.trained_names}
    copies = 1 + sum(isinstance(value, dict) for value in optimizer.init({n: p[:0] for n, p in params.items()}).values())
    size = copies * snapshots * sum(p.numel() * p.element_size() for p in params.values())
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    require(size <= free, f"{snapshots} snapshots of {len(params)} tensors take {size / 1e9:.1f} GB, and {folder} has "
            f"{free / 1e9:.1f} GB free; record fewer experts or snapshots, or load the student with trainable='lora'", OSError)


def _identity(student: Student, task) -> dict:
    """What tells students, tokenizers and tasks apart."""
    if "identity" not in student.cache:
        own = dict(student.module.named_parameters())
        shapes = [[n, list(own[n].shape)] for n in student.trained_names]
        table = student.embedding.detach().float().cpu().contiguous().numpy()
        student.cache["identity"] = {
            "student": student.name,
            "trainable": student.trainable,
            "parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
            "embedding": hashlib.sha256(table.tobytes()).hexdigest(),
            "tokenizer": hashlib.sha256(json.dumps(sorted(student.tokenizer.get_vocab().items())).encode()).hexdigest(),
        }
    return student.cache["identity"] | {"task": task.fingerprint}
