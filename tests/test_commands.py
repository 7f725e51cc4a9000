"""The command line's steps on a tiny world: one piece of work from experts to card, and every refusal by name."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
import yaml

import distillkit as dk
from distillkit.applications.publish import save_published
from distillkit.cli import main as command_line
from distillkit.cli import steps as commands
from distillkit.cli.looks import _hub
from distillkit.cli.steps import SCORES
from distillkit.cli.work import SETTINGS, STEPS, Work, settings_of
from distillkit.core.experts import record_experts
from distillkit.experiments import results
from distillkit.experiments.instruction import InstructionJob
from distillkit.io.files import write_file
from distillkit.io.storage import Claim, append_line, read_lines

TINY = ["--corpus", "rotten_tomatoes", "--student", "bert-base-uncased", "--max-length", "12"]
STEPS_OF = ["--outer-steps", "2", "--outer-batch", "8", "--unroll-steps", "2", "--length", "8"]


@pytest.fixture(scope="module")
def work(standin_home, tmp_path_factory):
    """runs/ with a set that was distilled and scored from the command line, and what was printed."""
    import standin_hub

    folder = tmp_path_factory.mktemp("work")
    with standin_hub.patched(standin_home):
        assert command_line.main(["distil", "--name", "tiny", *TINY, *STEPS_OF, "--work", str(folder)]) == 0
        assert command_line.main(["evaluate", "--name", "tiny", "--seeds", "0", "1", "--work", str(folder)]) == 0
    return folder


def call(*argv):
    return command_line.main([str(a) for a in argv])


def scores(folder):
    return read_lines(folder / "tiny" / SCORES)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_distil_makes_what_the_library_makes(work, world):
    made = dk.DistilledSet.load(work / "tiny" / "set")
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    unroll = dk.Unroll(2, optimizer=dk.SGD(0.2))
    distiller = dk.Distiller(start, dk.BPTT(task, student, unroll, batch_size=8), lr=0.08)
    assert len(list(distiller.run(2))) == 2
    assert torch.equal(made.embeds, distiller.distilled.embeds) and torch.equal(made.step_sizes, distiller.distilled.step_sizes)
    assert dk.DistilledSet.load(work / "tiny" / "text").tokens is not None
    kept = yaml.safe_load((work / "tiny" / SETTINGS).read_text())
    assert set(kept) == {f.name for f in dataclasses.fields(Work)} and kept["outer_steps"] == 2 and kept["corpus"] == TINY[1]


def test_evaluate_takes_up_the_settings_of_that_name(work, world):
    (row,) = scores(work)[:1]
    found = dk.evaluate(dk.DistilledSet.load(work / "tiny" / "set"), *world, seeds=(0, 1))
    assert row["scores"] == [round(s, 6) for s in found.scores] and row["recipe"]["name"] == "own"
    assert (row["student"], row["corpus"]) == ("bert-base-uncased", "rotten_tomatoes")
    assert row["corpus_sha256"] == world[0].fingerprint


def test_transfer(work, standin_hub, capsys):
    assert call("transfer", "--name", "tiny", "--target", "roberta-base", "--seeds", 0, "--work", work) == 0
    assert "roberta-base trained on 2 examples, test split of rotten_tomatoes" in capsys.readouterr().out
    assert scores(work)[-1]["student"] == "roberta-base" and scores(work)[-1]["recipe"]["name"] == "tuned"


def test_card_has_the_scores_of_this_set_alone(work, capsys, standin_hub, tmp_path):
    work = shutil.copytree(work, tmp_path / "copy")
    row = scores(work)[0]
    append_line(work / "tiny" / SCORES, row | {"set": "0" * 64, "corpus": "elsewhere"})
    assert call("card", "--name", "tiny", "--work", work, "--license", "mit", "--origin") == 0
    out = capsys.readouterr().out
    assert "license: mit" in out and f"| 2 | SGD | {row['mean']:.3f} ± {row['std']:.3f} | 2 |" in out and "elsewhere" not in out
    assert "test split of rotten&#95;tomatoes, bert-base-uncased, own" in out and "5" * 40 in out
    assert call("card", "--name", "tiny", "--work", work, "--set", work / "tiny" / "text", "--out", tmp_path / "out") == 0
    assert call("evaluate", "--set", tmp_path / "out", *TINY, "--seeds", 0, "--work", tmp_path) == 0, "a published set is one"
    (work / "tiny" / SCORES).unlink()
    append_line(work / "tiny" / SCORES, {"score": 1})
    assert call("card", "--name", "tiny", "--work", work) == 2
    assert "line 1 is no score (KeyError('set')" in capsys.readouterr().err


def test_a_card_refuses_an_edited_score_and_outlives_a_torn_one(work, capsys, standin_hub, tmp_path):
    folder = shutil.copytree(work, tmp_path / "copy") / "tiny"
    row = scores(folder.parent)[0]
    argv = ["card", "--name", "tiny", "--work", folder.parent]
    append_line(folder / SCORES, row | {"corpus": "elsewhere"})
    whole = (folder / SCORES).read_text()
    (folder / SCORES).write_text(whole.replace(f'"mean": {row["mean"]}', '"mean": 0.99', 1))
    assert call(*argv) == 2 and re.search(r"scores\.jsonl, line 1: .*delete the line", capsys.readouterr().err)
    (folder / SCORES).write_text(whole[:-30])
    assert call(*argv) == 0
    out = capsys.readouterr().out
    assert f"{row['mean']:.3f}" in out and "elsewhere" not in out
    assert call("evaluate", "--name", "tiny", "--seeds", 0, "--work", folder.parent) == 0
    assert [len(one["scores"]) for one in scores(folder.parent)] == [2, *[1] * (len(scores(folder.parent)) - 1)]


def test_experts_then_trajectory(standin_hub, tmp_path, capsys):
    assert call("experts", "--name", "tiny", *TINY, "--work", tmp_path) == 0
    assert "1 experts of 2 snapshots" in capsys.readouterr().out
    few = ["--outer-steps", 1, "--unroll-steps", 1, "--optimizer", "adamw", "--step-size", "0.001"]
    assert call("distil", "--name", "tiny", "--objective", "trajectory", *few, "--work", tmp_path) == 0
    assert dk.DistilledSet.load(tmp_path / "tiny" / "set").meta["recipe"]["objective"] == "TrajectoryMatching"


def test_going_on_and_starting_over(standin_hub, tmp_path, capsys):
    base = ["distil", "--name", "tiny", *TINY, *STEPS_OF, "--work", tmp_path]
    assert call(*base) == 0 and call(*base) == 0
    capsys.readouterr()
    assert call(*base, "--lr", "0.5") == 2
    assert "other settings: --lr is" in capsys.readouterr().err
    assert call(*base, "--lr", "0.5", "--fresh") == 0


# --- starting over, and not starting ---------------------------------------------------------------------------------


def contents(folder):
    """Every file below a folder by its bytes, but for locks, which hold nothing."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".lock"}


