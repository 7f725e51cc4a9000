"""Model folders of other people: which files are read, and which never are.

A folder in the hub's layout may hold pickles, Python code, adapters that name further models, links that lead out of it, and
a ``config.json`` that points to other files or switches parts of transformers on.  transformers follows much of that.  So it is
never shown the folder itself: :func:`readable` links the few files that a model needs into a temporary folder, with the JSON
among them checked and rewritten.  A file that is not on the list is not there.

Numbers are checked before anything of their size is built, so that a foreign configuration costs neither memory nor minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
import re
import reprlib
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import safetensors_conversion

from distillkit.io.checks import require

CONFIG, TOKENIZER_CONFIG, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
WEIGHTS, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model")
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE)
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
NAMES = (CONFIG, TOKENIZER_CONFIG, ADAPTER, WEIGHTS, INDEX, SHARDS, *TOKENIZER_FILES)  # all that is downloaded
NEVER_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors", ".py", ".jinja")

AGAIN = "save or download the model again"
LARGEST = 2**26  # bytes of a file other than weights; the largest tokenizers have half of that
LEVELS = 32  # of nested JSON; real configurations have 4
LAYERS = 1024
SPARE = 2**24  # numbers that a model may have beyond its weight files: a fresh head, tables of positions, masks

# Keys that make transformers run code, read other files, choose kernels or return outputs in another form than a student needs;
# and the class names of another task, whose number is the student's.
DROPPED = frozenset({
    "auto_map", "custom_pipelines", "configuration_files", "transformers_weights", "fusion_config", "kernel_config",
    "distributed_config", "name_or_path", "_name_or_path", "init_inputs", "return_dict", "torchscript", "output_attentions",
    "output_hidden_states", "num_labels", "id2label", "label2id",
})
DROPPED_ENDINGS = ("_implementation", "_implementation_internal", "_file", "_files")


@contextlib.contextmanager
def refusing(source: str, problem: str, kinds: type[Exception] = Exception) -> Iterator[None]:
    """Turns an error of somebody else's code about somebody else's files into a ValueError that names the ``problem``."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{source!r}: {problem} ({in_brief(error)}); {AGAIN}") from error


