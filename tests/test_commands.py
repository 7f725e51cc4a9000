"""The command line's steps on a tiny world: one piece of work from experts to card, and every refusal by name."""

import dataclasses
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
import yaml

import distillkit as dk
from distillkit import __main__, commands, evaluation
from distillkit.commands import SCORES, SETTINGS, STEPS, Work
from distillkit.publish import save_published
from distillkit.storage import append_line, read_lines

TINY = ["--corpus", "rotten_tomatoes", "--student", "bert-base-uncased", "--max-length", "12"]
STEPS_OF = ["--outer-steps", "2", "--outer-batch", "8", "--unroll-steps", "2", "--length", "8"]


@pytest.fixture(scope="module")
def work(standin_home, tmp_path_factory):
    """runs/ with a set that was distilled and scored from the command line, and what was printed."""
    import standin_hub

    folder = tmp_path_factory.mktemp("work")
    with standin_hub.patched(standin_home):
        assert __main__.main(["distil", "--name", "tiny", *TINY, *STEPS_OF, "--work", str(folder)]) == 0
        assert __main__.main(["evaluate", "--name", "tiny", "--seeds", "0", "1", "--work", str(folder)]) == 0
    return folder


@pytest.fixture
def quick(standin_hub, monkeypatch):
    monkeypatch.setattr(evaluation, "GRID", {"step_size": (1e-3,), "steps": (1, 2)})


def call(*argv):
    return __main__.main([str(a) for a in argv])


def scores(folder):
    return read_lines(folder / "tiny" / SCORES)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_distil_makes_what_the_library_makes(work, world):
    made = dk.DistilledSet.load(work / "tiny" / "set")
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    unroll = dk.Unroll(2, optimizer=dk.SGD(0.2), metagrad=dk.recommend(student)[0])
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


def test_transfer(work, quick, capsys):
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
    assert "other settings: rates" in capsys.readouterr().err
    assert call(*base, "--lr", "0.5", "--fresh") == 0


# --- settings --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_over_the_folder(tmp_path):
    def settled(*argv):
        return commands.settings_of(__main__.parser().parse_args(["distil", "--work", str(tmp_path), *map(str, argv)]))

    assert settled() == Work()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / SETTINGS).write_text("lr: 0.3\nouter_steps: 7\n")
    (tmp_path / "a.yaml").write_text("outer_steps: 8\nseeds: [4, 5]\n")
    assert (settled().lr, settled().outer_steps) == (0.3, 7)
    assert settled("--limit", 9).limit == 9
    found = settled("--config", tmp_path / "a.yaml", "--inits", 2)
    assert (found.lr, found.outer_steps, found.seeds, found.inits) == (0.08, 8, (4, 5), 2)
    assert settled("--config", tmp_path / "a.yaml", "--outer-steps", 9).outer_steps == 9


@pytest.mark.parametrize(("text", "message"), [
    ("colour: red", "unknown setting 'colour'; there are checkpoint_every, corpus"),
    ("outer_steps: 0", "outer_steps must be a whole number of at least 1, not 0"),
    ("lr: 1e-3", r"lr must be a number above 0, not '1e-3' \(YAML reads"),
    ("lr: .nan", "lr must be a number above 0, not nan"),
    ("fraction: -1", "fraction must be a number above 0, not -1"),
    ("name: ../up", "name must be letters"),
    ("objective: magic", "objective must be one of bptt, trajectory, not 'magic'"),
    ("optimizer: rmsprop", "optimizer must be one of sgd"),
    ("metagrad: guess", "metagrad must be one of replay"),
    ("split: train", "split must be one of test, validation"),
    ("trainable: half", "trainable must be one of full"),
    ("recipe: mine", "recipe must be one of own"),
    ("seeds: []", r"seeds must be a list of whole numbers, not \(\)"),
    ("limit: many", "limit must be a whole number of at least 1, not 'many'"),
    ("limit: {test: 0}", r"limit\['test'\] must be a whole number of at least 1, not 0"),
    ("limit: {tset: 9}", "limit names the split 'tset'; a task has train, validation, test"),
    ("- a", "must hold settings"),
    ("a: [", "is not YAML"),
])
def test_bad_settings_are_exit_code_2(tmp_path, capsys, text, message):
    (tmp_path / "a.yaml").write_text(text)
    assert call("distil", "--config", tmp_path / "a.yaml", "--work", tmp_path) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"], "nothing was begun"


@pytest.mark.parametrize(("argv", "message"), [
    (["distil", "--config", "nowhere.yaml"], "no file of settings nowhere.yaml"),
    (["evaluate"], "no set .*work/set; make one with: python -m distillkit distil"),
    (["verify", "nowhere"], "no folder nowhere"),
    (["verify", "."], r"nothing of distillkit's is stored below \."),
    (["card", "--set", "hub:nobody"], "repo_id must be 'owner/name'"),
    (["doctor", "--student", "offline:gpt"], "unknown offline student 'offline:gpt'"),
])
def test_bad_input_is_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert call(*argv) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


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
        __main__.parser().parse_args(line.split()), "an example that parses"
    assert f"python -m distillkit {command}" in out.split("example:")[1]
    for flag in STEPS.get(command, ("", (), ""))[1]:
        assert re.search(rf"--{flag.replace('_', '-')} .*\n?.*\w", out)


def test_the_parser_imports_nothing_heavy():
    code = ("import sys, distillkit.__main__ as m; m.parser(); "
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


def test_verify_finds_every_folder_and_every_harm(work, tmp_path, capsys):
    shutil.copytree(work, tmp_path / "runs")
    save_published(dk.DistilledSet.load(work / "tiny" / "text"), tmp_path / "runs" / "published")
    assert call("verify", tmp_path / "runs") == 0
    out = capsys.readouterr().out
    assert [line.split(": ")[1] for line in out.splitlines()[:-1]] == [
        "published set", "distilled-set", "distiller-checkpoint", "distilled-set", "distilled-set"]
    assert out.splitlines()[-1] == "5 ok"

    left = tmp_path / "runs" / "tiny" / f".set.{'0a' * 8}.new"
    left.mkdir()
    tensors, manifest = tmp_path / "runs/tiny/set/tensors.safetensors", tmp_path / "runs/tiny/text/manifest.json"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    manifest.unlink()
    (tmp_path / "runs/published/data/train.parquet").write_bytes(b"")
    assert call("verify", tmp_path / "runs") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 ok, 3 DAMAGED, 1 left over"
    damaged = [line for line in out if line.startswith("DAMAGED")]
    assert "does not have the SHA-256" in damaged[1] and "has no plain file manifest.json" in damaged[2]
    assert "train.parquet does not have the SHA-256" in damaged[0]


@pytest.mark.parametrize("harm", ["{", "[]", '{"kind": 3}', "[" * 100_000])
def test_verify_stands_any_manifest(work, tmp_path, harm):
    shutil.copytree(work / "tiny" / "set", tmp_path / "set")
    (tmp_path / "set" / "manifest.json").write_text(harm)
    assert call("verify", tmp_path) == 1


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
    assert "as classifier: none (" in out and "no points between them" in out and "cannot be a student" in err


def test_doctor_asks_a_hub_that_is_not_there(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert commands._hub().startswith("NOT reachable (http://127.0.0.1:9: ")


def test_every_setting_is_a_flag_of_some_step():
    assert {f.name for f in dataclasses.fields(Work)} == {name for _, names, _ in STEPS.values() for name in names}
