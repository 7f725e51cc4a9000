"""Model folders of other people: what is read of them, and what never is.

A folder in the hub's layout may hold pickles, Python code, adapters that name further models, links that lead out of it, and
a ``config.json`` that points to other files or switches parts of transformers on.  transformers follows much of that.  So it is
never shown the folder itself: :func:`readable` links the few files that a model needs into a temporary folder, with the JSON
among them checked and rewritten.  Whatever is not on the list is not there.

Numbers are checked before anything of their size is built, so that a foreign configuration costs neither memory nor minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import re
import reprlib
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

CONFIG, TOKENIZER_CONFIG, ADAPTER = "config.json", "tokenizer_config.json", "adapter_config.json"
WEIGHTS, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model")
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *SENTENCEPIECE)
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
TEMPLATE = "chat_template.jinja"
NAMES = (CONFIG, TOKENIZER_CONFIG, ADAPTER, WEIGHTS, INDEX, SHARDS, *TOKENIZER_FILES, TEMPLATE)  # all that is downloaded

AGAIN = "save or download the model again"
MB = 2**20
JSON_BYTES, VOCABULARY_BYTES, TEMPLATE_BYTES, HEADER_BYTES = 8 * MB, 128 * MB, MB, 8 * MB
DEPTH = 32  # of nested JSON; real configurations have 4
LAYERS = 1024
SPARE = 2**24  # numbers that a model may have beyond its weight files: a fresh head, tables of positions, masks

# Keys that make transformers run code, read other files, choose kernels or answer in another form than a student needs; and
# the class names of another task, whose number is the student's.
DROPPED = frozenset({
    "auto_map", "custom_pipelines", "configuration_files", "transformers_weights", "fusion_config", "kernel_config",
    "distributed_config", "name_or_path", "_name_or_path", "init_inputs", "return_dict", "torchscript", "output_attentions",
    "output_hidden_states", "num_labels", "id2label", "label2id",
})
NEVER_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors", ".py", ".jinja")
DROPPED_ENDINGS = ("_implementation", "_implementation_internal", "_file", "_files")


@contextlib.contextmanager
def readable(source: str, *, installed: bool = False) -> Iterator[Path]:
    """A temporary folder with what transformers may see of a model.

    Args:
        source: a local folder in the hub's layout, or a hub id.
        installed: the folder belongs to an installed package, whose files an installer may have made links.

    Raises:
        FileNotFoundError: ``source`` is neither here nor on the hub.
        ValueError: it has no weights in safetensors or no tokenizer, is quantised or an adapter, or a file of it is damaged,
            too large, or a link that leaves the folder.
    """
    try:
        is_local = Path(source).exists()
    except OSError:  # a name that no file can have
        is_local = False
    folder = _Folder(Path(source), installed) if is_local else _Folder(snapshot(source), True)
    with tempfile.TemporaryDirectory(prefix="distillkit-model-") as temporary:
        try:
            _link_all(folder, Path(temporary))
        except OSError as error:
            raise ValueError(f"{folder.path} cannot be read ({told(error)}); check the disk and your rights") from error
        yield Path(temporary)


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder to read from; ``links_lead_out``: its files may be links to anywhere, as they are somebody's we trust."""

    path: Path
    links_lead_out: bool

    def file(self, name: str, most_bytes: int | None = None) -> Path | None:
        """Where the file ``name`` really is; None if there is none.

        Links may lead about in the folder, and from a snapshot in the hub's cache to that cache's own files.
        """
        path = self.path / name
        if not path.is_file():
            return None
        home, real = self.path.resolve(), path.resolve()
        homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
        if not self.links_lead_out and not any(real.is_relative_to(place) for place in homes):
            raise ValueError(f"{path} is a link that leads out of its folder; put the file itself there")
        size = real.stat().st_size
        if most_bytes is not None and size > most_bytes:
            raise ValueError(f"{path} has {size:,} bytes, and no model needs more than {most_bytes:,} there; {AGAIN}")
        return real

    def json(self, name: str) -> dict | None:
        """The JSON object in the file ``name``; None if there is no such file."""
        path = self.file(name, JSON_BYTES)
        if path is None:
            return None
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path / name} is not JSON ({told(error)}); {AGAIN}") from error
        if not isinstance(content, dict) or _depth(content) > DEPTH:
            raise ValueError(f"{self.path / name} must be a JSON object of at most {DEPTH} levels; {AGAIN}")
        return content


