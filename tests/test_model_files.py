"""Model folders of other people: what is read is right, and what could do harm is refused before it does."""

import json
import os
import pickle
import shutil
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import distillkit as dk
from distillkit.core import model_files
from standin_hub import MODELS

BOMB = "[" * 100_000
DEEP = '{"model_type": "bert", "deep": ' + '{"a": ' * 500 + "1" + "}" * 501


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def made(tmp_path):
    """The file that a payload would create."""
    return tmp_path / "made"


@pytest.fixture(scope="session")
def original(world, tmp_path_factory):
    """A tiny BERT as a folder, with a tokenizer."""
    _, student = world
    folder = tmp_path_factory.mktemp("models") / "tiny"
    student.module.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "mine")


@pytest.fixture
def outside(original, tmp_path):
    """The weights of that model, beside its folder."""
    return shutil.copy(original / "model.safetensors", tmp_path / "outside.safetensors")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config(**values):
    return lambda folder, *_: change(folder / "config.json", **values)


def text(name, content):
    return lambda folder, *_: (folder / name).write_text(content)


def sparse(name, size, head=b""):
    """A file that claims much and occupies nothing."""
    def harm(folder, *_):
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
    return harm


def pickled(name):
    return lambda folder, made, outside: (folder / name).write_bytes(pickle.dumps(Payload(made)))


def indexed(name):
    """The weights lie in the file that `name` gives, and the index says so."""
    def harm(folder, made, outside):
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shard = name(folder, made, outside)
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard)}))
    return harm


def shard_pickle(folder, made, outside):
    pickled("weights.bin")(folder, made, outside)
    return "weights.bin"


def shard_below(folder, made, outside):
    (folder / "below").mkdir()
    shutil.copy(outside, folder / "below" / "model.safetensors")
    return "below/model.safetensors"


def shard_link(folder, made, outside):
    (folder / "part.safetensors").symlink_to(outside)
    return "part.safetensors"


def linked(name):
    def harm(folder, made, outside):
        shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    return harm


def without(*names):
    def harm(folder, *_):
        for name in names:
            (folder / name).unlink(missing_ok=True)
    return harm


def bin_only(folder, made, outside):
    without("model.safetensors")(folder)
    pickled("pytorch_model.bin")(folder, made, outside)


def adapter_only(folder, made, outside):
    shutil.move(folder, folder.parent / "base")
    folder.mkdir()
    shutil.copy(folder.parent / "base" / "tokenizer.json", folder)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder.parent / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def no_words(folder, *_):
    """A tokenizer of its special tokens alone, as transformers makes one where the vocabulary is lost."""
    without(*TOKENIZER)(folder)
    specials = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    transformers.BertTokenizerFast(vocab=specials).save_pretrained(folder)


def grown(**tokens):
    """A tokenizer with a token more than the model has rows."""
    def harm(folder, *_):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if "special" in tokens:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        else:
            tokenizer.add_tokens(["distillkit"])
        tokenizer.save_pretrained(folder)
    return harm


def far_token(folder, *_):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["story"] = 4 * 10**9
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


