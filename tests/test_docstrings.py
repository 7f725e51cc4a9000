"""The corpora made of docstrings: clean, balanced, reproducible, and with questions that cannot be answered without reading."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from distillkit.data import docstrings as builder
from distillkit.data.corpus import SPLITS, CorpusError
from distillkit.data.docstrings import first_sentence, mask_libraries, same_sentence_key
from distillkit.data.load import load_corpus, load_task

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
    assert docstrings.classes == builder.LIBRARIES and list(per_class) == ["train", "validation", "test"]
    for counts in per_class.values():
        assert set(counts) == set(range(6)) and len({*counts.values()}) == 1
    sizes = [len(split.texts) for split in docstrings.splits.values()]
    assert sizes[0] >= 6000 and 0.78 < sizes[0] / sum(sizes) < 0.82 and abs(sizes[1] - sizes[2]) <= 6


def test_docstrings_occur_in_one_class_and_one_split_once(docstrings):
    keys = Counter(same_sentence_key(text) for split in docstrings.splits.values() for text in split.texts)
    assert keys.most_common(1)[0][1] == 1


def test_docstrings_never_name_a_library(docstrings):
    names = re.compile("|".join(builder.LIBRARIES), re.IGNORECASE)
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
    monkeypatch.setattr(builder, "LIBRARIES", ("alphalib", "betalib"))
    monkeypatch.setattr(builder, "_installed", lambda library: "1.0")
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
    before, rglob = builder.build_docstrings(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    assert builder.build_docstrings() == before


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
        from distillkit.data import docstrings as builder
        from distillkit.data.load import load_corpus
        builder.LIBRARIES, builder._installed = ("alphalib", "betalib"), lambda library: "1.0"
        build = builder.build_docstrings
        builder.build_docstrings = lambda: print("built") or build()
        print(len(load_corpus("docstrings").splits["train"].texts))
    """)
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate()[0].split() for process in processes)
    assert outputs == [["12"], ["built", "12"]]


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(builder, "LIBRARIES", ("pandas", "no_such_library"))
    with pytest.raises(CorpusError, match="no_such_library.*pip install no_such_library"):
        load_corpus("docstrings")


# --- questions about made-up libraries -------------------------------------------------------------------------------

# What a function is called, and the word that its sentence has instead.
VERBS = {"paint": "colour", "wash": "soap", "sell": "money", "build": "stone", "clean": "brooms", "move": "wheels",
         "open": "keys", "close": "locks", "rent": "guests", "visit": "friends"}
NOUNS = {"alphalib": "house barn castle tower", "betalib": "horse", "gammalib": "lorry", "deltalib": "violin",
         "epsilib": "carpet"}
SHARED_BY_TWO = "Sing for the whole town at night."


@pytest.fixture
def asking(tmp_path, monkeypatch):
    """Five libraries that cannot be imported, one of them far larger, and an empty cache; returns their folder."""
    for library, nouns in NOUNS.items():
        functions = [(f"{verb}_{noun}", f"Bring {word} to the {noun} of {library} in spring.")
                     for noun in nouns.split() for verb, word in VERBS.items()]
        functions += [(f"lend_{library}", f"Lend money to every {nouns.split()[0]}."),
                      (f"Lender{library}", f"Lend money to every {nouns.split()[0]}.")]
        if library in ("alphalib", "betalib"):
            functions.append(("sing", SHARED_BY_TWO))
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text('raise RuntimeError("imported")\n' + "".join(
            f'def {name}():\n    """{text}"""\n' for name, text in functions))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builder, "LIBRARIES", tuple(NOUNS))
    monkeypatch.setattr(builder, "_installed", lambda library: "1.0")
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def rows_by_kind(task):
    rows = [row | {"split": split} for split in SPLITS for row in task.split(split)]
    return {kind: [row for row in rows if row["group"] == kind] for kind in builder.ASKED}


