"""Files of rows: JSON lines, JSON lists, CSV, TSV, parquet, and datasets that `save_to_disk` wrote.

Each reader gives named columns of equal length, and for text the line where each row begins, so that an error names it.
What can be read in two ways is an error: a row with more or fewer fields than the header, a column named twice, half a
quotation. Nothing is unpickled. CSV is read by the standard library, since pandas fills up short rows and renames doubled
columns without a word, and pyarrow accepts half a quotation and counts rows where a user looks for lines.
"""

import csv
import gzip
import io
import json
import reprlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LONGEST_FIELD = 2**31 - 1  # characters in a field of CSV; the standard library's own limit is 131,072
SAVED = ("state.json", "dataset_info.json")  # what save_to_disk writes beside the rows of a split

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class CorpusError(ValueError):
    """Text that cannot be found or used; the message names the value, the place and the remedy."""


@dataclass(frozen=True)
class Table:
    """The columns of one file, or of one split on the hub.

    `columns`: name -> a call that reads its values. `place` says where the rows are from. `class_names`: of the columns
    whose whole numbers stand for names. `lines`: where each row begins, in files of text.
    """

    columns: Mapping[str, Callable[[], list]]
    place: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lines: Sequence[int] = ()

    def values(self, column: str, by_name: bool = True) -> list:
        """A column, whole numbers that stand for class names replaced by those (unless `by_name` is False)."""
        try:
            values = self.columns[column]()
        except UnicodeDecodeError as error:  # parquet holds bytes, decoded only now
            raise CorpusError(f"{self.place}, column {shown(column)}: not UTF-8 ({error}); save it as UTF-8") from error
        names = self.class_names.get(column) if by_name else None
        if not names:
            return values
        return [names[value] if type(value) is int and 0 <= value < len(names) else value for value in values]


def shown(value) -> str:
    """`value` as an error message quotes it: shortened, and without control characters."""
    return _short.repr(value)


def one_line(error: Exception) -> str:
    """What a library says of a file, on one line and without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


def named(names: Iterable[str], most: int = 8) -> str:
    """Names from a file in a row, as an error message lists them: the first `most`, without control characters."""
    names = list(names)
    plain = [name if str(name).isprintable() else shown(name) for name in names[:most]]
    return ", ".join(map(str, plain)) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def parse_json(text: str, where: str, remedy: str = "repair it"):
    """The JSON value that `text` holds; a `CorpusError` for text that is none, is nested too deep, or names a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not JSON ({one_line(error)}); {remedy}") from error


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"an object names the key {shown(_doubled(name for name, _ in pairs))} twice")
    return row


def _doubled(names: Iterable[str]) -> str | None:
    """The first of `names` that occurs again, or None."""
    seen = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


