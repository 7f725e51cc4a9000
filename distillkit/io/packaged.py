"""The models that come with the package: where they are, and whether they are what their manifests say."""

from __future__ import annotations

import json
from pathlib import Path

from distillkit.io.verify import sha256_of

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("tiny-opt", "tiny-llama")
MANIFEST = "manifest.json"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class AssetError(ValueError):
    """A model of the package that is missing, damaged or unknown, or a folder that must not be overwritten."""


def asset(name: str) -> Path:
    """The folder of the packaged model ``"tiny-opt"`` or ``"tiny-llama"``, every file that is loaded from it verified.

    Raises:
        AssetError: an unknown name, a missing file, or one that is not, byte for byte, what its manifest says.
    """
    if name not in NAMES:
        raise AssetError(f"unknown model {name!r}; the package has {', '.join(NAMES)}")
    folder, remedy = ASSETS / name, f"reinstall distillkit, or make it again: python -m distillkit.assets.pretrain {name}"
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())["sha256"]
        wrong = [file for file in FILES if sha256_of(folder / file) != digests[file]]
    except FileNotFoundError as error:
        raise AssetError(f"{error.filename} is missing; {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{folder / MANIFEST} is damaged ({error!r}); {remedy}") from error
    if wrong:
        raise AssetError(f"{folder / wrong[0]} does not have the SHA-256 of {MANIFEST}: damaged or edited; {remedy}")
    return folder