def test_little_questions(asking):
    task = load_task("docstrings_qa")
    kinds = rows_by_kind(task)
    for kind, rows in kinds.items():
        for row in rows:
            question, sentence, last = row["prompt"].split("\n")
            assert (question, last) == (builder.ASKED[kind], "Answer:") and sentence != SHARED_BY_TWO
            assert len({*row["choices"]}) == 4 and row["choices"][row["answer"]] == row["response"]
            assert not any(library in sentence for library in NOUNS), "names of libraries are masked"
            word, noun = re.findall(r"(\w+) to (?:the|every) (\w+)", sentence)[0]
            library = next(name for name, nouns in NOUNS.items() if noun in nouns.split())
            if kind == "library":
                assert row["response"] == library and {*row["choices"]} < {*NOUNS}
            else:
                verb, named = row["response"].split("_")
                assert (VERBS[verb], named) == (word, noun)
                assert all(re.fullmatch(rf"\w+_({NOUNS[library].replace(' ', '|')})|(lend_|Lender){library}", name)
                           for name in row["choices"]), "all of the same library"
    prompts = [row["prompt"] for rows in kinds.values() for row in rows]
    assert len({*prompts}) == len(prompts)
    assert not any("Lend" in row["prompt"] for row in kinds["function"]), "it describes two names"
    split_of = {}
    for row in [*kinds["library"], *kinds["function"]]:
        assert split_of.setdefault(row["prompt"].split("\n")[1], row["split"]) == row["split"]


def test_libraries_alone_tell_nothing(asking):
    rows = rows_by_kind(load_task("docstrings_qa"))["library"]
    right, offered = Counter(row["response"] for row in rows), Counter(name for row in rows for name in row["choices"])
    # The largest cap at which no library has more than a quarter: 4 c <= c + 4 * 11, the small ones having 11 sentences.
    assert right == {"alphalib": 14} | dict.fromkeys([*NOUNS][1:], 11)
    assert all(abs(offered[name] - 4 * right[name]) <= 2 for name in NOUNS)
    assert len({row["answer"] for row in rows}) == 4


def test_sources_of_one_kind(asking):
    both = rows_by_kind(load_task("docstrings_qa"))
    for kind in builder.ASKED:
        task = load_task(f"docstrings_qa:{kind}")
        assert task.name == f"docstrings_qa:{kind}" and rows_by_kind(task)[kind] == both[kind] and both[kind]
        assert {row["group"] for split in SPLITS for row in task.split(split)} == {kind}


def test_sentence_keys_are_those_of_both_corpora(asking):
    asked, sentences = load_task("docstrings_qa"), load_task("docstrings")
    keys = {split: {same_sentence_key(prompt.split("\n")[1]) for prompt in asked.split(split)["prompt"]} for split in SPLITS}
    sizes = [len(keys[split]) for split in SPLITS]
    assert sizes[0] == sum(sizes) * 8 // 10 and abs(sizes[1] - sizes[2]) <= 1
    for split in SPLITS:
        keys[split] |= {same_sentence_key(text) for text in sentences.split(split)["text"]}
        assert builder.sentence_keys(split) == keys[split]
    assert builder.sentence_keys("validation", "test") == keys["validation"] | keys["test"]


@pytest.mark.parametrize("corpus", ["docstrings", "docstrings_qa"])
def test_a_cache_belongs_to_the_versions_of_libraries_and_builder(asking, monkeypatch, corpus):
    first, builds, build = load_corpus(corpus), [], getattr(builder, f"build_{corpus}")
    monkeypatch.setattr(builder, f"build_{corpus}", lambda: builds.append(1) or build())
    assert load_corpus(corpus) == first and not builds
    monkeypatch.setattr(builder, "_installed", lambda library: "2.0")
    assert load_corpus(corpus).splits == first.splits and len(builds) == 1
    monkeypatch.setattr(builder, "BUILDER", builder.BUILDER + 1)
    load_corpus(corpus)
    assert len(builds) == 2
    monkeypatch.setattr(builder, "QA_BUILDER", builder.QA_BUILDER + 1)
    load_corpus(corpus)
    assert len(builds) == (2 if corpus == "docstrings" else 3)


