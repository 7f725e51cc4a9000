"""Settings from a YAML file or from flags: frozen dataclasses put together from parts, so that each setting is declared once.

A part (:class:`Data`, :class:`Size`, :class:`Inner`, :class:`Outer`, ...) holds the settings of one concern.  A kind of
experiment, and the command line's ``Work``, is a subclass of the parts that it needs.  A field carries its help, which flags
show too, and its check: whoever builds settings with a bad value gets a ValueError that names the setting.

An experiment is described by one such object and takes nothing else, so the file repeats the run.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from distillkit.io.checks import check_choice, check_number, check_seeds, check_whole, limits_by_split
from distillkit.io.escaping import one_line

LARGEST = 1_000_000  # bytes of a file of settings
LONGEST_NAME = 200  # bytes: file systems take 255, of which the hidden names beside it need some
LISTED = {int: ("whole numbers", (int,)), float: ("numbers", (int, float)), str: ("texts", (str,))}
METAGRADS = ("replay", "forward_difference", "recommended")
REQUIRED = dataclasses.MISSING


def option(default, told: str, check: Callable[[str, Any], None] | None = None) -> Any:
    """A field with its help and a function that raises ValueError for a bad value, given the field's name and the value."""
    return dataclasses.field(default=default, metadata={"help": told, "check": check})


def whole(default, told: str) -> Any:
    """A whole number of at least 1."""
    return option(default, told, check_whole)


def positive(default, told: str) -> Any:
    """A number above 0."""
    return option(default, told, _check_positive)


def choice(default, told: str, allowed) -> Any:
    """One of several texts."""
    return option(default, told, partial(_check_one_of, allowed))


def whole_numbers(default, told: str) -> Any:
    """A list of one or more whole numbers."""
    return option(default, told, _check_whole_numbers)


def filled(default, told: str) -> Any:
    """A list of one or more values."""
    return option(default, told, _check_filled)


def _check_positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a number above 0, not {value!r} (YAML reads 1e-3 as text; write 0.001)")


def _check_one_of(allowed, name: str, value) -> None:
    check_choice(name, value, allowed)


def _check_whole_numbers(name: str, value) -> None:
    try:
        check_seeds(name, value)
    except ValueError as error:
        raise ValueError(f"{name} must be a list of whole numbers, each once, not {value!r}") from error


def _check_filled(name: str, value) -> None:
    if not value:
        raise ValueError(f"{name} must not be empty")


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(**defaults) -> Callable[[type], Any]:
    """Decorator: makes a class a frozen dataclass of keyword arguments; ``defaults`` replace those of inherited settings."""

    def decorate(cls: type) -> type:
        inherited = {field.name: field for base in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(base)
                     for field in dataclasses.fields(base)}
        for name, default in defaults.items():
            cls.__annotations__[name] = inherited[name].type
            setattr(cls, name, dataclasses.field(default=default, metadata=inherited[name].metadata))
        return dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    return decorate


@settings()
class Settings:
    """Base of all settings, which have a ``name``."""

    name: str = option(REQUIRED, "run name; outputs go to WORK/NAME")

    flags: typing.ClassVar[bool] = False  # whether each setting is a flag of the command line too

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if value is None and types.NoneType in kinds:
                continue
            _check_type(field.name, value, kinds)
            if check := field.metadata.get("check"):
                check(field.name, value)
        if not self.name.replace("_", "").replace("-", "").isalnum() or len(self.name.encode()) > LONGEST_NAME:
            raise ValueError(f"name must be letters, digits, '_' and '-' ({LONGEST_NAME} bytes at most), as it names a file, "
                             f"not {reprlib.repr(self.name)}")

    @classmethod
    def from_yaml(cls, path: str | Path | None, **given):
        """Read settings.

        Args:
            path: the file; None: there is none.
            given: settings that take the place of the file's.

        Raises:
            ValueError: a key that is no setting, or a value that cannot be: the message names the file and the key, or,
                of a setting in ``given``, its flag.
        """
        values = {**({} if path is None else read(path)), **given}
        needed = {f.name: f.default is REQUIRED for f in dataclasses.fields(cls)}
        for key in values:
            if key not in needed:
                raise ValueError(f"{path}: unknown setting {key!r}; there are {', '.join(sorted(needed))}")
        if missing := [key for key, is_needed in needed.items() if is_needed and key not in values]:
            raise ValueError(f"{path}: the setting {missing[0]!r} is missing")
        try:
            return cls(**tupled(values))
        except ValueError as error:
            message = renamed(error, cls.origins(path, given))
            placed = path is None or message.startswith(("--", str(path)))
            raise ValueError(message if placed else f"{path}: {message}") from error

    @classmethod
    def origins(cls, path: str | Path | None, given: Mapping) -> dict[str, str]:
        """What the user calls each setting: by its key in the file at ``path``, or by its flag if it has one."""
        own = set() if path is None else read(path).keys() - given.keys()
        flag = {name: f"--{name.replace('_', '-')}" if cls.flags else name for name in cls.__dataclass_fields__}
        return {name: f"{path}: {name}" if name in own else flag[name] for name in flag}


