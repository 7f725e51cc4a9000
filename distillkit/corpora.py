"""Where real text comes from; nothing else in the kit touches files of text.

Three sources, and never one in place of another:

* **docstrings**, for machines that reach only a package index. The first sentences of the docstrings of six installed
  libraries are real English written by many people; the class of a sentence is the library it came from. The sources
  are parsed, never imported. Library names and module paths are masked, so that the class must be read from what a
  sentence says. A sentence found in two libraries is dropped, and one found twice is kept once, so that nothing stands
  in two classes or two splits; every class has as many rows as the smallest library can fill.
* **a known name** (`ag_news`, ...): the folder `$DISTILLKIT_DATA/<name>`, else the Hugging Face hub.
* **any folder** of `train`, `validation`/`dev` and `test` as `.jsonl`, `.csv` or `.parquet`, or **any hub id**.

Rows are labelled text, or prompts with their responses: which of the two is told by the name or by the columns.
A `Corpus` is what was found, as it was found: `tasks.py` checks the rows and makes what splits are missing.
"""

import ast
import csv
import difflib
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from .progress import progress
from .storage import StorageError, cache_dir, load_folder, save_folder

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
LABEL_COLUMNS = ("label", "labels", "coarse_label", "class", "category")


class CorpusError(ValueError):
    """Text that cannot be found or used; the message names the value, the place and the remedy."""


@dataclass(frozen=True)
class Split:
    """The rows of one split, unchecked: `texts` and `labels` of equal length, and the place they came from.

    For prompts, `texts` are the questions, `labels` the answers, and `further` holds other columns of that length.
    """

    texts: list
    labels: list
    place: str
    further: dict[str, list] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """Text as it was found: `classes` is None where nothing names them; `origin` says in words where it is from.

    `layout` is "labels" for labelled text, else how a row asks and answers: "prompts", "arc" or "mmlu".
    """

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, Split]
    origin: str
    layout: str = "labels"


@dataclass(frozen=True)
class Known:
    """A corpus on the Hugging Face hub that is known by a short name, and how its columns are called."""

    hub_id: str
    classes: tuple[str, ...]
    text: str = "text"
    label: str = "label"
    revision: str | None = None
    config: str | None = None
    further: tuple[str, ...] = ()
    layout: str = "labels"


KNOWN = {
    "rotten_tomatoes": Known("cornell-movie-review-data/rotten_tomatoes", ("neg", "pos")),
    "sst2": Known("stanfordnlp/sst2", ("negative", "positive"), text="sentence"),
    "imdb": Known("stanfordnlp/imdb", ("neg", "pos")),
    "ag_news": Known("fancyzhx/ag_news", ("World", "Sports", "Business", "Sci/Tech")),
    # The repository itself holds a loading script, which is never run: the hub's own parquet conversion is read.
    "trec": Known("CogComp/trec", ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), label="coarse_label",
                  revision="refs/convert/parquet"),
}
QUESTIONS = {
    "arc_easy": Known("allenai/ai2_arc", (), "question", "answerKey", config="ARC-Easy", further=("choices",), layout="arc"),
    "mmlu": Known("cais/mmlu", (), "question", "answer", config="all", further=("choices", "subject"), layout="mmlu"),
}
PROMPTS = Known("", (), "prompt", "response", further=("choices", "answer", "group"), layout="prompts")
QA_SOURCES = ("docstrings_qa", "docstrings_qa:library", "docstrings_qa:function")


def load_corpus(source) -> Corpus:
    """The corpus that `source` names: "docstrings", a known name, a folder, or a hub id. Raises `CorpusError`."""
    known = KNOWN | QUESTIONS
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(source, str) or not source:
        raise CorpusError(f"a task is named by a string or a path, not by {source!r}")
    if source == "docstrings":
        return docstring_corpus()
    if source in QA_SOURCES:
        from .instruction import docstrings_qa  # which builds on this module

        return docstrings_qa(source)
    if source in known:
        return _known_corpus(source, known[source])
    if Path(source).expanduser().is_dir():
        return folder_corpus(Path(source).expanduser())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return _hub_corpus(source, Known(source, ()), looked_in=["this folder: no such folder here"])
    names = ["docstrings", *QA_SOURCES, *known]
    close = difflib.get_close_matches(source, names, n=1)
    raise CorpusError(f"unknown task {source!r}{f' (did you mean {close[0]!r}?)' if close else ''}: it is none of "
                      f"{', '.join(names)}, not an existing folder, and not a hub id of the form 'owner/name'")