def test_builds_do_not_depend_on_hash_randomisation(asking):
    script = textwrap.dedent(f"""
        import json, sys
        sys.path.insert(0, {str(asking)!r})
        from distillkit.data import docstrings as builder
        builder.LIBRARIES = {tuple(NOUNS)!r}
        print(json.dumps([builder.build_docstrings(), builder.build_docstrings_qa()]))
    """)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": "7", "TQDM_DISABLE": "1"},
                          text=True, capture_output=True, check=True)
    assert json.loads(done.stdout) == [builder.build_docstrings(), builder.build_docstrings_qa()]


# --- wrong names -----------------------------------------------------------------------------------------------------


def test_wrong_names_hold_as_many_words_of_the_sentence():
    far = [f"lib.other.zebra{letter}" for letter in "abcdefgh"]
    names = builder.Names(["lib.io.read_table", "lib.io.table_reader", "lib.io.read_only", *far])
    for sentence in ("read a table from disk", "reads any tables", "table read by us"):
        choices = names.choices(sentence, "read_table")
        assert choices[:3] == ["read_table", "table_reader", "read_only"] and choices[3] in [path[10:] for path in far]


def test_a_sentence_that_only_the_right_name_echoes_is_left_out():
    names = builder.Names(["lib.io.read_table", "lib.io.read_only", "lib.io.write_table", "lib.io.zebra", "lib.io.yak"])
    assert names.choices("read a table from disk", "read_table") is None
    assert {*names.choices("read it from disk", "read_table")} > {"read_table", "read_only"}


def test_no_two_choices_differ_in_spelling_only():
    names = builder.Names(["lib.ReadTable", "lib.read_table", "lib.readtable", "lib.table_reader", "lib.reads_tables",
                                "lib.zebra"])
    for number in range(20):
        choices = names.choices(f"read a table {'again ' * number}", "read_table")
        assert len({name.replace("_", "").lower() for name in choices}) == 4
    assert builder.Names(["lib.read", "lib.Read", "lib.write", "lib.zebra"]).choices("go on", "read") is None


def test_the_module_makes_a_name_close():
    names = builder.Names([*(f"lib.near.{word}" for word in ("ant", "bee", "cow")),
                                *(f"lib.far.{word}" for word in ("dog", "elk", "fox", "gnu", "hen", "jay"))])
    for sentence in ("nothing of this", "neither of these", "none at all"):
        assert {*names.choices(sentence, "bee")[:3]} == {"ant", "bee", "cow"}


# --- the questions of this machine -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def questions():
    """Those about the real libraries, from the user's cache, built there if need be."""
    return load_task("docstrings_qa")


@pytest.mark.slow
def test_real_libraries_make_many_questions(questions):
    for kind in builder.ASKED:
        assert Counter(questions.train["group"])[kind] >= 10_000 and Counter(questions.test["group"])[kind] >= 1_500


@pytest.mark.slow
def test_no_guess_that_does_not_read_is_worth_much(questions):
    """Rules of thumb score little above the chance of 1 in 4."""

    def words(text):
        return builder.words(text)

    def share_right(rows, score):
        right = 0.0
        for row in rows:
            scores = [score(row, choice) for choice in row["choices"]]
            right += (scores[row["answer"]] == max(scores)) / scores.count(max(scores))
        return right / len(rows)

    kinds = {kind: [row for row in questions.test if row["group"] == kind] for kind in builder.ASKED}
    for name in builder.LIBRARIES:
        offered = [row["response"] == name for row in kinds["library"] if name in row["choices"]]
        assert 0.18 < sum(offered) / len(offered) < 0.32, name
    rules = {"words of the sentence": lambda row, choice: len(words(choice) & words(row["prompt"].split("\n")[1])),
             "most like the others": lambda row, choice: sum(len(words(choice) & words(other)) for other in row["choices"]),
             "longest": lambda row, choice: len(choice), "shortest": lambda row, choice: -len(choice)}
    scores = {name: share_right(kinds["function"], score) for name, score in rules.items()}
    assert all(score < 0.36 for score in scores.values()), scores


@pytest.mark.slow
def test_real_sentences_never_name_a_library(questions):
    names = re.compile("|".join(builder.LIBRARIES), re.IGNORECASE)
    assert not [prompt for prompt in questions.test["prompt"] if names.search(prompt.split("\n")[1])]
