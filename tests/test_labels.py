"""Which class a label means: classes are names, and one number is one class however it is written."""

import json
import re
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

import distillkit as dk
from distillkit.data.corpus import CorpusError
from distillkit.data.labels import spelled, whole


@pytest.fixture
def write(tmp_path):
    """Writes rows with these labels as every split (or other ones as test) and gives the folder."""

    def write(labels, test=None, *, ending="jsonl", listed=None):
        for split, values in (("train", labels), ("validation", labels), ("test", test or labels)):
            rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(values)]
            path = tmp_path / f"{split}.{ending}"
            if ending == "csv":
                path.write_text("text,label\n" + "".join(f'{row["text"]},"{row["label"]}"\n' for row in rows))
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if listed is not None:
            (tmp_path / "labels.json").write_text(json.dumps(listed))
        return tmp_path

    return write


def read(task, split="train"):
    return [task.classes[label] for label in task.split(split)["label"]]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("labels, names", [
    ([0, 1, 0, 1], "0 1 0 1"),
    ([1, "1.0", "2", " 2 "], "1 1 2 2"),
    (["1", "1.0", "2.00", "+2"], "1 1 2 2"),
    ([-1, 0, 1, -1], "-1 0 1 -1"),
    ([0, 4, 4, 0], "0 4 4 0"),
    (["2019", "2021", "2020", "2020"], "2019 2021 2020 2020"),
    (["10", "9", "2", "2.0"], "10 9 2 2"),
    (["1.1", "1.10", "1.0", "1"], "1.1 1.10 1.0 1"),
    (["neg", "neg ", "\tpos", "pos"], "neg neg pos pos"),
    (["v1", "1", "1.0", "v1"], "v1 1 1.0 v1"),
])
def test_labels_are_read_as_the_names_they_spell(write, ending, labels, names):
    task = dk.load_task(write(labels, ending=ending))
    assert read(task) == read(task, "test") == names.split()
    order = sorted({*names.split()}, key=(lambda name: int(name)) if re.fullmatch(r"[-\d ]+", names) else str)
    assert list(task.classes) == order


@pytest.mark.parametrize("labels, names", [
    ([True, False, True], "true false true"),
    ([True, "false", "true"], "true false true"),
    ([0.5, 1, 1.0], "0.5 1 1"),
    ([1.5, 10.5, 2.5], "1.5 10.5 2.5"),
    ([1e3, 1000, 2], "1000 1000 2"),
])
def test_columns_of_json_values(write, labels, names):
    task = dk.load_task(write(labels))
    assert read(task) == names.split() and list(task.classes) == list(dict.fromkeys(
        sorted(names.split(), key=str if labels[0] is True else float)))


@pytest.mark.parametrize("spelling", [
    pyarrow.array([0, 1, 1], pyarrow.int8()), pyarrow.array([0, 1, 1], pyarrow.float32()),
    pyarrow.array([Decimal("0.00"), Decimal("1.00"), Decimal("1.00")]), pyarrow.array(["0", "1", "1"]).dictionary_encode(),
    pyarrow.array([False, True, True]),
])
def test_columns_of_parquet(tmp_path, spelling):
    for split in ("train", "validation", "test"):
        table = pyarrow.table({"text": pyarrow.array(["a", "b", "c"]), "label": spelling})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    names = ["false", "true", "true"] if spelling.type == pyarrow.bool_() else ["0", "1", "1"]
    assert read(dk.load_task(tmp_path)) == names


def test_numbers_and_names_however_they_are_written():
    values = [Decimal("3.0"), 3, 3.0, "3", "3.0", " +3 "]
    assert [whole(value) for value in values] == [3] * 6 and {spelled(value) for value in values[:3]} == {"3"}
    assert spelled(True) == "true" and whole(True) is None
    for value in (None, "", " ", [1], {"a": 1}, float("nan"), float("inf"), Decimal("NaN")):
        assert spelled(value) is None and whole(value) is None
    assert whole("1.1") is whole("1e3") is whole("1" * 5000) is None


