"""Settings from a YAML file or from flags: frozen dataclasses put together from parts, so that each setting is declared once.

A part (:class:`Data`, :class:`Size`, :class:`Inner`, :class:`Outer`, ...) holds the settings of one concern.  A kind of
experiment, and the command line's ``Work``, is a subclass of the parts that it needs.  A field says its type, its limits and
its help, which flags show too.  Values are checked (:mod:`distillkit.experiments.values`): whoever builds settings with a bad
value gets a ValueError that names the setting, the value and what it must be.

An experiment is described by one such object and takes nothing else, so the file repeats the run.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import reprlib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from distillkit.experiments.values import Misfit, fitted, within
from distillkit.io.checks import check_choice
from distillkit.io.escaping import one_line

LARGEST = 1_000_000  # bytes of a file of settings
REQUIRED = dataclasses.MISSING
Whole = typing.Annotated[int, ("ge", 1)]
Number = int | float  # 2 stays 2: the hash of settings tells it from 2.0
Positive = typing.Annotated[float, ("gt", 0)]
Seeds = typing.Annotated[tuple[int, ...], ("seeds", True)]


def option(default, description: str, **limits) -> Any:
    """A setting with its help and the limits of its value, as :func:`~distillkit.experiments.values.within` takes them."""
    return dataclasses.field(default=default, metadata={"description": description, "limits": limits})


def whole(default, description: str) -> Any:
    """A whole number of at least 1."""
    return option(default, description, ge=1)


def positive(default, description: str) -> Any:
    """A number above 0."""
    return option(default, description, gt=0)


def filled(default, description: str) -> Any:
    """A list of one or more values."""
    return option(default, description, least=1)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(**defaults) -> Callable[[type], Any]:
    """Decorator: makes a class a frozen dataclass of keyword arguments; ``defaults`` replace those of inherited settings."""

    def decorate(cls: type) -> type:
        types = typing.get_type_hints(cls, include_extras=True)
        inherited = {field.name: field for base in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(base)
                     for field in dataclasses.fields(base)}
        for name, default in defaults.items():
            cls.__annotations__[name] = types[name]
            setattr(cls, name, dataclasses.field(default=default, metadata=inherited[name].metadata))
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.__init__ = _checking(cls.__init__, dataclasses.fields(cls), types)
        return cls

    return decorate


def _checking(build: Callable[..., None], fields: tuple, types: Mapping[str, Any]) -> Callable[..., None]:
    """``build`` of checked values; the errors say in a line which setting must be what, and what it is instead."""
    known = {field.name: field for field in fields}

    @functools.wraps(build)
    def check_and_build(self, **values):
        errors = [f"the setting {name!r} is missing" for name, field in known.items()
                  if field.default is REQUIRED and name not in values]
        for name, value in values.items():
            try:
                if name not in known:
                    raise Misfit("not be given: there is no such setting", value)
                values[name] = fitted(value, types[name])
                within(values[name], known[name].metadata["limits"])
            except Misfit as misfit:
                errors.append(f"{name} must {misfit}")
        if errors:
            raise ValueError("; ".join(errors))
        build(self, **values)

    return check_and_build


@settings()
class Settings:
    """Base of all settings, which have a ``name``."""

    name: str = option(REQUIRED, "run name: letters, digits, '_' and '-'; outputs go to WORK/NAME",
                       pattern=r"^[\w-]+$", most=200)  # file systems take 255 bytes; files beside it need some

    @classmethod
    def from_yaml(cls, path: str | Path | None, **flags):
        """Read settings.

        Args:
            path: the file; None: there is none.
            flags: settings from the command line, which take the place of the file's.

        Raises:
            ValueError: an unknown key or a bad value.  The message names the flag, or the file and the key.
        """
        values = {**({} if path is None else read(path)), **flags}
        check_keys(path, values, cls.__dataclass_fields__)
        try:
            return cls(**values)
        except ValueError as error:
            message = renamed(error, {name: flag(name) for name in flags})
            raise ValueError(message if path is None or message.startswith("--") else f"{path}: {message}") from error


@settings()
class Experiment(Settings):
    """What every kind of experiment has: its rows, which by default are all that there are, and the name of its kind."""

    rows: tuple[str, ...] = option(REQUIRED, "rows of the table, as method/recipe")
    kind: str = option(REQUIRED, "kind of experiment that these settings are for")

    kinds: ClassVar[tuple[str, ...]] = ()  # where a class is of several

    def __post_init__(self):
        check_choice("kind", self.kind, self.kinds or (self.__dataclass_fields__["kind"].default,))
        known = self.__dataclass_fields__["rows"].default
        for row in self.rows if known is not REQUIRED else ():
            check_choice("a row", row, known)

    def seeds_of(self, row: str) -> tuple[int, ...]:
        """The seeds of the sets of a row: all, unless a kind of experiment says otherwise."""
        return self.seeds


@settings()
class Grid(Experiment):
    """Base of the settings of a grid."""

    base: Mapping = option(REQUIRED, "settings that the cells share, as their kind of experiment takes them")

    cell_job: ClassVar[type]  # settings of a cell
    of_grid: ClassVar[tuple[str, ...]] = ("rows", "kind")  # settings of a cell that the grid gives

    def __post_init__(self):
        super().__post_init__()
        self.check("base", self.base)
        self.cells()  # every one of them is checked before the first is run

    def check(self, where: str, values) -> None:
        """Raise ValueError unless ``values`` holds settings that a cell may have."""
        check_keys(where, values, {*names(self.cell_job)} - {*self.of_grid})

    def variations(self) -> dict[str, Mapping]:
        """What each cell has besides the base, by the cell's name, in the order they are run."""
        raise NotImplementedError

    def cells(self) -> dict[str, Any]:
        """The settings of every cell by its name."""
        cells = {}
        for key, values in self.variations().items():
            name = f"{self.name}-{re.sub(r'[^A-Za-z0-9_]+', '-', key)}"
            try:
                cells[key] = self.cell_job(name=name, rows=self.rows, **{**self.base, **values})
            except (TypeError, ValueError) as error:
                raise ValueError(f"cell {key}: {error}") from error
        return cells