def _check_type(name: str, value, kinds: tuple) -> None:
    """Raise ValueError unless a setting that is text, a list or a table is one; numbers have checks of their own."""
    origins, told = {typing.get_origin(kind) or kind for kind in kinds}, reprlib.repr(value)
    if str in kinds and not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {told}")
    if origins & {Mapping, dict} and int not in origins and not isinstance(value, Mapping):
        raise ValueError(f"{name} must hold settings as 'key: value' lines, not {told}")
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            word, items = LISTED[typing.get_args(kind)[0]]
            if not isinstance(value, list | tuple) or not all(type(item) in items for item in value):
                raise ValueError(f"{name} must be a list of {word}, not {told}")


def _check_limit(name: str, value) -> None:
    limits_by_split(value, ("train", "validation", "test"))


@settings()
class Experiment(Settings):
    """What every kind of experiment has: its rows, which by default are all that there are, and the name of its kind."""

    rows: tuple[str, ...] = option(REQUIRED, "rows of the table, as method/recipe")
    kind: str = option(REQUIRED, "kind of experiment that these settings are for")

    kinds: typing.ClassVar[tuple[str, ...]] = ()  # where a class is of several

    def __post_init__(self):
        super().__post_init__()
        check_choice("kind", self.kind, self.kinds or (self.__dataclass_fields__["kind"].default,))
        known = self.__dataclass_fields__["rows"].default
        for row in self.rows if known is not REQUIRED else ():
            check_choice("a row", row, known)


@settings()
class Data(Settings):
    """The corpus and the student, as ``load_task`` and ``load_student`` take them."""

    corpus: str = option(REQUIRED, "docstrings, docstrings_qa, ag_news, ..., a folder, or a hub id")
    student: str = option(REQUIRED, "offline:minilm, ..., a folder, or a hub id")
    trainable: str | None = choice(None, "what trains: full, head or lora", ("full", "head", "lora"))
    text_column: str | None = option(None, "column of the text, where it has another name than usual")
    label_column: str | None = option(None, "column of the label, where it has another name than usual")
    limit: int | dict[str, int] | None = option(None, "rows of each split at most; in a file also {test: 900}", _check_limit)
    max_length: int = whole(32, "tokens that a real text is cut to")


@settings()
class Size(Settings):
    """The size of every set."""

    per_class: int = whole(1, "synthetic examples of each class")
    fraction: float | None = positive(None, "or: their share of the training rows; an instruction task takes only this")
    length: int | None = whole(None, "tokens of a synthetic example (default: max_length)")

    def size(self, seed: int) -> dict:
        """Arguments that say how large a set is, and its seed."""
        size = {"per_class": self.per_class} if self.fraction is None else {"fraction": self.fraction}
        return size | {"length": self.length, "seed": seed}


@settings()
class Inner(Settings):
    """The inner loop: how a student trains on a set, and how its meta-gradient is formed."""

    unroll_steps: int = whole(3, "inner steps T")
    step_size: float = positive(0.2, "inner step size; the learned step sizes start from it")
    inner_batch: int | None = whole(None, "synthetic examples of an inner step (default: all)")
    metagrad: str | None = choice(None, "replay (exact), forward_difference, or recommended: what suits the student (default)",
                                  METAGRADS)


