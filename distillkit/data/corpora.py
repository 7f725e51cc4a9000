"""Where real text is looked for: folders of files, corpora with a known name, and the Hugging Face hub.

A known name (`ag_news`, ...) is looked for in the folder `$DISTILLKIT_DATA/<name>`, then on the hub. Any other folder holds
a file, several numbered files or a `save_to_disk` folder for each split. Nothing is read in place of what was asked for.

Rows are labelled text, or prompts with their responses: the name or the columns tell which. A `Corpus` is what was read,
unchecked; `tasks.py` checks its rows and makes the splits that are missing.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from distillkit.data.corpus import Corpus, CorpusError, Split, is_text, named, shown
from distillkit.data.tables import READERS, Table, dataset_table, ending, is_saved, parse_json, read_table, read_text, reading

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document")
LABEL_COLUMNS = ("label", "labels", "coarse_label", "class", "category")


@dataclass(frozen=True)
class Layout:
    """How the rows of a corpus are laid out, and where the hub has them.

    `text`, `label`: the columns of what is read and what is learned. `further`: optional columns. `rows`: "labels" for
    labelled text, else a key of `instruction.ROWS`.
    """

    text: str = "text"
    label: str = "label"
    further: tuple[str, ...] = ()
    rows: str = "labels"
    classes: tuple[str, ...] = ()
    hub_id: str = ""
    config: str | None = None
    revision: str | None = None


KNOWN = {
    "rotten_tomatoes": Layout(classes=("neg", "pos"), hub_id="cornell-movie-review-data/rotten_tomatoes"),
    "sst2": Layout("sentence", classes=("negative", "positive"), hub_id="stanfordnlp/sst2"),
    "imdb": Layout(classes=("neg", "pos"), hub_id="stanfordnlp/imdb"),
    "ag_news": Layout(classes=("World", "Sports", "Business", "Sci/Tech"), hub_id="fancyzhx/ag_news"),
    # The repository itself holds a loading script, which is never run: the hub's own parquet conversion is read.
    "trec": Layout(label="coarse_label", classes=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), hub_id="CogComp/trec",
                   revision="refs/convert/parquet"),
    "arc_easy": Layout("question", "answerKey", ("choices",), "arc", hub_id="allenai/ai2_arc", config="ARC-Easy"),
    "mmlu": Layout("question", "answer", ("choices", "subject"), "mmlu", hub_id="cais/mmlu", config="all"),
}
PROMPTS = Layout("prompt", "response", ("choices", "answer", "group"), "prompts")
# How instruction data of others name their columns; read only where no columns of labelled text are.
_ABOUT = ("input", "context", "system", "category", "history")
INSTRUCTIONS = (
    replace(PROMPTS, label="completion"),
    Layout("instruction", "output", _ABOUT, "instruction"),  # Alpaca
    Layout("instruction", "response", _ABOUT, "instruction"),  # Dolly
    *(Layout(turns, turns, ("system",), "chat") for turns in ("messages", "conversation", "conversations")),  # and ShareGPT
)

# A split of the kit, and the names of a file, a folder or a split of the hub that may fill it, the first choice first.
SPLIT_NAMES = {"train": ("train", "auxiliary_train"), "validation": ("validation", "dev", "val", "valid", "eval"),
               "test": ("test",)}
_NAMES = {name for names in SPLIT_NAMES.values() for name in names}
_FILE = re.compile(r"(?P<name>[a-z_]+)(-(?P<part>\d{5})-of-(?P<parts>\d{5})(-[0-9a-f]{16})?)?(\.[a-z]+){1,2}")
LOOKS_LIKE_DATA = {*READERS, ".txt", ".arrow", ".feather", ".orc", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".xml",
                   ".xls", ".xlsx", ".pkl", ".pickle", ".npy", ".npz", ".pt", ".db", ".sqlite", ".avro"}
NO_DATA = {"labels.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


def folder_corpus(folder: Path, columns: tuple, name: str = "") -> Corpus:
    """The corpus in a folder of splits, with an optional labels.json.

    `columns`: the names that the user gave to the columns of text and labels, or None. `name`: of a known corpus.
    """
    sources, unread = _listed(folder)
    chosen = _chosen(sources)
    tables = {split: [read_table(path) for path in _parts(folder, sources[source])] for split, source in chosen.items()}
    unread += [path.name for source in sources.keys() - chosen.values() for path in sources[source]]
    origin = f"the folder {name} in DISTILLKIT_DATA" if name else f"a local folder named {folder.resolve().name}"
    corpus = _corpus(name or folder.resolve().name, KNOWN.get(name, Layout()), tables, origin, columns, unread)
    return replace(corpus, classes=_listed_classes(folder / "labels.json") or corpus.classes)


def hub_corpus(name: str, columns: tuple, folder: Path) -> Corpus:
    """The corpus of a known name or a hub id; `folder` is where else it was looked for."""
    import datasets.config  # a second to import
    from datasets.exceptions import DatasetsError

    layout = KNOWN.get(name, Layout(hub_id=name))
    place = layout.hub_id + (f" ({layout.config})" if layout.config else "")
    try:
        loaded = datasets.load_dataset(layout.hub_id, layout.config, revision=layout.revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # absent, unreachable, ambiguous, malformed
        raise CorpusError(
            f"{name} was not found. Looked in\n  * the folder {folder}: no such folder\n  * the Hugging Face hub and its cache "
            f"{datasets.config.HF_CACHE_HOME}, as {place}: {error}\nOn a machine without internet: set DISTILLKIT_DATA to a "
            f"folder that holds {name.split('/')[-1]}/ with train.jsonl and test.jsonl, name such a folder itself, copy the "
            "hub's cache (HF_HOME) from a machine that has it, or use 'docstrings' or 'docstrings_qa', which need no download."
        ) from error
    chosen = _chosen(loaded)
    tables = {split: [dataset_table(loaded[source], f"the hub's {place}, split {source}")] for split, source in chosen.items()}
    unread = sorted({*loaded} - {*chosen.values()})
    return _corpus(name, layout, tables, f"Hugging Face hub, {place}", columns, unread)


def _chosen(present: Iterable[str]) -> dict[str, str]:
    """split -> the first of its names that is present."""
    names = {split: [name for name in SPLIT_NAMES[split] if name in present] for split in SPLIT_NAMES}
    return {split: candidates[0] for split, candidates in names.items() if candidates}


# --- folders ---------------------------------------------------------------------------------------------------------


def _listed(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files and saved folders of each split name, and the names of whatever else looks like data."""
    if is_saved(folder):  # a single split, which has no name
        return {"train": [folder]}, []
    sources, unread = {}, []
    for path in _visible(folder) + _visible(folder / "data"):
        match = _FILE.fullmatch(path.name.lower())
        name = path.name if is_saved(path) else match["name"] if match and ending(path) and path.is_file() else ""
        if name in _NAMES:
            sources.setdefault(name, []).append(path)
        elif path != folder / "data" and _looks_like_data(path):
            unread.append(path.name + "/" * path.is_dir())
    return sources, unread


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _looks_like_data(path: Path) -> bool:
    if path.is_dir():
        return path.name.lower() in _NAMES or any(map(_looks_like_data, _visible(path)))
    return path.suffix.lower() in LOOKS_LIKE_DATA and path.name not in NO_DATA


