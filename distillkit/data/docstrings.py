"""The corpora that are always there: real English from the docstrings of six installed libraries.

The sources are parsed, never imported. A docstring gives its first sentence, with library names masked. A sentence found
in two libraries is dropped, and one found twice counts once, so that nothing stands in two classes or two splits.

* **docstrings**: the class of a sentence is the library it came from, which must be read from what the sentence says. Every
  class has as many rows as the smallest library can fill.
* **docstrings_qa**: questions about the sentences, all with four choices, and so that the choices alone tell nothing:

  * **library**: which library is this sentence from? The two kinds of guessing that need no reading are worth no more than
    chance. No library has more than a quarter of the rows (the largest lose the rest), and each is offered as a wrong
    choice three times as often as it is right.
  * **function**: which function or class does this sentence describe? All choices are names of one library. Two of the
    wrong ones are close: they hold as many words of the sentence as can be found, and as little else, up to what the right
    one does, and then they share words or the module with it; for two questions in three the second is close to the first
    instead, or the name that is most like the others would be the right one. The third is any name. Where each wrong name
    holds fewer words of the sentence than the right one, the question is left out; so is a sentence that describes
    several names.

Rows are ordered by the SHA-256 of their sentence: a shuffle that needs no random numbers and does not depend on the order
of files.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from distillkit.data.corpus import PROMPT_COLUMNS, SPLITS, Corpus, CorpusError, Split
from distillkit.io.files import read_file, write_file
from distillkit.io.progress import progress
from distillkit.io.seeds import generator
from distillkit.io.storage import Claim, StorageError, cache_dir

LIBRARIES = ("matplotlib", "networkx", "pandas", "scipy", "sympy", "torch")
ALIASES = frozenset({"mpl", "plt", "pyplot", "pylab", "nx", "pd", "mplot3d"})
MASK = "library"
# Tests describe test cases, and vendored code is other people's.
SKIPPED = frozenset({"test", "tests", "testing", "_testing", "_vendor", "_vendored", "vendor", "extern", "externals"})
# The kinds of questions.
ASKED = {"library": "Which library is this sentence from?",
         "function": "Which function or class does this sentence describe?"}
CHOICES = 4
SHARE = 4  # how many words of a sentence are worth as much as a name that holds nothing else
BUILDER, QA_BUILDER = 3, 2  # raise whenever the same sources would give other sentences, or other questions


def docstring_corpus() -> Corpus:
    """The sentences and their libraries, from the cache or built."""
    rows, origin = built("docstrings", build_docstrings, BUILDER)
    splits = {name: Split(**split, place=f"the docstring corpus, split {name}", where=[f"split {name}"] * len(split["texts"]))
              for name, split in rows.items()}
    return Corpus("docstrings", LIBRARIES, splits, f"first sentences of the docstrings of installed libraries: {origin}")


def docstrings_qa(source: str = "docstrings_qa") -> Corpus:
    """The questions, from the cache or built; "docstrings_qa:library" and ":function" are of one kind only."""
    rows, origin = built("docstrings_qa", build_docstrings_qa, [BUILDER, QA_BUILDER])
    kinds = {source.partition(":")[2]} - {""} or {*ASKED}
    splits = {}
    for name, columns in rows.items():
        chosen = [row for row, kind in enumerate(columns["group"]) if kind in kinds]
        further = {column: [values[row] for row in chosen] for column, values in columns.items()}
        where = [f"split {name}"] * len(chosen)
        splits[name] = Split(further.pop("prompt"), further.pop("response"), f"the corpus {source}", where, further)
    return Corpus(source, None, splits, f"questions about the docstrings of installed libraries: {origin}", "prompts")


def sentence_keys(*splits: str) -> frozenset[str]:
    """The `same_sentence_key`s of the sentences that the two corpora hold in those splits.

    Pre-training leaves them out. Settings are chosen on validation rows, so what is read there counts as much as in test.
    """
    questions, sentences = docstrings_qa().splits, docstring_corpus().splits
    return frozenset(same_sentence_key(text) for split in splits
                     for text in [*sentences[split].texts, *(prompt.split("\n")[1] for prompt in questions[split].texts)])


# --- the cache -------------------------------------------------------------------------------------------------------


def built(name: str, build: Callable[[], dict], builder) -> tuple[dict, str]:
    """The rows of a corpus, from the cache if they were built from the versions installed now; and those versions in words.

    `builder` (JSON) changes whenever `build` would make other rows of the same versions.
    """
    versions = {library: _installed(library) for library in LIBRARIES}
    recipe = {"builder": builder, "python": list(sys.version_info[:3]), "versions": versions}
    key = _digest(json.dumps(recipe, sort_keys=True))[:16]
    path = cache_dir() / "corpora" / f"{name}-{key}.safetensors"
    with Claim(path, wait=True):  # of two processes, one builds and the other waits
        try:
            stored = read_file(path, kind="corpus", identity=recipe)
            rows = json.loads(stored.tensors["splits"].numpy().tobytes())
        except StorageError as error:
            if path.exists():
                warnings.warn(f"the cached docstring corpus is built again: {error}", stacklevel=4)
                path.unlink()
            rows = build()
            text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)  # too long for a header
            write_file(path, kind="corpus", identity=recipe, tensors={"splits": text})
    return rows, ", ".join(f"{library} {version}" for library, version in versions.items())


def _root(library: str) -> Path:
    spec = importlib.util.find_spec(library)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(f"the docstring corpus needs the library {library}, which is not installed here; "
                          f"run: {Path(sys.executable).name} -m pip install {library}")
    return Path(spec.submodule_search_locations[0])


def _installed(library: str) -> str:
    _root(library)
    return importlib.metadata.version(library)


# --- docstrings of a library -----------------------------------------------------------------------------------------

NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documented(library: str) -> dict[str, str]:
    """The docstrings of an installed library by dotted path, such as ``scipy.signal.convolve``; parsed, never imported.

    Names with a leading underscore are private and left out, private modules are not: much that is public is defined in
    them, and their names are left out of the path.
    """
    result: dict[str, str] = {}
    for parts, path, docstring in _docstrings(library):
        if path and SKIPPED.isdisjoint(parts):
            result.setdefault(path, docstring)
    return result


def _docstrings(library: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """(parts of the module's name, dotted path or "" for private names, docstring) of every definition of a library."""
    root = _root(library)
    gc.disable()  # parsing makes millions of nodes and no cycles; looking for cycles among them takes as long as parsing
    try:
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root.parent).with_suffix("").parts
            if not SKIPPED.isdisjoint(parts[:-1]):
                continue
            module = [part for part in parts if not part.startswith("_")]
            tree = ast.Module([], [])  # of templates and other files that are not Python
            with suppress(SyntaxError, ValueError), warnings.catch_warnings(action="ignore"):  # invalid escape sequences
                tree = ast.parse(file.read_bytes())
            for path, docstring in _named_docstrings(tree, module):
                yield parts, ".".join(path), docstring
    finally:
        gc.enable()