@settings()
class Data(Settings):
    """The corpus and the student, as ``load_task`` and ``load_student`` take them."""

    corpus: str = option(REQUIRED, "docstrings, docstrings_qa, ag_news, ..., a folder, or a hub id")
    student: str = option(REQUIRED, "offline:minilm, ..., a folder, or a hub id")
    trainable: str | None = option(None, "what trains: full, head, lora, or top:3 for the head and the top three layers",
                                   pattern=r"^(full|head|lora|top:[1-9]\d*)$")
    text_column: str | None = option(None, "column of the text, if its name is not a usual one")
    label_column: str | None = option(None, "column of the label, if its name is not a usual one")
    limit: Whole | dict[Literal["train", "validation", "test"], Whole] | None = option(
        None, "most rows of each split; a file may also say {test: 900}")
    max_length: int = whole(32, "tokens that a real text is cut to")


@settings()
class Size(Settings):
    """The size of every set."""

    per_class: int = whole(1, "synthetic examples per class")
    fraction: float | None = positive(None, "share of the training rows, instead of per_class; instruction tasks need it")
    length: int | None = whole(None, "tokens of a synthetic example (default: max_length)")

    def size(self, seed: int) -> dict:
        """Arguments that say how large a set is, and its seed."""
        size = {"per_class": self.per_class} if self.fraction is None else {"fraction": self.fraction}
        return size | {"length": self.length, "seed": seed}


@settings()
class Inner(Settings):
    """The inner loop: how a student trains on a set, and how its meta-gradient is formed."""

    unroll_steps: int = whole(3, "inner steps T")
    step_size: float | None = positive(None, "inner step size; the learned step sizes start from it (default: 0.2; with more "
                                             "than six inner steps 1.2 in all)")
    inner_batch: int | None = whole(None, "synthetic examples per inner step (default: all)")
    metagrad: Literal["replay", "forward_difference", "recommended"] | None = option(
        None, "replay (exact), forward_difference, or recommended: what suits the student (default)")

    def first_step_size(self, steps: int | None = None) -> float:
        """The size that the learned step sizes of so many inner ``steps`` start from, by default of ``unroll_steps``."""
        return self.step_size or min(0.2, 1.2 / (steps or self.unroll_steps))