def snapshot(hub_id: str) -> Path:
    """The folder of a hub model in the Hugging Face cache, downloaded if need be, without anything but its plain files.

    A repository that holds pickles only is read from the pull request in which the hub's own bot has converted it, if there is
    one.

    Raises:
        FileNotFoundError: there is no such model, or the hub does not answer and the cache does not have it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(NAMES)))
        if not constants.HF_HUB_OFFLINE and not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
            revision = _converted_revision(hub_id)
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(NAMES))) if revision else folder
    except (HTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"unknown student {hub_id!r}: neither a local folder nor to be had from the Hugging Face hub or its cache "
            f"({told(error)}); without internet use an offline student or a folder saved with save_pretrained"
        ) from error
    return folder


def _converted_revision(hub_id: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from transformers.safetensors_conversion import previous_pr

    try:
        pull = previous_pr(HfApi(), hub_id, "Adding `safetensors` variant of this model", token=None)
    except (HTTPError, OSError, IndexError):  # IndexError: transformers looks for the commit before the pull request's own
        return None
    return pull.git_reference if pull is not None and pull.author == "SFconvertbot" else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar, and without "some weights were newly initialised": that is what init() is for."""
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


def read_config(folder: Path, source: str) -> Any:
    """The configuration in a folder of :func:`readable`, as transformers reads it."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' own code may fail in any way on other people's values
        raise ValueError(f"{source!r}: its {CONFIG} is not one that transformers can read ({told(error)}); {AGAIN}") from error
    config.name_or_path = source
    return config


def read_tokenizer(folder: Path, source: str, config: Any) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in a folder of :func:`readable`, as transformers reads it for ``config``."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{source!r}: its tokenizer cannot be read ({told(error)}); {AGAIN}") from error
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise ValueError(f"{source!r}: its {TOKENIZER_CONFIG} names a class that is no tokenizer; {AGAIN}")
    tokenizer.name_or_path = source
    return tokenizer


def check_attention(module: Any, attention: str, source: str) -> None:
    """Raise ValueError unless each part of a model computes its ``attention`` as it was asked to."""
    for part in module.modules():
        actual = getattr(getattr(part, "config", None), "_attn_implementation", attention)
        if actual != attention:
            raise ValueError(f"{source!r} computes its attention as {actual!r}, although {attention!r} was asked for; it "
                             "cannot be a student")


def warn_of_unused(module: Any, names: Collection[str], source: str) -> None:
    """Warn of tensors of a checkpoint's body that the model has no place for, such as layers that its configuration leaves out.

    Args:
        module: the model as loaded.
        names: the tensors that it did not take.
        source: what the model was loaded from.
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
    spelled = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {token: i for role in ("pad", "bos", "eos", "unk", "cls", "sep")
             if (token := getattr(tokenizer, f"{role}_token")) is not None
             and (i := tokenizer.convert_tokens_to_ids(token)) is not None}
    words = {token: i for token, i in tokenizer.get_vocab().items() if i not in spelled and token not in roles}
    if not words:
        raise ValueError(f"{source!r}: its tokenizer has no words, so all text would look alike; save the one that the model "
                         "was trained with there")
    beyond = sorted(token for token, i in {**words, **roles}.items() if i >= rows)
    if beyond:
        raise ValueError(f"{source!r}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of the embedding table, "
                         f"such as {reprlib.repr(beyond[0])}; save the tokenizer that belongs to it, or add rows with "
                         "resize_token_embeddings and save the model")


def inventory(source: str) -> tuple[list[str], list[str]]:
    """Names of the files of a local folder that are read, and of the weights and code that never are; none of a hub id."""
    folder = Path(source)
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    read = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in NAMES)]
    return read, [name for name in names if name not in read and name.endswith(NEVER_READ)]


def check_size(build: Callable[[], Any], folder: Path, source: str) -> None:
    """Raise ValueError unless the model that ``build`` makes, on no device, fits the weight files in ``folder``."""
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:  # transformers' own code may fail in any way on other people's numbers
        raise ValueError(f"{source!r}: its {CONFIG} does not describe a model that transformers can build ({told(error)}); "
                         f"{AGAIN}") from error
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if numbers > stored + SPARE:
        raise ValueError(f"{source!r}: its {CONFIG} describes a model of {numbers:,} numbers, and its weight files have only "
                         f"{stored:,} bytes; {AGAIN}")


def told(error: Exception) -> str:
    """The kind of an error and the beginning of its message, without control characters that files of others put there."""
    line = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {''.join(c if c.isprintable() else '?' for c in line)}"


