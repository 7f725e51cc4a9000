"""Corpora: the offline corpus is clean, balanced and reproducible, and nothing is found in place of another thing."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from distillkit.data import corpora
from distillkit.data.corpora import CorpusError, first_sentence, mask_libraries, same_sentence_key
from distillkit.data.load import load_corpus

# --- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("docstring, expected", [
    ("Return the sum of two numbers.", "Return the sum of two numbers."),
    ("\n    Return the sum\n    of two   numbers.\n\n    Parameters\n    ------\n", "Return the sum of two numbers."),
    ("Return the sum of all. Then another sentence follows.", "Return the sum of all."),
    ("Return one value, e.g. The mean of it, or more.", "Return one value, e.g. The mean of it, or more."),
    ("Return the :func:`~a.b.mean` of ``x`` and *all* of `y`.", "Return the a.b.mean of x and all of y."),
    ("See the `User Guide <https://x.org/guide>`_ for more on it.", "See the User Guide for more on it."),
    ("Read more of this at https://x.org/guide and elsewhere.", "Read more of this at and elsewhere."),
    ("Turn a pandas.DataFrame into a torch one.", "Turn a library into a library one."),
    ("Too short.", None),
    (" ".join(["word"] * 61), None),
    ("mean(x, axis=None) computes the mean of it", None),
    ("mean(input, dim) -> Tensor", None),
    (">>> call this function with these words", None),
    ("A heading in many words\n=======================", None),
    (".. deprecated:: it is gone since long ago", None),
    ("a + b - c * (d / e) == f_{1} ^ g [h] | {i} what", None),
    ("Return one of :class:`list' and of many others.", None),
    ("", None),
])
def test_first_sentence(docstring, expected):
    assert first_sentence(docstring) == expected


@pytest.mark.parametrize("word", [
    "torch", "PyTorch", "torch.nn.Linear", "is_torch_available", "NetworkXError", "nx.Graph", "pd", "pandas", "SciPy",
    "mpl_toolkits.mplot3d", "plt.show", "pyplot", "SymPyGamma",
])
def test_names_and_aliases_are_masked(word):
    assert mask_libraries(f"Use {word}, or {word}'s own.") == "Use library, or library's own."


@pytest.mark.parametrize("word", ["sample", "update", "complex", "n-th", "touch", "symbol", "spike", "pdf", "index"])
def test_other_words_are_not_masked(word):
    assert mask_libraries(f"Use {word}, or {word}'s own.") == f"Use {word}, or {word}'s own."


def test_same_sentence_key_ignores_case_digits_and_punctuation():
    assert same_sentence_key("Type-2 DCT, of X!") == same_sentence_key("type 1 dct of x") == "type dct of x"
    assert same_sentence_key("Type of X") != same_sentence_key("Type of Y")


# --- the corpus of this machine --------------------------------------------------------------------------------------


def test_docstrings_are_balanced_and_of_useful_size(docstrings):
    per_class = {name: Counter(split.labels) for name, split in docstrings.splits.items()}
    assert docstrings.classes == corpora.LIBRARIES and list(per_class) == ["train", "validation", "test"]
    for counts in per_class.values():
        assert set(counts) == set(range(6)) and len({*counts.values()}) == 1
    sizes = [len(split.texts) for split in docstrings.splits.values()]
    assert sizes[0] >= 6000 and 0.78 < sizes[0] / sum(sizes) < 0.82 and abs(sizes[1] - sizes[2]) <= 6


def test_docstrings_occur_in_one_class_and_one_split_once(docstrings):
    keys = Counter(same_sentence_key(text) for split in docstrings.splits.values() for text in split.texts)
    assert keys.most_common(1)[0][1] == 1


def test_docstrings_never_name_a_library(docstrings):
    names = re.compile("|".join(corpora.LIBRARIES), re.IGNORECASE)
    alias = re.compile(r"(?<![A-Za-z0-9])(mpl|plt|pyplot|pylab|nx|pd|mplot3d)(?![A-Za-z0-9])", re.IGNORECASE)
    texts = [text for split in docstrings.splits.values() for text in split.texts]
    assert [text for text in texts if names.search(text) or alias.search(text)] == []
    assert sum("library" in text for text in texts) > 20, "some sentences named one"


def test_docstrings_are_plain_sentences(docstrings):
    for split in docstrings.splits.values():
        for text in split.texts:
            assert 4 <= len(text.split()) <= 60 and text == " ".join(text.split())
            assert not re.search(r"``|:\w+:`|://|->|>>>", text), text


# --- a corpus of made-up libraries -----------------------------------------------------------------------------------

COLOURS, ANIMALS = "red green blue black white grey brown pink", "cat dog fox hen cow owl pig ape"
SHARED = "Close the open file."


@pytest.fixture
def little(tmp_path, monkeypatch):
    """Two libraries that cannot be imported, and an empty cache; returns the folder that holds both."""
    for library, words in (("alphalib", COLOURS), ("betalib", ANIMALS)):
        _write_library(tmp_path / library, library, words.split())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(corpora, "LIBRARIES", ("alphalib", "betalib"))
    monkeypatch.setattr(corpora, "_installed", lambda library: "1.0")
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _write_library(folder, name, words):
    def function(sentence, number):
        return f'def f{number}():\n    """{sentence}\n\n    More text.\n    """\n'

    (folder / "inner" / "tests").mkdir(parents=True)
    sentences = [f"Paint the {word} house of {name}." for word in words]
    (folder / "__init__.py").write_text('raise RuntimeError("imported")\n' + function(SHARED, 0))
    (folder / "inner" / "a.py").write_text("\n".join(function(text, number) for number, text in enumerate(sentences)))
    (folder / "inner" / "b.py").write_text(function(sentences[0].upper(), 0))  # the same but for its case
    (folder / "inner" / "tests" / "c.py").write_text(function(f"Test the {name} house for ghosts.", 0))
    (folder / "inner" / "broken.py").write_text("def f(:\n")
    (folder / "inner" / "latin.py").write_bytes(b'"""A caf\xe9 in a latin file."""\n')


def test_little_corpus(little):
    corpus = load_corpus("docstrings")
    texts = [text for split in corpus.splits.values() for text in split.texts]
    labels = [label for split in corpus.splits.values() for label in split.labels]
    assert len(texts) == 16 and Counter(labels) == {0: 8, 1: 8}
    assert not any("ghosts" in text or text == SHARED for text in texts)
    for text, label in zip(texts, labels):
        word = text.lower().split()[2]
        assert word in (COLOURS, ANIMALS)[label].split() and "lib." not in text and "library" in text
    assert [len(split.texts) for split in corpus.splits.values()] == [12, 2, 2]


def test_build_does_not_depend_on_the_order_of_files(little, monkeypatch):
    before, rglob = corpora.build_docstrings(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    assert corpora.build_docstrings() == before


def test_build_does_not_depend_on_hash_randomisation(little):
    script = textwrap.dedent(f"""
        import json, sys
        sys.path.insert(0, {str(little)!r})
        from distillkit.data import corpora
        from distillkit.data.load import load_corpus
        corpora.LIBRARIES = ("alphalib", "betalib")
        print(json.dumps(corpora.build_docstrings()))
    """)
    environment = dict(os.environ, TQDM_DISABLE="1")
    outputs = [subprocess.run([sys.executable, "-c", script], env=environment | {"PYTHONHASHSEED": seed}, text=True,
                              capture_output=True, check=True).stdout for seed in ("1", "2")]
    assert outputs[0] == outputs[1] and json.loads(outputs[0]) == corpora.build_docstrings()


def test_the_cache_is_used_and_belongs_to_the_versions(little, monkeypatch):
    first, builds, build = load_corpus("docstrings"), [], corpora.build_docstrings
    monkeypatch.setattr(corpora, "build_docstrings", lambda: builds.append(1) or build())
    assert load_corpus("docstrings") == first and not builds
    monkeypatch.setattr(corpora, "_installed", lambda library: "2.0")
    load_corpus("docstrings")
    monkeypatch.setattr(corpora, "BUILDER", corpora.BUILDER + 1)
    load_corpus("docstrings")
    assert len(builds) == 2


def test_a_damaged_cache_is_built_again_with_a_warning(little):
    first = load_corpus("docstrings")
    (path,) = (little / "cache" / "corpora").glob("*.safetensors")
    path.write_bytes(path.read_bytes().replace(b"Paint", b"Faint"))
    with pytest.warns(UserWarning, match="built again.*SHA-256"):
        assert load_corpus("docstrings") == first
    assert b"Faint" not in path.read_bytes()


def test_two_processes_at_once_build_once(little):
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(little)!r})
        from distillkit.data import corpora
        from distillkit.data.load import load_corpus
        corpora.LIBRARIES, corpora._installed = ("alphalib", "betalib"), lambda library: "1.0"
        build = corpora.build_docstrings
        corpora.build_docstrings = lambda: print("built") or build()
        print(len(load_corpus("docstrings").splits["train"].texts))
    """)
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate()[0].split() for process in processes)
    assert outputs == [["12"], ["built", "12"]]


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(corpora, "LIBRARIES", ("pandas", "no_such_library"))
    with pytest.raises(CorpusError, match="no_such_library.*pip install no_such_library"):
        load_corpus("docstrings")


