"""The suite does what fits into the time, loses nothing however it ends, goes on, and its results become committed ones."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from distillkit.cli import main as command_line
from distillkit.core.distilled import DistilledSet
from distillkit.experiments import suite_jobs
from distillkit.experiments.kinds import table_of
from distillkit.experiments.notebooks import Notebooks
from distillkit.experiments.results import read, write
from distillkit.experiments.runner import CONFIGS
from distillkit.experiments.settings import kind_of
from distillkit.experiments.suite import Share, Times, Unit, run
from distillkit.experiments.suite_jobs import JOBS, Benchmark, Experiment
from distillkit.experiments.union import merge, united
from distillkit.io.deadline import Deadline, TimeUp
from killed import at_every_stage, leftovers

SMALL = {"product": {"seed": [0, 1], "unroll_steps": [1, 2], "student": ["bert-base-uncased"], "corpus": ["rotten_tomatoes"]},
         "base": suite_jobs._SMALL_GRID}
SLIDES = Experiment("small", "gpu_slides", {"": 1.0}, {}, SMALL)
ARC = next(job for job in JOBS if job.name == "instruction_arc_easy_smollm2")
LENGTH = 16  # places of that table


class After(Deadline):
    """A deadline that comes after so many checks, however fast the machine is."""

    def __init__(self, checks):
        super().__init__(3600.0)
        self.checks = checks

    def check(self, expected=0.0):
        self.checks -= 1
        if self.checks < 0:
            raise TimeUp("that was the last")


@dataclasses.dataclass
class Fake:
    """A job of units that take no time; `noted` has the names of those that were run."""

    units_: list
    name: str = "fake"
    measures_time: bool = False
    noted: list = dataclasses.field(default_factory=list)

    def units(self, out, deadline, command):
        return [dataclasses.replace(unit, run=lambda unit=unit: (self.noted.append(unit.name), unit.run()))
                for unit in self.units_]

    def needs(self):
        return []


def unit(name, guess=1.0, run=lambda: None, **more):
    return Unit(name, (f"like {name}",), guess, run, **more)


def raising(error):
    def run():
        raise error
    return run


def scores(folder, name="small"):
    """The table without what two runs may differ in."""
    result = read(folder / "results" / f"{name}.json")
    return [{key: value for key, value in score.items() if key != "seconds"} for score in result["scores"]]


# --- what is done, and when ------------------------------------------------------------------------------------------


def test_what_fits_is_done_in_order_of_value(tmp_path, capsys):
    job = Fake([unit("first"), unit("long", 100.0), unit("here already", done=True), unit("later", 5.0),
                unit("saves its progress", 100.0, divisible=True)])
    run([job], tmp_path, Deadline(30.0))
    assert job.noted == ["first", "later", "saves its progress"]
    assert "4 of 5 units done, 3 of them now; 1 left" in capsys.readouterr().out
    heavy = Fake([unit("one", load=40.0, world="a"), unit("two", load=20.0, world="b"), unit("three", load=20.0, world="b")])
    run([heavy], tmp_path, Deadline(30.0))
    assert heavy.noted == ["two", "three"], "what has to be loaded first counts"
    run([job := Fake([unit("saves its progress", divisible=True), unit("quick", 0.0)])], tmp_path, Deadline(0.0))
    assert job.noted == [], "not even what takes no time is begun when the time is up"


def test_measured_times_take_the_place_of_guesses(tmp_path):
    slow = Unit("slow", ("T = 8", "any"), 1.0, lambda: time.sleep(0.05))
    run([Fake([slow])], tmp_path, Deadline(60.0))
    expected = lambda *kinds, name="other": Times(tmp_path).expected("fake", Unit(name, kinds, 7.0, lambda: None))  # noqa: E731
    assert 0.05 <= expected("T = 8") == expected("T = 2", "any") < 1.0
    assert expected("unknown") == 7.0 and Times(tmp_path).expected("another job", slow) == 1.0
    run([Fake([Unit("cut", ("c",), 0.01, lambda: (time.sleep(0.05), raising(TimeUp())()))])], tmp_path, Deadline(60.0))
    assert expected("c", name="cut") >= 0.1, "longer than what was not enough"


def test_a_failed_unit_or_job_is_said_and_the_others_go_on(tmp_path, capsys):
    class Impossible(Fake):
        def units(self, *args):
            raise FileNotFoundError("no checkout")

    bad = [unit(name, run=raising(FileNotFoundError("no model"))) for name in "abc"]
    job = Fake([*bad, unit("cut", run=raising(TimeUp())), unit("good")])
    run([Impossible([], "impossible"), job], tmp_path, Deadline(60.0))
    out = capsys.readouterr().out
    assert job.noted == [*"abc", "cut", "good"]
    assert "impossible: skipped: no checkout" in out
    assert "1 of 5 units done, 1 of them now; 1 left (1 cut short by the end of the time)" in out
    assert "; 3 cannot be done here: FileNotFoundError: no model" in out


def test_processes_share_the_units_by_the_sets_that_they_build_on(tmp_path, capsys):
    def job(**more):
        return Fake([unit(f"{row} {seed}", builds_on=seed) for seed in "abc" for row in ("own", "text")], **more)

    first, second = job(), job()
    for number, part in enumerate((first, second)):
        run([part], tmp_path, Deadline(60.0), share=Share(number, 2))
    assert first.noted == ["own a", "text a", "own c", "text c"] and second.noted == ["own b", "text b"]
    assert "4 of 4 units done" in capsys.readouterr().out, "of its own share"
    timed = job(measures_time=True)
    run([timed], tmp_path, Deadline(60.0), share=Share(0, 2))
    assert not timed.noted and "it measures time; run it in one process" in capsys.readouterr().out
    run([timed], tmp_path, Deadline(60.0))
    assert len(timed.noted) == 6
    units = {unit.name: unit.builds_on for unit in ARC.units(tmp_path, Deadline(), "")}
    nacd = [units[f"instruction_arc_easy_smollm2: {row}, set 1"] for row in ("nacd/own", "nacd/tuned", "nacd text/tuned")]
    assert len({*nacd}) == 1 and len({*units.values()}) > 12, "a text is made of the set, so one process makes both"


def test_the_shipped_jobs():
    assert len({job.name for job in JOBS}) == len(JOBS) and JOBS[0].name.startswith("metagrad")
    needs = [settings for job in JOBS for settings in job.needs()]
    corpora = [(settings.corpus, settings.max_length, settings.limit) for settings in needs]
    assert ("docstrings", 32, None) in corpora and ("imdb", 128, {"train": 8000, "validation": 1000, "test": 2000}) in corpora
    students = {settings.student.removeprefix("offline:") for settings in needs}
    assert students == {"minilm", "minilm-l3", "mpnet", "smollm2", "tiny-opt"}
    assert ("mmlu", 512, {"test": 400}) in corpora, "the further questions that the same students answer"
    tiny = {job.name: job.tiny().name for job in JOBS if job.tiny()}
    assert tiny == {name: f"{name}_tiny" for name in tiny}, "what a dry run makes cannot be taken for the real thing"
    kinds = [{kind_of(CONFIGS / f"{job.config}.yaml") for job in JOBS if isinstance(job, Experiment) and bool(job.small) == dry}
             for dry in (True, False)]
    assert kinds[0] >= kinds[1], "every kind of experiment has a dry run"


# --- an experiment ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(standin_home, tmp_path_factory):
    """The folder of an uninterrupted run."""
    import standin_hub

    folder = tmp_path_factory.mktemp("whole")
    with standin_hub.patched(standin_home):
        run([SLIDES], folder, Deadline(3600.0), "the command")
    return folder


@pytest.mark.usefixtures("standin_hub")
class TestExperiment:
    def test_every_score_is_in_one_table(self, whole):
        result = read(whole / "results" / "small.json")
        assert result["command"] == "the command"
        assert len({(score["cell"], score["row"]) for score in result["scores"]}) == LENGTH
        longer = [score for score in result["scores"] if "unroll_steps=2" in score["cell"] and "same_set_as" not in score]
        assert {score["row"] for score in longer} == {"embeddings/own"}, "nothing else depends on the inner steps"
        lines = table_of(result).splitlines()
        assert [line.split("|")[2].strip() for line in lines[2:7]] == [
            "k_center/tuned", "random/tuned", "embeddings/own, unroll_steps=1", "embeddings/own, unroll_steps=2",
            "full/standard"]
        assert "not run" not in table_of(result)

    def test_a_call_that_is_cut_at_any_place_is_gone_on_with(self, whole, tmp_path, capsys):
        calls = 0
        while not (tmp_path / "results/small.json").exists() or len(scores(tmp_path)) < len(scores(whole)):
            before = scores(tmp_path) if (tmp_path / "results/small.json").exists() else []
            run([SLIDES], tmp_path, After(8), "the command")
            assert [score for score in scores(tmp_path) if score in before] == before
            calls += 1
            assert calls < 30, "each call gets somewhere"
        assert calls > 3 and scores(tmp_path) == scores(whole)
        states = [json.loads(line)["state"] for line in (tmp_path / "times.jsonl").read_text().splitlines()]
        assert {*states} == {"done", "cut"} and "cut short by the end of the time" in capsys.readouterr().out

    def test_a_set_is_gone_on_with_inside_its_learning(self, tmp_path):
        job = dataclasses.replace(SLIDES, changes=SMALL | {"rows": ["embeddings/own"]})
        run([job], tmp_path, After(2))
        logs = [*(tmp_path / "work").rglob("checkpoint-*.log.jsonl")]
        assert [len(log.read_text().splitlines()) - 1 for log in logs if log.stat().st_size], "steps were saved"
        made = {log: log.read_text() for log in logs}
        run([job], tmp_path, Deadline(3600.0))
        assert all(log.read_text().startswith(text) for log, text in made.items()), "no step was made again"

    def test_killed_at_any_moment_nothing_is_lost(self, whole, tmp_path):
        """Each child is killed at its stage, and the next one goes on with what is there."""
        before = []
        for _ in at_every_stage(lambda: run([SLIDES], tmp_path, Deadline(3600.0), "the command"), tmp_path, step=60):
            path = tmp_path / "results/small.json"
            now = scores(tmp_path) if path.exists() else []
            assert [score for score in now if score in before] == before
            before = now
        assert scores(tmp_path) == scores(whole) and not leftovers(tmp_path)

    def test_sets_of_several_seeds_are_learned_together_and_gone_on_with(self, tmp_path):
        def job(**changes):
            base = suite_jobs._SMALL_GRID | {"metagrad": "replay"} | changes
            return dataclasses.replace(SLIDES, changes=SMALL | {"rows": ["embeddings/own"], "base": base})

        alone, together = job(), job(together=True)
        run([together], tmp_path / "together", After(1))
        logs = (tmp_path / "together/work").rglob("checkpoint-*.log.jsonl")
        assert sorted(len(log.read_text().splitlines()) - 1 for log in logs) == [2, 2, 3, 3], "the sets of two seeds keep step"
        for job, folder in ((alone, "alone"), (together, "together")):
            run([job], tmp_path / folder, Deadline(3600.0))
        sets = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone/work").rglob("embeddings-*")]
        assert len(sets) == len(scores(tmp_path / "together")) / 2 == 4
        for path in sets:
            expected, learned = (DistilledSet.load(tmp_path / folder / path).embeds for folder in ("alone", "together"))
            assert (learned - expected).abs().mean() < 1e-3 < expected.abs().mean()

    def test_what_is_missing_is_looked_for_once(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "empty"))
        product = SMALL["product"] | {"student": ["offline:minilm-l3", "bert-base-uncased"], "seed": [0], "unroll_steps": [1]}
        job = dataclasses.replace(SLIDES, changes=SMALL | {"product": product})
        run([job], tmp_path, Deadline(3600.0))
        out = capsys.readouterr().out
        assert "4 of 8 units done" in out and "4 cannot be done here" in out and out.count("failed") == 1
        assert "distillkit fetch offline:minilm-l3" in out


# --- the benchmark and the notebooks ---------------------------------------------------------------------------------


def test_the_benchmark_row_by_row(tmp_path, capsys, monkeypatch):
    job = dataclasses.replace(Benchmark("costs", "", "full", "random:bert-tiny").tiny(), steps=(1,), repeats=2)
    path = tmp_path / "results" / "costs_tiny.json"
    run([job], tmp_path, After(3))
    (entry,) = read(path)["entries"]
    measured = [row for row in entry["rows"] if "failed" not in row]
    assert len(measured) == 3 and all(row["seconds"] > 0 and row["flops"] > 0 for row in measured)
    run([job], tmp_path, Deadline(3600.0))
    result = read(path)
    rows = result["entries"][0]["rows"]
    assert [row for row in rows if row in measured] == measured and len(rows) == 10
    assert result["rates"]["float32"] > 0 and result["settings"]["repeats"] == 2
    capsys.readouterr()
    monkeypatch.setattr(suite_jobs, "SCRIPT", tmp_path / "absent.py")
    run([job], tmp_path, Deadline(60.0))
    assert "costs_tiny: skipped: no " in capsys.readouterr().out


def test_notebooks_are_timed_and_a_failing_one_says_why(tmp_path, capsys):
    for name, source in {"good": "print(1)", "wrong": "raise ValueError('too small')"}.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        (tmp_path / f"{name}.ipynb").write_text(nbformat.writes(notebook))
    job = Notebooks("timed", ("--scale", "cpu", "--reduced"), folder=tmp_path, guess=1.0)
    run([job], tmp_path / "out", Deadline(600.0))
    assert "1 of 2 units done, 1 of them now" in (out := capsys.readouterr().out) and "too small" in out
    result = read(tmp_path / "out/results/timed.json")
    (score,) = result["scores"]
    assert score["row"] == "good" and score["seconds"] > 0 and score["bytes"] > 1e7
    assert table_of(result).splitlines()[2].startswith("| good | ")
    run([job], tmp_path / "other", Deadline(2.0))
    assert not (tmp_path / "other/results/timed.json").exists(), "a notebook that takes longer is ended"


# --- merging ---------------------------------------------------------------------------------------------------------


def split(whole, folder, chosen):
    """A copy of the run with only some of its scores."""
    shutil.copytree(whole, folder)
    result = read(path := folder / "results" / "small.json")
    result["scores"] = [score for score in result["scores"] if chosen(score)]
    result["cells"] = {key: cell for key, cell in result["cells"].items() if key in {s["cell"] for s in result["scores"]}}
    write(path, result)
    return folder


def test_two_halves_are_one_table(whole, tmp_path):
    one = split(whole, tmp_path / "one", lambda score: score["set_seed"] == 0)
    other = split(whole, tmp_path / "other", lambda score: score["set_seed"] == 1 or score["row"] == "random/tuned")
    for folder in (one, other):
        assert command_line.main(["suite", "--merge", str(folder), "--into", str(tmp_path / "into")]) == 0
    expected, merged = (read(folder / "small.json") for folder in (whole / "results", tmp_path / "into"))
    assert merged == expected and table_of(merged) == table_of(expected)


@pytest.mark.parametrize(("made", "accuracy"), [("2000-01-01T00:00:00Z", "stored"), ("3000-01-01T00:00:00Z", "added")])
def test_the_newer_score_counts(whole, made, accuracy):
    stored, added = (read(whole / "results" / "small.json") for _ in range(2))
    place = stored["scores"][0]
    for score in added["scores"]:
        score["accuracy"] = "added"
    note = added["cells"][place["cell"]]["notes"][f"{place['row']} {place['set_seed']}"]
    note["made"] = made
    merged = united(stored, added)
    changed = [score for score in merged["scores"] if score["accuracy"] == "added"]
    assert bool(changed) == (accuracy == "added")
    assert {(s["cell"], s["row"], s["set_seed"]) for s in changed} <= {(place["cell"], place["row"], place["set_seed"])}
    assert len(merged["scores"]) == len(stored["scores"])


def test_other_settings_are_refused_and_nothing_is_changed(whole, tmp_path, capsys):
    into = tmp_path / "into"
    shutil.copytree(whole / "results", into)
    source = split(whole, tmp_path / "source", lambda score: True)
    for name in ("small", "a_new_one"):
        result = read(whole / "results" / "small.json")
        result["config"]["base"]["lr"] = 0.5
        write(source / "results" / f"{name}.json", result)
    before = (into / "small.json").read_bytes()
    assert command_line.main(["suite", "--merge", str(source), "--into", str(into)]) == 2
    assert "config.base.lr is None there and 0.5 here" in capsys.readouterr().err
    assert (into / "small.json").read_bytes() == before and not (into / "a_new_one.json").exists()
    with pytest.raises(FileNotFoundError, match="no results in"):
        merge(tmp_path, into)


def test_tables_of_costs_are_merged_row_by_row():
    def costs(*contenders, made="2026-01-01", version="2"):
        rows = [{"contender": name, "steps": t, "seconds": 1.0, "made": made} for t, name in contenders]
        return {"kind": "cost", "settings": {"steps": [2, 8]}, "machine": {"processor": "GPU", "cores": len(contenders)},
                "versions": {"torch": version}, "entries": [{"student": "a", "trainable": "full", "rows": rows}]}

    merged = united(costs((8, "Replay")), costs((8, "Replay"), (2, "Replay"), made="2027-01-01"))
    assert [(row["steps"], row["made"]) for row in merged["entries"][0]["rows"]] == [(2, "2027-01-01"), (8, "2027-01-01")]
    with pytest.raises(ValueError, match="other versions: versions.torch is '2' there and '3' here"):
        united(costs(), costs(version="3"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_ends_in_time_and_goes_on(tmp_path, capsys):
    """A dry run of two of the jobs, as a person would try the suite before using a GPU."""
    out, jobs = tmp_path / "out", ["metagrad_gpu_opt_tiny", "gpu_scaling_tiny"]
    common = ["suite", "--tiny", "--out", str(out), "--jobs", *jobs]
    assert command_line.main([*common, "--list"]) == 0
    assert f"{jobs[0]}: 0 of 20 units done" in capsys.readouterr().out and not out.exists()
    begun = time.monotonic()
    assert command_line.main([*common, "--minutes", "0.05"]) == 0
    attempts = [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]
    assert time.monotonic() - begun < 3.0 + max(line["seconds"] for line in attempts) + 2.0
    assert " 0 left" not in capsys.readouterr().out
    assert command_line.main([*common, "--minutes", "10"]) == 0
    assert capsys.readouterr().out.count("; 0 left") == 2
    assert command_line.main(["suite", "--merge", str(out), "--into", str(tmp_path / "into")]) == 0
    assert {path.stem for path in (tmp_path / "into").glob("*.json")} == {*jobs}
    assert command_line.main(["table", "gpu_scaling_tiny", "--results", str(tmp_path / "into")]) == 0
    assert "not run" not in capsys.readouterr().out
    assert command_line.main(["verify", str(out)]) == 0


def test_several_processes_make_one_table(tmp_path, capfd):
    job, out = "evidence_ag_news_mpnet_large_rates_tiny", tmp_path / "out"
    common = ["suite", "--tiny", "--out", str(out), "--minutes", "10", "--processes", "2", "--jobs"]
    assert command_line.main([*common, job]) == 0
    assert "1 of 1 units done" in capfd.readouterr().out
    result = read(out / "results" / f"{job}.json")
    assert {score["row"] for score in result["scores"]} == {"keywords/tuned", "embeddings/own"}
    assert command_line.main([*common, "nothing"]) == 2, "found before any process is begun"


@pytest.mark.parametrize(("options", "message"), [(["--minutes", "0"], "--minutes must be above 0"),
                                                  (["--processes", "0"], "--processes must be above 0"),
                                                  (["--jobs", "nothing"], "jobs must be one of metagrad_gpu_minilm")])
def test_what_cannot_be_is_one_line(tmp_path, capsys, options, message):
    assert command_line.main(["suite", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


BARE = """
import sys
sys.path.insert(0, {tests!r})
import bare_machine
bare_machine.strip()
from distillkit.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_dry_run_of_every_job_on_a_bare_machine(tmp_path, monkeypatch):
    """Prepared here; without a network and without `datasets` begun, killed, begun again, ended in time, gone on with."""
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    assert command_line.main(["suite", "--tiny", "--prepare", str(prepared)]) == 0
    shutil.rmtree(prepared / "files")  # only the parts travel
    monkeypatch.setenv("DISTILLKIT_PREPARED", str(prepared))

    def there(minutes, **options):
        script = [sys.executable, "-c", BARE.format(tests=str(Path(__file__).parent))]
        return subprocess.Popen([*script, "suite", "--tiny", "--out", str(out), "--minutes", str(minutes)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    first = there(10)
    while not (out / "results").exists() or len([*(out / "results").glob("*.json")]) < 4:
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.kill()
    first.communicate()
    done = len((out / "times.jsonl").read_text().splitlines())
    second = there(0.4)
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    third = there(10)
    text, errors = third.communicate()
    assert third.returncode == 0, errors
    here = len(suite_jobs.dry()) - 1
    assert text.count("; 0 left") == here and "notebooks_gpu_tiny: skipped: not installed: datasets" in text
    attempts = [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]
    made = [(line["job"], line["unit"]) for line in attempts if line["state"] == "done"]
    assert len(made) == len({*made}) and len(attempts) > done, "nothing was made twice"
    assert len(merge(out / "results", tmp_path / "into")) == here
