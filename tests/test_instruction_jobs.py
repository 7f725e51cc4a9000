"""The instruction experiment: every score, seed by seed, from settings in a file; and whether one method beats another."""

import math

import numpy as np
import pytest
import yaml
from scipy import stats

from distillkit.cli.main import draw, main
from distillkit.evaluation.recipes import NAMED, Standard, Tuned
from distillkit.experiments import instruction as instruction_jobs
from distillkit.experiments.instruction import ROWS, InstructionJob, InstructionRun, instruction_table
from distillkit.experiments.results import kind_of, paired_difference, read, write
from distillkit.experiments.runner import CONFIGS

SMALL = {
    "name": "small", "corpus": "arc_easy", "student": "facebook/opt-1.3b", "trainable": "full", "max_length": 48,
    "fraction": 0.2, "seeds": [0, 1], "expert_count": 1, "expert_epochs": 1, "expert_batch": 8, "snapshots_per_epoch": 2,
    "match_epochs": 0.5, "unroll_steps": 2, "inner_batch": 4, "neighbor_weight": 0.1, "outer_steps": 2, "outer_batch": 4,
}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run from a file of settings: its folder and what it printed to."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"kind": "instruction"}))
    with standin_hub.patched(standin_home), pytest.MonkeyPatch.context() as patch:
        patch.setitem(NAMED, "tuned", Tuned({"step_size": (1e-3,), "steps": (1, 2)}))
        patch.setitem(NAMED, "standard", Standard(least_steps=2))
        assert main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, read(folder / "small.json")


def job(**changes):
    return InstructionJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in (SMALL | changes).items()})


def test_every_score_is_made(finished):
    folder, result = finished
    assert list(result["rows"]) == list(ROWS)
    for name, row in result["rows"].items():
        assert row.keys() == {"0", "1"}
        for score in row.values():
            assert 0 <= score["mean"] <= 1 and len(score["normalized"]) == 1
            if not name.startswith("zero-shot"):
                assert score["recipe"]["name"] == name.split("/")[1]
    sizes = {name.split("/")[0]: row["0"]["examples"] for name, row in result["rows"].items()}
    rows = result["corpus"]["rows"]["train"]
    assert sizes.pop("full") == rows and sizes.pop("zero-shot") == 0 and set(sizes.values()) == {int(0.2 * rows)}
    made = result["distilling"]
    assert made.keys() == {"nacd 0", "nacd 1", "bptt 0", "bptt 1"}
    assert made["nacd 0"]["terms"].keys() == {"outer", "neighbor"} and len(made["bptt 0"]["losses"]) == 2
    assert made["nacd 0"]["terms"] != made["nacd 1"]["terms"], "a seed is another set"


def test_an_interrupted_run_goes_on(finished, standin_hub, monkeypatch):
    folder, result = finished
    scored = []
    monkeypatch.setattr(instruction_jobs, "evaluate", lambda *a, **kw: pytest.fail("scored again"))
    assert InstructionRun(job(), folder, folder / "work")() == result
    monkeypatch.setattr(InstructionRun, "score", lambda self, *what: scored.append(what) or {"mean": 0.5})
    short = job(seeds=[0, 1], rows=["random/tuned", "nacd/own"])
    part = read(folder / "small.json")
    part["rows"]["random/tuned"].pop("1")
    (folder / "part").mkdir()
    write(folder / "part" / "small.json", part)
    InstructionRun(short, folder / "part", folder / "work")()
    assert scored == [("random", "tuned", 1)]