# --- folders, known names, the hub -----------------------------------------------------------------------------------

ROWS = [{"text": "NA", "label": 0}, {"text": 'a "quoted", line\u2028with a separator', "label": 1}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes the same two rows as train and test in the format that is asked for, where a known name would look."""
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))

    def write(suffix="jsonl", name="mine", rows=ROWS, labels=None):
        import pandas

        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            path, table = tmp_path / name / f"{split}.{suffix}", pandas.DataFrame(rows)
            if suffix == "jsonl":
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            else:
                table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
        if labels is not None:
            (tmp_path / name / "labels.json").write_text(json.dumps(labels))
        return tmp_path / name

    return write


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_folder_formats_give_the_same_text(folder, suffix):
    corpus = load_corpus(folder(suffix, labels=["no", "yes"]))
    assert corpus.name == "mine" and corpus.classes == ("no", "yes") and list(corpus.splits) == ["train", "test"]
    assert corpus.splits["train"].texts == [row["text"] for row in ROWS]
    assert [int(label) for label in corpus.splits["train"].labels] == [0, 1]


def test_dev_counts_as_validation(folder):
    path = folder()
    (path / "test.jsonl").rename(path / "dev.jsonl")
    assert list(load_corpus(path).splits) == ["train", "validation"]


def test_known_name_is_looked_for_in_the_data_folder_first(folder, standin_hub, monkeypatch, tmp_path):
    rows = [{"sentence": "a local sentence", "label": 1}]
    folder(name="sst2", rows=rows)
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))  # which the stand-in hub hides
    assert load_corpus("sst2").splits["train"].texts == ["a local sentence"]
    assert load_corpus("sst2").classes == ("negative", "positive")
    assert load_corpus("imdb").origin == "Hugging Face hub, stanfordnlp/imdb"


def test_the_hub_is_read_for_every_known_name(standin_hub):
    import standin_hub as hub

    for name, known in corpora.KNOWN.items():
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
    with pytest.raises(CorpusError, match="train.jsonl has no text column: it has words, label; name .* 'text'"):
        load_corpus(folder(rows=[{"words": "a", "label": 0}]))
    with pytest.raises(CorpusError, match="train.csv has no label column: it has text, mark; name .* 'label'"):
        load_corpus(folder("csv", "other", rows=[{"text": "a", "mark": 0}]))


@pytest.mark.parametrize("content, message", [
    ('{"text": "a", "label": 0}\n{"text": \n', "line 2: not JSON"),
    ('["a", 0]\n', "line 1: .* not a JSON object"),
    ("", "no columns at all"),
])
def test_bad_lines_are_named(folder, content, message):
    path = folder()
    (path / "train.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=f"train.jsonl.*{message}"):
        load_corpus(path)


def test_bad_files_are_named(folder, tmp_path):
    path = folder("csv")
    (path / "train.csv").write_bytes(b"text,label\ncaf\xe9,0\n")
    with pytest.raises(CorpusError, match="train.csv: not UTF-8"):
        load_corpus(path)
    (path / "train.csv").unlink()
    (path / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(CorpusError, match="train.parquet: not a readable parquet"):
        load_corpus(path)
    (path / "train.jsonl").write_text("{}")
    with pytest.raises(CorpusError, match="train.jsonl and train.parquet; keep one"):
        load_corpus(path)
    (tmp_path / "void").mkdir()
    with pytest.raises(CorpusError, match="void holds none of train, validation, dev, test"):
        load_corpus(tmp_path / "void")


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