# --- docstrings ------------------------------------------------------------------------------------------------------

LIBRARIES = ("matplotlib", "networkx", "pandas", "scipy", "sympy", "torch")
ALIASES = frozenset({"mpl", "plt", "pyplot", "pylab", "nx", "pd", "mplot3d"})
MASK = "library"
BUILDER = 3  # raise whenever the same sources would give other sentences
# Tests describe test cases, and vendored code is other people's.
SKIPPED = frozenset({"test", "tests", "testing", "_testing", "_vendor", "_vendored", "vendor", "extern", "externals"})


def docstring_corpus() -> Corpus:
    """The offline corpus, from the cache or built."""
    found, made_of = built("docstrings", build_docstrings, BUILDER)
    splits = {name: Split(**rows, place=f"the docstring corpus, split {name}") for name, rows in found.items()}
    return Corpus("docstrings", LIBRARIES, splits, f"first sentences of the docstrings of installed libraries: {made_of}")


def built(name: str, build: Callable[[], dict], builder) -> tuple[dict, str]:
    """What `build` makes of the installed libraries, from the cache if it was made of the versions installed now; and
    those versions in words. `builder` (JSON) changes whenever `build` would make something else of the same versions."""
    versions = {library: _installed(library) for library in LIBRARIES}
    recipe = {"builder": builder, "python": list(sys.version_info[:3]), "versions": versions}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "corpora" / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of two processes, one builds and the other waits
        data = _cached(folder, recipe)
        if data is None:
            data = {"recipe": recipe, "splits": build()}
            save_folder(folder, kind="corpus", data=data)
    return data["splits"], ", ".join(f"{library} {version}" for library, version in versions.items())


