"""Where real text comes from; nothing else in the kit touches files of text.

Three sources, and never one in place of another:

* **docstrings**, for machines that reach only a package index. The first sentences of the docstrings of six installed
  libraries are real English written by many people; the class of a sentence is the library it came from. The sources
  are parsed, never imported. Library names and module paths are masked, so that the class must be read from what a
  sentence says. A sentence found in two libraries is dropped, and one found twice is kept once, so that nothing stands
  in two classes or two splits; every class has as many rows as the smallest library can fill.
* **a known name** (`ag_news`, ...): the folder `$DISTILLKIT_DATA/<name>`, else the Hugging Face hub.
* **any folder** that holds a file, several numbered files or a `save_to_disk` folder for each split, or **any hub id**.

Rows are labelled text, or prompts with their responses: which of the two is told by the name or by the columns.
A `Corpus` is what was found, as it was found: `tasks.py` checks the rows and makes what splits are missing. Files are
read by `tables.py`.
"""

import ast
import difflib
import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from distillkit.data.tables import (
    READERS,
    CorpusError,
    Table,
    dataset_table,
    ending,
    is_saved,
    named,
    parse_json,
    read_table,
    read_text,
    saved_table,
    shown,
)
from distillkit.io.files import read_file, write_file
from distillkit.io.progress import progress
from distillkit.io.storage import Claim, StorageError, cache_dir

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
LABEL_COLUMNS = ("label", "labels", "coarse_label", "class", "category")


@dataclass(frozen=True)
class Split:
    """The rows of one split, unchecked: `texts` and `labels` of equal length, and the place they came from.

    For prompts, `texts` are the questions, `labels` the answers, and `further` holds other columns of that length.
    `files` are, in order, the files that hold the rows: place, number of rows, and the line of each where there are lines.
    """

    texts: list
    labels: list
    place: str
    further: dict[str, list] = field(default_factory=dict)
    files: tuple[tuple[str, int, Sequence[int]], ...] = ()

    def row(self, number: int) -> str:
        """Where the row with that number is, for an error message."""
        first = 0
        for place, size, lines in self.files:
            if number < first + size:
                return f"row {number} (counted from 0; {f'line {lines[number - first]} of ' if lines else ''}{place})"
            first += size
        return f"row {number} (counted from 0; {self.place})"


@dataclass(frozen=True)
class Corpus:
    """Text as it was found: `classes` is None where nothing names them; `origin` says in words where it is from.

    `layout` is "labels" for labelled text, else how a row asks and answers; see `instruction.ROWS`. `unread` names what
    looks like data, lies beside the splits and belongs to none of them.
    """

    name: str
    classes: tuple[str, ...] | None
    splits: dict[str, Split]
    origin: str
    layout: str = "labels"
    unread: tuple[str, ...] = ()


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
# How instruction data of others name their columns; read only where no columns of labelled text are there.
_ABOUT = ("input", "context", "system", "category", "history")
INSTRUCTIONS = (
    replace(PROMPTS, label="completion"),
    Known("", (), "instruction", "output", further=_ABOUT, layout="instruction"),  # Alpaca
    Known("", (), "instruction", "response", further=_ABOUT, layout="instruction"),  # Dolly
    *(Known("", (), turns, turns, further=("system",), layout="chat")  # the last two: ShareGPT
      for turns in ("messages", "conversation", "conversations")),
)


@dataclass(frozen=True)
class Columns:
    """The names that the user gave to the columns of labelled text."""

    text: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for role, name in (("text_column", self.text), ("label_column", self.label)):
            if name is not None and (not isinstance(name, str) or not name):
                raise CorpusError(f"{role} must be the name of a column, not {name!r}")
        if self.text is not None and self.text == self.label:
            raise CorpusError(f"text_column and label_column are both {self.text!r}; name two columns")


