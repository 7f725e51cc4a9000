"""A whole experiment in small: every row, taken up where it stopped, and errors that name the setting."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import distillkit as dk
from distillkit.cli import main as command_line
from distillkit.cli import runs
from distillkit.experiments import runner
from distillkit.experiments.classification import ROW_NAMES, ClassificationCell, ClassificationJob, table
from distillkit.experiments.results import COLUMNS, VERSIONED, frame, read, settings_hash, with_tables
from distillkit.experiments.results import write as write_result
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import kind_of
from distillkit.io.storage import StorageError

SMALL = {"name": "small", "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8,
         "outer_steps": 3, "outer_batch": 8, "eval_seeds": [0, 1], "full_seeds": [0], "standard_steps": 2,
         "tuned_grid": {"step_size": [0.001], "steps": [1, 2]}}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run: its folder and what it returned."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    with standin_hub.patched(standin_home):
        return folder, Run(ClassificationCell, job(), folder / "results", folder / "work")()


@pytest.fixture
def copied(finished, tmp_path, standin_hub):
    """That run, to be continued; the names of the rows that are scored are noted in `scored`."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    noted, evaluate = [], runner.evaluate

    def noting(*args, recipe, **options):
        noted.append(recipe if isinstance(recipe, str) else type(recipe).__name__.lower())
        return evaluate(*args, recipe=recipe, **options)

    monkeypatch.setattr(runner, "evaluate", noting)
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
    return Run(ClassificationCell, job(**changes), folder / "results", folder / "work")()


def scores(result, row):
    return [score for score in result["scores"] if score["row"] == row]


def rows(result):
    return [*dict.fromkeys(score["row"] for score in result["scores"])]


def drop(row):
    return lambda result: result.update(scores=[score for score in result["scores"] if score["row"] != row])


def without_seconds(result):
    return [{key: value for key, value in score.items() if key != "seconds"} for score in result["scores"]]


