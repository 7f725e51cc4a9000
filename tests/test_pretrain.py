"""Pre-training: no sentence of the corpora is read, runs repeat and resume to the bit, and what is written loads."""

import importlib.metadata
import itertools
import json
import re
import warnings
from collections import defaultdict

import pytest
import torch
import transformers

import distillkit as dk
from distillkit.assets import pretrain
from distillkit.assets.pretrain import Text, documents, encode, fresh_model, token_stream, train, write
from distillkit.data.docstrings import ALIASES, LIBRARIES, same_sentence_key
from distillkit.io import packaged as packaged_models
from distillkit.io.packaged import FILES, AssetError, asset

NAMES = ["tiny-opt", "tiny-llama"]
STEPS, BATCH = 4, 256
FACTS = {"docstrings": 240, "kept": 240, "characters": 9, "libraries": {"alpha": "1.0"},
         "held_out": {"sentences": 0, "sha256": ""}, "training": {"sentences": 0, "sha256": ""}}
NAMES_OF_LIBRARIES = "|".join(LIBRARIES) + rf"|(^|[._])({'|'.join(ALIASES)})($|[._])"
TEXTS = ["Compute x_2[10] via alpha.fit.", "two  spaces\nand a new line", "  in front", "é α 漢 🙂", "tab\there </s> <pad>"]


def made_up(start, stop):
    things = itertools.product(("fast", "slow", "sparse", "dense"), ("matrix", "graph", "series"), ("rows", "nodes", "axes"))
    words = [" ".join(thing) for thing in things]
    return [f"alpha.m{i % 7}.f{i}: Return the {words[i % 36]} of the {words[i * 5 % 36]}." for i in range(start, stop)]


@pytest.fixture(scope="module", autouse=True)
def short_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "BATCH", BATCH)
        yield


@pytest.fixture(scope="module")
def text():
    return Text([(document, 2) for document in made_up(0, 200)], made_up(200, 216), FACTS)