def _link_all(folder: _Folder, clean: Path) -> None:
    """Link or rewrite into ``clean`` what may be seen of ``folder``."""
    if not folder.path.is_dir():
        raise ValueError(f"{folder.path} is not a folder; point to a model folder, not to a file of it")
    config, has_adapter = folder.json(CONFIG), (folder.path / ADAPTER).exists()
    if has_adapter:
        raise ValueError(f"{folder.path} holds an adapter ({ADAPTER}), which is not a whole model; merge it into its model "
                         "with peft's merge_and_unload(), and save that")
    if config is None:
        raise ValueError(f"{folder.path} is not a model folder: it has no {CONFIG}; point to a saved transformers model")
    _write(clean / CONFIG, _checked_config(config, folder.path))
    _link_weights(folder, clean)
    _link_tokenizer(folder, clean)


def _link_weights(folder: _Folder, clean: Path) -> None:
    index = None if folder.file(WEIGHTS) else folder.json(INDEX)
    if folder.file(WEIGHTS):
        shards = {WEIGHTS: WEIGHTS}
    elif index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_shard, weight_map.values())):
            raise ValueError(f"{folder.path / INDEX} must give each tensor the name of a *.safetensors file in its folder; "
                             f"{AGAIN}")
        names = sorted(set(weight_map.values()))
        shards = {name: f"model-{i:05}-of-{len(names):05}.safetensors" for i, name in enumerate(names, 1)}
        _write(clean / INDEX, {"metadata": {}, "weight_map": {tensor: shards[name] for tensor, name in weight_map.items()}})
    else:
        pickles = sorted(path.name for path in folder.path.glob("*.bin"))
        kind = "only pickles, which can run code when they are read and never are" if pickles else "nothing in that format"
        raise ValueError(
            f"{folder.path} has no {WEIGHTS}: there is {kind}; convert a pickle that you trust with safetensors.torch."
            f"save_file(torch.load('pytorch_model.bin', weights_only=True), '{WEIGHTS}', {{'format': 'pt'}}), or with the "
            "model's own save_pretrained"
        )
    for name, own_name in shards.items():
        path = folder.file(name)
        if path is None:
            raise ValueError(f"{folder.path} lacks {name}, which its {INDEX} names; {AGAIN}")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if HEADER_BYTES < header <= path.stat().st_size:
            raise ValueError(f"{path} has a header of {header:,} bytes, and no model needs more than {HEADER_BYTES:,}; {AGAIN}")
        (clean / own_name).symlink_to(path)


def _is_shard(name) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", name) is not None


def _link_tokenizer(folder: _Folder, clean: Path) -> None:
    for name in (*TOKENIZER_FILES, TEMPLATE):
        if path := folder.file(name, TEMPLATE_BYTES if name == TEMPLATE else VOCABULARY_BYTES):
            (clean / name).symlink_to(path)
    if settings := folder.json(TOKENIZER_CONFIG):
        _write(clean / TOKENIZER_CONFIG, _without_dropped(settings))
    vocabularies = [name for name in VOCABULARIES if (clean / name).exists()]
    if vocabularies == ["vocab.json"] and not (clean / "merges.txt").exists():
        raise ValueError(f"{folder.path} has a vocab.json without its merges.txt; {AGAIN}")
    if not vocabularies:
        raise ValueError(f"{folder.path} has no tokenizer (no {', '.join(VOCABULARIES[:3])}, ...); save the one that the model "
                         "was trained with there, with its save_pretrained")


def _checked_config(config: dict, folder: Path) -> dict:
    """A configuration without what is dropped.

    Raises:
        ValueError: it names no kind of model, is that of a quantised one, or asks for more layers than any model has.
    """
    where = folder / CONFIG
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{where} names no model_type, such as \"bert\"; {AGAIN}")
    for parent in (config, *(value for value in config.values() if isinstance(value, dict))):
        if parent.get("quantization_config") or parent.get("compression_config"):
            raise ValueError(f"{where} describes quantised weights, which cannot be trained; take the model's full-precision "
                             "weights, or save it dequantised")
        for key, value in parent.items():
            if re.search(r"layers?$|group_num$|groups$", key) and isinstance(value, int) and value > LAYERS:
                raise ValueError(f"{where} has {key!r} = {reprlib.repr(value)}, and no model has more than {LAYERS}; "
                                 f"{AGAIN}")
    return _without_dropped(config)


def _without_dropped(value):
    if isinstance(value, dict):
        return {key: _without_dropped(part) for key, part in value.items()
                if key not in DROPPED and not key.endswith(DROPPED_ENDINGS)}
    return [_without_dropped(part) for part in value] if isinstance(value, list) else value


def _depth(value) -> int:
    """How many levels a JSON value has; counted level by level, as a deep one would exhaust a recursion."""
    levels, parts = 0, [value]
    while parts := [part for part in parts if isinstance(part, dict | list)]:
        parts = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
        levels += 1
    return levels


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
