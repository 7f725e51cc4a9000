"""Files of rows: JSON lines, JSON lists, CSV, TSV, parquet, and datasets that `save_to_disk` wrote.

Every reader gives a `Table` of named columns. In files of text it also knows the line where each row begins, so that an
error can name it. What can be read in two ways is an error: a row with more or fewer fields than the header, a column
named twice, half a quotation. Nothing is unpickled.

CSV is read by the standard library in strict mode. pandas fills short rows and renames doubled columns without a word;
pyarrow accepts half a quotation, turns "NA" into a missing value and counts rows where a user looks for lines.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distillkit.data.corpus import CorpusError, shown
from distillkit.io.escaping import one_line

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
LONGEST_FIELD = 2**31 - 1  # characters in a field of CSV; the standard library's own limit is 131,072
SAVED = ("state.json", "dataset_info.json")  # what save_to_disk writes beside the rows of a split


@dataclass(frozen=True)
class Table:
    """The rows of one file, or of one split on the hub.

    `names`: of its columns. `read`: gives the values of a column by its name. `place`: where the rows are from; `where`:
    the same for each row, with its line in files of text. `class_names`: for columns whose whole numbers stand for names.
    """

    names: Sequence[str]
    read: Callable[[str], list]
    place: str
    where: Sequence[str]
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (name := _doubled(self.names)) is not None:
            raise CorpusError(f"{self.place}: two columns are named {shown(name)}; rename one")

    def values(self, column: str, *, by_name: bool) -> list:
        """The values of a column; with `by_name`, whole numbers that stand for class names are replaced by those."""
        with reading(f"{self.place}, column {shown(column)}"):  # parquet holds bytes, decoded only now
            values = self.read(column)
        names = self.class_names.get(column, ()) if by_name else ()
        return [names[value] if type(value) is int and 0 <= value < len(names) else value for value in values]


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Whatever the libraries raise for a damaged or hostile file becomes a `CorpusError` that names its place."""
    from pyarrow import ArrowException  # slow to import

    try:
        yield
    except CorpusError:
        raise
    except (ArrowException, OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorpusError(f"{place} cannot be read: {one_line(error)}; repair it or save it again, text as UTF-8") from error


def _doubled(names: Iterable[str]) -> str | None:
    """The first name that occurs again, or None."""
    seen = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


# --- text ------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str, remedy: str = "repair it"):
    """The JSON value that `text` holds; a `CorpusError` for other text, deep nesting, or an object with a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not JSON ({one_line(error)}); {remedy}") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    if (name := _doubled(name for name, _ in pairs)) is not None:
        raise ValueError(f"an object names the key {shown(name)} twice")
    return dict(pairs)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, unpacked if it ends in .gz."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CorpusError(f"{path}, line {line}: a NUL character, which text has none of; save the file as UTF-8 again")
    return text


def _json(path: Path) -> Table:
    """JSON lines, or in a .json file a list of objects."""
    text = read_text(path)
    if ending(path) == ".json" and text.lstrip().startswith("["):
        rows = parse_json(text, str(path))
        where = [f"{path}, row {number}" for number in range(len(rows))]
    else:
        lines = text.split("\n")  # not splitlines(), which would split at U+2028 too
        where = [f"{path}, line {number}" for number, line in enumerate(lines, start=1) if line.strip()]
        rows = [parse_json(line, place, "put one object on a line") for place, line in zip(where, filter(str.strip, lines))]
    for row, place in zip(rows, where):
        if not isinstance(row, dict):
            raise CorpusError(f"{place}: {shown(row)} is not a JSON object with named columns")
    names = [*dict.fromkeys(name for row in rows for name in row)]
    return Table(names, lambda name: [row.get(name) for row in rows], str(path), where)


def _delimited(path: Path) -> Table:
    """CSV or TSV whose first row names the columns."""
    delimiter = "\t" if ending(path) == ".tsv" else ","
    text = read_text(path)
    _check_separator(path, text.lstrip("\r\n").partition("\n")[0].rstrip(), delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, where, line = [], [], 1
    usual_limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        for row in reader:
            if row:  # not an empty line
                rows.append(row)
                where.append(f"{path}, line {line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num}: not {ending(path)[1:].upper()} ({one_line(error)}); quote fields "
                          "as the format asks") from error
    finally:
        csv.field_size_limit(usual_limit)
    header = [name.strip() for name in rows[0]] if rows else []
    for row, place in zip(rows, where):
        if len(row) != len(header):
            raise CorpusError(f"{place}: {len(row)} fields where the header names {len(header)}; quote a field "
                              "that holds the separator, or correct the row")
        # Many writers of TSV never quote. A quotation mark that opens such a field would swallow whole rows.
        if delimiter == "\t" and any("\t" in value and "\n" in value for value in row):
            raise CorpusError(f"{place}: a quotation mark opens a field that runs over tabs and lines; double "
                              "the quotation marks of the text and quote the field, or save the file as .jsonl")
    return Table(header, lambda name: [row[header.index(name)] for row in rows[1:]], str(path), where[1:])


def _check_separator(path: Path, header: str, delimiter: str) -> None:
    """An error for a header in which another separator stands, and never the one that the ending of the file asks for."""
    others, usual = [name for mark, name in SEPARATORS.items() if mark in header], SEPARATORS[delimiter]
    if others and delimiter not in header:
        raise CorpusError(f"{path}: its first line, {shown(header)}, is separated by {others[0]}, and a {ending(path)} file by "
                          f"{usual}; save the file with {usual}")


# --- tables of typed columns -----------------------------------------------------------------------------------------

def _parquet(path: Path) -> Table:
    import datasets  # a second to import
    from pyarrow import parquet

    table = parquet.ParquetFile(path).read()
    metadata = parse_json((table.schema.metadata or {}).get(b"huggingface", b"{}"), f"{path}, its schema")  # by datasets
    features = datasets.Features.from_dict(metadata.get("info", {}).get("features", {}))
    return Table(table.column_names, lambda name: table.column(name).to_pylist(), str(path), [str(path)] * len(table),
                 _class_names(features))


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets.Dataset.save_to_disk`."""
    return all((folder / name).is_file() for name in SAVED)


def _saved(folder: Path) -> Table:
    """The rows of a split that `save_to_disk` wrote."""
    import datasets

    files = [file["filename"] for file in parse_json(read_text(folder / SAVED[0]), str(folder))["_data_files"]]
    if outside := [name for name in files if Path(name).name != name]:
        raise ValueError(f"the file {shown(outside[0])} lies outside of the folder")
    rows = datasets.load_from_disk(str(folder))
    rows.data.validate(full=True)  # offsets that point outside of a damaged file would end the process
    return dataset_table(rows, str(folder))


def dataset_table(rows, place: str) -> Table:
    """The table of a `datasets.Dataset`; a column is read only when it is asked for."""
    rows = rows.with_format(None)  # Python's values, whatever the dataset was saved to give
    return Table(rows.column_names, lambda name: rows[name][:], place, [place] * len(rows), _class_names(rows.features))


def _class_names(features) -> dict[str, tuple[str, ...]]:
    from datasets import ClassLabel

    return {name: tuple(feature.names) for name, feature in features.items() if isinstance(feature, ClassLabel)}


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _delimited, ".tsv": _delimited, ".parquet": _parquet}


def ending(path: Path) -> str:
    """The ending in lower case that says how a file is read: the one before .gz, unless it is parquet; "" for others."""
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings[-1:] == [".gz"] and endings[-2:-1] != [".parquet"]:
        endings.pop()
    return endings[-1] if endings and endings[-1] in READERS else ""


def read_table(path: Path) -> Table:
    """The rows of a file, read as its ending says, or of a folder of `save_to_disk`."""
    with reading(str(path)):
        return _saved(path) if path.is_dir() else READERS[ending(path)](path)
