"""An experiment on merging, streams and updates in small, through the command line."""


import pytest
import yaml

from distillkit.cli import main as command_line
from distillkit.experiments import continual as merging_jobs
from distillkit.experiments.continual import ROWS, ContinualJob, continual_table
from distillkit.experiments.results import read
from distillkit.experiments.runner import CONFIGS
from distillkit.experiments.settings import kind_of

SMALL = {"kind": "continual", "name": "small", "student": "bert-base-uncased", "limit": 60,
         "max_length": 12, "length": 8, "seeds": [0], "eval_seeds": [0],
         "unroll_steps": 2, "outer_steps": 2, "outer_batch": 6, "stream_steps": 2, "stream_batch": 4, "memory_batch": 4,
         "stream_step_sizes": [0.001], "weights": [0.3, 0.6], "tuned_grid": {"step_size": [0.001], "steps": [1, 2]}}
CLASSES = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]


def settings(**changes):
    return SMALL | {"corpus": "trec", "groups": [CLASSES[:2], CLASSES[2:4], CLASSES[4:]]} | changes


def job(**changes):
    return ContinualJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings(**changes).items()})


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """A complete run, given in two parts: the folder and the result."""
    import standin_hub

    folder = tmp_path_factory.mktemp("continual")
    (folder / "small.yaml").write_text(yaml.safe_dump(settings()))
    command = ["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]
    with standin_hub.patched(standin_home), pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_jobs, "rescaled", lambda s, t, u: (s, {1.0: 0.0}))
        assert command_line.main([*command, "--rows", "merged/own", "after/update"]) == 0
        part = read(folder / "small.json")
        assert command_line.main(command) == 0
    return part, read(folder / "small.json")


def of_row(result, row):
    return [score for score in result["scores"] if score["row"] == row]


def test_every_row_is_made_once(finished):
    part, whole = finished
    assert [score["row"] for score in part["scores"]] == ["after/update", "merged/own"]
    assert [*dict.fromkeys(score["row"] for score in whole["scores"])] == sorted(ROWS)
    assert all(score in whole["scores"] for score in part["scores"])
    cell = whole["cells"]["small"]
    assert {name for name, note in cell["notes"].items() if "losses" in note} == {
        "task0 0", "task1 0", "task2 0", "joint 0"}, "each set is distilled once"
    assert cell["corpus"]["name"].count("trec[") == 3
    assert [score["task"].count("trec[") for score in of_row(whole, "alone/own")] == [1, 1, 1]


def test_budgets_are_equal(finished):
    _, whole = finished
    first = {row: of_row(whole, row)[0] for row in ROWS}
    assert len({first[f"{m}/own"]["examples"] for m in ("merged", "joint", "random", "k_center")}) == 1
    assert first["merged/own"]["nbytes"] >= first["random/own"]["nbytes"]
    stream = {m: first[f"{m}/stream"] for m in merging_jobs.MEMORIES}
    tried = {m: whole["cells"]["small"]["notes"][f"{m}/stream 0"]["settings"] for m in merging_jobs.MEMORIES}
    assert stream["none"]["examples"] == stream["none"]["nbytes"] == 0 and tried["none"]["weight"] is None
    assert stream["distilled"]["examples"] == stream["random"]["examples"] == stream["k_center"]["examples"] == 4
    assert stream["random"]["examples"] < stream["bytes"]["examples"]
    assert 0 < stream["bytes"]["nbytes"] <= stream["distilled"]["nbytes"]
    assert all(len(settings["tried"]) == 2 for name, settings in tried.items() if name != "none")
    assert all({"accuracy", "forgetting"} <= score.keys() for score in stream.values())


def test_an_update_tells_the_new_from_the_rest(finished):
    for row in ("before/update", "after/update"):
        (score,), groups = of_row(finished[1], row), finished[1]["cells"]["small"]["notes"][f"{row} 0"]["groups"]
        assert {*groups} == {*CLASSES[:4]} and score["examples"] == 4
        assert score["new"] == pytest.approx(sum(groups[c] for c in CLASSES[2:4]) / 2, abs=1e-5)
        assert score["rest"] == pytest.approx(sum(groups[c] for c in CLASSES[:2]) / 2, abs=1e-5)


def test_the_table(finished):
    table = continual_table(finished[1])
    assert table.count("not run") == 0 and table.splitlines()[0] == "| trained on | own, rescaled | AdamW, tuned | sets |"
    for start in ("| merged | ", "| alone | ", "| none | 0 | 0 | ", "| bytes | ", "| after the update | "):
        assert f"\n{start}" in table
    part = continual_table(finished[0] | {"config": finished[1]["config"]})
    assert "| joint | not run | not run | 0 |" in part and "| none |  |  | | not run | not run | 0 |" in part


def test_shipped_settings():
    shipped = {p.stem: ContinualJob.from_yaml(p) for p in CONFIGS.glob("*.yaml") if kind_of(p) == "continual"}
    assert "continual_docstrings" in shipped and all(found.name == name for name, found in shipped.items())


@pytest.mark.parametrize(("change", "message"), [
    ({"groups": [["a", "b"]]}, "groups must be two or more lists"), ({"groups": ["ab", "cd"]}, "groups must be two or more"),
    ({"groups": [["a", "b"], ["c", "d"]]}, "an update need three groups"), ({"rows": ["none/own"]}, "a row must be one of"),
    ({"outer_steps": 0}, "outer_steps must be"), ({"weights": []}, "weights must have at least 1 item"),
    ({"metagrad": "exact"}, "metagrad must be"), ({"lr": 0}, "lr must be"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        job(**change)
