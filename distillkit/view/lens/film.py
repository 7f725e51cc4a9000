"""A film of a distilled set: states of it in order, and what each learned position is near to in each of them.

:func:`record_film` runs a distillation and keeps chosen outer steps on disk, each as a set of its own; the last frame of an
interrupted run is where the checkpoint goes on.  :func:`filmed` measures any states in order: of a run, or several sets that
are to be compared (real, learned, projected, swapped).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller, StepRecord
from distillkit.core.student import Student
from distillkit.io.checkpoint import check_settings
from distillkit.io.checks import check_are, check_is, check_whole, require
from distillkit.io.storage import absolute
from distillkit.text.projection import project
from distillkit.view.measures import word_distance

ABSENT = -1  # the token of a position that a set does not have
SUFFIX = ".frame"
CHOICES = 8  # the most sets with names that are offered side by side


@dataclasses.dataclass(frozen=True, eq=False)
class Film:
    """States of a set; m examples and l positions are those of the largest one.

    Attributes:
        names: of the f frames.
        sets: the frames.
        learned: ``[m, l]`` bool, positions that are learned in some frame.
        tokens: ``[f, m, l]`` the token of each position, of a learned one the nearest word; -1 where there is none.
        distances: ``[f, m, l]`` distance of each learned position to its nearest word, in units of ``yardstick``; else NaN.
        moved: ``[f, m, l]`` its distance from where it was in the first frame, in the same unit.
        yardstick: the median distance between a word and the word nearest to it.
    """

    names: tuple[str, ...]
    sets: tuple[DistilledSet, ...]
    learned: np.ndarray
    tokens: np.ndarray
    distances: np.ndarray
    moved: np.ndarray
    yardstick: float

    @property
    def places(self) -> np.ndarray:
        """Example and position of each of the p learned positions, ``[p, 2]``, in reading order."""
        return np.argwhere(self.learned)

    @property
    def choices(self) -> bool:
        """Whether the frames are a few sets with names, to choose from; else they are the steps of a run."""
        return 1 < len(self.names) <= CHOICES and not all(name.startswith("step ") for name in self.names)

    def with_frame(self, name: str, state: DistilledSet, student: Student) -> Film:
        """This film with a further frame: a set of the same shape and learned positions."""
        pair = filmed({"first": self.sets[0], name: state}, student)
        grown = {part: np.concatenate([getattr(self, part), getattr(pair, part)[1:]])
                 for part in ("tokens", "distances", "moved")}
        return dataclasses.replace(self, names=(*self.names, name), sets=(*self.sets, state), **grown)

    def embeds(self, frame: int) -> Tensor:
        """Embeddings ``[p, d]`` of the learned positions in a frame, float32; NaN for those that it does not have."""
        state = self.sets[frame]
        return _padded(state, state.free, self.learned.shape)[torch.from_numpy(self.learned)]


def record_film(
    distiller: Distiller, folder: str | Path, n: int, *, frames: int = 41
) -> Generator[StepRecord, None, None]:
    """Run a distillation as ``distiller.run(n)`` does, and keep evenly spaced steps in ``folder``, the first and last included.

    Args:
        distiller: with or without a checkpoint; with one an interrupted film goes on where the run does.
        folder: of the frames; it may hold those of the same run.
        n: outer steps in all.
        frames: how many states to keep, 2 or more.

    Raises:
        ValueError: ``folder`` holds a film of a run with other settings; the first difference is named.
    """
    check_are(distiller=(distiller, Distiller))
    check_whole("n", n)
    check_whole("frames", frames, least=2)
    folder = absolute(folder)
    if states := frames_in(folder):
        stored = DistilledSet.load(states[0])
        check_settings(folder, stored.meta.get("recipe", {}).get("distiller", {}), distiller.checkpoint.settings)
    folder.mkdir(parents=True, exist_ok=True)
    steps = {round(step) for step in np.linspace(0, n, frames)}

    def keep() -> None:
        path = folder / f"{distiller.step:08d}{SUFFIX}"
        if distiller.step in steps and not path.exists():
            distiller.distilled.save(path)

    keep()
    for record in distiller.run(n):
        keep()
        yield record


def frames_in(folder: str | Path) -> list[Path]:
    """The files of the frames in a folder, in the order of their steps."""
    return sorted(absolute(folder).glob(f"*{SUFFIX}"))


def states_of(history) -> tuple[tuple[str, ...], tuple[DistilledSet, ...]]:
    """Names and sets of a history: a set, a sequence of sets, sets by name, a folder of frames, or a Distiller.

    Raises:
        ValueError: there is no set in it.
        TypeError: something else.
    """
    if isinstance(history, str | Path):
        folder = absolute(history)
        history = [DistilledSet.load(path) for path in frames_in(folder)]
        require(history, f"{folder} holds no film; make one with record_film(distiller, folder, n)")
    if isinstance(history, Distiller):
        history = [history.distilled]
    if isinstance(history, DistilledSet):
        history = [history]
    require(isinstance(history, Mapping | Sequence),
            f"history must be a set, several, or the folder of a film, not {history!r}", TypeError)
    sets = tuple(history.values()) if isinstance(history, Mapping) else tuple(history)
    require(sets, "history holds no set; give a set, several sets, or the folder of a film")
    for place, state in enumerate(sets):
        check_is(f"history[{place}]", state, DistilledSet)
    if isinstance(history, Mapping):
        return tuple(map(str, history)), sets
    steps = [state.meta.get("recipe", {}).get("outer_steps") for state in sets]
    return tuple(f"set {place + 1}" if step is None else f"step {step}" for place, step in enumerate(steps)), sets


def filmed(history, student: Student) -> Film:
    """Measure a history; arguments and errors as :func:`states_of`, and ValueError for sets of another embedding table."""
    check_is("student", student, Student)
    names, sets = states_of(history)
    for state in sets:
        state.check_table(student)
    shape = max(len(state) for state in sets), max(state.mask.shape[1] for state in sets)
    learned = torch.stack([_grown(state.free, shape, False) for state in sets])
    embeds = torch.stack([_padded(state, state.mask, shape) for state in sets])
    tokens = torch.stack([_tokens(state, student, shape) for state in sets])
    unit = word_distance(student)
    table = student.embedding.cpu().float()
    words = table[tokens.clamp_min(0)]
    nothing = ~learned
    distances = ((embeds - words).norm(dim=-1) / unit).masked_fill(nothing, torch.nan)
    moved = ((embeds - embeds[0]).norm(dim=-1) / unit).masked_fill(nothing, torch.nan)
    return Film(names, sets, learned.any(0).numpy(), tokens.numpy(), distances.numpy(), moved.numpy(), unit)


def _grown(values: Tensor, shape: tuple[int, int], filling) -> Tensor:
    """``values [m, l, …]`` in a larger shape ``[m', l', …]``."""
    grown = values.new_full((*shape, *values.shape[2:]), filling)
    grown[: values.shape[0], : values.shape[1]] = values
    return grown


def _padded(state: DistilledSet, where: Tensor, shape: tuple[int, int]) -> Tensor:
    """The embeddings of a set ``[m, l, d]`` at some positions ``[m, l]``, NaN at the others."""
    return _grown(state.embeds.float().masked_fill(~where[..., None], torch.nan), shape, torch.nan)


def _tokens(state: DistilledSet, student: Student, shape: tuple[int, int]) -> Tensor:
    tokens = project(state, student).tokens if state.tokens is None else state.tokens
    assert tokens is not None
    return _grown(tokens.masked_fill(~state.mask, ABSENT), shape, ABSENT)