HARMS = {
    "index names a pickle": (indexed(shard_pickle), "index.json"),
    "index names a parent folder": (indexed(lambda *_: "../outside.safetensors"), "index.json"),
    "index names an absolute path": (indexed(lambda folder, made, outside: str(outside)), "index.json"),
    "index names a subfolder": (indexed(shard_below), "index.json"),
    "index names a link": (indexed(shard_link), "link"),
    "index names a missing file": (indexed(lambda *_: "part.safetensors"), "part.safetensors"),
    "index names a number": (indexed(lambda *_: 3), "index.json"),
    "index is a bomb": (lambda *a: (without("model.safetensors")(*a), text("model.safetensors.index.json", BOMB)(*a)),
                        "index.json"),
    "index is empty": (lambda *a: (without("model.safetensors")(*a), text("model.safetensors.index.json", "{}")(*a)),
                       "index.json"),
    "weights are a pickle": (bin_only, "save_file"),
    "there are no weights": (without("model.safetensors"), "model.safetensors"),
    "weights are a link": (linked("model.safetensors"), "link"),
    "weights are a pipe": (lambda *a: (without("model.safetensors")(*a), os.mkfifo(a[0] / "model.safetensors")),
                           "model.safetensors"),
    "weights are a link to themselves": (
        lambda *a: (without("model.safetensors")(*a), (a[0] / "model.safetensors").symlink_to("model.safetensors")),
        "model.safetensors"),
    "weights have a header of 99 MB": (sparse("model.safetensors", 10**8, (99 * 10**6).to_bytes(8, "little")), "header"),
    "weights are empty": (sparse("model.safetensors", 0), "damaged"),
    "config is a link": (linked("config.json"), "link"),
    "config is a bomb": (text("config.json", BOMB), "JSON"),
    "config is nested": (text("config.json", DEEP), "levels"),
    "config is a list": (text("config.json", "[1]"), "object"),
    "config is no JSON": (text("config.json", "{"), "JSON"),
    "config is no text": (lambda folder, *_: (folder / "config.json").write_bytes(b"\xff\xfe{"), "JSON"),
    "config is 1 GB": (sparse("config.json", 2**30), "bytes"),
    "config has no kind": (text("config.json", "{}"), "model_type"),
    "config has a number for a kind": (config(model_type=3), "model_type"),
    "config has an unknown kind": (config(model_type="nobody"), "nobody"),
    "config has words for numbers": (config(hidden_size="wide"), "config.json"),
    "config has no heads": (config(num_attention_heads=0), "config.json"),
    "config is quantised": (config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "quantised"),
    "an adapter beside the model": (text("adapter_config.json", '{"base_model_name_or_path": "../outside"}'), "merge"),
    "an adapter alone": (adapter_only, "merge"),
    "no tokenizer": (without(*TOKENIZER), "tokenizer"),
    "no merges": (lambda *a: (without(*TOKENIZER)(*a), text("vocab.json", '{"a": 0}')(*a)), "merges"),
    "a tokenizer without words": (no_words, "no words"),
    "a tokenizer with a further word": (grown(), "beyond"),
    "a tokenizer with a further padding token": (grown(special=True), "beyond"),
    "tokenizer is a link": (linked("tokenizer.json"), "link"),
    "tokenizer is a bomb": (text("tokenizer.json", BOMB), "tokenizer"),
    "tokenizer is empty": (text("tokenizer.json", ""), "tokenizer"),
    "tokenizer is 1 GB": (sparse("tokenizer.json", 2**30), "bytes"),
    "tokenizer settings are a bomb": (text("tokenizer_config.json", BOMB), "JSON"),
    "tokenizer settings are a list": (text("tokenizer_config.json", "[]"), "object"),
    "tokenizer is a model": (lambda folder, *_: change(folder / "tokenizer_config.json", tokenizer_class="BertModel"),
                             "tokenizer"),
    "a chat template of 1 GB": (sparse("chat_template.jinja", 2**30), "bytes"),
    **{f"config asks for 10**12 {name}": (config(**{name: 10**12}), "config.json") for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "type_vocab_size")},
    "tokenizer has a token 4,000,000,000": (far_token, "beyond"),
    "config is a folder": (lambda *a: (without("config.json")(*a), (a[0] / "config.json").mkdir()), "config.json"),
    "config asks for more than a number holds": (config(vocab_size=10**30), "config.json"),
    "config asks for some GB": (config(vocab_size=10**8), "bytes"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_refused_at_once(task, folder, made, outside, harm):
    """With an error that names the matter, and before a pickle is read or memory is taken."""
    do, matter = HARMS[harm]
    do(folder, made, outside)
    begun = time.perf_counter()
    with pytest.raises(ValueError) as refusal:
        dk.load_student(folder, task)
    assert matter in str(refusal.value) and str(refusal.value).isprintable()
    assert time.perf_counter() - begun < 10
    assert not made.exists()


def test_the_payload_is_one(made):
    pickle.loads(pickle.dumps(Payload(made))).close()
    assert made.exists()


def logits(student):
    batch = dict(student.tokenizer(["a warm and funny story", "it was dull"], padding=True, return_tensors="pt"))
    return student.logits(student.init(0), batch)


def other_weights(folder, made, outside):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({k: v + 1 for k, v in weights.items()}, folder / "other.safetensors", {"format": "pt"})
    change(folder / "config.json", transformers_weights="other.safetensors")


def other_config(folder, made, outside):
    other = json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu"}
    (folder / "config.4.0.0.json").write_text(json.dumps(other))
    change(folder / "config.json", configuration_files=["config.json", "config.4.0.0.json"])


def code(folder, made, outside):
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(made)!r}, 'w').close()\n")
    change(folder / "config.json", auto_map={
        "AutoConfig": "configuration_mine.Mine", "AutoModelForSequenceClassification": "modeling_mine.Mine"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})