def write(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return path


# --- a complete run --------------------------------------------------------------------------------------------------


def test_every_student_is_a_row_of_one_table(finished):
    folder, result = finished
    assert stored(folder) == result and rows(result) == sorted(ROW_NAMES)
    for row in ROW_NAMES:
        method, recipe = row.split("/")
        of_row = scores(result, row)
        assert [score["init_seed"] for score in of_row] == ([0] if method == "full" else [0, 1])
        for score in of_row:
            assert (score["method"], score["recipe"], score["examples"]) == (method, recipe, 80 if method == "full" else 2)
            assert 0 <= score["accuracy"] <= 1 and score["flops"] > 0 and score["seconds"] > 0 and score["nbytes"] > 0
            assert (score["experiment"], score["corpus"], score["split"]) == ("small", "rotten_tomatoes", "test")
            assert score["target"] == "bert-base-uncased" and score["settings_hash"] == settings_hash(job())
            assert (score.get("per_class"), score.get("length")) == ((None, None) if method == "full" else (1, 8))
        note = result["cells"]["small"]["notes"][f"{row} 0"]
        assert note["recipe"]["name"] == recipe and {*note["groups"]} == {"neg", "pos"}
    assert [*frame(result).columns[: len(COLUMNS)]] == [*COLUMNS]
    cell = result["cells"]["small"]
    assert result["config"] == cell["config"] == json.loads(json.dumps(dataclasses.asdict(job())))
    assert cell["corpus"]["rows"] == {"train": 80, "validation": 40, "test": 40} and len(cell["corpus"]["sha256"]) == 64
    assert {*cell["versions"]} == {*VERSIONED, "python"} and "date" in cell and "machine" in cell


def test_what_was_distilled(finished, standin_hub):
    folder, result = finished
    notes = result["cells"]["small"]["notes"]
    assert {name: (note["steps"], len(note["losses"])) for name, note in notes.items() if "losses" in note} == {
        "real + learned labels 0": (3, 3), "keywords + learned labels 0": (3, 3), "embeddings 0": (3, 3)}
    text = notes["projected 0"]["text"]
    assert [row["label"] for row in text] == ["neg", "pos"] and all(row["text"] for row in text)
    cell = Run(ClassificationCell, job(), folder / "results", folder / "work").cell
    embeddings, labels, keywords = (cell.set_of(name, 0) for name in (
        "embeddings", "real + learned labels", "keywords + learned labels"))
    assert embeddings.tokens is None and embeddings.meta["recipe"]["outer_steps"] == 3
    assert labels.tokens is not None and labels.meta["selection"]["method"] == "random", "real text, learned labels"
    assert torch.equal(keywords.embeds, cell.set_of("keywords", 0).embeds) and keywords.soft, "only labels and step sizes"
    nbytes = {score["method"]: score["nbytes"] for score in result["scores"]}
    assert nbytes["embeddings"] == embeddings.nbytes > nbytes["real + learned labels"] == labels.nbytes
    assert nbytes["projected"] == nbytes["real + learned labels"] > nbytes["random"] == nbytes["k_center"]


def test_the_same_sentences_are_scored_once(finished, standin_hub, tmp_path, scored):
    """At one a class herding and k-centre both take the medoid; at two they differ."""
    one, other = (scores(finished[1], f"{method}/tuned") for method in ("k_center", "herding"))
    assert [score["accuracy"] for score in one] == [score["accuracy"] for score in other]
    assert {score.get("same_set_as") for score in other} == {"small: k_center/tuned, set 0"}
    twins = {score["row"] for score in finished[1]["scores"] if "same_set_as" in score}
    assert twins == {"herding/tuned", "k_means/tuned"}  # one sentence per class: the one nearest the mean
    result = run(tmp_path, rows=["k_center/tuned", "herding/tuned"], per_class=2)
    assert scored == ["tuned"] * 2 and not any("same_set_as" in score for score in result["scores"])


def test_the_table(finished):
    _, result = finished
    lines = table(result).splitlines()
    heads = "method | recipe | examples | bytes | of the compressed corpus | accuracy (mean ± sd) | seeds | seconds to train"
    assert lines[0] == f"| {heads} |"
    assert len(lines) == 2 + len(ROW_NAMES) and all(line.count("|") == 9 for line in lines)
    one, other = (score["accuracy"] for score in scores(result, "herding/tuned"))
    nbytes, mean, deviation = scores(result, "herding/tuned")[0]["nbytes"], (one + other) / 2, abs(one - other) / 2**0.5
    share = nbytes / result["cells"]["small"]["training_text"]["compressed"]
    assert lines[4].startswith(f"| herding | tuned | 2 | {nbytes} | {share:.2%} | {mean:.3f} ± {deviation:.3f} | 2 | ")
    partial = result | {"scores": [dict(score) for score in result["scores"] if score["row"] != "k_center/tuned"]}
    assert table(partial).splitlines()[3] == "| k_center | tuned | | | | not run | | |"
    scores(partial, "full/standard")[0]["committed"] = "same corpus"
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
    assert run(copied) == finished[1] and scored == []


@pytest.mark.parametrize("row", ["random/tuned", "embeddings/own", "projected/tuned"])
def test_only_a_missing_row_is_made(copied, scored, finished, row):
    rewrite(copied, drop(row))
    result = run(copied)
    assert scored == [row.split("/")[1]]
    assert without_seconds(result) == without_seconds(finished[1]), "in its place"
    assert stored(copied) == result


def test_losses_that_the_result_lacks_are_read_from_the_checkpoint(copied, finished):
    """A run may be killed after a set was learned and before its score is there."""
    rewrite(copied, drop("embeddings/own"))
    rewrite(copied, lambda result: result["cells"]["small"]["notes"].pop("embeddings 0"))
    expected, notes = (result["cells"]["small"]["notes"] for result in (finished[1], run(copied)))
    assert notes["embeddings 0"] == expected["embeddings 0"]


def test_a_row_is_on_disk_before_the_next_begins(copied, monkeypatch):
    for row in ("random/tuned", "projected/own"):
        rewrite(copied, drop(row))
    evaluate = runner.evaluate

    def dies_at_the_second(*args, **kwargs):
        if "random/tuned" in rows(stored(copied)):
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(runner, "evaluate", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(copied)
    assert {*ROW_NAMES} - {*rows(stored(copied))} == {"projected/own"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"eval_seeds": [0, 2]}, r"other settings: eval_seeds is \[0, 1\] there and \[0, 2\] here"),
     ({"outer_steps": 4}, "other settings: outer_steps is 3 there and 4 here"), ({"lr": 0.5}, "other settings: lr"),
     ({"limit": 20}, "other settings: limit")],
)
def test_other_settings_do_not_replace_a_result(copied, scored, change, message):
    before = stored(copied)
    with pytest.raises(ValueError, match=message + ".*--fresh"):
        run(copied, **change)
    assert scored == [] and stored(copied) == before


def test_settings_that_came_or_went_since(copied, scored):
    rewrite(copied, lambda result: result["cells"]["small"]["config"].pop("label_lr"))
    assert run(copied)["config"]["label_lr"] is None and scored == [], "what a result does not name had its default"
    rewrite(copied, lambda result: result["cells"]["small"]["config"].update(gone=3))
    with pytest.raises(ValueError, match="gone is 3 there and None here"):
        run(copied)


def test_another_corpus_and_an_older_form_are_refused(copied, scored):
    rewrite(copied, lambda result: result["cells"]["small"]["corpus"].update(sha256="0"))
    with pytest.raises(ValueError, match="another corpus: sha256 is '0' there"):
        run(copied)
    rewrite(copied, lambda result: result.pop("scores"))
    with pytest.raises(ValueError, match=r"distillkit 0\.1 wrote it.*--fresh"):
        run(copied)
    assert scored == []


def test_other_rows_are_made_in_addition(copied, scored, finished):
    rewrite(copied, drop("herding/tuned"))
    result = run(copied, rows=["herding/tuned", "embeddings/own"])
    assert scored == [] and {*rows(result)} == {*ROW_NAMES}, "k-centre has chosen the same sentences"


