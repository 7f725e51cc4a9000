"""Settings from a YAML file: frozen dataclasses that say which key is none of theirs, and which one is missing.

Whatever runs for longer than a cell of a notebook is described by one such object, and takes nothing else: so that the
file is the run, and the same file makes it again.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from distillkit.io.escaping import one_line

LARGEST = 1_000_000  # bytes of a file of settings
LONGEST_NAME = 200  # bytes: file systems take 255, of which the hidden names beside it need some
LISTED = {int: ("whole numbers", (int,)), float: ("numbers", (int, float)), str: ("texts", (str,))}


class Settings:
    """Base of a frozen dataclass of settings that comes from a YAML file; has a ``name``."""

    flags: ClassVar[bool] = False  # whether each setting is a flag of the command line too

    if TYPE_CHECKING:  # what subclasses have, those that a SeededRun takes all of it
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
        name: str
        rows: tuple[str, ...]
        seeds: tuple[int, ...]

    def check_name(self) -> None:
        """Raise ValueError unless text, lists and tables of settings are such, and ``name`` can name a file."""
        self._check_types()
        if not self.name.replace("_", "").replace("-", "").isalnum() or len(self.name.encode()) > LONGEST_NAME:
            raise ValueError(f"name must be letters, digits, '_' and '-' ({LONGEST_NAME} bytes at most), as it names a file, "
                             f"not {reprlib.repr(self.name)}")

    def _check_types(self) -> None:
        """Raise ValueError unless each setting that is text, a list or a table is one; numbers have checks of their own."""
        for key, hint in typing.get_type_hints(type(self)).items():
            if key not in self.__dataclass_fields__:
                continue
            value, kinds = getattr(self, key), typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            origins = {typing.get_origin(kind) or kind for kind in kinds}
            if value is None and types.NoneType in origins:
                continue
            told = reprlib.repr(value)
            if str in kinds and not isinstance(value, str):
                raise ValueError(f"{key} must be text, not {told}")
            if origins & {Mapping, dict} and int not in kinds and not isinstance(value, Mapping):
                raise ValueError(f"{key} must hold settings as 'key: value' lines, not {told}")
            for kind in kinds:
                if typing.get_origin(kind) is tuple:
                    word, items = LISTED[typing.get_args(kind)[0]]
                    if not isinstance(value, list | tuple) or not all(type(item) in items for item in value):
                        raise ValueError(f"{key} must be a list of {word}, not {told}")

    def check_positive(self, *keys: str) -> None:
        """Raise ValueError unless each of these settings is a number above 0, or None where that is its default."""
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        for key in keys:
            value = getattr(self, key)
            if value is None and key in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{key} must be a number above 0, not {value!r} (YAML reads 1e-3 as text; write 0.001)")

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
        found = {**({} if path is None else read(path)), **given}
        known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        for key in found:
            if key not in known:
                raise ValueError(f"{path}: unknown setting {key!r}; there are {', '.join(sorted(known))}")
        if missing := [key for key, needed in known.items() if needed and key not in found]:
            raise ValueError(f"{path}: the setting {missing[0]!r} is missing")
        try:
            return cls(**tupled(found))
        except ValueError as error:
            message = renamed(error, cls.origins(path, given))
            known = path is None or message.startswith(("--", str(path)))
            raise ValueError(message if known else f"{path}: {message}") from error

    @classmethod
    def origins(cls, path: str | Path | None, given: Mapping) -> dict[str, str]:
        """What the user calls each setting: by its key in the file at ``path``, or by its flag if it has one."""
        own = set() if path is None else read(path).keys() - given.keys()
        flag = {name: f"--{name.replace('_', '-')}" if cls.flags else name for name in cls.__dataclass_fields__}
        return {name: f"{path}: {name}" if name in own else flag[name] for name in flag}


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
