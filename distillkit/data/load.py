"""From the name of a corpus to a task: the one entrance to this room."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from distillkit.data.corpora import KNOWN, folder_corpus, hub_corpus
from distillkit.data.corpus import SPLITS, Corpus, CorpusError, is_text
from distillkit.data.docstrings import docstring_corpus, docstrings_qa
from distillkit.data.instruction import instruction_task
from distillkit.data.prepared import arguments, prepared_task
from distillkit.data.tasks import SHORTEST, Task, classification_task
from distillkit.io.checks import check_whole, limits_by_split
from distillkit.io.prepared import prepared_folder
from distillkit.io.seeds import generator

BUILT_IN = ("docstrings", "docstrings_qa", "docstrings_qa:library", "docstrings_qa:function")


def load_corpus(source, *, text_column: str | None = None, label_column: str | None = None) -> Corpus:
    """The corpus that `source` names: "docstrings", a known name, a folder, or a hub id.

    `text_column`, `label_column`: what the columns are called, where they have other names than usual.

    Raises `CorpusError` for a source that does not exist, a file that cannot be read, or columns that are missing.
    """
    source, columns = os.fspath(source) if isinstance(source, os.PathLike) else source, (text_column, label_column)
    if not isinstance(source, str) or not source:
        raise CorpusError(f"source must name a task by a string or a path, not by {source!r}")
    named = [name for name in columns if name is not None]
    if named and (source in BUILT_IN or len({*map(str, named)}) < len(named) or not all(map(is_text, named))):
        raise CorpusError(f"text_column and label_column must name two columns of a corpus that is not built in, not "
                          f"{text_column!r} and {label_column!r} of {source}")
    if source in BUILT_IN:
        return docstring_corpus() if source == "docstrings" else docstrings_qa(source)
    root = os.environ.get("DISTILLKIT_DATA") or "$DISTILLKIT_DATA"
    folder = Path(root if source in KNOWN else "", source).expanduser()
    if folder.is_dir():
        return folder_corpus(folder, columns, source if source in KNOWN else "")
    if folder.is_file():
        raise CorpusError(f"{source} is a file; name the folder that holds it, with the splits as train and test in it")
    if source in KNOWN or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return hub_corpus(source, columns, folder)
    names = [*BUILT_IN, *KNOWN]
    hint = "".join(f" (did you mean {name!r}?)" for name in difflib.get_close_matches(source, names, n=1))
    raise CorpusError(f"source: unknown task {source!r}{hint}: it is none of {', '.join(names)}, not an existing folder, and "
                      "not a hub id of the form 'owner/name'")


def load_task(
    source,
    *,
    max_length: int = 64,
    limit: int | Mapping[str, int | None] | None = None,
    seed: int = 0,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """The task that `source` names: "docstrings", "docstrings_qa", a name on the hub, a folder, or a hub id.

    `max_length`: tokens of a row, special ones included, 3 or more. `limit`: at most so many rows in each split, the
    classes as equal as they can be; `{"test": 900}` limits the splits that it names. `seed`: for `limit`, and for taking
    validation out of train where it is missing. `text_column`, `label_column`: the columns of labelled text, where they
    have other names than usual.

    A folder holds, itself or in `data/`, for each split a file or all of its numbered parts (.jsonl, .ndjson, .json, .csv,
    .tsv, packed as .gz or not; .parquet), or a folder of `save_to_disk`; val, valid, dev and eval are validation. A warning
    names other data that lie there. Where the source holds prompts with responses, the task is an
    `instruction.InstructionTask`. While DISTILLKIT_PREPARED names a prepared folder (`io/prepared.py`), the task comes from
    there, and its splits are `rows.Rows`.

    Raises `CorpusError` (a `ValueError`) for a source that does not exist, for rows that cannot be used, by place, and for
    arguments that a prepared folder was not prepared with.
    """
    check_whole("max_length", max_length, least=SHORTEST, meaning="at least one token between two special ones")
    limits = limits_by_split(limit, SPLITS)
    generator("task-limit", seed)  # an error now if it is none
    if folder := prepared_folder():
        return prepared_task(folder, arguments(source, max_length=max_length, limit=limits, seed=seed, text_column=text_column,
                                               label_column=label_column))
    corpus = load_corpus(source, text_column=text_column, label_column=label_column)
    make = classification_task if corpus.layout == "labels" else instruction_task
    return make(corpus, max_length=max_length, limits=limits, seed=seed)