@pytest.fixture
def copy(work, tmp_path, standin_hub):
    return shutil.copytree(work, tmp_path / "runs")


@pytest.mark.parametrize("mistake", [
    ["--corpus", "rotten_tomatos"], ["--student", "no-such/student"], ["--per-class", 41], ["--length", 2], ["--colour", "red"],
    ["--objective", "trajectory"], ["--outer-batch", 81],
])
def test_a_mistake_beside_fresh_costs_nothing(copy, mistake, capsys):
    before = contents(copy)
    try:
        assert call("distil", "--name", "tiny", *TINY, *STEPS_OF, *mistake, "--fresh", "--work", copy) == 2
    except SystemExit as stopped:  # by argparse
        assert stopped.code == 2
    assert contents(copy) == before


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_run_that_is_refused_changes_nothing_of_the_running_one(copy, fresh, capsys):
    before = contents(copy)
    for held in (copy / "tiny", copy / "tiny" / "checkpoint"):
        with Claim(held):
            assert call("distil", "--name", "tiny", "--outer-steps", 3, "--work", copy, *fresh) == 2
        assert "in use by another run" in capsys.readouterr().err
        assert contents(copy) == before


def test_fresh_leaves_what_distillkit_did_not_write(copy, capsys):
    (copy / "tiny" / "notes.txt").write_text("mine")
    assert call("distil", "--name", "tiny", "--outer-steps", 1, "--fresh", "--work", copy) == 0
    assert (copy / "tiny" / "notes.txt").read_text() == "mine" and (copy / "tiny" / SCORES).is_file()
    assert dk.DistilledSet.load(copy / "tiny" / "set").meta["recipe"]["outer_steps"] == 1
    (copy / "tiny" / "set").write_text("mine")
    before = contents(copy)
    for fresh, message in (([], "will not overwrite"), (["--fresh"], "will not start over at")):
        assert call("distil", "--name", "tiny", "--outer-steps", 1, "--work", copy, *fresh) == 2
        assert f"{message} {copy / 'tiny' / 'set'}" in capsys.readouterr().err and contents(copy) == before


