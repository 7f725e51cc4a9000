"""Grids of experiments in small: the slides' table on the stand-in hub, taken up again, with cells that cannot be run."""

import json
import shutil

import pytest
import yaml

from distillkit.cli import main as command_line
from distillkit.experiments import runner
from distillkit.experiments.classification import ClassificationCell, GridJob, scaling_table, slides_table
from distillkit.experiments.results import frame, read, write
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import kind_of
from distillkit.io.storage import read_lines

BASE = {"max_length": 12, "length": 8, "unroll_steps": 2, "outer_steps": 2, "outer_batch": 8, "eval_seeds": [0, 1],
        "full_seeds": [0], "standard_steps": 2, "tuned_grid": {"step_size": [0.001], "steps": [1, 2]}}
SLIDES = {"kind": "slides", "name": "small", "base": BASE, "rows": ["random/tuned", "embeddings/own", "full/standard"],
          "product": {"corpus": ["ag_news", "rotten_tomatoes"], "student": ["bert-base-uncased", "roberta-base"]}}
SCALING = {"kind": "scaling", "name": "sizes", "rows": ["random/tuned", "embeddings/own"], "product": {"seed": [0, 1]},
           "base": BASE | {"corpus": "rotten_tomatoes", "student": "bert-base-uncased"},
           "around": {"per_class": [1, 2]}}


pytestmark = pytest.mark.usefixtures("standin_hub")


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """A complete slides' table, and a scaling grid, made by the command line."""
    import standin_hub

    folder = tmp_path_factory.mktemp("grids")
    with standin_hub.patched(standin_home):
        for settings in (SLIDES, SCALING):
            assert command(folder, settings) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    noted, evaluate = [], runner.evaluate
    monkeypatch.setattr(runner, "evaluate", lambda *a, **kw: noted.append(a[2].name) or evaluate(*a, **kw))
    return noted


def command(folder, settings, *options):
    path = folder / f"{settings['name']}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return command_line.main(["run", str(path), "--results", str(folder / "results"), "--work", str(folder / "work"), *options])


def result(folder, name="small"):
    return read(folder / "results" / f"{name}.json")


def rows(result):
    """{cell: its rows that have run}."""
    return frame(result).groupby("cell", sort=False)["row"].unique().map(list).to_dict()


def run(folder, work="work"):
    return Run(ClassificationCell, job(SLIDES), folder / "results", folder / work)


def job(settings, **changes):
    return GridJob(**{k: tuple(v) if k == "rows" else v for k, v in (settings | changes).items()})


# --- a complete run --------------------------------------------------------------------------------------------------


def test_one_command_fills_the_slides_table(finished):
    whole = result(finished)
    cells = [f"corpus={corpus},student={student}" for corpus in ("ag_news", "rotten_tomatoes")
             for student in ("bert-base-uncased", "roberta-base")]
    assert rows(whole) == dict.fromkeys(cells, sorted(SLIDES["rows"]))
    for key, cell in whole["cells"].items():
        assert cell["corpus"]["name"] in key and cell["machine"]["processor"] and "torch" in cell["versions"]
        assert cell["notes"]["embeddings 0"]["steps"] == 2 and "losses" not in cell["notes"]["embeddings 0"]
    for score in whole["scores"]:
        assert score["cell"] == f"corpus={score['corpus']},student={score['target']}"
        assert score["method"] != "full" or score["examples"] == whole["cells"][score["cell"]]["corpus"]["rows"]["train"]
    lines = slides_table(whole).splitlines()
    assert lines[0] == "| corpus | trained on | bert-base-uncased | roberta-base |"
    place = cells[1], "embeddings/own"
    one, other = (score["accuracy"] for score in whole["scores"] if (score["cell"], score["row"]) == place)
    assert lines[3].startswith("| ag_news | embeddings/own | ")
    assert lines[3].endswith(f" {(one + other) / 2:.3f} ± {abs(one - other) / 2**0.5:.3f} |")
    assert len(lines) == 2 + 2 * 3 + 2 and "not run" not in "".join(lines) and lines[-1].startswith("Made on: ")
    assert str(finished) not in json.dumps(whole)


