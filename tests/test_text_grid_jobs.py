"""The grid of ways to text: cells are experiments of their own, interrupted and shared, in one result and one table."""

import pytest
import yaml

from distillkit.cli.main import main
from distillkit.experiments import runner
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import by_row, by_set, frame, paired_difference, read
from distillkit.experiments.runner import CONFIGS
from distillkit.experiments.settings import kind_of
from distillkit.experiments.ways_to_text import TextGridJob, text_grid_table

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
    assert [(s["cell"], s["row"], s["set_seed"]) for s in part["scores"]] == [
        ("ag_news,2", row, 1) for row in sorted(SETTINGS["rows"])]
    cells = [f"{corpus},{size}" for size in (1, 2) for corpus in ("rotten_tomatoes", "ag_news")]
    assert [(s["cell"], s["row"], s["set_seed"]) for s in whole["scores"]] == [
        (cell, row, seed) for cell in sorted(cells) for row in sorted(SETTINGS["rows"]) for seed in (0, 1)]
    for score in whole["scores"]:
        corpus, size = score["cell"].split(",")
        assert (score["corpus"], score["per_class"]) == (corpus, int(size))
        assert score["examples"] == int(size) * (2 if corpus == "rotten_tomatoes" else 4)
    assert all(score in whole["scores"] for score in part["scores"])
    notes = whole["cells"]["ag_news,1"]["notes"]["swaps from sentences 1"]
    assert len(notes["text"]) == 4 and notes["steps"] == 2


def test_what_is_made_is_not_made_again(finished, standin_hub, monkeypatch):
    folder, _, whole = finished
    monkeypatch.setattr(runner, "load_corpus", lambda *a: pytest.fail("made again"))
    assert command(folder) == 0 and read(folder / "small.json") == whole


@pytest.mark.parametrize("view", [by_set, by_row])
def test_cells_are_not_mixed_under_one_name(finished, view):
    _, _, whole = finished
    with pytest.raises(ValueError, match=r"the row 'herding/fixed' stands in the cells .*'ag_news,1'.*; name one with cell="):
        view(whole)
    assert view(whole, cell="ag_news,1").notna().any(axis=None)


def test_the_table(finished):
    _, part, whole = finished
    lines = text_grid_table(whole).splitlines()
    assert table_of(whole).splitlines() == lines and lines[0] == "| examples a class | text | rotten_tomatoes | ag_news |"
    sets = by_set(whole, cell="ag_news,1")
    (line,) = (line for line in lines if line.startswith("| 1 | swaps from sentences |"))
    mean, _ = paired_difference(sets, "swaps from sentences/fixed", "herding/fixed")
    assert f"{sets.loc['swaps from sentences/fixed'].mean():.3f} ±" in line and f"; {mean:+.3f}" in line.split("|")[-2]
    assert len(lines) == 2 + 6 + 2
    table = text_grid_table(part)
    assert "| 2 | k_center | not run |" in table and "| 1 |" not in table and table.endswith("Not run: 1 a class.")
    without = part | {"scores": [score for score in part["scores"] if score["method"] != "herding"]}
    assert "herding |" not in text_grid_table(without), "a line without a score says nothing"
    assert {*frame(part)["row"]} == {*SETTINGS["rows"]}


def test_shipped_settings():
    shipped = {p.stem: TextGridJob.from_yaml(p) for p in CONFIGS.glob("*.yaml") if kind_of(p) == "text_grid"}
    assert "text_sizes" in shipped and all(found.name == name for name, found in shipped.items())


@pytest.mark.parametrize(("change", "message"), [
    ({"corpora": {}}, "corpora must hold a line"), ({"per_class": []}, "per_class must have at least 1 item"),
    ({"per_class": [0]}, "rotten_tomatoes,0: per_class must"), ({"base": {"swaps": 3}}, "base: unknown setting 'swaps'"),
    ({"corpora": {"sst2": {"corpus": "imdb"}}}, "sst2: unknown setting 'corpus'"), ({"rows": ["best/fixed"]}, "a row must be"),
])
def test_bad_settings_are_named(tmp_path, capsys, change, message):
    assert command(tmp_path, settings=SETTINGS | change) == 2
    assert message in capsys.readouterr().err