def test_sets_of_other_settings_are_refused(copied):
    (copied / "results" / "small.json").unlink()
    with pytest.raises(ValueError, match=r"small is of a run with other settings: lr is 0\.08 there and 0\.5 here.*--fresh"):
        run(copied, rows=["embeddings/own"], lr=0.5)


def test_a_committed_row(copied, scored, finished):
    (copied / "results" / "small.json").rename(copied / "results" / "longer.json")
    result = run(copied, rows=["full/standard"], committed="longer", committed_rows=["full/standard"])
    expected = [score | {"committed": "same corpus"} for score in scores(finished[1], "full/standard")]
    assert scored == [] and result["scores"] == expected


def test_a_committed_row_that_is_not_there_is_missed_at_once(copied, scored):
    rewrite(copied, drop("full/standard"))
    (copied / "results" / "small.json").rename(copied / "results" / "longer.json")
    with pytest.raises(FileNotFoundError, match=r"committed='absent', but there is no result .*absent\.json; make it"):
        run(copied, committed="absent", committed_rows=["full/standard"])
    with pytest.raises(ValueError, match=r"committed='longer', but .*longer\.json has no row full/standard; finish it"):
        run(copied, committed="longer", committed_rows=["full/standard"])
    assert scored == []


@pytest.mark.parametrize("start", ["random", "keywords", "herding"])
def test_learning_starts_where_the_settings_say(copied, start):
    """The start has the selection's own embeddings, and soft labels that can be learned."""
    cell = ClassificationCell(job(start=start), copied / "work" / "other", copied / "results")
    distilled, selected = cell.start(0), dk.select(cell.task, cell.student, start, per_class=1, length=8)
    assert torch.equal(distilled.embeds, selected.embeds) and distilled.soft
    assert distilled.targets.argmax(1).tolist() == selected.targets.tolist() == [0, 1]


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
    honest = {"random/tuned", "k_center/tuned", "herding/tuned", "keywords/tuned", "keywords + learned labels/own",
              "projected/own"}
    assert demo.start == "keywords", "so keywords, and keywords with learned labels, are the controls"
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
    rewrite(copied, drop("random/tuned"))
    assert command_line.main(["run", str(config), *places(copied)]) == 0
    out = capsys.readouterr().out
    assert "rotten_tomatoes: 80 / 40 / 40 rows; student bert-base-uncased" in out
    assert table(stored(copied)) in out and "written to" in out and scored == ["tuned"]


def test_fresh_forgets(copied, scored, tmp_path):
    config = write(tmp_path / "small.yaml", **SMALL | {"rows": ["random/tuned"]})
    marker = copied / "work" / "small" / "left-over"
    marker.mkdir()
    assert command_line.main(["run", str(config), *places(copied), "--fresh"]) == 0
    assert not marker.exists() and rows(stored(copied)) == ["random/tuned"] and scored == ["tuned"]


def test_the_demo_is_the_quickstart_and_draws_it(copied, monkeypatch, capsys):
    """With the settings and the finished rows of the small run in the place of the shipped ones."""
    monkeypatch.setattr(runs, "CONFIGS", copied)
    write(copied / "quickstart.yaml", **SMALL)
    assert command_line.main(["demo", *places(copied)]) == 0
    assert (copied / "work" / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert not [*copied.glob("*.png")], "the committed figures are drawn by another command"
    assert "| embeddings | own |" in capsys.readouterr().out


def test_a_demo_begins_anew_where_nothing_is_left_to_do(copied):
    path = copied / "results" / "small.json"
    assert runs.is_finished(path) and not runs.is_finished(copied / "absent.json")
    rewrite(copied, drop("random/tuned"))
    assert not runs.is_finished(path), "it goes on"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StorageError, match="small.json is damaged.*--fresh"):
        runs.is_finished(path)


def test_table_of_a_result(copied, capsys, finished):
    assert command_line.main(["table", "small", "--results", str(copied / "results")]) == 0
    assert capsys.readouterr().out.strip() == table(finished[1])


@pytest.mark.parametrize(("argv", "message"), [
    (["run", "no-such-settings"], "no configuration 'no-such-settings': neither a file nor one of .*quickstart"),
    (["table", "no-such-result"], r".*No such file .*no-such-result\.json"),
])
def test_bad_input_is_exit_code_2(tmp_path, capsys, argv, message):
    assert command_line.main([*argv, "--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert re.search(f"^error: {message}", captured.err) and captured.out == ""


def test_a_benchmark_is_no_table_of_scores(capsys):
    assert command_line.main(["table", "metagrad", "--results", str(Path(__file__).parents[1] / "figures" / "results")]) == 2
    assert re.search(r"^error: .*metagrad\.json holds no scores", capsys.readouterr().err)


@pytest.mark.parametrize("change", [{"corpus": "no_such_corpus"}, {"student": "no-such/student"}, {"colour": "red"},
                                    {"per_class": 41}])
def test_bad_settings_are_exit_code_2(standin_hub, tmp_path, capsys, change):
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