def test_a_scaling_grid_varies_one_setting_at_a_time(finished):
    sizes = {k: (c.per_class, c.length) for k, c in job(SCALING, around={"per_class": [1, 2], "length": [6]}).cells().items()}
    assert sizes == {f"seed={s}{c}": size for s in (0, 1) for c, size in
                     (("", (1, 8)), (",per_class=2", (2, 8)), (",length=6", (1, 6)))}
    whole = result(finished, "sizes")
    assert [*rows(whole)] == ["seed=0", "seed=0,per_class=2", "seed=1", "seed=1,per_class=2"]
    assert {(score["set_seed"], score["per_class"]) for score in whole["scores"]} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    lines = scaling_table(whole).splitlines()
    assert len(lines) == 2 + 2 and lines[2].startswith("| base | 1 | 8 | 2 | ") and lines[2].endswith(" | 2 |")
    accuracies = [s["accuracy"] for s in whole["scores"] if (s["per_class"], s["row"]) == (2, "random/tuned")]
    assert lines[3].startswith("| per_class=2 | 2 | 8 | 2 | ") and f"| {sum(accuracies) / 4:.3f} |" in lines[3]


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_grid_does_nothing(copied, scored):
    before = result(copied)
    assert command(copied, SLIDES) == 0 and scored == [] and result(copied) == before


def test_a_row_that_is_missing_is_made_from_the_result_alone(copied, scored):
    """As it is for somebody who has the committed result and none of the work behind it."""
    before = result(copied)
    missing = ("corpus=rotten_tomatoes,student=roberta-base", "random/tuned")
    write(copied / "results" / "small.json",
          before | {"scores": [score for score in before["scores"] if (score["cell"], score["row"]) != missing]})
    shutil.rmtree(copied / "work")
    assert command(copied, SLIDES) == 0 and scored == ["roberta-base"]
    columns = ["cell", "row", "set_seed", "init_seed", "accuracy"]
    assert frame(result(copied))[columns].equals(frame(before)[columns])


def test_sets_that_are_learned_side_by_side(tmp_path):
    """The sets of both seeds are there after the first, and equal those that are learned one after the other."""
    losses = {}
    for together in (False, True):
        base = SCALING["base"] | {"together": together, "metagrad": "replay"}
        settings = job({name: value for name, value in SCALING.items() if name != "around"}, base=base)
        grid = Run(ClassificationCell, settings, tmp_path / f"results {together}", tmp_path / f"work {together}")
        grid(["embeddings/own", "seed=0"])
        assert len(logs(tmp_path / f"work {together}")) == 1 + together, "the set of the other seed too"
        grid(["embeddings/own", "seed=1"])
        losses[together] = [[record["loss"] for record in read_lines(log)[1:]] for log in logs(tmp_path / f"work {together}")]
        assert len(losses[together]) == 2
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-4)
    assert losses[True][1] == pytest.approx(losses[False][1], rel=1e-4)
    assert losses[True][0] != losses[True][1]


def logs(folder):
    return sorted(folder.rglob("checkpoint-embeddings-?.log.jsonl"))


def test_single_cells_and_rows(tmp_path, scored):
    one = "corpus=ag_news,student=roberta-base"
    assert command(tmp_path, SLIDES, "--rows", one, "random/tuned") == 0
    assert rows(result(tmp_path)) == {one: ["random/tuned"]} and len(scored) == 1
    lines = slides_table(result(tmp_path)).splitlines()
    assert lines[2].startswith("| ag_news | random/tuned | not run | 0.") and lines[3].endswith("| not run | not run |")
    scored.clear()
    assert command(tmp_path, SCALING, "--rows", "random/tuned", "--seeds", "1") == 0
    assert all(key.startswith("seed=1") for key in result(tmp_path, "sizes")["cells"]) and len(scored) == 2
    with pytest.raises(ValueError, match="rows must be one of corpus=.*, not 'nonsense'"):
        run(tmp_path)(("nonsense",))