def find_corpus(source: str, columns: Columns, *, built_in: tuple[str, ...]) -> Corpus:
    """The corpus of a known name, a folder or a hub id; `built_in` are further names, for the message where there is none."""
    known = KNOWN | QUESTIONS
    if source in known:
        return _known_corpus(source, known[source], columns)
    path = Path(source).expanduser()
    if path.is_dir():
        return folder_corpus(path, columns=columns)
    if path.is_file():
        raise CorpusError(f"{source} is a file; name the folder that holds it, with the splits as train and test in it")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return _hub_corpus(source, Known(source, ()), columns, looked_in=["this folder: no such folder here"])
    names = [*built_in, *known]
    close = difflib.get_close_matches(source, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise CorpusError(f"source: unknown task {source!r}{hint}: it is none of {', '.join(names)}, not an existing folder, and "
                      "not a hub id of the form 'owner/name'")


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
    path = cache_dir() / "corpora" / f"{name}-{key}.safetensors"
    with Claim(path, wait=True):  # of two processes, one builds and the other waits
        splits = _cached(path, recipe)
        if splits is None:
            splits = build()
            text = torch.frombuffer(bytearray(json.dumps(splits).encode()), dtype=torch.uint8)  # too long for a header
            write_file(path, kind="corpus", identity=recipe, tensors={"splits": text})
    return splits, ", ".join(f"{library} {version}" for library, version in versions.items())


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


def _cached(path: Path, recipe: dict) -> dict | None:
    if not path.exists():
        return None
    try:
        stored = read_file(path, kind="corpus", identity=recipe)
        return json.loads(stored.tensors["splits"].numpy().tobytes())
    except StorageError as error:
        warnings.warn(f"the cached docstring corpus is built again: {error}", stacklevel=5)
        path.unlink()
        return None


# --- folders ---------------------------------------------------------------------------------------------------------

# A split of the kit, and what a file, a folder or a split of the hub is called that may fill it, the first choice first.
SPLIT_NAMES = {"train": ("train", "auxiliary_train"), "validation": ("validation", "dev", "val", "valid", "eval"),
               "test": ("test",)}
_FILE = re.compile(r"(?P<name>[a-z_]+)(?P<shard>-(?P<part>\d{5})-of-(?P<parts>\d{5})(-[0-9a-f]{16})?)?(\.[a-z]+){1,2}")
LOOKS_LIKE_DATA = {*READERS, ".txt", ".arrow", ".feather", ".orc", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".xml",
                   ".xls", ".xlsx", ".pkl", ".pickle", ".npy", ".npz", ".pt", ".db", ".sqlite", ".avro"}
NO_DATA = {"labels.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


def folder_corpus(folder: Path, *, name: str | None = None, known: Known | None = None,
                  columns: Columns = Columns()) -> Corpus:
    """The corpus in a folder of splits, with an optional labels.json."""
    sources, unread = _listed(folder)
    tables = {}
    for split, candidates in SPLIT_NAMES.items():
        present = [candidate for candidate in candidates if candidate in sources]
        if present:
            paths = _of_split(present[0], sources)
            tables[split] = [saved_table(path) if path.is_dir() else read_table(path) for path in paths]
        unread += [path.name for candidate in present[1:] for path in sources[candidate]]
    if not tables:
        raise CorpusError(f"{folder} holds none of train, validation, dev, test (or val, valid, eval) as {', '.join(READERS)}; "
                          f"put at least train and test there{_not_read(unread)}")
    origin = f"the folder {name} in DISTILLKIT_DATA" if known else f"a local folder named {folder.resolve().name}"
    corpus = _from_tables(name or folder.resolve().name, known or Known("", ()), tables, origin, columns)
    return replace(corpus, classes=_folder_classes(folder) or corpus.classes, unread=() if known else tuple(unread))


def _listed(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files and saved folders of each split name, and the names of whatever else looks like data."""
    if is_saved(folder):  # a single split, which has no name
        return {"train": [folder]}, []
    sources, unread = {}, []
    names = {candidate for candidates in SPLIT_NAMES.values() for candidate in candidates}
    for path in _visible(folder) + _visible(folder / "data"):
        match = _FILE.fullmatch(path.name.lower())
        if path.is_dir() and path.name in names and is_saved(path):
            sources.setdefault(path.name, []).append(path)
        elif path.is_dir():
            if path != folder / "data" and (path.name.lower() in names or any(map(_looks_like_data, _visible(path)))):
                unread.append(f"{path.name}/")
        elif match and match["name"] in names and ending(path):
            sources.setdefault(match["name"], []).append(path)
        elif _looks_like_data(path):
            unread.append(path.name)
    return sources, unread


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _looks_like_data(path: Path) -> bool:
    return path.suffix.lower() in LOOKS_LIKE_DATA and path.name not in NO_DATA


def _of_split(name: str, sources: dict[str, list[Path]]) -> list[Path]:
    """The one file of a split, or all of its numbered parts in order."""
    paths = sources[name]
    matches = [_FILE.fullmatch(path.name.lower()) for path in paths]
    parts = sorted((int(match["part"]), int(match["parts"]), path) for match, path in zip(matches, paths)
                   if match and match["shard"])
    if len(parts) < len(paths) and len(paths) > 1 or len({(path.parent, ending(path), count) for _, count, path in parts}) > 1:
        names = [path.name if path.parent == paths[0].parent else f"{path.parent.name}/{path.name}" for path in paths]
        raise CorpusError(f"{paths[0].parent} holds {' and '.join(names)}; keep one of them")
    if parts and [part for part, _, _ in parts] != [*range(parts[0][1])]:
        raise CorpusError(f"{paths[0].parent} holds {len(parts)} of the {parts[0][1]} parts of {name}, or one twice; "
                          "add the missing parts")
    return [path for *_, path in parts] if parts else paths


def _not_read(unread: Sequence[str]) -> str:
    return f". Not read: {named(unread)}" if unread else ""


def _from_tables(name: str, known: Known, tables: dict[str, list[Table]], origin: str, columns: Columns) -> Corpus:
    """The corpus whose splits are in `tables`, each in one or in several parts."""
    known = _layout_of(known, tables, columns)
    labelled = known.layout == "labels"
    splits, classes = {}, None
    for split, parts in tables.items():
        text = _column(parts, "text", columns.text, known.text, TEXT_COLUMNS if labelled else ())
        label = _column(parts, "label", columns.label, known.label, LABEL_COLUMNS if labelled else ())
        if labelled:
            classes = classes or next((part.class_names[label] for part in parts if label in part.class_names), None)
        further = [column for column in known.further if all(column in part.columns for part in parts)]
        read = [[part.values(column, by_name=labelled) for part in parts] for column in (text, label, *further)]
        texts, labels, *others = (list(itertools.chain.from_iterable(values)) for values in read)
        place = parts[0].place if len(parts) == 1 else f"{parts[0].place} and {len(parts) - 1} further parts"
        files = tuple((part.place, len(values), part.lines) for part, values in zip(parts, read[0]))
        splits[split] = Split(texts, labels, place, dict(zip(further, others)), files)
    return Corpus(name, classes or known.classes or None, splits, origin, known.layout)


def _layout_of(known: Known, tables: dict[str, list[Table]], columns: Columns) -> Known:
    """`known`, or how instruction data are read if the columns of `tables` are theirs."""
    if known.layout != "labels" or columns != Columns():
        return known
    headers = [{*part.columns} for parts in tables.values() for part in parts]
    if any({PROMPTS.text, PROMPTS.label} <= header for header in headers):
        return PROMPTS
    instructions = [layout for layout in INSTRUCTIONS if any({layout.text, layout.label} <= header for header in headers)]
    labelled = any(header & {known.text, *TEXT_COLUMNS} and header & {known.label, *LABEL_COLUMNS} for header in headers)
    if instructions and labelled:
        raise CorpusError(f"the columns {named(sorted(headers[0]))} can be read as labelled text and as instructions; name "
                          "text_column and label_column, or rename the columns to prompt and response")
    return instructions[0] if instructions else known


def _folder_classes(folder: Path) -> tuple[str, ...] | None:
    path = folder / "labels.json"
    if not path.is_file():
        return None
    names = parse_json(read_text(path), str(path))
    if not isinstance(names, list) or not all(map(_is_name, names)) or len({name.strip() for name in names}) < len(names):
        raise CorpusError(f"{path}: must be a list of distinct class names, like [\"negative\", \"positive\"]")
    return tuple(names)


def _is_name(value) -> bool:
    """Whether `value` is a string with something in it, and no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def _column(parts: list[Table], role: str, given: str | None, own: str, usual: tuple[str, ...]) -> str:
    """The column of a role in all `parts`: the one that the user gave, or else `own`, or the first of the `usual`."""
    names = [given] if given else [own, *(name for name in usual if name != own)]
    for part in parts:
        name = next((name for name in names if name in part.columns), None)
        if name is None:
            raise CorpusError(_no_column(part, role, given, names, labelled=bool(usual)))
        names = [name]  # the same one in the other parts
    return names[0]


def _no_column(part: Table, role: str, given: str | None, names: list[str], labelled: bool) -> str:
    has = f"it has {named(part.columns) or 'no columns at all'}"
    if given:
        return f"{part.place} has no column {shown(given)}, which {role}_column names: {has}"
    role = role if labelled else names[0]
    remedy = f"name the {role} column {names[0]!r}"
    if labelled:
        remedy += (f" (or {', '.join(names[1:])}), or give its name as {role}_column; prompts with their responses go into "
                   "columns named prompt and response")
    return f"{part.place} has no {role} column: {has}; {remedy}"


# --- the hub ---------------------------------------------------------------------------------------------------------


def _known_corpus(name: str, known: Known, columns: Columns) -> Corpus:
    root = os.environ.get("DISTILLKIT_DATA")
    if root and (folder := Path(root).expanduser() / name).is_dir():
        return folder_corpus(folder, name=name, known=known, columns=columns)
    looked = f"the folder {folder}: absent" if root else f"$DISTILLKIT_DATA/{name}: DISTILLKIT_DATA is not set"
    return _hub_corpus(name, known, columns, looked_in=[looked])


def _hub_corpus(name: str, known: Known, columns: Columns, looked_in: list[str]) -> Corpus:
    import datasets.config  # a second to import
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(known.hub_id, known.config, revision=known.revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # absent, unreachable, ambiguous, malformed
        tried = f"the Hugging Face hub and its cache {datasets.config.HF_CACHE_HOME}, as {_on_hub(known)}: {error}"
        raise CorpusError(
            f"{name} was not found. Looked in\n" + "\n".join(f"  * {place}" for place in [*looked_in, tried])
            + f"\nOn a machine without internet: set DISTILLKIT_DATA to a folder that holds {name.split('/')[-1]}/ "
            "with train.jsonl and test.jsonl, name such a folder itself, copy the hub's cache (HF_HOME) from a machine "
            "that has it, or use 'docstrings' or 'docstrings_qa', which need no download."
        ) from error
    return _from_datasets(name, known, loaded, columns)


def _from_datasets(name: str, known: Known, loaded, columns: Columns) -> Corpus:
    tables, unread = {}, {*loaded}
    for split, candidates in SPLIT_NAMES.items():
        if present := [candidate for candidate in candidates if candidate in loaded]:
            unread.remove(present[0])
            tables[split] = [dataset_table(loaded[present[0]], f"the hub's {_on_hub(known)}, split {present[0]}")]
    if not tables:
        raise CorpusError(f"the hub's {_on_hub(known)} has none of train, validation, dev, test{_not_read(sorted(unread))}")
    corpus = _from_tables(name, known, tables, f"Hugging Face hub, {_on_hub(known)}", columns)
    return replace(corpus, unread=() if name in KNOWN | QUESTIONS else tuple(sorted(unread)))


def _on_hub(known: Known) -> str:
    return known.hub_id + (f" ({known.config})" if known.config else "")
