"""The instruction experiment: every score, seed by seed, from settings in a file; and whether one method beats another."""

import math

import pytest
import yaml
from scipy import stats

import distillkit as dk
from distillkit.cli.main import main
from distillkit.evaluation.recipes import Standard
from distillkit.evaluation.scoring import answered
from distillkit.experiments import runner
from distillkit.experiments.instruction import ROWS, InstructionCell, InstructionJob, instruction_table
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import as_config, by_set, paired_difference, read, settings_hash, write
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import kind_of
from example_results import result_of

SMALL = {
    "name": "small", "corpus": "arc_easy", "student": "facebook/opt-1.3b", "trainable": "full", "max_length": 48,
    "fraction": 0.2, "seeds": [0, 1], "expert_count": 1, "expert_epochs": 1, "expert_batch": 8, "snapshots_per_epoch": 2,
    "match_epochs": 0.5, "unroll_steps": 2, "inner_batch": 4, "neighbor_weight": 0.1, "outer_steps": 2, "outer_batch": 4,
    "standard_steps": 2, "tuned_grid": {"step_size": [0.001], "steps": [1, 2]},
}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run from a file of settings: its folder and what it printed to."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"kind": "instruction"}))
    with standin_hub.patched(standin_home):
        assert main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, read(folder / "small.json")


def job(**changes):
    return InstructionJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in (SMALL | changes).items()})


def test_every_score_is_made(finished):
    folder, result = finished
    assert job().seeds_of("zero-shot/none") == (0,), "one and the same model"
    assert [(score["row"], score["set_seed"], score["init_seed"]) for score in result["scores"]] == [
        (row, seed, seed) for row in sorted(ROWS) for seed in job().seeds_of(row)]
    for score in result["scores"]:
        assert 0 <= score["accuracy"] <= 1 and 0 <= score["normalized"] <= 1
        assert (score["method"], score["recipe"]) == tuple(score["row"].split("/"))
    cell = result["cells"]["small"]
    sizes, rows = {score["method"]: score["examples"] for score in result["scores"]}, cell["corpus"]["rows"]["train"]
    assert sizes.pop("full") == rows and sizes.pop("zero-shot") == 0 and set(sizes.values()) == {int(0.2 * rows)}
    learned = {name: note for name, note in cell["notes"].items() if "losses" in note}
    assert learned.keys() == {f"{method} {seed}" for method in ("nacd", "nacd vectors", "bptt") for seed in (0, 1)}
    assert learned["nacd 0"]["terms"].keys() == {"outer", "neighbor"} and len(learned["bptt 0"]["losses"]) == 2
    assert learned["nacd 0"]["terms"] != learned["nacd 1"]["terms"], "a seed is another set"


def test_the_same_students_answer_further_corpora(standin_hub, tmp_path):
    asked = job(also=["mmlu"], also_limit=5, rows=["zero-shot/none", "random/standard"], seeds=[0])
    run = Run(InstructionCell, asked, tmp_path, tmp_path / "work")
    result, (further,) = run(), run.cell.further
    assert len(further.test) == 5
    mmlu = {score["row"]: score["accuracy on mmlu"] for score in result["scores"]}
    trained = dk.evaluate(run.cell.set_of("random", 0), further, run.cell.student, seeds=(0,), recipe=Standard(least_steps=2))
    untrained = answered(run.cell.student, run.cell.student.init(0), further, "test")[0].mean()
    assert mmlu == {"zero-shot/none": pytest.approx(untrained), "random/standard": pytest.approx(trained.mean)}
    heads = table_of(result).splitlines()[0]
    assert "| accuracy on mmlu |" in heads and "mmlu" not in table_of(result | {"config": as_config(job())})
    assert settings_hash(asked) == settings_hash(job(rows=asked.rows, seeds=[0])), "the sets are the same"
    two = {"task": run.cell.task, "student": run.cell.student, "seeds": (0,), "recipe": "tuned"}
    with pytest.raises(ValueError, match="also names a task twice: mmlu, mmlu"):
        dk.evaluate(run.cell.set_of("random", 0), **two, also=[further, further])
    with pytest.raises(ValueError, match="was loaded for instruction"):
        dk.evaluate(run.cell.set_of("random", 0), **two, also=[dk.load_task("rotten_tomatoes", max_length=12)])


def scored_as(monkeypatch, accuracy):
    """Scores without any training; the rows and seeds that were asked for."""
    asked = []
    monkeypatch.setattr(InstructionCell, "score", lambda self, method, recipe, seed: asked.append((method, recipe, seed)) or (
        [{"init_seed": seed, "accuracy": accuracy(seed)}], {}))
    return asked