def pickles(folder, made, outside):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", ".metadata", "adapter_model.bin"):
        pickled(name)(folder, made, outside)
    shutil.copy(outside, folder / "shard-00000-model-00001-of-00001.safetensors")  # as of a distributed checkpoint


def other_tokenizer(folder, made, outside):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(words, reversed(words.values())))
    other = folder.parent / "other.json"
    for path in (folder / "tokenizer.4.0.0.json", other):
        path.write_text(json.dumps(tokenizer))
    change(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"], vocab_file=str(other),
           tokenizer_file=str(other), init_inputs=[str(other)])


def two_shards(folder, *_):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"shard-0000{i % 2}-model-00001-of-00001.safetensors" for i, name in enumerate(weights)}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in weights.items() if places[name] == place}
        safetensors.torch.save_file(part, folder / place, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def links_inside(folder, *_):
    (folder / "files").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.move(folder / name, folder / "files" / name)
        (folder / name).symlink_to(Path("files") / name)


def as_converted(folder, *_):
    """The way that the error for pickles names."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    safetensors.torch.save_file(torch.load(folder / "pytorch_model.bin", weights_only=True), folder / "model.safetensors",
                                {"format": "pt"})


HARMLESS = {
    "sdpa": config(_attn_implementation="sdpa"),
    "sdpa by another name": config(attn_implementation="sdpa", _attn_implementation_internal="sdpa"),
    "a kernel from the hub": config(_attn_implementation="kernels-community/flash-attn"),
    "experts": config(_experts_implementation="grouped_mm"),
    "tuples": config(return_dict=False, torchscript=True, output_attentions=True, output_hidden_states=True),
    "other classes": config(id2label={str(i): str(i) for i in range(7)}, label2id={str(i): i for i in range(7)}),
    "a billion classes": config(num_labels=10**9),
    "another precision": config(dtype="float16", torch_dtype="float16"),
    "fusions": config(fusion_config={"rms_norm": True}),
    "other weights": other_weights,
    "another configuration": other_config,
    "another tokenizer": other_tokenizer,
    "code": code,
    "pickles": pickles,
    "two shards": two_shards,
    "links inside": links_inside,
    "as converted": as_converted,
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_is_left_out_changes_nothing(world, folder, made, outside, kind):
    task, expected = world
    HARMLESS[kind](folder, made, outside)
    student = dk.load_student(folder, task)
    assert torch.equal(logits(student), logits(expected))
    parts = [part.config for part in student.module.modules() if hasattr(part, "config")]
    assert len(parts) > 3 and {part._attn_implementation for part in parts} == {"eager"}
    assert student.dtype == torch.float32 and student.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert student.module.config.name_or_path == str(folder)
    assert not made.exists()


def test_attention_is_checked_after_loading(task, folder, monkeypatch):
    """Should transformers ever find another way to another kind of attention."""
    build = transformers.AutoModelForSequenceClassification.from_pretrained

    def other(*args, **options):
        return build(*args, **options | {"attn_implementation": "sdpa"})

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", other)
    with pytest.raises(ValueError, match="'sdpa'.*'eager'"):
        dk.load_student(folder, task)
    assert dk.load_student(folder, task, attention="sdpa").attention == "sdpa"


@pytest.mark.parametrize("honest", [True, False])
def test_a_snapshot_of_the_hubs_cache(world, folder, tmp_path, honest):
    """Its files are links into the cache's `blobs`, and into nothing else."""
    task, expected = world
    cache = tmp_path / "models--me--mine"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("5" * 40)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = (cache if path.name == "model.safetensors" and not honest else cache / "blobs") / f"blob-{path.name}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    if honest:
        assert torch.equal(logits(dk.load_student(snapshot, task)), logits(expected))
    else:
        with pytest.raises(ValueError, match="link"):
            dk.load_student(snapshot, task)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a/b/c", "no\0body", "./nobody", "\x1b[31m"])
def test_names_that_nothing_has(task, standin_hub, name):
    with pytest.raises(FileNotFoundError) as refusal:
        dk.load_student(name, task)
    assert "unknown student" in str(refusal.value) and str(refusal.value).isprintable()


def test_the_files_of_an_installed_package_may_be_links(task, monkeypatch, tmp_path):
    """As some installers make them, into their own cache."""
    import importlib.util
    from importlib.machinery import ModuleSpec

    from distillkit.io.packaged import MINILM_PACKAGE

    whole = dk.load_student("offline:minilm", task)
    package = Path(next(iter(importlib.util.find_spec(MINILM_PACKAGE).submodule_search_locations)))
    (tmp_path / "model").mkdir()
    for path in (package / "model").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    find, spec = importlib.util.find_spec, ModuleSpec(MINILM_PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == MINILM_PACKAGE else find(name, *rest))
    assert torch.equal(logits(dk.load_student("offline:minilm", task)), logits(whole))


def fewer_layers(folder):
    change(folder / "config.json", num_hidden_layers=1)


def relative_positions(folder):
    """As BERT had in earlier versions of transformers, and has no more."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch.ones(3, 16)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", position_embedding_type="relative_key")


@pytest.mark.parametrize(("edit", "tensor"), [(fewer_layers, "encoder.layer.1"), (relative_positions, "distance_embedding")])
@pytest.mark.parametrize("whole", [True, False])
def test_a_body_that_the_model_has_no_place_for(task, folder, edit, tensor, whole):
    edit(folder)
    if not whole:  # as the body alone is saved, without its prefix
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        body = {name.removeprefix("bert."): value for name, value in weights.items() if name.startswith("bert.")}
        safetensors.torch.save_file(body, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="tensors of its body.*no place") as warned:
        dk.load_student(folder, task)
    assert tensor in str(warned[0].message)


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_other_tasks_are_no_loss(task, standin_hub, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dk.load_student(name, task, trainable="full")


def test_a_file_is_no_folder(task, folder):
    with pytest.raises(ValueError, match="not a model folder"):
        dk.load_student(folder / "model.safetensors", task)


def test_what_is_downloaded():
    """No pickles, no code, and of other people's folders nothing below the first level."""
    from huggingface_hub.utils import filter_repo_objects

    needed = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "vocab.txt",
              "merges.txt", "chat_template.jinja"]
    others = ["pytorch_model.bin", "modeling_mine.py", "onnx/config.json", "original/model.safetensors", "training_args.bin",
              "consolidated.safetensors", "onnx/model.onnx", "custom_generate/generate.py"]
    assert [*filter_repo_objects(others + needed, allow_patterns=list(model_files.NAMES))] == needed