def _parts(folder: Path, paths: list[Path]) -> list[Path]:
    """The one file of a split, or all of its numbered parts in order."""
    matches = [_FILE.fullmatch(path.name.lower()) for path in paths]
    numbers = [(int(match["part"]), int(match["parts"])) if match and match["part"] else (0, 1) for match in matches]
    kinds = {(path.parent, ending(path), parts) for path, (_, parts) in zip(paths, numbers)}
    if len(kinds) > 1 or sorted(part for part, _ in numbers) != [*range(numbers[0][1])]:
        raise CorpusError(f"{folder} holds {named(path.relative_to(folder) for path in paths)} for one split; keep one file, "
                          "or the numbered parts of one set, all of them")
    return [path for _, path in sorted(zip(numbers, paths))]


def _listed_classes(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    with reading(str(path)):
        names = parse_json(read_text(path), str(path))
    if not isinstance(names, list) or not all(map(is_text, names)) or len({name.strip() for name in names}) < len(names):
        raise CorpusError(f"{path}: must be a list of distinct class names, like [\"negative\", \"positive\"]")
    return tuple(names)


# --- columns ---------------------------------------------------------------------------------------------------------


def _corpus(name: str, layout: Layout, tables: dict[str, list[Table]], origin: str, columns: tuple, unread: list) -> Corpus:
    """The corpus whose splits are in `tables`, each in one or in several parts."""
    if not tables:
        raise CorpusError(f"{origin} holds none of train, validation, dev, test (or val, valid, eval) as {', '.join(READERS)}; "
                          f"put at least train and test there. Not read: {named(unread) or 'nothing else'}")
    unread = () if layout in KNOWN.values() else tuple(unread)
    layout = _layout(layout, tables, columns)
    by_name = layout.rows == "labels"
    splits, classes = {}, None
    for split, parts in tables.items():
        text = _column(parts, "text", columns[0], layout.text, TEXT_COLUMNS if by_name else ())
        label = _column(parts, "label", columns[1], layout.label, LABEL_COLUMNS if by_name else ())
        classes = classes or next((part.class_names[label] for part in parts if label in part.class_names), None)
        further = [column for column in layout.further if all(column in part.names for part in parts)]
        texts, labels, *others = (list(itertools.chain.from_iterable(part.values(column, by_name=by_name) for part in parts))
                                  for column in (text, label, *further))
        more = f" and {len(parts) - 1} further parts" if len(parts) > 1 else ""
        where = [*itertools.chain.from_iterable(part.where for part in parts)]
        splits[split] = Split(texts, labels, parts[0].place + more, where, dict(zip(further, others)))
    return Corpus(name, classes or layout.classes or None, splits, origin, layout.rows, unread)


def _layout(layout: Layout, tables: dict[str, list[Table]], columns: tuple) -> Layout:
    """The layout, or that of instruction data if the columns of `tables` show it."""
    if layout.rows != "labels" or any(columns):
        return layout
    headers = [{*part.names} for parts in tables.values() for part in parts]
    instructions = [other for other in (PROMPTS, *INSTRUCTIONS) if any({other.text, other.label} <= h for h in headers)]
    labelled = any(h & {layout.text, *TEXT_COLUMNS} and h & {layout.label, *LABEL_COLUMNS} for h in headers)
    if instructions and instructions[0] != PROMPTS and labelled:
        raise CorpusError(f"the columns {named(sorted(headers[0]))} can be read as labelled text and as instructions; name "
                          "text_column and label_column, or rename the columns to prompt and response")
    return instructions[0] if instructions else layout


def _column(parts: list[Table], role: str, by_user: str | None, usual: str, others: tuple[str, ...]) -> str:
    """The column of a role in all `parts`: the one that the user gave, or else the usual one, or the first of the others."""
    names = [by_user] if by_user else [usual, *others]
    for part in parts:
        present = [name for name in names if name in part.names]
        if not present:
            source = f"which {role}_column names" if by_user else f"or {named(others)}" if others else "which its layout needs"
            raise CorpusError(f"{part.place} has no column {shown(names[0])}, {source}: it has {named(part.names) or 'none'}; "
                              f"rename the column of the {role}, or give its name as {role}_column; prompts with their "
                              "responses go into columns named prompt and response")
        names = present[:1]  # the same one in the other parts
    return names[0]