def in_brief(error: Exception) -> str:
    """The kind of an error and the beginning of its message, without control characters from other people's files."""
    line = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {''.join(c if c.isprintable() else '?' for c in line)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar, and without warnings of newly initialised weights, which ``init`` draws anyway."""
    logs = transformers.utils.logging
    verbosity, bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bar:
            logs.enable_progress_bar()


# --- the files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable(source: str, *, installed: bool = False) -> Iterator[Path]:
    """A temporary folder with the files that transformers may see of a model.

    Args:
        source: a local folder in the hub's layout, or a hub id.
        installed: the folder belongs to an installed package, whose files an installer may have made links.

    Raises:
        FileNotFoundError: ``source`` is neither a local folder nor on the hub.
        ValueError: it has no weights in safetensors or no tokenizer, is quantised or an adapter, or one of its files is
            damaged, too large, or a link that leaves the folder.
    """
    folder = _Folder(Path(source), installed) if os.path.exists(source) else _Folder(snapshot(source), True)
    with tempfile.TemporaryDirectory(prefix="distillkit-model-") as temporary:
        with refusing(source, "it cannot be read", OSError):
            _link_config(folder, Path(temporary))
            _link_weights(folder, Path(temporary))
            _link_tokenizer(folder, Path(temporary))
        yield Path(temporary)


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder to read from; if ``trusted``, its files may be links to anywhere."""

    path: Path
    trusted: bool

    def file(self, name: str) -> Path | None:
        """The file ``name`` with links resolved; None if there is none.

        Links may lead to another place in the folder, and from a snapshot in the hub's cache to that cache's own files.
        """
        path = self.path / name
        if not path.is_file():
            return None
        real, home = path.resolve(), self.path.resolve()
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        require(self.trusted or any(real.is_relative_to(allowed) for allowed in homes),
                f"{path} is a link that leads out of its folder; put the file itself there")
        size = real.stat().st_size
        require(name.endswith(".safetensors") or size <= LARGEST,
                f"{path} has {size:,} bytes, and no model needs more than {LARGEST:,}; {AGAIN}")
        return real

    def json(self, name: str) -> dict:
        """The JSON object in the file ``name`` without dropped keys; empty if there is no such file."""
        path = self.file(name)
        if path is None:
            return {}
        with contextlib.suppress(ValueError, RecursionError):
            content = _without_dropped(json.loads(path.read_bytes()), LEVELS)
            if isinstance(content, dict):
                return content
        raise ValueError(f"{self.path / name} must be a JSON object of at most {LEVELS} levels; {AGAIN}")


def _without_dropped(value: Any, levels: int) -> Any:
    require(levels, "too many levels")
    if isinstance(value, dict):
        return {key: _without_dropped(part, levels - 1) for key, part in value.items()
                if key not in DROPPED and not key.endswith(DROPPED_ENDINGS)}
    return [_without_dropped(part, levels - 1) for part in value] if isinstance(value, list) else value


def _link_config(folder: _Folder, clean: Path) -> None:
    where, config = folder.path / CONFIG, folder.json(CONFIG)
    require(not (folder.path / ADAPTER).exists(), f"{folder.path} holds an adapter ({ADAPTER}), which is not a whole model; "
            "merge it into its model with peft's merge_and_unload(), and save that")
    require(isinstance(config.get("model_type"), str), f"{folder.path} is not a model folder: it has no {CONFIG} that names a "
            "model_type, such as \"bert\"; choose a folder saved with save_pretrained")
    for settings in (config, *(value for value in config.values() if isinstance(value, dict))):
        require(not settings.get("quantization_config") and not settings.get("compression_config"), f"{where} describes "
                "quantised weights, which cannot be trained; use the model's full-precision weights, or save it dequantised")
        counts = [v for k, v in settings.items() if re.search(r"layers?$|group_num$|groups$", k) and isinstance(v, int)]
        require(max(counts, default=0) <= LAYERS, f"{where} asks for more than {LAYERS} layers; {AGAIN}")
    _write(clean / CONFIG, config)


def _link_weights(folder: _Folder, clean: Path) -> None:
    index, shards = {} if folder.file(WEIGHTS) else folder.json(INDEX), {WEIGHTS: WEIGHTS}
    weight_map = index.get("weight_map", {})
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    require(all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name) for name in names),
            f"{folder.path / INDEX} must give each tensor the name of a *.safetensors file in its folder; {AGAIN}")
    if names:
        shards = {name: f"model-{number:05}.safetensors" for number, name in enumerate(dict.fromkeys(names))}
        _write(clean / INDEX, {"metadata": {}, "weight_map": {tensor: shards[name] for tensor, name in weight_map.items()}})
    for name, clean_name in shards.items():
        path = folder.file(name)
        if path is None:
            raise ValueError(
                f"{folder.path} has no {name} (nor an {INDEX} that names other files), and pickles, which can run code, are "
                "never read; save the model with its save_pretrained, or convert a pickle that you trust with "
                "safetensors.torch.save_file(torch.load("
                f"'pytorch_model.bin', weights_only=True), '{WEIGHTS}', {{'format': 'pt'}})"
            )
        (clean / clean_name).symlink_to(path)


def _link_tokenizer(folder: _Folder, clean: Path) -> None:
    files = {name: path for name in TOKENIZER_FILES if (path := folder.file(name))}
    vocabularies = [name for name in VOCABULARIES if name in files]
    require(vocabularies and (vocabularies != ["vocab.json"] or "merges.txt" in files),
            f"{folder.path} has no tokenizer (none of {', '.join(VOCABULARIES[:2])}, vocab.json with merges.txt, ...); save "
            "the one that the model was trained with there, with its save_pretrained")
    for name, path in files.items():
        (clean / name).symlink_to(path)
    _write(clean / TOKENIZER_CONFIG, folder.json(TOKENIZER_CONFIG))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def snapshot(hub_id: str, remedy: str = "use an offline student or a folder saved with save_pretrained") -> Path:
    """The folder of a hub model in the Hugging Face cache, downloaded if need be; only the files in ``NAMES``.

    A repository that holds pickles only is read from the pull request in which the hub's own bot has converted it, if there is
    one.

    Raises:
        FileNotFoundError: there is no such model, or the hub does not answer and the cache does not have it.
    """
    download = functools.partial(huggingface_hub.snapshot_download, hub_id, allow_patterns=list(NAMES))
    try:
        folder = Path(download())
        if not huggingface_hub.constants.HF_HUB_OFFLINE and not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
            revision = _converted_revision(hub_id)
            folder = Path(download(revision=revision)) if revision else folder
    except (HTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"unknown student {hub_id!r}: neither a local folder nor available from the Hugging Face hub or its cache "
            f"({in_brief(error)}); without internet {remedy}"
        ) from error
    return folder


