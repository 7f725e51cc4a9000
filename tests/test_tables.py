"""Files that other people wrote: ordinary layouts load with the right rows, the others are errors that name file and line."""

import gzip
import json
import random
import re

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

import distillkit as dk
from distillkit.cli.main import main
from distillkit.data.corpus import CorpusError

TEXTS = ["it was fine", 'a "quoted", word', "tabs\tand", "two\nlines", "NA", "caf\u00e9 \u2028 end"]
ROWS = [{"text": text, "label": ["bad", "good"][number % 2]} for number, text in enumerate(TEXTS)]
TABLE = pandas.DataFrame(ROWS)
BOMB = "[" * 100_000 + "]" * 100_000


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv(**options):
    return TABLE.to_csv(index=False, **options)


def columns(task, split="train"):
    return task.split(split)["text"][:], [task.classes[label] for label in task.split(split)["label"]]


def as_written(task, split="train"):
    return columns(task, split) == (TEXTS, [row["label"] for row in ROWS])


@pytest.fixture
def folder(tmp_path):
    """Writes files by name, text or bytes, and gives their folder."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / "mine"

    return write


CONTENTS = {
    "jsonl": lines(ROWS), "ndjson": lines(ROWS), "JSONL": lines(ROWS), "json": json.dumps(ROWS, indent=1), "Json": lines(ROWS),
    "csv": csv(), "CSV": csv(lineterminator="\r\n"), "tsv": csv(sep="\t"), "jsonl.gz": gzip.compress(lines(ROWS).encode()),
    "csv.gz": gzip.compress(csv().encode()), "JSON.GZ": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("ending", CONTENTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_ending_gives_the_same_rows(folder, ending, mark):
    content = CONTENTS[ending]
    if mark:
        content = gzip.compress(mark.encode() + gzip.decompress(content)) if isinstance(content, bytes) else mark + content
    task = dk.load_task(folder(**{f"{split}.{ending}": content for split in ("train", "validation", "test")}))
    assert all(as_written(task, split) for split in ("train", "validation", "test")) and task.classes == ("bad", "good")


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "eval"])
def test_names_of_the_validation_split(folder, name):
    task = dk.load_task(folder(**{"train.csv": csv(), f"{name}.csv": csv(), "test.csv": csv()}))
    assert as_written(task, "validation") and as_written(task), "nothing was carved out of train"


def test_windows_line_ends_in_lines_of_json(folder):
    assert as_written(dk.load_task(folder(**{"train.jsonl": lines(ROWS).replace("\n", "\r\n"), "val.jsonl": lines(ROWS),
                                             "test.jsonl": lines(ROWS)})))


def test_a_field_longer_than_the_standard_limit(folder):
    import csv as standard

    limit, long = standard.field_size_limit(), "word " * 40_000
    path = folder(**{name: csv() + f"{long},good\n" for name in ("train.csv", "dev.csv", "test.csv")})
    assert dk.load_task(path).train["text"][-1] == long and standard.field_size_limit() == limit


@pytest.mark.parametrize("place", ["", "data/"])
def test_numbered_parts_are_one_split(tmp_path, place):
    home = tmp_path / "mine" / place
    home.mkdir(parents=True)
    for split, parts in (("train", 3), ("validation", 1), ("test", 2)):
        for part in range(parts):
            piece = TABLE.iloc[part * len(TABLE) // parts : (part + 1) * len(TABLE) // parts]
            piece.to_parquet(home / f"{split}-{part:05}-of-{parts:05}.parquet")
    task = dk.load_task(tmp_path / "mine")
    assert all(as_written(task, split) for split in ("train", "validation", "test"))
    TABLE.iloc[2:4].assign(label=[None, "good"]).to_parquet(home / "train-00001-of-00003.parquet")
    with pytest.raises(CorpusError, match=r"row 2 \(counted from 0; .*train-00001-of-00003.parquet\): the label is"):
        dk.load_task(tmp_path / "mine")
    (home / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(CorpusError, match="train-00000-of-00003.parquet, .*; keep one file, or the numbered parts"):
        dk.load_task(tmp_path / "mine")


NUMBERED = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])})


@pytest.mark.parametrize("form", [None, "numpy"])
def test_a_folder_of_save_to_disk(tmp_path, form):
    rows = datasets.Dataset.from_dict(TABLE.to_dict("list"), features=NUMBERED).with_format(form)
    datasets.DatasetDict({"train": rows, "valid": rows, "test": rows}).save_to_disk(tmp_path / "mine")
    task = dk.load_task(tmp_path / "mine")
    assert task.classes == ("good", "bad") and all(as_written(task, split) for split in ("train", "validation", "test"))
    rows.save_to_disk(tmp_path / "single")
    with pytest.raises(CorpusError, match="single has no test split"):
        dk.load_task(tmp_path / "single")
    (tmp_path / "mine" / "test" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../train/data.arrow"}]}))
    with pytest.raises(CorpusError, match="lies outside of the folder"):
        dk.load_task(tmp_path / "mine")


def test_class_names_in_a_parquet_schema_are_kept_by_name(tmp_path):
    """Also where two files number them in another order."""
    (tmp_path / "mine").mkdir()
    for split, names in (("train", ["good", "bad"]), ("validation", ["good", "bad"]), ("test", ["bad", "good"])):
        features = datasets.Features(NUMBERED | {"label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict(TABLE.to_dict("list"), features=features).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    task = dk.load_task(tmp_path / "mine")
    assert task.classes == ("good", "bad") and all(as_written(task, split) for split in ("train", "validation", "test"))


def test_categories_are_their_names(tmp_path):
    (tmp_path / "mine").mkdir()
    for split in ("train", "dev", "test"):
        TABLE.astype({"label": "category"}).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    assert as_written(dk.load_task(tmp_path / "mine"))


@pytest.mark.parametrize("name, content", [
    ("state.json", {"_data_files": []}), ("state.json", {"_data_files": [{"filename": "absent.arrow"}]}),
    ("state.json", {"_split": 3}), ("state.json", {"_data_files": [{}]}), ("dataset_info.json", {"features": "x"}),
    ("dataset_info.json", {"features": {"text": {"_type": "Nothing"}}}), ("state.json", BOMB),
    ("data-00000-of-00001.arrow", "x"), ("data-00000-of-00001.arrow", 9),
])
def test_damaged_folders_of_save_to_disk(tmp_path, name, content):
    rows = datasets.Dataset.from_dict(TABLE.to_dict("list"), features=NUMBERED)
    datasets.DatasetDict({"train": rows, "valid": rows, "test": rows}).save_to_disk(tmp_path / "mine")
    path = tmp_path / "mine" / "train" / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_bytes()) | content)
    elif isinstance(content, int):  # the end of the first text lies far outside of the file
        content = path.read_bytes().replace(b"\0" * 4 + len(TEXTS[0]).to_bytes(4, "little"), b"\0" * 4 + b"\xff\xff\xff\x7f", 1)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CorpusError, match="train cannot be read|train: not JSON"):
        dk.load_task(tmp_path / "mine")


@pytest.mark.parametrize("name", ["val", "valid", "dev", "eval", "validation"])
def test_splits_of_the_hub_go_by_the_same_names(monkeypatch, name):
    rows = datasets.Dataset.from_dict(TABLE.to_dict("list"), features=NUMBERED)
    splits = datasets.DatasetDict({"train": rows, name: rows, "test": rows, "more": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    with pytest.warns(UserWarning, match="not read: more;"):
        task = dk.load_task("somebody/something")
    assert task.classes == ("good", "bad") and all(as_written(task, split) for split in ("train", "validation", "test"))
    del splits["test"], splits[name], splits["train"]
    with pytest.raises(CorpusError, match="holds none of train.*Not read: more"):
        dk.load_task("somebody/something")


def test_a_malformed_file_of_the_hub(monkeypatch):
    def malformed(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")

    monkeypatch.setattr(datasets, "load_dataset", malformed)
    with pytest.raises(CorpusError, match="somebody/something.*An error occurred while generating"):
        dk.load_task("somebody/something")


@pytest.mark.parametrize("said", [
    [{"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "The Po."}],
    {"from": ["human", "gpt"], "value": ["Name a river.", "The Po."]},  # as the hub's older data sets hold lists of objects
])
def test_conversations_of_the_hub(monkeypatch, said):
    rows = datasets.Dataset.from_dict({"conversations": [said] * 20})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": rows, "test": rows}))
    task = dk.load_task("somebody/something")
    assert task.test[3] == {"prompt": "Name a river.", "response": "The Po.", "choices": [], "answer": -1, "group": ""}


# --- columns of other names ------------------------------------------------------------------------------------------

RENAMED = TABLE.rename(columns={"text": "tweet", "label": "mood"}).assign(text="other text", label="other label")


def test_columns_that_are_named(folder):
    named = {f"{split}.csv": RENAMED.to_csv(index=False) for split in ("train", "dev", "test")}
    assert as_written(dk.load_task(folder(**named), text_column="tweet", label_column="mood"))
    prompts = {name: content.replace("text,label", "prompt,response") for name, content in named.items()}
    assert as_written(dk.load_task(folder(**prompts), text_column="tweet", label_column="mood")), "labelled text all the same"


def test_columns_are_named_on_the_command_line_and_for_the_hub(folder, capsys, standin_hub, tmp_path):
    task = dk.load_task("fancyzhx/ag_news", text_column="text", label_column="label")
    assert task.classes == ("World", "Sports", "Business", "Sci/Tech")
    path = folder(**{f"{split}.csv": RENAMED.drop(columns=["text", "label"]).to_csv(index=False)
                     for split in ("train", "dev", "test")})
    say = ["evaluate", "--corpus", str(path), "--set", str(tmp_path / "set"), "--student", "bert-base-uncased", "--work",
           str(tmp_path / "runs"), "--seeds", "0", "--recipe", "standard"]
    named = dk.load_task(path, text_column="tweet", label_column="mood", max_length=32)
    student = dk.load_student("bert-base-uncased", named)
    dk.select(named, student, "random", per_class=1).save(tmp_path / "set")
    assert main(say) == 2 and "mine" in capsys.readouterr().err
    assert main([*say, "--text-column", "tweet", "--label-column", "mood"]) == 0


@pytest.mark.parametrize("given, message", [
    ({"text_column": "twit"}, "train.csv has no column 'twit', which text_column names: it has tweet, mood, text, label"),
    ({"label_column": "mod"}, "has no column 'mod', which label_column names"),
    ({"text_column": "tweet", "label_column": "tweet"}, "not 'tweet' and 'tweet' of"),
    ({"text_column": ""}, "must name two columns of a corpus that is not built in, not '' and None"),
    ({"label_column": 3}, "must name two columns of a corpus that is not built in, not None and 3"),
])
def test_columns_that_are_not_there(folder, given, message):
    path = folder(**{f"{split}.csv": RENAMED.to_csv(index=False) for split in ("train", "dev", "test")})
    with pytest.raises(CorpusError, match=re.escape(message)):
        dk.load_task(path, **given)
    with pytest.raises(CorpusError, match="text_column and label_column .*docstrings"):
        dk.load_task("docstrings", **given)


# --- what is not read ------------------------------------------------------------------------------------------------


def test_what_looks_like_data_is_named(folder):
    others = dict.fromkeys(["test.xlsx", "more/a.parquet", "README.md", "train.parquet.gz"], "")
    path = folder(**{"training.csv": csv()} | others)
    with pytest.raises(CorpusError, match="mine holds none of .*Not read: more/, test.xlsx, train.parquet.gz, training.csv"):
        dk.load_task(path)
    folder(**{"train.csv": csv(), "validation/good/1.txt": "x"})
    with pytest.raises(CorpusError, match="no test split.*not read: more/, test.xlsx, .*, validation/; add a labelled test"):
        dk.load_task(path)
    folder(**{"test.csv": csv(), "dev.csv": csv(), "val.csv": csv()})
    with pytest.warns(UserWarning, match="not read: more/, test.xlsx, train.parquet.gz, training.csv, validation/, val.csv"):
        dk.load_task(path)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(CorpusError, match="train.csv is a file; name the folder"):
        dk.load_task(folder(**{"train.csv": csv()}) / "train.csv")


@pytest.mark.parametrize("ending, mark, said", [("csv", ";", "semicolons.*commas"), ("csv", "|", "bars.*commas"),
                                                ("csv", "\t", "tabs.*commas"), ("tsv", ",", "commas.*tabs")])
@pytest.mark.parametrize("options", [{}, {"quoting": 1}, {"lineterminator": "\r\n"}])
def test_another_separator_than_the_ending_says(folder, ending, mark, said, options):
    others = {f"{split}.{ending}": csv(sep=mark, **options) for split in ("train", "dev", "test")}
    with pytest.raises(CorpusError, match=f"(dev|test|train).{ending}.*text.*{said}"):
        dk.load_task(folder(**others))


def test_a_column_may_hold_another_separator_in_its_name(folder):
    renamed = TABLE.rename(columns={"text": "text; as written", "label": "a|b"})
    path = folder(**{f"{split}.csv": renamed.to_csv(index=False) for split in ("train", "dev", "test")})
    assert as_written(dk.load_task(path, text_column="text; as written", label_column="a|b"))


@pytest.mark.parametrize("second", ["train.jsonl.gz", "train-00000-of-00001.csv", "data/train.csv"])
def test_two_files_for_one_split(folder, second):
    with pytest.raises(CorpusError, match="mine holds .*train.* for one split; keep one file"):
        dk.load_task(folder(**{"train.csv": csv(), second: csv(), "test.csv": csv()}))


# --- files that cannot be read as they stand -------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, message", [
    ("train.csv", "text,label\na,0\nb,c,1\n", "line 3: 3 fields where the header names 2"),
    ("train.csv", 'text,label\n"a\nb",0\nc,d,1\n', "line 4: 3 fields"),
    ("train.csv", "text,label\na,0\n\nb\n", "line 4: 1 fields where the header names 2"),
    ("train.csv", "text,label,label\na,0,1\n", ": two columns are named 'label'"),
    ("train.csv", 'text,label\n"a"b,0\n', "line 2: not CSV"),
    ("train.csv", 'text,label\na,0\n"b,1\n', "line 3: not CSV"),
    ("train.csv", "text,label\na\0b,0\n", "line 2: a NUL character"),
    ("train.csv", "text,label\na,0\n".encode("utf-16"), "cannot be read: .*utf-8"),
    ("train.csv", "text,label\na,0\n".encode("utf-16-le"), "line 1: a NUL character"),
    ("train.tsv", 'text\tlabel\n"half\t0\nanother"\t1\n', "line 2: a quotation mark opens a field"),
    ("train.tsv", "text\tlabel\na\tb\t0\n", "line 2: 3 fields where the header names 2"),
    ("train.jsonl", '{"text": "a", "label": 0}\n\n{"text": "a", "label": 0, "text": "b"}\n', "line 3: .*'text' twice"),
    ("train.jsonl", '{"text": "a", "label": 0}\n{"text": ' + BOMB + "}\n", "line 2: not JSON .*recursion"),
    ("train.json", BOMB, "not JSON .*recursion"),
    ("train.json", '[{"text": "a", "label": 0}, ["b", 1]]', r"row 1: \['b', 1\] is not a JSON object"),
    ("train.json", '{"data": [\n{"text": "a", "label": 0}]}', "line 1: not JSON .*list of objects|put one object on a line"),
    ("train.jsonl.gz", b"no gzip", "cannot be read: .*(gzip|end-of-stream)"),
    ("train.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-9], "cannot be read: .*(gzip|end-of-stream)"),
    ("train.parquet", "PAR1 and no more", "cannot be read"),
])
def test_damaged_files_are_errors_with_their_line(folder, capsys, tmp_path, name, content, message):
    path = folder(**{name: content, "test.jsonl": lines(ROWS)})
    with pytest.raises(CorpusError, match=f"{re.escape(name)}.*{message}"):
        dk.load_task(path)
    assert main(["distil", "--corpus", str(path), "--work", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1, "one line, no traceback"


def test_doubled_columns_and_bad_bytes_in_parquet(tmp_path, folder):
    path = folder(**{"test.csv": csv()})
    text = pyarrow.array(["a", "b"])
    pyarrow.parquet.write_table(pyarrow.table([text, text, text], names=["text", "label", "label"]), path / "train.parquet")
    with pytest.raises(CorpusError, match="train.parquet: two columns are named 'label'"):
        dk.load_task(path)
    ends = pyarrow.array([0, 1], pyarrow.int32()).buffers()[1]
    broken = pyarrow.StringArray.from_buffers(1, ends, pyarrow.py_buffer(b"\xff"))
    pyarrow.parquet.write_table(pyarrow.table([broken, broken], names=["text", "label"]), path / "train.parquet")
    with pytest.raises(CorpusError, match="train.parquet, column 'text' cannot be read: .*utf-8"):
        dk.load_task(path)


@pytest.mark.parametrize("features", ['{"info": 3}', "{", '{"info": {"features": {"a": {"_type": "ClassLabel", "names": 3}}}}'])
def test_a_parquet_schema_that_lies(tmp_path, folder, features):
    path = folder(**{"test.csv": csv()})
    table = pyarrow.Table.from_pandas(TABLE).replace_schema_metadata({b"huggingface": features.encode()})
    pyarrow.parquet.write_table(table, path / "train.parquet")
    with pytest.raises(CorpusError, match="train.parquet.*(cannot be read|its schema: not JSON)"):
        dk.load_task(path)


@pytest.mark.parametrize("row, name, place", [
    (6, "train.jsonl", r"row 6 \(counted from 0; .*train.jsonl, line 7\)"),
    (6, "train.csv", r"row 6 \(counted from 0; .*train.csv, line 8\)"),
    (6, "train.json", r"row 6 \(counted from 0; .*train.json, row 6\)"),
])
@pytest.mark.parametrize("value", [None, "", " "])
def test_a_missing_label_is_named_by_file_and_line(folder, row, name, place, value):
    rows = [{"text": f"text {number}", "label": "good" if number % 2 else "bad"} for number in range(10)]
    rows[row]["label"] = value
    table = pandas.DataFrame(rows)
    content = {"jsonl": lines(rows), "csv": table.to_csv(index=False), "json": json.dumps(rows)}[name.split(".")[1]]
    with pytest.raises(CorpusError, match=place):
        dk.load_task(folder(**{name: content, "test.jsonl": lines(ROWS)}))


def test_damage_anywhere_in_a_file_is_never_a_traceback(folder):
    """Bytes of whole files dropped, doubled or changed: the task loads, or the error is ours."""
    draw, contents = random.Random(0), {**CONTENTS, "parquet": TABLE.to_parquet()}
    outcomes = set()
    for _ in range(200):
        ending = draw.choice([*contents])
        content = contents[ending] if isinstance(contents[ending], bytes) else contents[ending].encode()
        start, length = draw.randrange(len(content)), draw.choice([1, 1, 2, 9])
        piece = draw.choice([b"", content[start : start + length] * 2, bytes([draw.randrange(256)])])
        name, rest = f"train.{ending}", {"test.csv": csv(), "val.csv": csv()}
        path = folder(**{name: content[:start] + piece + content[start + length :], **rest})
        try:
            dk.load_task(path)
            outcomes.add("loads")
        except CorpusError as error:
            assert str(error).isprintable(), "nothing of a file reaches the terminal raw"
            outcomes.add("refused")
        (path / name).unlink()
    assert outcomes == {"loads", "refused"}