def test_a_folder_of_the_users_is_not_touched(tmp_path, standin_hub, monkeypatch, capsys):
    (tmp_path / "Documents" / "thesis").mkdir(parents=True)
    (tmp_path / "Documents" / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "package.json").write_text('{"name": "package"}')
    settings = {"corpus": TINY[1], "student": TINY[3], "max_length": 12, "length": 8, "rows": ["random/tuned"]}
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, fresh in (("Documents", ["--fresh"]), ("package", ["--fresh"]), ("Documents", [])):
        (tmp_path / "doc.yaml").write_text(yaml.safe_dump(settings | {"name": name}))
        assert call("run", "doc.yaml", *fresh, "--work", ".", "--results", ".") == 2
        assert "distillkit did not write" in capsys.readouterr().err
    (tmp_path / "doc.yaml").unlink()
    assert contents(tmp_path) == before


def test_a_signal_is_its_exit_code_and_the_same_command_goes_on(copy, monkeypatch, capsys):
    from distillkit.core import distiller

    plain, calls = distiller.meta_gradient, iter(range(9))

    def ended(*args, **kwargs):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    base = ["distil", "--name", "tiny", *STEPS_OF, "--fresh", "--work", copy]
    with monkeypatch.context() as patch:
        patch.setattr(distiller, "meta_gradient", ended)
        assert call(*base) == 143
    assert "give the same command again, without --fresh, to go on" in capsys.readouterr().err
    assert not (copy / "tiny" / "set").exists(), "the new run has begun to write"
    with monkeypatch.context() as patch:
        patch.setattr(distiller, "meta_gradient", ended)
        assert call(*base[:-3], "--work", copy) == 0
    assert next(calls) == 3, "one step of two was left"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- settings --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_over_the_folder(tmp_path):
    def settled(*argv):
        return settings_of(command_line.parser().parse_args(["distil", "--work", str(tmp_path), *map(str, argv)]))[0]

    assert settled() == Work()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / SETTINGS).write_text("lr: 0.3\nouter_steps: 7\n")
    (tmp_path / "a.yaml").write_text("outer_steps: 8\nseeds: [4, 5]\nexpert_step_size: 1e-4\n")
    assert (settled().lr, settled().outer_steps) == (0.3, 7)
    assert settled("--limit", 9).limit == 9
    found = settled("--config", tmp_path / "a.yaml", "--inits", 2)
    assert (found.lr, found.outer_steps, found.seeds, found.inits) == (0.08, 8, (4, 5), 2)
    assert found.expert_step_size == 1e-4, "a number without a dot is no text"
    assert settled("--config", tmp_path / "a.yaml", "--outer-steps", 9).outer_steps == 9
    assert settled("--label-lr", 0.5, "--step-size-lr", 0.25).rates() == {"lr": 0.3, "label_lr": 0.5, "step_size_lr": 0.25}
    with pytest.raises(ValueError, match="--label-lr must be greater than 0"):
        settled("--label-lr", 0)