@pytest.mark.parametrize("listed, labels, names", [
    (["neg", "pos"], [0, 1, 1], "neg pos pos"),
    (["neg", "pos"], ["0", "1.0", "1"], "neg pos pos"),
    (["neg", "pos"], ["pos", "neg ", "pos"], "pos neg pos"),
    (["pos", "neg"], ["pos", "neg", "pos"], "pos neg pos"),
    (["1", "2", "3"], [1, 2, 3], "1 2 3"),
    (["1", "2", "3"], ["3.0", "1", "2"], "3 1 2"),
    (["1", "0"], [1, 0, 1], "1 0 1"),
    (["2019", "2020"], [2020, 2019, 2020], "2020 2019 2020"),
    (["2019", "2020"], [0, 1, 1], "2019 2020 2020"),
    ([" a", "b "], ["a", "b", "a"], "a b a"),
    (["false", "true"], [True, False, True], "true false true"),
])
def test_a_list_of_classes(write, listed, labels, names):
    task = dk.load_task(write(labels, listed=listed))
    assert read(task) == names.split() and list(task.classes) == [name.strip() for name in listed]


@pytest.mark.parametrize("listed, labels, test, row, label", [
    (["neg", "pos"], ["neg", "pos"], ["neg", "1"], 1, "'1'"),
    (["neg", "pos"], ["neg", "pos", "1"], None, 2, "'1'"),
    (["neg", "pos"], [0, 1, "pos"], None, 2, "'pos'"),
    (["neg", "pos"], [0, 1], [0, 2], 1, "2"),
    (["neg", "pos"], [0, 1], [1, -1], 1, "-1"),
    (["neg", "pos"], ["neg", "pos"], ["Neg", "pos"], 0, "'Neg'"),
    (["1", "2", "3"], [1, 2, 3], [0, 1], 0, "0"),
    (["1", "2", "3"], [0, 1, 2], None, 0, "0"),
    (["neg", "pos"], [False, True], None, 0, "False"),
    (None, ["neg", "pos"], ["neg", "1"], 1, "'1'"),
    (None, ["neg", "pos"], ["neg", 1], 1, "1"),
    (None, [0, 1], [0, "no"], 1, "'no'"),
    (None, ["1.1", "1.10"], ["1.1", "1.100"], 1, "'1.100'"),
    (None, ["1", "1.0"], ["1.0", "x"], 1, "'x'"),
])
def test_no_label_falls_back_to_a_place(write, listed, labels, test, row, label):
    with pytest.raises(CorpusError, match=rf"row {row} \(counted from 0; .*, line {row + 1}\): the label is {label}, which is"):
        dk.load_task(write(labels, test, listed=listed))


@pytest.mark.parametrize("label", [None, "", " ", ["neg"], [], {"a": 1}, float("nan"), json.loads("[" * 90 + "]" * 90)])
@pytest.mark.parametrize("listed", [None, ["neg", "pos"]])
def test_labels_that_are_none_are_named_by_row(write, listed, label):
    good, bad = ["neg", "pos", "neg", "pos"], ["neg", "pos", "neg", label]
    for train, test, split in ((bad, good, "train"), (good, bad, "test")):
        place = rf"split {split}, row 3 \(counted from 0; .*{split}.jsonl, line 4\): the label is"
        with pytest.raises(CorpusError, match=place):
            dk.load_task(write(train, test, listed=listed))


@pytest.mark.parametrize("labels", [[0, "x"], [True, 1], [1, "1.5"], [1.5, "1.5"]])
def test_kinds_that_are_mixed(write, labels):
    with pytest.raises(CorpusError, match="train.jsonl mixes labels that are numbers"):
        dk.load_task(write(labels))


def test_names_that_differ_in_case_bring_a_warning(write):
    with pytest.warns(UserWarning, match="'Pos', 'pos' differ in case only"):
        assert dk.load_task(write(["Pos", "pos", "neg"])).classes == ("Pos", "neg", "pos")


def test_minus_one_is_a_class_where_train_has_it(write):
    task = dk.load_task(write([-1, 1, -1, 1], [-1, -1]))
    assert read(task, "test") == ["-1", "-1"] and len(task.validation) == 4
    task = dk.load_task(write([-1, 1, -1, 1], [-1, -1], listed=["-1", "1"]))
    assert read(task, "test") == ["-1", "-1"]
    (write([0, 1]) / "labels.json").unlink()
    task = dk.load_task(write([0, 1, 0, 1] * 5, ["-1.0", "-1"]))
    assert read(task, "test") == ["0", "1", "0", "1"] * 5 and "used as test" in task.origin


def test_control_characters_of_names_do_not_reach_a_message(write):
    with pytest.raises(CorpusError) as caught:
        dk.load_task(write(["\x1b[31mred", "blue"], ["\x1b[2Jgone"]))
    assert str(caught.value).isprintable() and "\\x1b[31mred" in str(caught.value)