@pytest.fixture(scope="module", params=NAMES)
def finished(request, text, tmp_path_factory):
    """The trainer and the record of a finished run of each kind, and the folder it wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer, record = train(request.param, text, steps=STEPS, runs=folder / "runs")
    return trainer, record, write(trainer, record, folder / "assets")


@pytest.fixture
def opt(text, tmp_path):
    """Makes short runs of tiny-opt."""
    return lambda **options: train("tiny-opt", text, runs=tmp_path / "runs", **{"steps": STEPS} | options)


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_docstring_is_read_in_full_and_as_the_first_sentences_of_its_paragraphs():
    docstring = ("Turn a pandas object\n    into rows.\n\nParameters\n----------\nx : int\n    The ``input``.\n\n"
                 "The order of ``rows`` is kept. So are their names.")
    text = documents({"alpha.turn": docstring, "alpha.bare": "No."}, frozenset())
    assert text.train == [
        ("alpha.bare\nNo.", 1),
        ("alpha.turn\nTurn a pandas object into rows.\nParameters\nx : int The ``input``.\n"
         "The order of ``rows`` is kept. So are their names.", 1),
        ("alpha.turn: Turn a library object into rows.", 1),
        ("Turn a library object into rows. -- alpha.turn", 2),
        ("Turn a library object into rows. -> turn (alpha)", 1),
        ("alpha.turn: The order of rows is kept.", 1),
        ("The order of rows is kept. -- alpha.turn", 2),
        ("The order of rows is kept. -> turn (alpha)", 1),
    ]
    assert text.validation == [] and text.facts["docstrings"] == text.facts["kept"] == 2


def test_long_docstrings_are_cut_after_a_word():
    (document, _), = documents({"alpha": "ab cd " * 400}, frozenset()).train[:1]
    assert document.endswith(("ab", "cd"))
    assert 990 < len(document) - len("alpha\n") <= 1000


@pytest.mark.parametrize("docstring", [
    "Sum all the values here.",
    "SUM all the values, here!\n\nMore text.",
    "Another first sentence of it. Sum all the values here. The end.",
    "Another first sentence of it.\n\nNotes\n-----\nTo sum all the\n    values here is its use.",
    "Another first sentence of it: sum :func:`all` the ``values`` *here*.",
])
def test_a_held_out_sentence_is_read_nowhere(docstring):
    docstrings = {"alpha.sum": docstring, "alpha.other": "Sum all the values there."}
    text = documents(docstrings, frozenset({"sum all the values here"}))
    assert len(text.train) == 4 and all("other" in document for document, _ in text.train)
    assert text.facts["docstrings"] == 2 and text.facts["kept"] == 1


def test_held_out_sentences_are_compared_with_names_masked():
    held_out = frozenset({"turn a library object into rows"})
    assert documents({"alpha": "See below for more of it. Turn a pandas object into rows."}, held_out).train == []


@pytest.mark.parametrize("docstring", [
    "Sum all the values here.\n\nThe order of the rows is kept.",
    "Sum ``all`` the values\n    here. A second sentence goes with it.\n\nThe order of the rows is kept.",
])
def test_of_a_training_sentence_the_other_paragraphs_are_read(docstring):
    text = documents({"alpha.sum": docstring}, frozenset(), frozenset({"sum all the values here"}))
    assert [document for document, _ in text.train] == [
        "alpha.sum\nThe order of the rows is kept.", "alpha.sum: The order of the rows is kept.",
        "The order of the rows is kept. -- alpha.sum", "The order of the rows is kept. -> sum (alpha)"]


def test_a_training_sentence_in_a_later_paragraph_is_not_read():
    docstring = "The order of the rows is kept.\n\nSum all the values here."
    text = documents({"alpha.sum": docstring}, frozenset(), frozenset({"sum all the values here"}))
    assert [document.partition("\n")[0] for document, _ in text.train] == [
        "alpha.sum: The order of the rows is kept.", "The order of the rows is kept. -- alpha.sum",
        "The order of the rows is kept. -> sum (alpha)"]


def sentences_in(texts, keys):
    """Which of the keys stand in one of the texts, as a plain search for strings finds them."""
    shortest, beginnings, hits = min(map(len, keys)), defaultdict(list), set()
    for key in keys:
        beginnings[key[:shortest]].append(f"{key} ")
    for text in texts:
        tokens = re.findall(r"[a-z0-9_.]+", re.sub(r":[a-z:]+:`", " ", text.lower()))
        named = ["library" if re.search(NAMES_OF_LIBRARIES, token) else token for token in tokens]
        words = " ".join(re.findall(r"[a-z]+", " ".join(named))) + " "
        for place in [0, *(space.end() for space in re.finditer(" ", words))]:
            hits |= {key for key in beginnings.get(words[place : place + shortest], ()) if words.startswith(key, place)}
    return hits


def test_no_sentence_of_the_corpora_is_read_in_any_disguise():
    disguises = ("{}", "Text of its own comes first. {}", "Text of its own comes first.\n\n{}\n\nMore of it follows.",
                 "Text of its own comes first: {} and goes on.", "See the ``notes`` first.\n\nNotes\n-----\n{}")
    docstrings, keys = {}, []
    for number, (one, two, three) in enumerate(itertools.product("abcdefg", repeat=3)):
        sentence = f"Turn {one} into {two} and {three} of a pandas :class:`Frame` with *rows*."
        docstrings[f"alpha.f{number}"] = disguises[number % 5].format(sentence)
        keys.append(f"turn {one} into {two} and {three} of a library frame with rows")
    assert len(sentences_in(docstrings.values(), keys)) == len(docstrings) == 343
    text = documents(docstrings, frozenset(keys[:100]), frozenset(keys[100:200]))
    read = [document for document, _ in text.train] + text.validation
    assert sentences_in(read, keys) == {f"{key} " for key in keys[200:]}
    assert not any(re.search(r"alpha\.f\d\d?\b", document) for document in read), "of the first hundred nothing is read"


@pytest.mark.slow
def test_no_sentence_of_the_corpora_is_in_what_the_packaged_models_read():
    """The text of the record is the text that is searched, so this is about the models and not about the code."""
    records = [json.loads((asset(name) / "training.json").read_text()) for name in NAMES]
    installed = {library: importlib.metadata.version(library) for library in LIBRARIES}
    if any(record["text"]["libraries"] != installed for record in records):
        pytest.skip("the text of other versions of the libraries is another text")
    text = pretrain.documents_of_libraries()
    read = [f"{count} {document}" for document, count in text.train] + text.validation
    assert {record["settings"]["text"] for record in records} == {pretrain._digest(read)}
    keys = {same_sentence_key(row["prompt"].split("\n")[1]) for split in ("train", "validation", "test")
            for row in dk.load_task("docstrings_qa").split(split)}
    keys |= {same_sentence_key(row["text"]) for split in ("train", "validation", "test")
             for row in dk.load_task("docstrings").split(split)}
    assert len(keys) > 20_000 and not sentences_in(read, keys)


def test_validation_documents_are_a_few_and_share_no_first_sentence_with_the_others():
    sentences = [document.split(": ")[1] for document in made_up(0, 36)]
    docstrings = {f"alpha.f{i}": f"{sentences[i % 36]} Case {i} follows." for i in range(72)}
    docstrings |= {f"beta.f{i}": f"Sentence of {'a' * (i % 60 + 1)} and {'b' * (i // 60 + 1)} only." for i in range(900)}
    text = documents(docstrings, frozenset())
    assert 4 * 4 <= len(text.validation) < 4 * 25 < len(text.train)
    first = {document.split(" -- ")[0] for document in text.validation if " -- " in document}
    assert first and first.isdisjoint(document.split(" -- ")[0] for document, _ in text.train)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokenizers_load_without_a_warning_and_give_text_back(finished, capfd, caplog):
    trainer, _, folder = finished
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert capfd.readouterr().err == "" and caplog.records == []
    for text in TEXTS[:-1]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids == trainer.processing_class(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:] and tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = tokenizer(["a", "a much longer one"], padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id != tokenizer.eos_token_id and batch["attention_mask"][0][-1] == 0


def test_the_two_tokenizers_differ(text):
    opt, llama = (make([document for document, _ in text.train]) for make, *_ in pretrain.KINDS.values())
    assert opt.convert_ids_to_tokens(opt("of rows 10").input_ids)[0] == "</s>" == opt.bos_token == opt.eos_token
    assert llama.convert_ids_to_tokens(llama("of rows 10").input_ids) == ["<s>", "▁of", "▁rows", "▁", "1", "0"]
    assert "Ġof" in opt.get_vocab() and "Ġof" not in llama.get_vocab() and "▁of" not in opt.get_vocab()
    assert llama.convert_ids_to_tokens(llama("漢").input_ids)[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]


def test_special_tokens_in_a_docstring_are_plain_text(finished):
    tokenizer = finished[0].processing_class
    ids, = encode(tokenizer, [TEXTS[-1]])
    bos, eos, pad = (getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad"))
    inner = ids[1:-1] if bos != eos else ids[1:]
    assert ids[0] == bos and (bos == eos or ids[-1] == eos)
    assert not {bos, eos, pad} & {*inner.tolist()} and tokenizer.decode(inner).strip() == TEXTS[-1]


def test_a_pass_holds_every_document_as_often_as_its_copies():
    documents, copies = [torch.full((size,), size) for size in (3, 5, 7)], [1, 2, 4]
    first, second = token_stream(documents, copies, 2 * 41, seed=0).split(41)
    assert first.bincount().tolist() == second.bincount().tolist() == [0, 0, 0, 3, 0, 10, 0, 28]
    assert not torch.equal(first, second) and not torch.equal(first, token_stream(documents, copies, 41, seed=1))
    assert torch.equal(first[:9], token_stream(documents, copies, 9, seed=0))


def test_the_last_quarter_is_read_in_long_rows(finished):
    trainer, _, _ = finished
    assert [tuple(rows.shape) for rows in trainer.train_dataset] == [(2, 128)] * 3 + [(1, 256)]


# --- models ----------------------------------------------------------------------------------------------------------


def test_written_models_load_and_are_those_that_were_trained(finished):
    trainer, _, folder = finished
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is type(trainer.model) and model.dtype == torch.bfloat16 and not any(info.values())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert all(torch.equal(p, trainer.model.get_parameter(name).bfloat16()) for name, p in model.named_parameters())
    assert model.config.max_position_embeddings == 256 and model.config.vocab_size == len(trainer.processing_class)
    assert {role: getattr(model.config, f"{role}_token_id") for role in ("bos", "eos", "pad")} == {
        role: getattr(trainer.processing_class, f"{role}_token_id") for role in ("bos", "eos", "pad")
    }


def test_written_models_are_students(finished, task):
    student = dk.load_student(finished[2], task)
    batch = dict(student.tokenizer(["a warm story", "dull"], padding=True, return_tensors="pt"))
    assert student.logits(student.init(0), batch).isfinite().all() and student.causal


def test_it_learns_and_writes_down_how(finished):
    _, record, folder = finished
    assert json.loads((folder / "training.json").read_text()) == record
    assert [point["step"] for point in record["curve"]] == [1, 2, 3, 4]
    assert record["tokens"] == STEPS * BATCH and record["text"]["libraries"] == {"alpha": "1.0"}
    assert record["curve"][-1]["validation_loss"] < record["curve"][0]["validation_loss"] - 0.3
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and f"--steps {STEPS} --seed 0" in card
    assert "| 4 | 1,024 | " in card and "alpha 1.0" in card


# --- runs ------------------------------------------------------------------------------------------------------------


def test_the_same_steps_and_seed_give_the_same_bytes(finished, text, tmp_path):
    _, record, folder = finished
    again = write(*train(record["settings"]["name"], text, steps=STEPS, runs=tmp_path / "runs"), tmp_path)
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in FILES)


def test_another_seed_gives_another_model(finished):
    trainer, record, _ = finished
    one, other = (fresh_model(record["settings"]["name"], trainer.processing_class, seed) for seed in (0, 1))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(finished, text, tmp_path, monkeypatch):
    trainer, record, _ = finished
    settings = {"steps": STEPS, "runs": tmp_path}

    step, calls = transformers.Trainer.training_step, itertools.count()

    def stopped(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.Trainer, "training_step", stopped)
        train(record["settings"]["name"], text, **settings)
    again, resumed = train(record["settings"]["name"], text, **settings)
    assert again.state.global_step == STEPS and resumed["curve"] == record["curve"]
    assert all(torch.equal(p.bfloat16(), trainer.model.get_parameter(name)) for name, p in again.model.named_parameters())


def test_runs_with_other_settings_or_text_do_not_meet(opt, text, tmp_path):
    opt(steps=1)
    opt(steps=1, seed=1)
    train("tiny-opt", text._replace(validation=text.validation[1:]), steps=1, runs=tmp_path / "runs")
    assert len([*(tmp_path / "runs").glob("pretrain-tiny-opt-*/checkpoint-1")]) == 3


def test_no_steps_and_too_little_text_are_refused(opt, monkeypatch):
    with pytest.raises(ValueError, match="steps must be .* not 0"):
        opt(steps=0)
    monkeypatch.setattr(pretrain, "BATCH", 2**20)
    with pytest.raises(ValueError, match="too little text.*1048576"):
        opt()


def test_a_loss_that_is_not_finite_is_an_error(opt, monkeypatch):
    monkeypatch.setattr(pretrain, "PEAK", 1e30)
    with pytest.raises(FloatingPointError, match="tiny-opt, step 4: the loss is nan; lower"):
        opt()


def test_the_command_writes_a_model(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "documents_of_libraries", lambda: text)
    where = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    threads = torch.get_num_threads()
    try:
        assert pretrain.main(["tiny-llama", "--steps", "1", *where]) == 0
        assert "256 tokens" in capsys.readouterr().out and (tmp_path / "out/tiny-llama/model.safetensors").is_file()
        (tmp_path / "out/tiny-llama/manifest.json").unlink()
        assert pretrain.main(["tiny-llama", "--steps", "1", *where]) == 2
        assert "will not overwrite" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)


# --- assets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(opt, tmp_path, monkeypatch):
    """A tiny-opt of one step where the package's would be; gives its folder."""
    monkeypatch.setattr(packaged_models, "ASSETS", tmp_path / "assets")
    return write(*opt(steps=1), tmp_path / "assets")