def _converted_revision(hub_id: str) -> str | None:
    with contextlib.suppress(HTTPError, OSError, IndexError):  # IndexError: a pull request of one commit
        title = "Adding `safetensors` variant of this model"
        pull = safetensors_conversion.previous_pr(huggingface_hub.HfApi(), hub_id, title, token=None)
        if pull is not None and pull.author == "SFconvertbot":
            return pull.git_reference
    return None


def inventory(source: str) -> tuple[list[str], list[str]]:
    """Names of the files of a local folder that are read, and of the weights and code that never are; none of a hub id."""
    folder = Path(source)
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    read = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in NAMES)]
    return read, [name for name in names if name not in read and name.endswith(NEVER_READ)]


# --- whether they belong together ------------------------------------------------------------------------------------


def check_size(model: Any, folder: Path, source: str) -> None:
    """Raise ValueError unless a model built on no device fits the weight files in ``folder``."""
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    require(numbers <= stored + SPARE, f"{source!r}: its {CONFIG} describes a model of {numbers:,} numbers, and its "
            f"weight files have only {stored:,} bytes; {AGAIN}")


def check_attention(module: Any, attention: str, source: str) -> None:
    """Raise ValueError unless each part of a model computes the ``attention`` that was asked for."""
    configs = (getattr(part, "config", None) for part in module.modules())
    others = {getattr(config, "_attn_implementation", attention) for config in configs} - {attention}
    require(not others, f"{source!r} computes its attention as {sorted(others)}, although {attention!r} was asked for; it "
            "cannot be a student")


def warn_of_unused(module: Any, names: Collection[str], source: str) -> None:
    """Warn of tensors of a checkpoint's body that the model has no place for, such as layers that its configuration leaves out.

    Args:
        module: the model as loaded.
        names: the tensors that it did not take.
        source: where the model was loaded from.
    """
    body = {child for child, _ in module.base_model.named_children()}
    inner = (name.removeprefix(f"{module.base_model_prefix}.") for name in names)
    # A head is drawn afresh, and not every classifier has the pooler of its checkpoint.
    unused = sorted(name for name in inner if name.split(".")[0] in body - {"pooler"})
    if unused:
        warnings.warn(f"{source!r}: {len(unused)} tensors of its body, such as {unused[0][:80]!r}, have no place in the model "
                      f"that its {CONFIG} describes, which may not be the one that was trained", stacklevel=5)


def check_vocabulary(tokenizer: transformers.PreTrainedTokenizerBase, rows: int, source: str) -> None:
    """Raise ValueError where text can become tokens that an embedding table of ``rows`` rows does not have, or no words.

    Special tokens that no text gets are needed only if it spells them out, such as the image placeholder of Gemma 3, which lies
    beyond the table of its text models.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id,
             tokenizer.cls_token_id, tokenizer.sep_token_id}
    vocabulary = tokenizer.get_vocab()
    require(set(vocabulary.values()) - special - roles, f"{source!r}: its tokenizer has no words, so all text would look "
            "alike; save the one that the model was trained with there")
    beyond = sorted(token for token, i in vocabulary.items() if i >= rows and (i in roles or i not in special))
    require(not beyond, f"{source!r}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of the embedding table, "
            f"such as {reprlib.repr(beyond[:1])}; save the tokenizer that belongs to it, or add rows with "
            "resize_token_embeddings and save the model")