def test_only_some_rows(finished, standin_hub, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(InstructionRun, "score", lambda self, *what: {"mean": 0.5})
    run = InstructionRun(job(name="other"), folder, folder / "work")
    assert run(("less/tuned",))["rows"].keys() == {"less/tuned"}
    with pytest.raises(ValueError, match="a row must be one of zero-shot/none, .* not 'less/own'"):
        run(("less/own",))


def test_the_table(finished):
    _, result = finished
    lines = instruction_table(result).splitlines()
    assert draw(result).splitlines() == lines and lines[2 + len(ROWS)] == ""
    scores = [result["rows"]["nacd/own"][s]["mean"] for s in "01"]
    full = [result["rows"]["full/standard"][s]["mean"] for s in "01"]
    (line,) = (line for line in lines if line.startswith(("| nacd | own |", "| nacd † | own |")))
    assert f"| {np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f} |" in line
    assert line.endswith(f"| 2 | {np.mean(scores) / np.mean(full):.0%} |")
    del result["rows"]["less/tuned"]
    assert "| less | tuned | | not run | | | |" in instruction_table(result)


def test_processes_share_a_result(finished, standin_hub, tmp_path, monkeypatch):
    rows = ["random/standard", "full/standard"]
    one, other = (InstructionRun(job(rows=rows), tmp_path, tmp_path / "work") for _ in range(2))
    monkeypatch.setattr(InstructionRun, "score", lambda self, method, recipe, seed: {"mean": 0.1 * seed})
    other.result["distilling"]["nacd 1"] = {"steps": 2}
    assert one(seeds=(0,))["rows"] == {name: {"0": {"mean": 0.0}} for name in rows}
    found = other(only=("full/standard",), seeds=(1,))
    assert found["rows"] == {"random/standard": {"0": {"mean": 0.0}}, "full/standard": {"0": {"mean": 0.0}, "1": {"mean": 0.1}}}
    assert one()["distilling"] == {"nacd 1": {"steps": 2}}, "nothing that the other has made is lost"
    assert {seed for row in one.result["rows"].values() for seed in row} == {"0", "1"}
    assert read(tmp_path / "small.json")["rows"] == one.result["rows"]
    with pytest.raises(ValueError, match="no seed 7 in this job; it has 0, 1"):
        one(seeds=(7,))


def test_seeds_are_for_experiments_that_have_them(capsys):
    assert main(["run", "quickstart", "--seeds", "0"]) == 2
    assert "--seeds is for experiments whose scores belong to seeds" in capsys.readouterr().err


def test_paired_differences_by_hand():
    rows = {"a": {s: {"mean": m} for s, m in zip("0123", (0.5, 0.6, 0.7, 0.9), strict=True)},
            "b": {s: {"mean": m} for s, m in zip("012", (0.4, 0.4, 0.4), strict=True)}, "c": {"0": {"mean": 0.3}}}
    mean, half = paired_difference(rows, "a", "b")
    low, high = stats.ttest_rel([0.5, 0.6, 0.7], [0.4, 0.4, 0.4]).confidence_interval(0.95)
    assert (mean, mean - half, mean + half) == pytest.approx((0.2, low, high))
    assert paired_difference(rows, "a", "c") == (pytest.approx(0.2), math.inf), "one seed tells nothing"


def scored(*means):
    return {str(seed): {"mean": mean, "normalized": [mean], "examples": 4} for seed, mean in enumerate(means)}


def test_the_table_compares_at_the_same_seed_and_marks_what_works_in_one_way_only():
    rows = {"random/standard": scored(0.4, 0.5, 0.6), "full/standard": scored(0.8, 0.9, 1.0),
            "nacd/own": scored(0.6, 0.7, 0.79), "nacd/standard": scored(0.3, 0.6, 0.6),
            "bptt/own": scored(0.5, 0.61, 0.7), "bptt/standard": scored(0.5, 0.61, 0.7)}
    text = instruction_table({"config": {"rows": list(rows)}, "rows": rows})
    assert text.count("| nacd † | own |") == 1 and "| bptt † |" not in text and "but not under standard" in text
    mean, half = paired_difference(rows, "nacd/own", "random/standard")
    assert f"| nacd, own | {mean:+.3f} ± {half:.3f} | {mean / 0.4:.0%} |" in text
    del rows["random/standard"]
    text = instruction_table({"config": {"rows": list(rows)}, "rows": rows})
    assert "†" not in text and "Differences" not in text, "there is nothing to compare with"


@pytest.mark.parametrize(("change", "message"), [
    ({"rows": ["nacd/mine"]}, "a row must be one of .* not 'nacd/mine'"),
    ({"fraction": 0}, "fraction must be greater than 0, not 0"),
    ({"outer_steps": 0}, "outer_steps must be greater than or equal to 1, not 0"),
    ({"seeds": []}, r"seeds must have at least 1 item, not .."),
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
