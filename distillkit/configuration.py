"""Settings from a YAML file: frozen dataclasses that say which key is none of theirs, and which one is missing.

Whatever runs for longer than a cell of a notebook is described by one such object, and takes nothing else: so that the
file is the run, and the same file makes it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml


class Settings:
    """Base of a frozen dataclass of settings that comes from a YAML file; has a ``name``."""

    if TYPE_CHECKING:  # what subclasses have, those that a SeededRun takes all of it
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
        name: str
        rows: tuple[str, ...]
        seeds: tuple[int, ...]

    def check_name(self) -> None:
        """Raise ValueError unless ``name`` can name a file."""
        if not isinstance(self.name, str) or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name must be letters, digits, '_' and '-', as it names a file, not {self.name!r}")

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
        """Read settings; a key that is none of them is an error that names it.

        Args:
            path: the file; None: there is none.
            given: settings that take the place of the file's.
        """
        found = {**({} if path is None else read(path)), **given}
        known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        for key in found:
            if key not in known:
                raise ValueError(f"{path}: unknown setting {key!r}; there are {', '.join(sorted(known))}")
        if missing := [key for key, needed in known.items() if needed and key not in found]:
            raise ValueError(f"{path}: the setting {missing[0]!r} is missing")
        return cls(**tupled(found))


def tupled(settings: Mapping) -> dict[str, Any]:
    """Settings as a frozen dataclass takes them: lists, which is what YAML and JSON have, become tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def kind_of(path: str | Path) -> str:
    """What kind of experiment a file of settings is for: its ``kind``, by default classification."""
    return read(path).get("kind", "classification")


def read(path: str | Path) -> dict:
    """The settings in a file, as they stand there."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold settings as 'key: value' lines")
    return found