@settings()
class Outer(Settings):
    """The outer loop: how a set is learned."""

    outer_steps: int = whole(100, "updates of the synthetic examples")
    outer_batch: int = whole(48, "real examples in an outer loss")
    lr: float = positive(0.08, "outer learning rate")
    label_lr: float | None = positive(None, "outer learning rate of labels (default: a multiple of lr)")
    step_size_lr: float | None = positive(None, "outer learning rate of step sizes (default: a multiple of lr)")

    def rates(self) -> dict:
        """The outer learning rates, as :class:`~distillkit.core.distiller.Distiller` takes them."""
        return {"lr": self.lr, "label_lr": self.label_lr, "step_size_lr": self.step_size_lr}


@settings()
class Expert(Settings):
    """The experts whose paths are matched, and how much of a path."""

    expert_count: int = whole(1, "experts")
    expert_epochs: int = whole(1, "epochs that an expert trains")
    expert_step_size: float = positive(1e-3, "step size of an expert's AdamW")
    expert_batch: int = whole(32, "rows of an expert's step")
    snapshots_per_epoch: int = whole(1, "snapshots of an expert's path per epoch")
    match_epochs: float = positive(1, "epochs of an expert's path that training on the set has to match")


@settings()
class Search(Settings):
    """The search for words by swaps; see :class:`~distillkit.text.swaps.SwapSearch`."""

    judge_steps: int = whole(400, "steps of the head that judges swaps")
    swap_steps: int = whole(100, "steps of the search, from every start alike")
    candidates: int = whole(64, "swaps that are judged in a step")
    least: int = whole(2, "how often a token must occur in the training split to be put into a text")


@settings()
class Neighbor(Settings):
    """The neighbour term."""

    neighbor_weight: float = option(0.0, "weight of the neighbour term at the end; it grows linearly from 0", check_number)


@settings()
class Target(Settings):
    """The model that a text is read by."""

    target: str = option("offline:distil-minilm", "the other model")


@settings()
class SetSeed(Settings):
    """One seed for all that is drawn."""

    seed: int = option(0, "seed of everything that is drawn")


@settings()
class SetSeeds(Settings):
    """Several sets of everything."""

    seeds: tuple[int, ...] = whole_numbers((0, 1, 2), "one set of everything for each seed")


@settings()
class Scoring(Settings):
    """How often a student is trained on a set."""

    eval_seeds: tuple[int, ...] = whole_numbers((0, 1, 2, 3, 4), "fresh initialisations that each set is scored on")


def names(*parts: type[Settings]) -> tuple[str, ...]:
    """The settings that the parts declare, without the name."""
    return tuple(dict.fromkeys(f.name for part in parts for f in dataclasses.fields(part) if f.name != "name"))


def check_keys(where: str, values, known) -> None:
    """Raise ValueError unless ``values`` is a mapping of settings, all of which are ``known``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold settings as 'key: value' lines, not {values!r}")
    if unknown := sorted(map(str, values.keys() - known)):
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; there are {', '.join(sorted(known))}")


def tupled(settings: Mapping) -> dict[str, Any]:
    """Settings as a frozen dataclass takes them: lists, which is what YAML and JSON have, become tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def kind_of(path: str | Path) -> str:
    """What kind of experiment a file of settings is for: its ``kind``, by default classification."""
    return read(path).get("kind", "classification")


def read(path: str | Path) -> dict:
    """The settings in a file, as they stand there."""
    try:
        if Path(path).stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Plain)
    except RecursionError as error:
        raise ValueError(f"{path} is no file of settings: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # a value that YAML knows and Python cannot hold, such as a date
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold settings as 'key: value' lines")
    return found


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for more values than fit into memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read; write the value out")
        return super().compose_node(parent, index)


def renamed(error: Exception, names: Mapping[str, str]) -> str:
    """The message of ``error`` with the arguments that it names called as ``names`` says.

    An argument is known by its place, at the beginning, before ``=`` or ``must`` or as the setting that differs, or by a
    name with an underscore.
    """
    words = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    compound = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if "_" in name)
    places = [rf"^({words})(?![\w./-])", rf"({words})(?==| must\b)", rf"(?<=settings: )({words})(?= is )"]
    known = rf"(?<![\w./'\"-])(?:{'|'.join(places)}|({compound or words})(?![\w./'\"-]))"
    # The file that a key stands in is named once, in front.
    return re.sub(known, lambda match: names[match[0]].rpartition(": ")[2] if match.start() else names[match[0]], str(error))