def build_docstrings() -> dict:
    """{split: {"texts": [...], "labels": [...]}}, the same bytes for the same installed versions."""
    with collector_paused():
        found = {library: _sentences(library) for library in progress(LIBRARIES, desc="reading docstrings", leave=False)}
    libraries_of = {}
    for library, sentences in found.items():
        for key in sentences:
            libraries_of.setdefault(key, []).append(library)
    # Hash order is a shuffle that needs no random numbers and does not depend on the order of files.
    ranked = {library: sorted((key for key in sentences if len(libraries_of[key]) == 1), key=_digest)
              for library, sentences in found.items()}
    size = min(len(keys) for keys in ranked.values())
    cuts = {"train": slice(0, size * 8 // 10), "validation": slice(size * 8 // 10, size * 9 // 10),
            "test": slice(size * 9 // 10, size)}
    splits = {}
    for split, cut in cuts.items():
        rows = [(key, label) for label, library in enumerate(LIBRARIES) for key in ranked[library][cut]]
        rows.sort(key=lambda row: _digest(row[0]))
        splits[split] = {"texts": [found[LIBRARIES[label]][key] for key, label in rows],
                         "labels": [label for _, label in rows]}
    return splits


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring as plain text with library names masked, or None where there is none.

    Markup is taken off, white space collapsed. Dropped are signatures, headings and code, and what has fewer than 4 or
    more than 60 words.
    """
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    if re.search(r"->|>>>|::\s*$|={3}|-{3}|~{3}|^\s*(\.\.|@|[-*+] )|^\w[\w.]*\(", paragraph):
        return None
    text = re.sub(r":[\w:+-]+:`([^`]*)`", r"`\1`", paragraph)  # roles
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1", text)  # links with a title
    text = re.sub(r"<?\w+://[^\s>]+>?", "", text)  # and without
    text = re.sub(r"`+~?\.?([^`]*?)`+_*", r"\1", text)
    text = re.sub(r"\*\*(.+?)\*\*|(?<!\w)\*(\w[^*]*?)\*(?!\w)", r"\1\2", text)
    text = " ".join(text.split())
    text = _SENTENCE_END.split(text, maxsplit=1)[0]
    if re.search(r"`|:\w+:|://", text):  # markup that is broken itself
        return None
    text = mask_libraries(text)
    words = re.findall(r"[A-Za-z]{2,}", text)
    if not 4 <= len(text.split()) <= 60 or len(words) < 4 or sum(map(len, words)) < 0.6 * len(text.replace(" ", "")):
        return None
    return text


_SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\bcf\.)(?<!\bal\.)(?<=[.!?])\s+(?=[A-Z\"'(\[])")


def mask_libraries(text: str) -> str:
    """`text` with each word or dotted path that names one of the libraries, or a usual alias, replaced by `library`."""

    def masked(match: re.Match) -> str:
        word = match[0].lower()
        if any(library in word for library in LIBRARIES) or not ALIASES.isdisjoint(re.split(r"[._]", word)):
            return MASK + ("." if word.endswith(".") else "")
        return match[0]

    return re.sub(r"[A-Za-z0-9_.]+", masked, text)


def same_sentence_key(text: str) -> str:
    """Equal for sentences that differ in case, digits, punctuation or spacing only."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


@contextmanager
def collector_paused():
    """Parsing makes millions of nodes and no cycles; looking for cycles among them takes longer than parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sentences(library: str) -> dict[str, str]:
    """The distinct first sentences of a library by their keys; of several spellings the first in sorting order."""
    root = _root(library)
    result = {}
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            for sentence in filter(None, map(first_sentence, _docstrings(path))):
                key = same_sentence_key(sentence)
                result[key] = min(sentence, result.get(key, sentence))
    return result


OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _docstrings(path: Path) -> list[str]:
    return [text for node in _statements(_parsed(path)) if isinstance(node, OWNERS) and (text := ast.get_docstring(node))]


def documented(library: str) -> dict[str, str]:
    """The docstrings of an installed library by dotted path, such as ``scipy.signal.convolve``; parsed, never imported.

    Names with a leading underscore are private and left out, private modules are not: much that is public is defined in
    them, and their names are left out of the path.
    """
    root = _root(library)
    result: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            module = [part for part in parts if not part.startswith("_")]
            for name, text in _named_docstrings(_parsed(path), module):
                result.setdefault(name, text)
    return result


def _named_docstrings(node: ast.AST, where: list[str]):
    """(dotted path, docstring) of `node`, which stands at `where`, and of the public definitions inside it."""
    if isinstance(node, OWNERS) and (text := ast.get_docstring(node)):
        yield ".".join(where), text
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if not (named and child.name.startswith("_")):
                yield from _named_docstrings(child, [*where, child.name] if named else where)


def _parsed(path: Path) -> ast.Module:
    """The syntax tree of a file; an empty one for templates and other files that are not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _statements(node: ast.AST):
    """`node` and the statements inside it. Like `ast.walk`, which is slow because it visits the expressions too."""
    yield node
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _statements(child)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _spec(library: str):
    spec = importlib.util.find_spec(library)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(f"the docstring corpus needs the library {library}, which is not installed here; "
                          f"run: {Path(sys.executable).name} -m pip install {library}")
    return spec


def _root(library: str) -> Path:
    return Path((_spec(library).submodule_search_locations or [])[0])


def _installed(library: str) -> str:
    _spec(library)
    return importlib.metadata.version(library)


def _cached(folder: Path, recipe: dict) -> dict | None:
    if not folder.exists():
        return None
    try:
        data = load_folder(folder, kind="corpus").data
        if data.get("recipe") == recipe:
            return data
        reason = "it was built from other versions"
    except StorageError as error:
        reason = str(error)
    warnings.warn(f"the cached docstring corpus is built again: {reason}", stacklevel=5)
    shutil.rmtree(folder)
    return None


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_corpus(folder: Path, *, name: str | None = None, known: Known | None = None) -> Corpus:
    """The corpus in a folder of train, validation or dev, test (.jsonl, .csv, .parquet) and optional labels.json."""
    files = {}
    for split, file in SPLIT_NAMES:
        here = [path for suffix in _READERS if (path := folder / f"{file}{suffix}").is_file()]
        if len(here) > 1:
            raise CorpusError(f"{folder} holds {' and '.join(path.name for path in here)}; keep one of them")
        if here:
            files.setdefault(split, here[0])
    if not files:
        raise CorpusError(f"{folder} holds none of train, validation, dev, test as {', '.join(_READERS)}; "
                          f"put at least train and test there")
    origin = f"the folder {name} in DISTILLKIT_DATA" if known else f"a local folder named {folder.resolve().name}"
    tables = {split: (_READERS[path.suffix](path), str(path), {}) for split, path in files.items()}
    corpus = _from_tables(name or folder.resolve().name, known or Known("", ()), tables, origin)
    return replace(corpus, classes=_folder_classes(folder) or corpus.classes)


# A split of the kit, and what a file or a split of the hub is called that may fill it, the first choice first.
SPLIT_NAMES = (("train", "train"), ("train", "auxiliary_train"), ("validation", "validation"), ("validation", "dev"),
               ("test", "test"))


def _from_tables(name: str, known: Known, tables: dict, origin: str) -> Corpus:
    """The corpus in `tables`: split -> (column name -> values, place, column name -> its type where there are types)."""
    if known.layout == "labels" and any({PROMPTS.text, PROMPTS.label} <= {*columns} for columns, *_ in tables.values()):
        known = PROMPTS
    texts, labels = (TEXT_COLUMNS, LABEL_COLUMNS) if known.layout == "labels" else ((known.text,), (known.label,))
    splits, classes = {}, known.classes or None
    for split, (columns, place, types) in tables.items():
        text, label = _column(columns, known.text, texts, place), _column(columns, known.label, labels, place)
        further = {column: columns[column][:] for column in known.further if column in columns}
        splits[split] = Split(columns[text][:], columns[label][:], place, further)
        classes = tuple(getattr(types.get(label), "names", None) or ()) or classes
    return Corpus(name, classes, splits, origin, known.layout)


def _read_jsonl(path: Path) -> dict[str, list]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{path}, line {number}: not JSON ({error}); put one object on a line") from error
            if not isinstance(row, dict):
                raise CorpusError(f"{path}, line {number}: {line[:40]!r} is not a JSON object with named columns")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(path: Path) -> dict[str, list]:
    # Not splitlines(), which would end a row at other characters too, such as U+2028.
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _read_parquet(path: Path) -> dict[str, list]:
    from pyarrow import ArrowException, parquet  # slow to import, and seldom needed

    try:
        return parquet.read_table(path).to_pydict()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not a readable parquet file ({error})") from error


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error


def _folder_classes(folder: Path) -> tuple[str, ...] | None:
    path = folder / "labels.json"
    if not path.is_file():
        return None
    try:
        names = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON ({error})") from error
    if not isinstance(names, list) or not all(map(_is_name, names)) or len({*names}) < len(names):
        raise CorpusError(f"{path}: must be a list of distinct class names, like [\"negative\", \"positive\"]")
    return tuple(names)


def _is_name(value) -> bool:
    """Whether `value` is a string with something in it, and no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def _column(columns, own: str, usual: tuple[str, ...], place: str) -> str:
    """The name among `columns` that is `own`, or else the first that is one of the `usual`, which begin with the role."""
    for name in (own, *usual):
        if name in columns:
            return name
    others = [name for name in usual if name != own]
    raise CorpusError(f"{place} has no {usual[0]} column: it has {', '.join(map(str, columns)) or 'no columns at all'}; "
                      f"name the {usual[0]} column {own!r}" + (f" (or {', '.join(others)}); prompts with their responses go "
                      "into columns named prompt and response" if others else ""))


# --- the hub ---------------------------------------------------------------------------------------------------------


def _known_corpus(name: str, known: Known) -> Corpus:
    root = os.environ.get("DISTILLKIT_DATA")
    if root and (folder := Path(root).expanduser() / name).is_dir():
        return folder_corpus(folder, name=name, known=known)
    looked = f"the folder {folder}: absent" if root else f"$DISTILLKIT_DATA/{name}: DISTILLKIT_DATA is not set"
    return _hub_corpus(name, known, looked_in=[looked])


def _hub_corpus(name: str, known: Known, looked_in: list[str]) -> Corpus:
    import datasets.config  # a second to import

    try:
        found = datasets.load_dataset(known.hub_id, known.config, revision=known.revision)
    except (OSError, ValueError, RuntimeError) as error:  # not there, not reachable, several configurations, a script
        tried = f"the Hugging Face hub and its cache {datasets.config.HF_CACHE_HOME}, as {_on_hub(known)}: {error}"
        raise CorpusError(
            f"{name} was not found. Looked in\n" + "\n".join(f"  * {place}" for place in [*looked_in, tried])
            + f"\nOn a machine without internet: set DISTILLKIT_DATA to a folder that holds {name.split('/')[-1]}/ "
            "with train.jsonl and test.jsonl, name such a folder itself, copy the hub's cache (HF_HOME) from a machine "
            "that has it, or use 'docstrings' or 'docstrings_qa', which need no download."
        ) from error
    return _from_datasets(name, known, found)


def _from_datasets(name: str, known: Known, found) -> Corpus:
    tables = {}
    for split, there in SPLIT_NAMES:
        if there in found and split not in tables:
            rows = found[there]
            columns = {column: rows[column] for column in rows.column_names}  # read when they are sliced
            tables[split] = columns, f"the hub's {_on_hub(known)}, split {there}", rows.features
    return _from_tables(name, known, tables, f"Hugging Face hub, {_on_hub(known)}")


def _on_hub(known: Known) -> str:
    return known.hub_id + (f" ({known.config})" if known.config else "")
