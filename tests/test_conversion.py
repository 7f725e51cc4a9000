"""Converted results print the same numbers in every table, and hold every number that the old ones held."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import MARKED, read, unsealed, write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "figures"))
from convert_results import convert  # noqa: E402

BEFORE = "e9f653f"


def before(path):
    return subprocess.run(["git", "show", f"{BEFORE}:{path}"], cwd=ROOT, capture_output=True, check=True).stdout


def names():
    command = ["git", "ls-tree", "--name-only", BEFORE, "figures/results/"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [Path(name).stem for name in listed if "metagrad" not in name]


PAGES = [before(page).decode() for page in ("README.md", "figures/RESULTS.md")]
TABLES = {match[3]: match[0] for page in PAGES for match in MARKED.finditer(page)}


def numbers(value):
    if isinstance(value, dict):
        return {number for inner in value.values() for number in numbers(inner)}
    if isinstance(value, list):
        return {number for inner in value for number in numbers(inner)}
    return {value} if isinstance(value, int | float | str) else set()


@pytest.mark.parametrize("name", names())
def test_every_printed_number_is_the_same(name, tmp_path):
    old = unsealed(before(f"figures/results/{name}.json"))
    path = tmp_path / f"{name}.json"
    write(path, convert(old))
    new = read(path)
    printed, expected = (text.replace("| -0.000", "| +0.000").splitlines() for text in (table_of(new), TABLES[name]))
    assert printed == expected[1:-1]
    lost = numbers(old) - numbers(new)
    means = {score["mean"] for score in scores(old)} | {score.get("std") for score in scores(old)}
    assert not {value for value in lost if value not in means and not str(value).startswith("k_center")}, "what is not a mean"
    committed = json.loads((ROOT / "figures" / "results" / f"{name}.json").read_text())
    assert {key: committed[key] for key in new} == new, "the converted file is committed"


def scores(result):
    for cell in result.get("cells", {"": result}).values():
        for row in cell["rows"].values():
            yield from [row] if "mean" in row else row.values()
