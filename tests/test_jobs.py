"""A whole experiment in small: every row, taken up where it stopped, and errors that name the setting."""

import dataclasses
import json
import shutil

import pytest
import yaml

from distillkit.cli import main as command_line
from distillkit.evaluation.recipes import NAMED, Standard, Tuned
from distillkit.experiments import classification as jobs
from distillkit.experiments import runner
from distillkit.experiments.classification import ROW_NAMES, ClassificationJob, ClassificationRun, table
from distillkit.experiments.results import VERSIONED, kind_of, read, with_tables
from distillkit.experiments.results import write as write_result
from distillkit.experiments.runner import CONFIGS

SMALL = {"name": "small", "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8,
         "outer_steps": 3, "outer_batch": 8, "eval_seeds": [0, 1], "full_seeds": [0]}


@pytest.fixture
def quick(standin_hub, monkeypatch):
    """Recipes of a few steps, on the stand-in hub."""
    monkeypatch.setitem(NAMED, "tuned", Tuned({"step_size": (1e-3,), "steps": (1, 2)}))
    monkeypatch.setitem(NAMED, "standard", Standard(least_steps=2))


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run: its folder and what it returned."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    with standin_hub.patched(standin_home), pytest.MonkeyPatch.context() as patch:
        patch.setitem(NAMED, "tuned", Tuned({"step_size": (1e-3,), "steps": (1, 2)}))
        patch.setitem(NAMED, "standard", Standard(least_steps=2))
        return folder, ClassificationRun(job(), folder / "results", folder / "work")()