def _named_docstrings(node: ast.AST, path: list[str]) -> Iterator[tuple[list[str], str]]:
    """(dotted path, docstring) of `node`, which stands at `path`, and of the definitions inside it.

    The path is empty for private names and what is inside of them. Like `ast.walk`, which is slow because it visits
    expressions too.
    """
    if isinstance(node, (ast.Module, *NAMED)) and (text := ast.get_docstring(node)):
        yield path, text
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            inner = path
            if path and isinstance(child, NAMED):
                inner = [] if child.name.startswith("_") else [*path, child.name]
            yield from _named_docstrings(child, inner)


# --- sentences -------------------------------------------------------------------------------------------------------

SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\bcf\.)(?<!\bal\.)(?<=[.!?])\s+(?=[A-Z\"'(\[])")
# Signatures, headings, directives and code.
NO_SENTENCE = re.compile(r"->|>>>|::\s*$|={3}|-{3}|~{3}|^\s*(\.\.|@|[-*+] )|^\w[\w.]*\(")
MARKUP = (
    (r":[\w:+-]+:`([^`]*)`", r"`\1`"),  # roles
    (r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1"),  # links with a title
    (r"<?\w+://[^\s>]+>?", ""),  # and without
    (r"`+~?\.?([^`]*?)`+_*", r"\1"),
    (r"\*\*(.+?)\*\*|(?<!\w)\*(\w[^*]*?)\*(?!\w)", r"\1\2"),
)


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring as plain text with library names masked, or None where there is none.

    Markup is taken off, white space collapsed. Dropped are signatures, headings and code, and what has fewer than 4 or
    more than 60 words.
    """
    text = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    if NO_SENTENCE.search(text):
        return None
    text = without_markup(text)
    text = mask_libraries(SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0])
    letters = [len(word) for word in re.findall(r"[A-Za-z]{2,}", text)]
    is_plain = not re.search(r"`|:\w+:|://", text)  # no broken markup
    is_prose = 4 <= len(text.split()) <= 60 and len(letters) >= 4 and sum(letters) >= 0.6 * len(text.replace(" ", ""))
    return text if is_plain and is_prose else None


def without_markup(text: str) -> str:
    """`text` without roles, the targets of links, and signs of emphasis."""
    for markup, plain in MARKUP:
        text = re.sub(markup, plain, text)
    return text


def mask_libraries(text: str) -> str:
    """`text` with each word or dotted path that names one of the libraries, or a usual alias, replaced by `library`."""
    return re.sub(r"[A-Za-z0-9_.]+", lambda match: _masked(match[0], LIBRARIES), text)


@cache  # a million words are looked at, few of them different
def _masked(word: str, libraries: tuple[str, ...]) -> str:
    name = word.lower()
    is_name = any(library in name for library in libraries) or not ALIASES.isdisjoint(re.split(r"[._]", name))
    return MASK + "." * name.endswith(".") if is_name else word


def same_sentence_key(text: str) -> str:
    """Equal for sentences that differ in case, digits, punctuation or spacing only."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sentences(*, public: bool) -> dict[str, dict[str, tuple[str, set[str]]]]:
    """library -> key -> (first sentence, the dotted paths it describes), without the keys that two libraries have.

    Of several spellings the first in sorting order counts. `public`: only names that `documented` gives, inside a module.
    """
    sentences = {library: {} for library in LIBRARIES}
    for library in progress(LIBRARIES, desc="reading docstrings", leave=False):
        docstrings = documented(library).items() if public else [(path, text) for _, path, text in _docstrings(library)]
        for path, docstring in docstrings:
            if (sentence := first_sentence(docstring)) and ("." in path or not public):
                key = same_sentence_key(sentence)
                other, paths = sentences[library].get(key, (sentence, set()))
                sentences[library][key] = min(sentence, other), paths | {path}
    owners = Counter(key for of_library in sentences.values() for key in of_library)
    return {library: {key: value for key, value in of_library.items() if owners[key] == 1}
            for library, of_library in sentences.items()}


def _cut(keys: list) -> dict[str, list]:
    """The first 80 % of the keys for train, and a tenth each for validation and test."""
    bounds = (0, len(keys) * 8 // 10, len(keys) * 9 // 10, len(keys))
    return {name: keys[start:stop] for name, start, stop in zip(SPLITS, bounds, bounds[1:])}


# --- the two corpora -------------------------------------------------------------------------------------------------


def build_docstrings() -> dict:
    """{split: {"texts": [...], "labels": [...]}}, the same bytes for the same installed versions."""
    sentences = _sentences(public=False)
    size = min(map(len, sentences.values()))
    cuts = {library: _cut(sorted(sentences[library], key=_digest)[:size]) for library in LIBRARIES}
    splits = {}
    for split in SPLITS:
        rows = [(key, label) for label, library in enumerate(LIBRARIES) for key in cuts[library][split]]
        rows.sort(key=lambda row: _digest(row[0]))
        splits[split] = {"texts": [sentences[LIBRARIES[label]][key][0] for key, label in rows],
                         "labels": [label for _, label in rows]}
    return splits


def build_docstrings_qa() -> dict:
    """{split: {column: [...]}}, the same for the same installed versions; 80 / 10 / 10 by sentence in hash order."""
    sentences = _sentences(public=True)
    rows = [*_library_questions(sentences)]
    for library in progress(sentences, desc="writing questions", leave=False):
        rows += _function_questions(sentences[library])
    rows.sort(key=lambda row: _digest(row["group"] + row["key"]))
    # Not by the plain digest: which rows of a large library are chosen depends on that, and must not decide the split.
    keys = sorted({row["key"] for row in rows}, key=lambda key: _digest("split" + key))
    splits = {}
    for name, part in _cut(keys).items():
        chosen = {*part}
        splits[name] = {column: [row[column] for row in rows if row["key"] in chosen] for column in PROMPT_COLUMNS}
    return splits


def _library_questions(sentences: Mapping) -> Iterator[dict]:
    sizes = [len(of_library) for of_library in sentences.values()]
    most = next(cap for cap in range(max(sizes), 0, -1) if CHOICES * cap <= sum(min(size, cap) for size in sizes))
    rows = [(key, library) for library in sentences for key in sorted(sentences[library], key=_digest)[:most]]
    right, wrong = Counter(library for _, library in rows), Counter()
    for key, library in sorted(rows, key=lambda row: _digest(row[0])):
        others = sorted(right.keys() - {library}, key=lambda other: (wrong[other] / right[other], _digest(key + other)))
        wrong.update(others[: CHOICES - 1])
        yield _question("library", key, sentences[library][key][0], [library, *others[: CHOICES - 1]])


def _function_questions(sentences: Mapping) -> Iterator[dict]:
    names = Names(path for _, paths in sentences.values() for path in paths)
    for key, (sentence, paths) in sentences.items():
        described = {path.rpartition(".")[2] for path in paths}
        if len(described) == 1 and (choices := names.choices(sentence, *described)):
            yield _question("function", key, sentence, choices)


def _question(kind: str, key: str, sentence: str, choices: list[str]) -> dict:
    """A row; `choices` come with the right one first and are shuffled."""
    order = torch.randperm(CHOICES, generator=generator("docstrings-qa-order", kind, key)).tolist()
    return {"key": key, "prompt": f"{ASKED[kind]}\n{sentence}\nAnswer:", "response": choices[0],
            "choices": [choices[place] for place in order], "answer": order.index(0), "group": kind}


class Names:
    """The names of one library. A name's features are its words, their beginnings, and its module."""

    def __init__(self, paths: Iterable[str]) -> None:
        modules = {}
        for path in sorted(paths):
            module, _, name = path.rpartition(".")
            modules.setdefault(name, module)
        self.names = list(modules)
        self.spelled = np.array([name.replace("_", "").lower() for name in self.names])
        self.features = [words(name) | {module} for name, module in modules.items()]
        self.size = np.array([len(features) for features in self.features])
        self.places = defaultdict(list)  # feature -> the names that have it
        for place, features in enumerate(self.features):
            for feature in features:
                self.places[feature].append(place)

    def choices(self, sentence: str, name: str) -> list[str] | None:
        """`name` and three wrong ones by the rule in the module's docstring; None where there are none that are fair."""
        draw, right = generator("docstrings-qa", sentence), self.names.index(name)
        hits = self.shared(words(sentence))
        worth = hits + SHARE * hits / self.size
        ties = 1e-3 * torch.rand(len(worth), generator=draw).numpy()
        worth = np.minimum(worth, worth[right]) + ties
        chosen = [right]
        for pivot in (0, int(torch.rand((), generator=draw) > 1 / 3)):
            both = self.shared(self.features[chosen[pivot]])
            likeness = both / (self.size + self.size[chosen[pivot]] - both)
            chosen.append(int(np.where(self.unlike(chosen), worth + likeness, -1).argmax()))
        others = np.flatnonzero(self.unlike(chosen))
        if not len(others) or hits[right] > hits[chosen[1:]].max():
            return None
        chosen.append(others[torch.randint(len(others), (), generator=draw)])
        return [self.names[place] for place in chosen]

    def shared(self, features: frozenset[str]) -> np.ndarray:
        """For each name, how many of `features` it has."""
        places = [place for feature in features for place in self.places.get(feature, ())]
        return np.bincount(np.array(places, dtype=int), minlength=len(self.names))

    def unlike(self, chosen: list[int]) -> np.ndarray:
        """For each name, whether it differs from those chosen by more than case and underscores."""
        return ~np.isin(self.spelled, self.spelled[chosen])


def words(text: str) -> frozenset[str]:
    """The words of a sentence, or of a name in snake or camel case, and the first four letters of each."""
    whole = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text) if len(word) > 1]
    return frozenset([*whole, *(word[:4] for word in whole)])