@settings()
class Outer(Settings):
    """The outer loop: how a set is learned."""

    outer_steps: int = whole(100, "updates of the synthetic examples")
    outer_batch: int = whole(48, "real examples per outer loss")
    start: Literal["random", "k_center", "herding", "k_means", "keywords"] = option(
        "random", "where learning starts from: random real rows, a selection of them, or a line of keywords per example")
    lr: float = positive(0.08, "outer learning rate")
    label_lr: float | None = positive(None, "outer learning rate of labels (default: a multiple of lr)")
    step_size_lr: float | None = positive(None, "outer learning rate of step sizes (default: a multiple of lr)")
    clip: float | None = positive(None, "a meta-gradient above so many times the usual norm is scaled down (default: none is)")

    def rates(self) -> dict:
        """The outer learning rates, as :class:`~distillkit.core.distiller.Distiller` takes them."""
        return {"lr": self.lr, "label_lr": self.label_lr, "step_size_lr": self.step_size_lr}


@settings()
class Expert(Settings):
    """The experts whose paths are matched, and how much of a path."""

    expert_count: int = whole(1, "experts")
    expert_epochs: int = whole(1, "epochs that an expert trains")
    expert_step_size: float = positive(1e-3, "step size of an expert's AdamW")
    expert_batch: int = whole(32, "rows per step of an expert")
    snapshots_per_epoch: int = whole(1, "snapshots of an expert's path per epoch")
    match_epochs: Number = option(1, "epochs of an expert's path that training on the set has to match", gt=0)


@settings()
class Search(Settings):
    """The search for words by swaps; see :class:`~distillkit.text.swaps.SwapSearch`."""

    judge_steps: int = whole(400, "steps of the head that judges swaps")
    swap_steps: int = whole(100, "steps of the search, the same number from every start")
    candidates: int = whole(64, "swaps that are judged per step")
    least: int = whole(2, "least number of times that a token occurs in the training split before it may be put into a text")
    examples: int | None = whole(None, "examples that a step of the search for swaps looks at (default: all)")


@settings()
class Neighbor(Settings):
    """The neighbour term."""

    neighbor_weight: float = option(0.0, "weight of the neighbour term at the end; it grows linearly from 0",
                                    ge=0, finite=True)


@settings()
class Target(Settings):
    """The model that a text is read by."""

    target: str = option("offline:distil-minilm", "model that reads the text")


@settings()
class SetSeed(Settings):
    """One seed for every random draw."""

    seed: int = option(0, "seed of every random draw")


@settings()
class SetSeeds(Settings):
    """Several sets per method."""

    seeds: Seeds = option((0, 1, 2), "each seed makes one set per method")


@settings()
class Recipes(Settings):
    """How the recipes ``standard`` and ``tuned`` train, if not by their defaults."""

    standard_steps: int | None = whole(None, "least number of steps of the recipe standard")
    tuned_grid: dict[typing.Literal["step_size", "steps"], tuple[int | float, ...]] | None = option(
        None, "what the recipe tuned tries: {step_size: [...], steps: [...]}", least=2)


@settings()
class Scoring(Recipes):
    """How often a student is trained on a set."""

    eval_seeds: Seeds = option((0, 1, 2, 3, 4), "fresh initialisations that each set is scored on")


def names(*parts: type[Settings]) -> tuple[str, ...]:
    """The settings that the parts declare, without the name."""
    return tuple(dict.fromkeys(field.name for part in parts for field in dataclasses.fields(part) if field.name != "name"))


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_keys(where, values, known) -> None:
    """Raise ValueError unless ``values`` is a mapping of settings, all of which are ``known``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold settings as 'key: value' lines, not {reprlib.repr(values)}")
    if unknown := sorted(map(str, values.keys() - known)):
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")


def kind_of(path: str | Path) -> str:
    """What kind of experiment a file of settings is for: its ``kind``, by default classification."""
    return read(path).get("kind", "classification")


def read(path: str | Path) -> dict:
    """The settings in a file, as they stand there."""
    if Path(path).stat().st_size > LARGEST:
        raise ValueError(f"{path} is no file of settings: it has more than {LARGEST:,} bytes")
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a value that Python cannot hold, as 2024-13-45
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from error
    check_keys(path, values, values)
    return values


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for more values than fit into memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases, such as *name, are not read; write the value out")
        return super().compose_node(parent, index)


# YAML 1.1 reads 1e-3, a number without a dot, as text.
_Plain.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), [*"-+0123456789"])


def renamed(error: Exception, names: Mapping[str, str]) -> str:
    """The message of ``error``, in which the argument it begins with, or that differs, is called as ``names`` says."""
    return re.sub(r"^\w+|(?<=settings: )[\w.]+", lambda match: names.get(match[0], match[0]), str(error))