@pytest.fixture
def copied(finished, tmp_path, quick):
    """That run, to be continued; the names of the rows that are scored are noted in `scored`."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    noted, evaluate = [], jobs.evaluate
    monkeypatch.setattr(jobs, "evaluate", lambda *a, **kw: noted.append(kw["recipe"]) or evaluate(*a, **kw))
    return noted


def job(**changes):
    settings = SMALL | changes
    return ClassificationJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def stored(folder):
    return read(folder / "results" / "small.json")


def rewrite(folder, change):
    result = stored(folder)
    change(result)
    write_result(folder / "results" / "small.json", result)


def run(folder, **changes):
    return ClassificationRun(job(**changes), folder / "results", folder / "work")()


def same(one, other):
    """Equal, where nan (the spread of a single seed) equals nan."""
    return json.dumps(one) == json.dumps(other)


def write(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return path


# --- a complete run --------------------------------------------------------------------------------------------------


def test_every_row_is_made_and_written(finished):
    folder, result = finished
    assert same(stored(folder), result)
    assert list(result["rows"]) == list(ROW_NAMES) and len(ROW_NAMES) == 11
    for name, row in result["rows"].items():
        method, recipe = name.split("/")
        assert (row["method"], row["recipe"]["name"]) == (method, recipe)
        assert (row["examples"], len(row["scores"])) == ((80, 1) if method == "full" else (2, 2))
        assert row["mean"] == pytest.approx(sum(row["scores"]) / len(row["scores"]), abs=1e-6)
        assert set(row["groups"]) == {"neg", "pos"}
    assert result["config"] == json.loads(json.dumps(dataclasses.asdict(job())))
    assert result["corpus"]["rows"] == {"train": 80, "validation": 40, "test": 40}
    assert len(result["corpus"]["sha256"]) == 64
    assert set(result["versions"]) == {*VERSIONED, "python"} and "date" in result and "machine" in result


def test_what_was_distilled(finished):
    folder, result = finished
    assert {n: (d["steps"], len(d["losses"])) for n, d in result["distilling"].items()} == {
        "labels": (3, 3), "embeddings": (3, 3)}
    assert [row["label"] for row in result["text"]] == ["neg", "pos"] and all(row["text"] for row in result["text"])
    embeddings, labels = (jobs.DistilledSet.load(folder / "work" / "small" / n) for n in ("embeddings", "labels"))
    assert embeddings.tokens is None and embeddings.meta["recipe"]["outer_steps"] == 3
    assert labels.tokens is not None and labels.meta["selection"]["method"] == "random", "real text, learned labels"
    nbytes = {name.split("/")[0]: row["nbytes"] for name, row in result["rows"].items()}
    assert nbytes["embeddings"] == embeddings.nbytes > nbytes["real + learned labels"] == labels.nbytes
    assert nbytes["projected"] == nbytes["real + learned labels"] > nbytes["random"] == nbytes["k_center"]


def test_the_same_sentences_are_scored_once(finished, quick, tmp_path, scored):
    """At one a class herding and k-centre both take the medoid; at two they differ."""
    rows = finished[1]["rows"]
    assert rows["herding/tuned"] == rows["k_center/tuned"] | {"method": "herding", "same_set_as": "k_center"}
    assert [name for name, row in rows.items() if "same_set_as" in row] == ["herding/tuned"]
    found = run(tmp_path, rows=["k_center/tuned", "herding/tuned"], per_class=2)
    assert scored == ["tuned"] * 2 and "same_set_as" not in found["rows"]["herding/tuned"]


def test_the_table(finished):
    _, result = finished
    lines = table(result).splitlines()
    assert lines[0] == "| method | recipe | examples | bytes | accuracy (mean ± sd) | seeds | seconds to train |"
    assert len(lines) == 2 + 11 and all(line.count("|") == 8 for line in lines)
    row = result["rows"]["herding/tuned"]
    assert lines[4].startswith(f"| herding | tuned | 2 | {row['nbytes']} | {row['mean']:.3f} ± {row['std']:.3f} | 2 | ")
    partial = result | {"rows": {n: r for n, r in result["rows"].items() if n != "k_center/tuned"}}
    assert table(partial).splitlines()[3] == "| k_center | tuned | | | not run | | |"
    partial["rows"]["full/standard"] = row | {"method": "full", "committed": "same corpus"}
    assert table(partial).splitlines()[-1].startswith("| full (committed, same corpus) | ")


def test_tables_in_a_text(finished):
    folder, result = finished
    text = "before\n<!-- table: small -->\nold\n<!-- end -->\nbetween\n<!-- table: absent -->\n<!-- end -->\nafter\n"
    once = with_tables(text, folder / "results", marker="table", draw=table)
    assert once == (f"before\n<!-- table: small -->\n{table(result)}\n<!-- end -->\nbetween\n"
                    "<!-- table: absent -->\n*not run*\n<!-- end -->\nafter\n")
    assert with_tables(once, folder / "results", marker="table", draw=table) == once


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing(copied, scored, finished):
    assert same(run(copied), finished[1]) and scored == []


@pytest.mark.parametrize("name", ["random/tuned", "embeddings/own", "projected/tuned"])
def test_only_a_missing_row_is_made(copied, scored, finished, name):
    rewrite(copied, lambda result: result["rows"].pop(name))
    result = run(copied)
    assert scored == [name.split("/")[1]]
    assert result["rows"][name]["scores"] == finished[1]["rows"][name]["scores"]
    assert all(same(row, finished[1]["rows"][n]) for n, row in result["rows"].items() if n != name)
    assert set(stored(copied)["rows"]) == set(ROW_NAMES)


def test_the_text_is_made_up_for(copied, scored, finished):
    """A run may be killed after its last row and before the text."""
    rewrite(copied, lambda result: result.pop("text"))
    assert run(copied)["text"] == finished[1]["text"] and scored == []


def test_a_row_is_on_disk_before_the_next_begins(copied, monkeypatch):
    rewrite(copied, lambda result: [result["rows"].pop(n) for n in ("random/tuned", "projected/own")])
    evaluate = jobs.evaluate

    def dies_at_the_second(*args, **kwargs):
        if "random/tuned" in stored(copied)["rows"]:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(jobs, "evaluate", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(copied)
    assert set(ROW_NAMES) - set(stored(copied)["rows"]) == {"projected/own"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"eval_seeds": [0, 2]}, r"other settings \(eval_seeds: \[0, 1\] there, \[0, 2\] here\)"),
     ({"outer_steps": 4}, "other settings .outer_steps: 3 there, 4 here"), ({"lr": 0.5}, "other settings .lr"),
     ({"limit": 20}, "other settings .limit")],
)
def test_other_settings_do_not_replace_a_result(copied, scored, change, message):
    before = stored(copied)
    with pytest.raises(ValueError, match=message + ".*--fresh"):
        run(copied, **change)
    assert scored == [] and same(stored(copied), before)


def test_settings_that_came_or_went_since(copied, scored):
    rewrite(copied, lambda result: result["config"].pop("label_lr"))
    assert run(copied)["config"]["label_lr"] is None and scored == [], "what a result does not name had its default"
    rewrite(copied, lambda result: result["config"].update(gone=None))
    with pytest.raises(ValueError, match="gone: None there, absent here"):
        run(copied)


def test_other_rows_are_made_in_addition(copied, scored):
    rewrite(copied, lambda result: result["rows"].pop("herding/tuned"))
    result = run(copied, rows=["herding/tuned", "embeddings/own"])
    assert len(scored) <= 1
    assert {"herding/tuned", "embeddings/own"} <= set(result["rows"])


def test_sets_of_other_settings_are_refused(copied):
    (copied / "results" / "small.json").unlink()
    with pytest.raises(ValueError, match=r"small is of a run with other settings \(lr: 0\.08 there, 0\.5 here\).*--fresh"):
        run(copied, rows=["embeddings/own"], lr=0.5)


def test_a_committed_row(copied, scored, finished):
    shutil.copy(copied / "results" / "small.json", copied / "results" / "longer.json")
    (copied / "results" / "small.json").unlink()
    result = run(copied, rows=["full/standard"], committed="longer", committed_rows=["full/standard"])
    expected = finished[1]["rows"]["full/standard"] | {"committed": "same corpus"}
    assert scored == [] and same(result["rows"]["full/standard"], expected)


def test_a_committed_row_that_is_not_there_is_missed_at_once(copied, scored):
    (copied / "results" / "small.json").rename(copied / "results" / "longer.json")
    with pytest.raises(FileNotFoundError, match=r"committed='absent', but there is no result .*absent\.json; make it"):
        run(copied, committed="absent", committed_rows=["full/standard"])
    part = json.loads((copied / "results" / "longer.json").read_text())
    part["rows"].pop("full/standard")
    write_result(copied / "results" / "longer.json", part)
    with pytest.raises(ValueError, match=r"committed='longer', but .*longer\.json has no row full/standard; finish it"):
        run(copied, committed="longer", committed_rows=["full/standard"])
    assert scored == []


# --- settings --------------------------------------------------------------------------------------------------------


def test_shipped_settings():
    paths = [path for path in sorted(CONFIGS.glob("*.yaml")) if kind_of(path) == "classification"]
    shipped = {path.stem: ClassificationJob.from_yaml(path) for path in paths}
    assert "quickstart" in shipped
    assert all(found.name == name for name, found in shipped.items()), "a result is found by its settings' name"
    assert all(len(found.eval_seeds) >= 5 for found in shipped.values())
    assert all(set(found.committed_rows) <= set(shipped[found.committed].rows) for found in shipped.values() if found.committed)
    demo = shipped["quickstart"]
    assert (demo.corpus, demo.student, demo.per_class, demo.length) == ("docstrings", "offline:minilm", 1, 32)
    honest = {"random/tuned", "k_center/tuned", "herding/tuned", "real + learned labels/own", "projected/own"}
    assert honest | {"embeddings/own", "full/standard"} <= {*demo.rows}


def test_settings_from_a_file(tmp_path):
    found = ClassificationJob.from_yaml(write(tmp_path / "a.yaml", **SMALL, rows=["full/standard"]))
    assert found == job(rows=["full/standard"]) and found.eval_seeds == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.lr = 1.0


@pytest.mark.parametrize(("change", "message"), [
    ({"learning_rate": 0.1}, r"a\.yaml: unknown setting 'learning_rate'; there are .*outer_steps.*seed"),
    ({"rows": ["random/tuned", "random/own"]}, "a row must be one of random/tuned, k_center/tuned, .*not 'random/own'"),
    ({"rows": "full/standard"}, "rows must be a valid tuple, not 'full/standard'"),
    ({"lr": "fast"}, "lr must be a valid number, not 'fast'"),
    ({"lr": True}, "lr must be a valid number, not True"),
    ({"step_size": -1}, "step_size must be greater than 0, not -1"),
    ({"outer_steps": 2.5}, "outer_steps must be a valid integer, not 2.5"),
    ({"per_class": 0}, "per_class must be greater than or equal to 1, not 0"),
    ({"metagrad": "exact"}, "metagrad must be .*'replay'.*, not 'exact'"),
    ({"committed": "longer"}, "committed.* belong together"),
    ({"committed_rows": ["full/standard"]}, "committed.* belong together"),
    ({"name": "../escape"}, "name must match pattern .* not '../escape'"),
    ({"name": ""}, "name must match pattern .* not ''"),
    ({"name": 7}, "name must be .* not 7"),
])
def test_bad_settings_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        ClassificationJob.from_yaml(write(tmp_path / "a.yaml", **SMALL | change))


@pytest.mark.parametrize(("text", "message"), [
    ("- a\n- b", "must hold settings as 'key: value' lines"),
    ("", "must hold settings"),
    ("name: a\ncorpus: b", "the setting 'student' is missing"),
    ("name: [a", "is not YAML"),
])
def test_files_that_hold_no_settings(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml.*{message}"):
        ClassificationJob.from_yaml(tmp_path / "a.yaml")


# --- the command line ------------------------------------------------------------------------------------------------


def places(folder):
    return ["--results", str(folder / "results"), "--work", str(folder / "work")]


def test_run_from_the_command_line(copied, scored, capsys, tmp_path):
    config = write(tmp_path / "small.yaml", **SMALL)
    rewrite(copied, lambda result: result["rows"].pop("random/tuned"))
    assert command_line.main(["run", str(config), *places(copied)]) == 0
    out = capsys.readouterr().out
    assert "rotten_tomatoes: 80 / 40 / 40 rows; student bert-base-uncased" in out
    assert table(stored(copied)) in out and "written to" in out and scored == ["tuned"]


def test_fresh_forgets(copied, scored, tmp_path):
    config = write(tmp_path / "small.yaml", **SMALL | {"rows": ["random/tuned"]})
    marker = copied / "work" / "small" / "left-over"
    marker.mkdir()
    assert command_line.main(["run", str(config), *places(copied), "--fresh"]) == 0
    assert not marker.exists() and list(stored(copied)["rows"]) == ["random/tuned"] and scored == ["tuned"]


def test_the_demo_is_the_quickstart_and_draws_it(copied, monkeypatch, capsys):
    """With the settings and the finished rows of the small run in the place of the shipped ones."""
    monkeypatch.setattr(runner, "CONFIGS", copied)
    write(copied / "quickstart.yaml", **SMALL)
    assert command_line.main(["demo", *places(copied)]) == 0
    assert (copied / "work" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert not [*copied.glob("*.png")], "the committed figures are drawn by another command"
    assert "| embeddings | own |" in capsys.readouterr().out


def test_a_demo_begins_anew_where_nothing_is_left_to_do_or_to_read(tmp_path):
    path = tmp_path / "quickstart.json"
    half = {"config": {"rows": ["random/tuned", "full/standard"]}, "rows": {"random/tuned": {}}}
    assert not command_line._done_with(path)
    write_result(path, half)
    assert not command_line._done_with(path), "it goes on"
    write_result(path, half | {"rows": {"random/tuned": {}, "full/standard": {}}, "text": []})
    assert command_line._done_with(path)
    write_result(path, half)
    path.write_bytes(path.read_bytes()[:-9])
    assert command_line._done_with(path)


def test_table_of_a_result(copied, capsys, finished):
    assert command_line.main(["table", "small", "--results", str(copied / "results")]) == 0
    assert capsys.readouterr().out.strip() == table(finished[1])


@pytest.mark.parametrize(("argv", "message"), [
    (["run", "no-such-settings"], "no configuration 'no-such-settings': neither a file nor one of .*quickstart"),
    (["table", "no-such-result"], r"no result .*no-such-result\.json"),
])
def test_bad_input_is_exit_code_2(tmp_path, capsys, argv, message):
    import re

    assert command_line.main([*argv, "--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert re.search(f"^error: {message}", captured.err) and captured.out == ""


@pytest.mark.parametrize("change", [{"corpus": "no_such_corpus"}, {"student": "no-such/student"}, {"colour": "red"},
                                    {"per_class": 41}])
def test_bad_settings_are_exit_code_2(quick, tmp_path, capsys, change):
    config = write(tmp_path / "a.yaml", **SMALL | {"rows": ["random/tuned"]} | change)
    assert command_line.main(["run", str(config), *places(tmp_path)]) == 2
    assert str(*change.values()) in capsys.readouterr().err or "colour" in change
    assert not (tmp_path / "results").exists()


def test_an_interruption_is_exit_code_130(tmp_path, monkeypatch, capsys):
    def interrupted(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(ClassificationJob, "from_yaml", interrupted)
    assert command_line.main(["run", "quickstart", *places(tmp_path)]) == 130
    assert "give the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"], ["table"], ["demo", "--quick"]])
def test_commands_that_are_none(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(argv)
    assert stopped.value.code == 2 and "usage: python -m distillkit" in capsys.readouterr().err