def test_processes_at_other_cells_keep_what_each_has_made(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    one, other = list(first.cells)[:2]
    first((one, "random/tuned"))
    second((other, "random/tuned"))
    first((one, "embeddings/own"))
    assert rows(result(tmp_path)) == {one: ["embeddings/own", "random/tuned"], other: ["random/tuned"]}
    apart = run(tmp_path, "elsewhere")  # a set that it does not have it would make again
    second((other, "embeddings/own"))
    apart((other, "random/tuned"))
    first((one,))
    assert rows(result(tmp_path))[other] == ["embeddings/own", "random/tuned"]


def test_what_is_not_here_is_skipped_and_said(tmp_path, capsys, scored):
    settings = SLIDES | {"product": {"corpus": ["imdb_of_nobody/gone", "ag_news"], "student": ["bert-base-uncased", "gone"]},
                         "rows": ["random/tuned"]}
    assert command(tmp_path, settings) == 1
    printed = capsys.readouterr().out
    assert "corpus=imdb_of_nobody/gone,student=bert-base-uncased: skipped: imdb_of_nobody/gone was not found" in printed
    assert "corpus=ag_news,student=gone: skipped: unknown student 'gone'" in printed
    assert [*rows(result(tmp_path))] == ["corpus=ag_news,student=bert-base-uncased"] and scored == ["bert-base-uncased"]
    assert slides_table(result(tmp_path)).count("not run") == 3


def test_a_cell_that_diverges_leaves_the_others(tmp_path, capsys, monkeypatch):
    distil = ClassificationCell.create

    def runs_away(self, *args):
        if self.job.corpus == "ag_news":
            raise FloatingPointError("outer step 3: loss nan")
        return distil(self, *args)

    monkeypatch.setattr(ClassificationCell, "create", runs_away)
    settings = SLIDES | {"product": SLIDES["product"] | {"student": ["bert-base-uncased"]}, "rows": ["embeddings/own"]}
    assert command(tmp_path, settings) == 1
    assert "ag_news,student=bert-base-uncased: skipped: outer step 3" in capsys.readouterr().out
    assert [*result(tmp_path)["cells"]] == ["corpus=rotten_tomatoes,student=bert-base-uncased"]


def test_cells_of_other_settings_are_refused(copied, capsys, scored):
    assert command(copied, SLIDES | {"base": BASE | {"lr": 0.5}}) == 2
    assert "with other settings: lr is 0.08 there and 0.5 here" in capsys.readouterr().err and scored == []
    wider = SLIDES | {"product": SLIDES["product"] | {"corpus": ["ag_news", "rotten_tomatoes", "sst2"]}}
    assert command(copied, wider, "--rows", "random/tuned") == 0 and len(scored) == 2, "a grid may grow"


def test_the_same_sentences_are_scored_once(tmp_path, scored):
    settings = SCALING | {"product": None, "around": {"unroll_steps": [1, 3], "per_class": [2]}, "rows": ["random/tuned"]}
    assert command(tmp_path, settings) == 0
    assert len(rows(result(tmp_path, "sizes"))) == 4 and len(scored) == 2, "cells that differ in distilling select alike"
    scores = frame(result(tmp_path, "sizes")).set_index("cell")
    assert scores["same_set_as"].dropna().to_dict() == dict.fromkeys(
        ("unroll_steps=1", "unroll_steps=3"), "base: random/tuned, set 0")
    assert [*scores.loc["base", "accuracy"]] == [*scores.loc["unroll_steps=3", "accuracy"]]
    assert command(tmp_path, settings) == 0 and len(scored) == 2


# --- settings --------------------------------------------------------------------------------------------------------


def test_shipped_grids():
    shipped = {p.stem: GridJob.from_yaml(p) for p in CONFIGS.glob("*.yaml") if kind_of(p) in GridJob.kinds}
    assert {"scaling_docstrings", "slides_table", "slides_offline"} <= {*shipped}
    assert all(found.name == name for name, found in shipped.items())
    assert len(shipped["slides_table"].cells()) == 12 and len(shipped["scaling_docstrings"].cells()) == 5
    for found in shipped.values():
        assert "embeddings/own" in found.rows
        assert {"random/tuned", "k_center/tuned"} & {*found.rows}, "a distilled set stands beside real sentences of its size"
        assert len({cell.name for cell in found.cells().values()}) == len(found.cells())


@pytest.mark.parametrize(("change", "message"), [
    ({"base": {**BASE, "lerning": 1}}, "base: unknown setting 'lerning'"),
    ({"around": {"per_class": 3}}, "around: per_class must be a list of values, not 3"),
    ({"around": {"per_class": [0]}}, "cell seed=0,per_class=0: per_class must be"),
    ({"product": {"name": ["a"]}}, "product: unknown setting 'name'"),
    ({"base": BASE}, "cell seed=0: .*'corpus' is missing"),
    ({"base": 3}, "base must be a valid"),
    ({"kind": "slides"}, "product of corpus and student"),
    ({"kind": "table"}, "kind must be one of scaling, slides, not 'table'"),
    ({"rows": ["random/none"]}, "a row must be one of .* not 'random/none'"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        job(SCALING, **change)