def test_an_interrupted_run_goes_on(finished, standin_hub, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(runner, "evaluate", lambda *a, **kw: pytest.fail("scored again"))
    assert Run(InstructionCell, job(), folder, folder / "work")() == result
    asked, missing = scored_as(monkeypatch, lambda seed: 0.5), ("random/tuned", 1)
    part = result | {"scores": [score for score in result["scores"] if (score["row"], score["set_seed"]) != missing]}
    write(folder / "part" / "small.json", part)
    Run(InstructionCell, job(rows=["random/tuned", "nacd/own"]), folder / "part", folder / "work")()
    assert asked == [("random", "tuned", 1)]


def test_only_some_rows(finished, standin_hub, monkeypatch):
    scored_as(monkeypatch, lambda seed: 0.5)
    run = Run(InstructionCell, job(name="other"), finished[0], finished[0] / "work")
    assert {score["row"] for score in run(("less/tuned",))["scores"]} == {"less/tuned"}
    with pytest.raises(ValueError, match="rows must be one of other, zero-shot/none, .* not 'less/own'"):
        run(("less/own",))


def test_the_table(finished):
    _, result = finished
    lines, sets = instruction_table(result).splitlines(), by_set(result)
    assert table_of(result).splitlines() == lines and lines[2 + len(ROWS)] == ""
    scores = sets.loc["nacd/own"]
    (line,) = (line for line in lines if line.startswith(("| nacd | own |", "| nacd † | own |")))
    assert f"| {scores.mean():.3f} ± {scores.std():.3f} |" in line
    zero, full = (sets.loc[row].mean() for row in ("zero-shot/none", "full/standard"))
    assert line.endswith(f"| 2 | {(scores.mean() - zero) / (full - zero):.0%} |" if full != zero else "| 2 | |")
    partial = result | {"scores": [score for score in result["scores"] if score["row"] != "less/tuned"]}
    assert "| less | standard |" in instruction_table(partial) and "| less | tuned |" not in instruction_table(partial)


def test_processes_share_a_result(finished, standin_hub, tmp_path, monkeypatch):
    rows = ["full/standard", "random/standard"]
    one, other = (Run(InstructionCell, job(rows=rows), tmp_path, tmp_path / "work") for _ in range(2))
    scored_as(monkeypatch, lambda seed: 0.1 * seed)
    other.cell.notes["nacd 1"] = {"steps": 2}

    def scores(result):
        return [(score["row"], score["set_seed"], score["accuracy"]) for score in result["scores"]]

    assert scores(one(seeds=(0,))) == [(row, 0, 0.0) for row in rows]
    assert scores(other(only=("full/standard",), seeds=(1,))) == [
        ("full/standard", 0, 0.0), ("full/standard", 1, 0.1), ("random/standard", 0, 0.0)]
    assert scores(one()) == [(row, seed, 0.1 * seed) for row in rows for seed in (0, 1)]
    notes = one.result["cells"]["small"]["notes"]
    assert notes["nacd 1"] == {"steps": 2}, "nothing that the other has made is lost"
    assert {*notes} == {"nacd 1", *(f"{row} {seed}" for row in rows for seed in (0, 1))}
    assert read(tmp_path / "small.json") == one.result
    with pytest.raises(ValueError, match="no seed 7 in this job; it has 0, 1"):
        one(seeds=(7,))


def test_paired_differences_by_hand():
    sets = by_set(result_of({"a": (0.5, 0.6, 0.7, 0.9), "b": (0.4, 0.4, 0.4), "c": (0.3,), "d": (math.nan, 0.5)}))
    mean, half = paired_difference(sets, "a", "b")
    low, high = stats.ttest_rel([0.5, 0.6, 0.7], [0.4, 0.4, 0.4]).confidence_interval(0.95)
    assert (mean, mean - half, mean + half) == pytest.approx((0.2, low, high))
    assert paired_difference(sets, "a", "c") == (pytest.approx(0.2), math.inf), "one set says nothing of the spread"
    assert math.isnan(paired_difference(sets, "c", "d")[0]), "no set in common"


def test_the_table_compares_at_the_same_seed_and_marks_what_works_in_one_way_only():
    rows = {"zero-shot/none": (0.3,), "random/standard": (0.4, 0.5, 0.6), "full/standard": (0.8, 0.9, 1.0),
            "nacd/own": (0.6, 0.7, 0.79),
            "nacd/standard": (0.3, 0.6, 0.6), "bptt/own": (0.5, 0.61, 0.7), "bptt/standard": (0.5, 0.61, 0.7)}
    text = instruction_table(result_of(rows))
    assert text.count("| nacd † | own |") == 1 and "| bptt † |" not in text and "but not under standard" in text
    mean, half = paired_difference(by_set(result_of(rows)), "nacd/own", "random/standard")
    assert f"| nacd, own | {mean:+.3f} ± {half:.3f} |" in text
    assert "| zero-shot | none | 4 | | | 0.300 | 0.300 | 1 | 0% |" in text and text.count("| 3 | 100% |") == 1
    assert "| random | standard | 4 | | | 0.500 ± 0.100 | 0.500 | 3 | 33% |" in text, "a third of the way from 0.3 to 0.9"
    del rows["random/standard"]
    text = instruction_table(result_of(rows))
    assert "†" not in text and "Differences" not in text, "there is nothing to compare with"


@pytest.mark.parametrize(("change", "message"), [
    ({"rows": ["nacd/mine"]}, "a row must be one of .* not 'nacd/mine'"),
    ({"fraction": 0}, "fraction must be greater than 0, not 0"),
    ({"outer_steps": 0}, "outer_steps must be greater than or equal to 1, not 0"),
    ({"seeds": []}, r"seeds must name at least one seed"),
    ({"kind": "other"}, "kind must be one of instruction, not 'other'"),
    ({"name": "a/b"}, "name must match pattern"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        job(**change)


def test_shipped_settings():
    paths = [path for path in sorted(CONFIGS.glob("*.yaml")) if kind_of(path) == "instruction"]
    shipped = {path.stem: InstructionJob.from_yaml(path) for path in paths}
    assert "instruction_library" in shipped
    assert all(found.name == name for name, found in shipped.items()), "a result is found by its settings' name"
    assert all(len(found.seeds) >= 5 and found.fraction == 0.05 for found in shipped.values())
    assert all(found.limit is None or found.limit >= 4000 for found in shipped.values())


def test_the_kind_of_a_file(tmp_path):
    for text, kind in (("name: a\n", "classification"), ("kind: instruction\n", "instruction")):
        (tmp_path / "a.yaml").write_text(text)
        assert kind_of(tmp_path / "a.yaml") == kind
