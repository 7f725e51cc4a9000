"""Where corpora are looked for: folders, known names and the hub, and nothing is read in place of another thing."""

import json
import re
import subprocess
import sys
import textwrap

import pytest

from distillkit.data import corpora
from distillkit.data.corpus import CorpusError
from distillkit.data.load import load_corpus


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes rows as train and test where a known name would look, and gives their folder."""
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))

    def write(rows=({"text": "a", "label": 0}, {"text": "b", "label": 1}), name="mine", labels=None):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if labels is not None:
            (tmp_path / name / "labels.json").write_text(json.dumps(labels))
        return tmp_path / name

    return write


def test_a_folder_is_a_corpus_whatever_its_name_is(folder):
    """One that is named like a known corpus is read as what it holds."""
    corpus = load_corpus(folder(name="mmlu", labels=["no", "yes"]))
    assert (corpus.name, corpus.layout, corpus.classes) == ("mmlu", "labels", ("no", "yes"))
    assert corpus.splits["train"].texts == ["a", "b"] and corpus.splits["test"].labels == [0, 1]


def test_known_name_is_looked_for_in_the_data_folder_first(folder, standin_hub, monkeypatch, tmp_path):
    rows = [{"sentence": "a local sentence", "label": 1}]
    folder(rows, "sst2")
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))  # which the stand-in hub hides
    assert load_corpus("sst2").splits["train"].texts == ["a local sentence"]
    assert load_corpus("sst2").classes == ("negative", "positive")
    assert load_corpus("imdb").origin == "Hugging Face hub, stanfordnlp/imdb"


def test_the_hub_is_read_for_every_known_name(standin_hub):
    import standin_hub as hub

    for name, known in corpora.KNOWN.items():
        if known.rows != "labels":
            continue
        corpus, (_, _, classes, _, sizes) = load_corpus(name), hub.DATASETS[known.hub_id]
        assert corpus.name == name and corpus.classes == tuple(classes) == known.classes
        assert set(corpus.splits) == set(sizes) - {"unsupervised"}
        assert len(corpus.splits["train"].texts) == 40 * len(classes)


def test_any_hub_id_is_read_with_its_own_class_names(standin_hub):
    corpus = load_corpus("fancyzhx/ag_news")
    assert corpus.name == "fancyzhx/ag_news" and corpus.classes == ("World", "Sports", "Business", "Sci/Tech")


@pytest.mark.parametrize("name", ["ag_news", "nobody/nothing"])
def test_not_found_says_where_it_looked_and_what_to_do(name, standin_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty")
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    message = str(caught.value)
    hub_id = "fancyzhx/ag_news" if name == "ag_news" else name
    assert f"{name} was not found" in message and hub_id in message and str(standin_hub) in message
    assert all(remedy in message for remedy in ("without internet", "DISTILLKIT_DATA", "HF_HOME", "docstrings"))
    assert name != "ag_news" or str(tmp_path / "ag_news") in message


@pytest.mark.parametrize("source", ["docstring", "arc_eassy", "mmmlu", "./absent", "", None, 3])
def test_unknown_names_are_refused_by_name(source):
    with pytest.raises(CorpusError, match=re.escape(repr(source))):
        load_corpus(source)


def test_a_near_miss_is_pointed_out():
    with pytest.raises(CorpusError, match="did you mean 'rotten_tomatoes'"):
        load_corpus("rotten_tomatos")


def test_folder_without_the_columns(folder):
    with pytest.raises(CorpusError, match="train.jsonl has no column 'text'.*it has words, label; .*text_column"):
        load_corpus(folder([{"words": "a", "label": 0}]))
    with pytest.raises(CorpusError, match="train.jsonl has no column 'label'.*it has text, mark; .*label_column"):
        load_corpus(folder([{"text": "a", "mark": 0}], "other"))


def test_folders_and_files_that_are_no_corpus(folder, tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(CorpusError, match="void holds none of train, validation, dev, test"):
        load_corpus(tmp_path / "void")
    with pytest.raises(CorpusError, match="train.jsonl has no column 'text'.*it has none"):
        load_corpus(folder([]))


@pytest.mark.parametrize("labels", [{"a": 0}, ["a", "a"], [0, 1], "ab"])
def test_bad_labels_json_is_named(folder, labels):
    with pytest.raises(CorpusError, match="labels.json: must be a list of distinct class names"):
        load_corpus(folder(labels=labels))


# --- the stand-in hub itself -----------------------------------------------------------------------------------------


def test_the_stand_in_resolves_every_model_in_a_subprocess(standin_home):
    """As the notebooks see it: the real from_pretrained, on an environment alone."""
    import standin_hub as hub

    script = textwrap.dedent(f"""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        for name in {list(hub.MODELS)!r}:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3)
            batch = tokenizer(["A warm, funny story", "unheard-of"], padding=True, return_tensors="pt")
            assert model(**batch).logits.shape == (2, 3) and model.config.vocab_size == len(tokenizer)
            assert tokenizer.unk_token_id not in batch["input_ids"][0].tolist()
            print(type(model).__name__)
    """)
    environment = hub.environment(standin_home)
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    kinds = ["Bert", "DistilBert", "Roberta", "Bert"]
    assert done.stdout.split()[:4] == [f"{kind}ForSequenceClassification" for kind in kinds]


def test_the_stand_in_is_the_same_every_time(standin_home, tmp_path):
    import standin_hub as hub

    again = hub.fill(tmp_path / "again")
    for path in sorted(standin_home.rglob("*")):
        twin = again / path.relative_to(standin_home)
        if path.suffix in {".safetensors", ".arrow"} or path.name in {"tokenizer.json", "config.json"}:
            assert path.read_bytes() == twin.read_bytes(), path.name