def test_an_asset_is_verified_and_an_older_one_replaced(packaged, opt, tmp_path):
    assert asset("tiny-opt") == packaged
    write(*opt(steps=1, seed=1), tmp_path / "assets")
    assert asset("tiny-opt") == packaged and [path.name for path in packaged.parent.iterdir()] == ["tiny-opt"]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_asset_is_refused(packaged, file):
    content = bytearray((packaged / file).read_bytes())
    content[len(content) // 2] ^= 1
    (packaged / file).write_bytes(content)
    with pytest.raises(AssetError, match=f"{file}.*SHA-256.*make it again: python -m distillkit.assets.pretrain tiny-opt"):
        asset("tiny-opt")


def test_missing_or_unknown_assets_are_named_with_the_remedy(packaged):
    with pytest.raises(AssetError, match="unknown model 'tiny-bert'; the package has tiny-opt, tiny-llama"):
        asset("tiny-bert")
    with pytest.raises(AssetError, match="tiny-llama/manifest.json is missing; reinstall"):
        asset("tiny-llama")
    (packaged / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="model.safetensors is missing; reinstall"):
        asset("tiny-opt")
    (packaged / "manifest.json").write_text('{"sha256": {}}')
    with pytest.raises(AssetError, match="manifest.json is damaged.*make it again"):
        asset("tiny-opt")


def test_a_folder_of_somebody_else_is_not_overwritten(opt, tmp_path):
    (tmp_path / "tiny-opt").mkdir()
    (tmp_path / "tiny-opt" / "notes.txt").write_text("mine")
    with pytest.raises(AssetError, match="will not overwrite.*choose another folder"):
        write(*opt(steps=1), tmp_path)
    assert (tmp_path / "tiny-opt" / "notes.txt").read_text() == "mine"