def test_an_experiment_and_the_command_line_share_their_settings():
    """A setting that both have is one declaration: the same help, limits and type."""
    work, job = ({f.name: f for f in dataclasses.fields(kind)} for kind in (Work, InstructionJob))
    types = [typing.get_type_hints(kind, include_extras=True) for kind in (Work, InstructionJob)]
    shared = {*work} & {*job} - {"seeds"}  # sets there, fresh models here
    assert {"corpus", "fraction", "inner_batch", "outer_steps", "label_lr", "match_epochs"} <= shared
    for name in shared:
        assert work[name].metadata == job[name].metadata and types[0][name] == types[1][name], name


@pytest.mark.parametrize(("text", "message"), [
    ("colour: red", "unknown setting 'colour'; there are checkpoint_every, clip, corpus"),
    ("outer_steps: 0", "outer_steps must be greater than or equal to 1, not 0"),
    ("lr: fast", "lr must be a valid number, not 'fast'"),
    ("lr: yes", "lr must be a valid number, not True"),
    ("lr: .nan", "lr must be greater than 0, not nan"),
    ("fraction: -1", "fraction must be greater than 0, not -1"),
    ("name: ../up", "name must match pattern"),
    ("name: 2024-01-01", "name must be a valid string, not datetime.date"),
    ("objective: magic", "objective must be 'bptt' or 'trajectory', not 'magic'"),
    ("recipe: mine", "recipe must be 'own', 'standard' or 'tuned'"),
    ("seeds: []", r"seeds must name at least one seed"),
    ("limit: many", "limit must be a valid integer, not 'many'"),
    ("limit: {test: 0}", "limit must be greater than or equal to 1, not 0"),
    ("limit: {tset: 9}", "limit must be 'train', 'validation' or 'test', not 'tset'"),
    ("- a", "must hold settings"),
    ("a: [", "is not YAML"),
])
def test_bad_settings_are_exit_code_2(tmp_path, capsys, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert call("distil", "--config", tmp_path / "a.yaml", "--work", tmp_path) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"], "nothing was begun"


@pytest.mark.parametrize(("argv", "message"), [
    (["distil", "--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    (["evaluate"], "no set .*work/set; make one with: python -m distillkit distil"),
    (["verify", "nowhere"], "no file or folder nowhere"),
    (["verify", "."], r"nothing of distillkit's is stored below \."),
    (["card", "--set", "hub:nobody"], "repo_id must be 'owner/name'"),
    (["doctor", "--student", "offline:gpt"], "'offline:gpt' is no offline student"),
])
def test_bad_input_is_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(("argv", "message"), [
    (["distil", "--outer-steps", 0], "--outer-steps must be"),
    (["distil", "--outer-batch", 81], "--outer-batch must be a whole number from 1 to 80"),
    (["distil", "--per-class", 41], "--per-class=41 but class"),
    (["distil", "--length", 2], "--length must be"),
    (["experts", "--expert-batch", 81], "--expert-batch must be a whole number from 1 to 80"),
    (["experts", "--snapshots-per-epoch", 9], "--snapshots-per-epoch must be"),
])
def test_an_error_names_the_flag_or_the_key_and_its_file(standin_hub, tmp_path, capsys, argv, message):
    step, flag, value = argv
    assert call(step, *TINY, flag, value, "--work", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    key = flag[2:].replace("-", "_")
    (tmp_path / "a.yaml").write_text(f"{key}: {value}\n")
    assert call(step, *TINY, "--config", tmp_path / "a.yaml", "--work", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'a.yaml'}: {message.replace(flag, key)}")


def test_an_error_of_an_experiment_names_its_file(standin_hub, tmp_path, capsys):
    settings = {"name": "a", "corpus": TINY[1], "student": TINY[3], "max_length": 12, "length": 8, "rows": ["random/tuned"]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings | {"per_class": 41}))
    assert call("run", tmp_path / "a.yaml", "--work", tmp_path, "--results", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'a.yaml'}: per_class=41 but class")


LAUGHS = "".join(f"{b}: &{b} [" + f"*{a}, " * 9 + f"*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
BOMB = "a: &a [" + "x, " * 9 + "x]\n" + LAUGHS


@pytest.mark.parametrize("text", [
    BOMB, "lr: " + "[" * 100_000, "lr: " + "{a: " * 5_000, "lr: 2024-13-45", "limit: " + "9" * 6000, "corpus: {a: 1}",
    "student: 5", "seeds: {a: 1}", "? [a]\n: b", "5: x", "lr: !!python/object/apply:os.getcwd []", "name: " + "n" * 300,
    "set: 4", "#" * 2_000_000, "kind: scaling\nname: a\nbase: {}\nproduct: {5: [1], a: [2]}",
], ids=lambda text: text[:12])
def test_no_file_of_settings_is_more_than_an_error(tmp_path, capsys, text):
    (tmp_path / "a.yaml").write_text(text)
    for step in ("distil", "run"):
        argv = ["--config", tmp_path / "a.yaml"] if step == "distil" else [tmp_path / "a.yaml"]
        assert call(step, *argv, "--work", tmp_path / "work") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and len(line) < 2100


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50_000, "{}", "[]", "\xff", '{"config": {}, "sha256": 1}'],
                         ids=lambda text: text[:9])
@pytest.mark.parametrize("what", ["result", "scores", "set"])
def test_no_json_of_others_is_more_than_an_error(work, tmp_path, capsys, content, what):
    folder = shutil.copytree(work, tmp_path / "runs") / "tiny"
    path, argv = {
        "result": (tmp_path / "a.json", ["table", "a", "--results", tmp_path]),
        "scores": (folder / SCORES, ["card", "--name", "tiny", "--work", tmp_path / "runs"]),
        "set": (folder / "set", ["card", "--name", "tiny", "--work", tmp_path / "runs"]),
    }[what]
    path.write_text(content + "\n", encoding="latin-1")
    assert call(*argv) == 2 and capsys.readouterr().err.startswith("error: ")


LONG = "n" * 300


@pytest.mark.parametrize("argv", [
    ["distil", "--name", LONG], ["distil", "--config", LONG], ["distil", "--work", LONG], ["distil", "--corpus", LONG],
    ["distil", "--student", LONG], ["evaluate", "--set", LONG], ["verify", LONG], ["run", LONG], ["table", LONG],
    ["card", "--out", LONG],
    ["card", "--out", "runs/tiny/settings.yaml/below"], ["distil", "--work", "runs/tiny/settings.yaml"],
    ["distil", "--corpus", "a\0b"],
])
def test_names_and_places_that_cannot_be_are_exit_code_2(work, tmp_path, standin_hub, monkeypatch, capsys, argv):
    shutil.copytree(work, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    given = [] if "--name" in argv or argv[0] not in STEPS else ["--name", "tiny"]
    assert call(*argv, *given, *([] if "--corpus" in argv or argv[0] != "distil" else TINY[:2])) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("argv", [["distil", "--outer-steps", "1", "--fresh"], ["evaluate", "--seeds", "0"],
                                  ["card", "--out", "out"]])
def test_a_disk_that_takes_no_more_is_exit_code_2_and_costs_nothing(copy, monkeypatch, capsys, argv, number):
    before = contents(copy)

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.chdir(copy)
    assert call(*argv, "--name", "tiny", "--work", copy) == 2
    assert os.strerror(number) in capsys.readouterr().err
    after = contents(copy)
    assert after.pop(f"tiny/{SCORES}").startswith(before.pop(f"tiny/{SCORES}")) and after == before


@pytest.mark.parametrize("argv", [["distil", "--colour", "red"], ["distil", "--lr", "much"], ["verify"],
                                  ["evaluate", "--lr", "1"], ["evaluate", "--seed", "1"]])
def test_flags_that_are_none(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(*argv)
    assert stopped.value.code == 2 and "usage: python -m distillkit" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*STEPS, "verify", "doctor"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(command, "--help")
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for line in re.findall(r"python -m distillkit (.*?)(?:   .*)?$", out.split("example:")[1], re.MULTILINE):
        command_line.parser().parse_args(line.split()), "an example that parses"
    assert f"python -m distillkit {command}" in out.split("example:")[1]
    for flag in STEPS[command].flags if command in STEPS else ():
        assert re.search(rf"--{flag.replace('_', '-')} .*\n?.*\w", out)


def test_the_parser_imports_nothing_heavy():
    code = ("import sys, distillkit.cli.main as m; m.parser(); "
            "print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_interruption_is_exit_code_130(monkeypatch, capsys, tmp_path):
    def interrupted(settings, student=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_world", interrupted)
    assert call("distil", "--work", tmp_path) == 130
    assert "give the same command again" in capsys.readouterr().err


# --- looks -----------------------------------------------------------------------------------------------------------


def test_verify_names_every_file_and_every_harm(work, tmp_path, capsys):
    runs = shutil.copytree(work, tmp_path / "runs")
    save_published(dk.DistilledSet.load(work / "tiny" / "text"), runs / "published")
    (runs / "notes.txt").write_text("mine")
    (runs / "link").symlink_to(tmp_path)
    assert call("verify", runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[12:].removeprefix(f"{runs}/") for line in lines if line.startswith("ok ")} == {
        "published: files of SHA256SUMS", "published/set.safetensors: distilled-set", "tiny/checkpoint: distiller-checkpoint",
        "tiny/checkpoint.log.jsonl: 3 lines", f"tiny/scores.jsonl: {len(scores(work))} lines", "tiny/set: distilled-set",
        f"tiny/settings.yaml: text, {len(dataclasses.fields(Work)) + 3} lines", "tiny/text: distilled-set"}
    others = [line for line in lines if line.startswith("not checked")]
    assert [line.split(": ")[0].rpartition("/")[2] for line in others] == ["link", "notes.txt", "README.md"]
    assert lines[-1] == "8 ok, 3 not checked" or lines[-1] == "3 not checked, 8 ok"

    (runs / "tiny" / f".set.{'0a' * 8}.new").touch()
    harmed = [runs / "tiny" / name for name in ("set", "text", "scores.jsonl", "settings.yaml", "checkpoint.log.jsonl")]
    for path in [*harmed, runs / "published" / "data" / "train.parquet"]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert call("verify", runs) == 1
    lines = capsys.readouterr().out.splitlines()
    damaged = [line for line in lines if line.startswith("DAMAGED")]
    # A checkpoint is worth its log.
    assert [Path(line[12:].split(": ")[0]).name for line in damaged] == [
        "published", "checkpoint", "checkpoint.log.jsonl", "scores.jsonl", "set", "settings.yaml", "text"]
    assert "train.parquet does not have the SHA-256" in damaged[0] and "1 left over" in lines[-1]


def test_verify_checks_a_single_file_results_and_indexes(work, world, tmp_path, capsys):
    assert call("verify", work / "tiny" / "set") == 0
    experts = record_experts(*world, tmp_path / "experts", batch_size=80)
    results.write(tmp_path / "small.json", {"config": {}, "rows": {}})
    assert call("verify", tmp_path) == 0 and "4 ok" in capsys.readouterr().out
    (experts.folder / "expert-000" / "0001.safetensors").unlink()
    (tmp_path / "small.json").write_text((tmp_path / "small.json").read_text().replace("rows", "cows"))
    assert call("verify", tmp_path) == 1
    out = capsys.readouterr().out
    assert "names expert-000/0001.safetensors, which is missing" in out and "2 DAMAGED" in out


@pytest.mark.parametrize("head", ["{", "[]", '{"kind": 3}', "[" * 100_000])
def test_verify_stands_any_header(tmp_path, head):
    (tmp_path / "set").write_bytes(safetensors.torch.save({}, {"distillkit": head}))
    assert call("verify", tmp_path) == 1


def test_nothing_of_strangers_reaches_the_terminal_raw(work, tmp_path, capsys):
    """Escape sequences in names of folders, kinds, manifests and corpora show themselves and do nothing."""
    evil = "a\x1b[2Jb\u202ec\x07\x9bd"
    (tmp_path / evil).mkdir()
    folder = shutil.copy(work / "tiny" / "set", tmp_path / evil / "set").parent
    write_file(tmp_path / evil / "other", kind=evil)
    (tmp_path / evil / f".set.{'0a' * 8}.new").touch()
    (tmp_path / "a.yaml").write_text(f'"{evil[:-2]}": 1', encoding="utf-8")
    codes = [call("verify", tmp_path), call("verify", folder / evil), call("distil", "--config", tmp_path / evil),
             call("evaluate", "--set", tmp_path / evil / "other"), call("distil", "--config", tmp_path / "a.yaml"),
             call("table", evil, "--results", tmp_path), call("run", evil)]
    assert codes == [0, 2, 2, 2, 2, 2, 2]
    said = "".join(capsys.readouterr())
    assert not {*said} & {"\x1b", "\u202e", "\x07", "\x9b"} and "a(U+001B)[2Jb(U+202E)c(U+0007)(U+009B)d" in said


def test_doctor(standin_hub, capsys, monkeypatch, tmp_path):
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "train.jsonl").write_text("")
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    assert call("doctor", "--student", "bert-base-uncased") == 0
    out = capsys.readouterr().out
    assert f"  torch {torch.__version__}: ok (>=" in out or "not installed as a package" in out
    assert "hub: not asked (HF_HUB_OFFLINE is set)" in out
    assert "  ag_news: train.jsonl\n" in out and "  imdb: absent\n" in out
    assert "student bert-base-uncased as classifier: bert, " in out
    assert "attention eager: first derivatives ok, second ok" in out
    assert re.search(r"attention sdpa: first derivatives ok, second none \(.*\); use ForwardDifference", out)
    assert "LoRA: 2,048 parameters in adapters" in out  # rank 8 at four matrices of 32 × 32
    assert "student bert-base-uncased as language model: none (" in out


@pytest.mark.parametrize(("name", "lines"), [
    ("microsoft/mpnet-base", ["as classifier: mpnet, ", "second ok", "sdpa: none (", "as language model: none ("]),
    ("google/gemma-3-270m", ["as classifier: gemma3_text, ", "as language model: gemma3_text, ", "second ok"]),
])
def test_doctor_tells_what_a_model_can_be(standin_hub, capsys, name, lines):
    assert call("doctor", "--student", name) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in lines)


def test_doctor_explains_a_model_that_can_be_nothing(standin_hub, capsys, tmp_path):
    (saved,) = standin_hub.glob("hub/models--gpt2/snapshots/*")
    config = transformers.Gemma4TextConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        global_head_dim=16, intermediate_size=64, vocab_size_per_layer_input=400, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0)
    transformers.Gemma4ForCausalLM(config).save_pretrained(tmp_path)
    for file in saved.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert call("doctor", "--student", tmp_path) == 2
    out, err = capsys.readouterr()
    assert "as classifier: none (" in out and "as language model: none (" in out and "cannot be a student" in err


def test_doctor_asks_a_hub_that_is_not_there(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert next(_hub()).startswith("hub: NOT reachable (http://127.0.0.1:9: ")


def test_every_setting_is_a_flag_of_some_step():
    assert {f.name for f in dataclasses.fields(Work)} == {name for step in STEPS.values() for name in step.flags}
