"""The grid of ways to text: cells are experiments of their own, interrupted and shared, in one result and one table."""

import copy

import pytest
import yaml

from distillkit.cli.main import draw, main
from distillkit.experiments import text_grid as text_grid_jobs
from distillkit.experiments.results import kind_of, read
from distillkit.experiments.runner import CONFIGS
from distillkit.experiments.text_grid import TextGridJob, text_grid_table

BASE = {
    "student": "bert-base-uncased", "max_length": 12, "length": 8, "seeds": [0, 1], "eval_seeds": [0], "judge_steps": 5,
    "sentence_steps": 2, "sentences": 20, "swap_steps": 2, "candidates": 4, "examples": 2, "fixed_steps": 2,
}
SETTINGS = {
    "kind": "text_grid", "name": "small", "base": BASE, "corpora": {"rotten_tomatoes": {}, "ag_news": {"limit": 40}},
    "per_class": [1, 2], "rows": ["k_center/fixed", "herding/fixed", "swaps from sentences/fixed"],
}


def command(folder, *more, settings=SETTINGS):
    (folder / "small.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work"), *more])


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    import standin_hub

    folder = tmp_path_factory.mktemp("grid")
    with standin_hub.patched(standin_home):
        assert command(folder, "--rows", "ag_news,2", "--seeds", "1") == 0
        part = read(folder / "small.json")
        assert command(folder) == 0
    return folder, part, read(folder / "small.json")


def test_cells_rows_and_seeds_may_be_made_one_by_one(finished):
    _, part, whole = finished
    assert [*part["cells"]] == ["ag_news,2"] and all([*seeds] == ["1"] for seeds in part["cells"]["ag_news,2"]["rows"].values())
    assert {*whole["cells"]} == {"rotten_tomatoes,1", "ag_news,1", "rotten_tomatoes,2", "ag_news,2"}
    for key, cell in whole["cells"].items():
        corpus, size = key.split(",")
        assert cell["config"]["corpus"] == corpus and [*cell["rows"]] == SETTINGS["rows"]
        for row in cell["rows"].values():
            assert [*sorted(row)] == ["0", "1"]
            assert {score["examples"] for score in row.values()} == {int(size) * len(row["0"]["groups"])}
    for name, row in part["cells"]["ag_news,2"]["rows"].items():
        assert whole["cells"]["ag_news,2"]["rows"][name]["1"] == row["1"]


def test_what_is_made_is_not_made_again(finished, standin_hub, monkeypatch):
    folder, _, whole = finished
    monkeypatch.setattr(text_grid_jobs, "TextRun", lambda *a: pytest.fail("made again"))
    assert command(folder) == 0 and read(folder / "small.json") == whole


def test_the_table(finished):
    whole = finished[2]
    lines = text_grid_table(whole).splitlines()
    assert draw(whole).splitlines() == lines and lines[0] == "| examples a class | text | rotten_tomatoes | ag_news |"
    rows = whole["cells"]["ag_news,1"]["rows"]
    means = {name: [rows[f"{name}/fixed"][s]["mean"] for s in "01"] for name in ("herding", "swaps from sentences")}
    (line,) = (line for line in lines if line.startswith("| 1 | swaps from sentences |"))
    gain = sum(a - b for a, b in zip(means["swaps from sentences"], means["herding"], strict=True)) / 2
    assert f"{sum(means['swaps from sentences']) / 2:.3f} ±" in line and f"; {gain:+.3f}" in line.split("|")[-2]
    assert len(lines) == 2 + 6 + 2
    part_of = copy.deepcopy(finished[1])
    part = text_grid_table(part_of)
    assert "| 2 | k_center | not run |" in part and "| 1 |" not in part and part.endswith("Not run: 1 a class.")
    del part_of["cells"]["ag_news,2"]["rows"]["herding/fixed"]
    assert "herding |" not in text_grid_table(part_of), "a line without a score says nothing"


def test_shipped_settings():
    shipped = {p.stem: TextGridJob.from_yaml(p) for p in CONFIGS.glob("*.yaml") if kind_of(p) == "text_grid"}
    assert "text_sizes" in shipped and all(found.name == name for name, found in shipped.items())


@pytest.mark.parametrize(("change", "message"), [
    ({"corpora": {}}, "corpora must hold a line"), ({"per_class": []}, "per_class must be a list"),
    ({"per_class": [0]}, "per_class must be a whole number"), ({"base": {"swaps": 3}}, "base: unknown setting 'swaps'"),
    ({"corpora": {"sst2": {"corpus": "imdb"}}}, "sst2: unknown setting 'corpus'"), ({"rows": ["best/fixed"]}, "a row must be"),
])
def test_bad_settings_are_named(tmp_path, capsys, change, message):
    assert command(tmp_path, settings=SETTINGS | change) == 2
    assert message in capsys.readouterr().err