# --- text ------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, unpacked if it ends in .gz."""
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({one_line(error)}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: not a readable gzip file ({one_line(error)}); pack or download it again") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CorpusError(f"{path}, line {line}: a NUL character, which text has none of; save the file as UTF-8 again")
    return text


def _json_lines(path: Path) -> Table:
    return _from_json_lines(path, read_text(path))


def _from_json_lines(path: Path, text: str) -> Table:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(), which would split at U+2028 too
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(_json_row(parse_json(line, where, "put one object on a line"), where))
            lines.append(number)
    return _from_rows(path, rows, lines)


def _json_list(path: Path) -> Table:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _from_json_lines(path, text)
    rows = parse_json(text, str(path), "a .json file is a list of objects, or one object on each line")
    return _from_rows(path, [_json_row(row, f"{path}, row {number}") for number, row in enumerate(rows)], ())


def _json_row(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: {shown(row)} is not a JSON object with named columns")
    return row


def _from_rows(path: Path, rows: list[dict], lines: Sequence[int]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table({name: values.copy for name, values in columns.items()}, str(path), lines=lines)


def _csv(path: Path) -> Table:
    return _delimited(path, ",")


def _tsv(path: Path) -> Table:
    return _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    usual_limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        rows, lines = [], []
        line = 1
        for row in reader:
            if row:  # not an empty line
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num}: not {'CSV' if delimiter == ',' else 'TSV'} ({one_line(error)}); "
                          "quote fields as the format asks") from error
    finally:
        csv.field_size_limit(usual_limit)
    header = [name.strip() for name in rows[0]] if rows else []
    if (name := _doubled(header)) is not None:
        raise CorpusError(f"{path}, line {lines[0]}: two columns are named {shown(name)}; rename one")
    for row, line in zip(rows, lines):
        if len(row) != len(header):
            raise CorpusError(f"{path}, line {line}: {len(row)} fields where the header names {len(header)}; quote a field "
                              "that holds the separator, or correct the row")
        # Many writers of TSV never quote. A quotation mark that opens such a field would swallow whole rows.
        if delimiter == "\t" and any("\t" in value and "\n" in value for value in row):
            raise CorpusError(f"{path}, line {line}: a quotation mark opens a field that runs over tabs and lines; double "
                              "the quotation marks of the text and quote the field, or save the file as .jsonl")
    columns = dict(zip(header, map(list, zip(*rows[1:])))) if rows[1:] else {name: [] for name in header}
    return Table({name: values.copy for name, values in columns.items()}, str(path), lines=lines[1:])


# --- tables of typed columns -----------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet  # slow to import, and seldom needed

    try:
        table = parquet.ParquetFile(path).read()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not a readable parquet file ({one_line(error)})") from error
    if (name := _doubled(table.column_names)) is not None:
        raise CorpusError(f"{path}: two columns are named {shown(name)}; rename one")
    columns = {name: table.column(name).to_pylist for name in table.column_names}
    return Table(columns, str(path), _names_in_schema(path, table.schema.metadata or {}))


def _names_in_schema(path: Path, metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The class names that `datasets` writes into a parquet file's schema, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
    except KeyError:
        return {}
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path}: the schema's entry 'huggingface' is unreadable ({one_line(error)}); save the file "
                          "again") from error
    found = {name: about.get("names") for name, about in features
             if isinstance(about, dict) and about.get("_type") == "ClassLabel"}
    for name, names in found.items():
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise CorpusError(f"{path}: the schema names the classes of {shown(name)} as {shown(names)}; save the file again")
    return {name: tuple(names) for name, names in found.items()}


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets.Dataset.save_to_disk`."""
    return all((folder / name).is_file() for name in SAVED)


def saved_table(folder: Path) -> Table:
    """The rows of a split that `save_to_disk` wrote."""
    import datasets  # a second to import
    from pyarrow import ArrowException

    try:
        listed = [file["filename"] for file in parse_json(read_text(folder / SAVED[0]), str(folder))["_data_files"]]
        if outside := [name for name in listed if Path(name).name != name]:
            raise CorpusError(f"{folder}: the file {shown(outside[0])} lies outside of the folder; save the dataset again")
        rows = datasets.load_from_disk(str(folder))
        rows.data.validate(full=True)  # offsets that point outside of a damaged file would end the process
    except (ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # what `datasets` raises
        raise CorpusError(f"{folder}: not a readable folder of save_to_disk ({one_line(error)}); save the dataset "
                          "again") from error
    return dataset_table(rows, str(folder))


def dataset_table(rows, place: str) -> Table:
    """The table of a `datasets.Dataset`, which is read when its columns are."""
    from datasets import ClassLabel

    rows = rows.with_format(None)  # Python's values, whatever the dataset was saved to give
    columns = {name: _reading(rows, name) for name in rows.column_names}
    class_names = {name: tuple(feature.names) for name, feature in rows.features.items() if isinstance(feature, ClassLabel)}
    return Table(columns, place, class_names)


def _reading(rows, column: str) -> Callable[[], list]:
    return lambda: rows[column][:]


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_list, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}


def ending(path: Path) -> str:
    """The ending that says how a file is read, in lower case: that before .gz, unless it is parquet; "" where none does."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    last = endings[0] if len(endings) == 2 and endings[1] == ".gz" and endings[0] != ".parquet" else (endings or [""])[-1]
    return last if last in READERS else ""


def read_table(path: Path) -> Table:
    """The rows of a file, read as its ending says."""
    return READERS[ending(path)](path)
