"""The benchmark's peers give the same meta-gradient as the oracle, and its command runs; nothing here is timed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

import distillkit as dk
from benchmarks import metagrad as benchmark
from distillkit.experiments.results import write

SETTINGS = {"examples": 6, "length": 12, "outer_batch": 12, "step_size": 0.3}
PEERS = [c for c in benchmark.CONTENDERS if c.peer]
INSTALLED = [pytest.param(c, id=c.name, marks=pytest.mark.skipif(not c.installed, reason="not installed")) for c in PEERS]


@pytest.fixture(scope="module")
def world(standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        task = dk.load_task("rotten_tomatoes", max_length=12)
        students = {
            (trainable, dtype): dk.load_student("bert-base-uncased", task, trainable=trainable, dtype=dtype, device="cpu")
            for trainable in ("full", "lora", "head")
            for dtype in ("float64", "float32")
        }
    return task, students


@pytest.fixture
def run_main(standin_hub, tmp_path):
    def run(*options):
        path = tmp_path / "out.json"
        common = ["--corpus", "rotten_tomatoes", "--length", "12", "--examples", "4", "--outer-batch", "4", "--device", "cpu"]
        benchmark.main([*common, "--out", str(path), *options])
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        return json.loads(text)

    return run


@pytest.mark.parametrize("trainable", ["full", "lora", "head"])
@pytest.mark.parametrize("contender", INSTALLED)
@pytest.mark.parametrize("outer", ["real", "linear"])
def test_peers_equal_store_all(world, contender, trainable, outer):
    task, students = world
    problem = benchmark.real_problem(task, students[trainable, "float64"], 3, SETTINGS)
    if outer == "linear":
        problem = benchmark.with_linear_outer(problem)
    noise = torch.randn(problem.targets.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.linspace(0.2, 0.4, 3, dtype=torch.float64)
    problem = dataclasses.replace(problem, step_sizes=sizes, targets=problem.targets + noise)
    oracle, ours = dk.StoreAll()(problem), contender.run(problem)
    assert ours.loss == pytest.approx(oracle.loss, rel=1e-12)
    for field in ("embeds", "targets", "step_sizes"):
        expected = getattr(oracle, field)
        assert expected.abs().max() > 0
        assert benchmark.difference(getattr(ours, field), expected) <= 1e-9


@pytest.mark.parametrize("contender", INSTALLED)
def test_peers_equal_store_all_on_a_decoder(standin_hub, contender):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student("facebook/opt-1.3b", task, dtype="float64", device="cpu")
    problem = benchmark.real_problem(task, student, 2, SETTINGS)
    # OPT takes its softmax in float32.
    assert benchmark.difference(contender.run(problem).embeds, dk.StoreAll()(problem).embeds) <= 1e-5


def test_random_weights_serve(world, monkeypatch):
    task, _ = world
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 2, "ffn_dim": 64, "num_hidden_layers": 1}
    monkeypatch.setitem(benchmark.RANDOM, "random:opt-small", (transformers.OPTConfig, sizes))
    run = benchmark.Run({}, Path(), task, [], "cpu")
    students = run.loaded("random:opt-small", "lora")
    problem = benchmark.real_problem(task, students["eager"], 1, SETTINGS)
    assert benchmark.difference(benchmark.mixflow(problem).embeds, dk.StoreAll()(problem).embeds) < 1e-4
    assert not any(p.requires_grad for p in students["sdpa"].module.parameters())


def test_mixflow_takes_any_optimiser_and_hard_labels(world):
    task, students = world
    problem = benchmark.real_problem(task, students["full", "float64"], 3, SETTINGS)
    problem = dataclasses.replace(problem, optimizer=dk.Momentum(0.3), targets=problem.targets.argmax(-1))
    oracle, ours = dk.StoreAll()(problem), benchmark.mixflow(problem)
    assert ours.targets is None
    assert benchmark.difference(ours.embeds, oracle.embeds) <= 1e-9


def test_the_problem_takes_examples_evenly_and_trains(world):
    task, students = world
    problem = benchmark.real_problem(task, students["full", "float32"], 2, SETTINGS | {"examples": 5})
    assert problem.embeds.shape == (5, 12, 32)
    assert sorted(problem.targets.argmax(-1).tolist()) == [0, 0, 0, 1, 1]
    assert [len(r) for r in problem.rows] == [5, 5]


def test_replay_holds_the_activations_of_one_step_and_store_all_those_of_all(world):
    task, students = world
    found = {}
    for contender in benchmark.CONTENDERS[:5]:
        for steps in (2, 8):
            problem = benchmark.real_problem(task, students["full", "float32"], steps, SETTINGS | {"examples": 8})
            found[contender.name, steps] = benchmark.live_bytes(contender, benchmark.with_linear_outer(problem))
    activations = {key: row["activations"] for key, row in found.items()}
    for name in ("Replay", "Replay, every 4th set", "ForwardDifference", "ForwardDifference, central"):
        assert activations[name, 8] <= 1.1 * activations[name, 2]
    assert activations["StoreAll", 8] > 3 * activations["StoreAll", 2]
    # Replay keeps one set more for each step, or for every fourth and a segment of four; the difference keeps gradients too.
    assert 5.5 <= found["Replay", 8]["sets"] - found["Replay", 2]["sets"] <= 6.5
    assert found["Replay, every 4th set", 8]["sets"] < found["Replay", 8]["sets"]
    assert found["ForwardDifference", 8]["sets"] > found["Replay", 8]["sets"] + 5


def test_the_command_writes_its_table(run_main, capsys):
    students = ["bert-base-uncased", "no/such-student"]
    found = run_main("--students", *students, "--steps", "1", "2", "--repeats", "1", "--trainable", "full", "head")
    assert [(e["student"], e["trainable"]) for e in found["entries"]] == [(s, t) for s in students for t in ("full", "head")]
    names = {c.name for c in benchmark.CONTENDERS}
    for entry in found["entries"][:2]:
        assert entry["set_bytes"] == 4 * entry["parameters"]
        assert entry["outer_batch_cost"] > 0
        assert {(r["contender"], r["steps"]) for r in entry["rows"]} == {(n, t) for n in names for t in (1, 2)}
        for row in entry["rows"]:
            if row.get("failed") == "not installed":
                continue
            assert "failed" not in row
            assert {"cost", "costs", "seconds", "plain_seconds", "bytes", "activations", "sets"} <= row.keys()
            assert row["flops"] > 0
            assert len(row["costs"]) == 1
            if row["peer"]:
                assert row["total_error"] < 1e-3
            else:
                assert len(row["cosine"]) == len(row["error"]) == row["steps"]
                assert min(row["cosine"]) > 0.99
    assert all("not loaded" in entry["failed"] for entry in found["entries"][2:])
    table = capsys.readouterr().out
    assert table.count("| ForwardDifference, fused |") == 2
    assert "not loaded: unknown student" in table


def test_an_interrupted_measurement_goes_on(run_main, tmp_path):
    options = ("--trainable", "head", "--steps", "1", "2", "--repeats", "1")
    whole = run_main(*options)
    (entry,) = whole["entries"]
    kept = [row | {"cost": 42.0} for row in entry["rows"] if row["steps"] == 1]
    cut = whole | {"entries": [entry | {"rows": kept}]}
    write(tmp_path / "out.json", cut)
    (resumed,) = run_main(*options, "--resume")["entries"]
    assert [row for row in resumed["rows"] if row["steps"] == 1] == kept
    assert [(r["steps"], r["contender"]) for r in resumed["rows"]] == [(r["steps"], r["contender"]) for r in entry["rows"]]
    with pytest.raises(ValueError, match="other settings"):
        run_main("--trainable", "head", "--steps", "1", "--repeats", "1", "--resume")


def test_the_accuracy_mode_and_reprinting(run_main, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "ACCURACY", {"step_size": (0.1,), "steps": (2,), "change": (0.1, 0.01)})
    found = run_main("--accuracy", "--students", "bert-base-uncased")
    (entry,) = found["entries"]
    assert [(r["way"], r["change"]) for r in entry["rows"]] == [
        *((way, d) for way in benchmark.WAYS for d in (0.1, 0.01)), (benchmark.NUDGED, None)
    ]
    assert all(len(r[key]) == 2 for r in entry["rows"] for key in ("cosine", "error", "share"))
    assert 0 < max(entry["rows"][-1]["error"]) < 1e-3, "rounding is felt, and little"
    written = capsys.readouterr().out
    assert "| central | 0.01 |" in written and "are left out: none." in written
    monkeypatch.setattr(benchmark, "README", tmp_path / "README.md")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    benchmark.README.write_text("<!-- benchmark: out -->\nold\n<!-- end -->\n<!-- table: out -->\nkept\n<!-- end -->\n")
    benchmark.main(["--readme"])
    expected = f"<!-- benchmark: out -->\n{written}<!-- end -->\n<!-- table: out -->\nkept\n<!-- end -->\n"
    assert benchmark.README.read_text() == expected


def test_steps_whose_contribution_is_lost_in_the_sum_are_left_out_and_counted():
    row = {"step_size": 0.5, "steps": 3, "change": 0.003, "cosine": [1.0, -0.7, 0.98], "error": [0.1, 900.0, 0.2]}
    rows = [row | {"way": way, "share": [1.0, 1e-7, 2e-6]} for way in ("forward", "central", benchmark.NUDGED)]
    table = benchmark.accuracy_table({"rows": rows}, {})
    assert table.count("| 0.9800 / 2.0e-01 |") == 3 and "left out: 1 of 3 steps at η = 0.5, T = 3." in table
    kept = benchmark._felt(row | {"share": [1.0, None, 1e-9]})
    assert kept["cosine"] == [1.0, -0.7], "what is not finite is not left out"


def test_a_contender_that_cannot_run_is_reported(world, monkeypatch):
    task, students = world

    def broken(problem):
        raise RuntimeError("no derivative\nof this kind")

    monkeypatch.setattr(benchmark, "CONTENDERS", (benchmark.Contender("broken", broken, peer=True),))
    settings = SETTINGS | {"repeats": 1}
    bench = benchmark.Bench(task, {"eager": students["head", "float32"]}, settings)
    row = bench.row(benchmark.CONTENDERS[0], 1)
    assert row["failed"] == "RuntimeError: no derivative"
    entry = {"rows": [row], "outer_batch_cost": 1.0}
    assert "| broken | failed |" in benchmark.cost_table(entry, {"machine": {"cuda": False}, "settings": settings})


def test_the_table_shows_medians_and_the_worst_inner_step():
    def row(contender, steps, cost, **more):
        return {"contender": contender, "steps": steps, "peer": False, "cost": cost, "seconds": cost,
                "activations": 2.5e6 * steps, "bytes": 7e6 * steps, "sets": 3.0, **more}

    rows = [
        row("StoreAll", 2, 3.0, cosine=[1.0, 0.5], error=[0.0, 0.25]),
        row("ForwardDifference", 2, 2.0, cosine=[None, 1.0], error=[None, 0.0]),
        row("MixFlow-MG", 2, 4.0, total_error=1e-6) | {"peer": True},
        {"contender": "TorchOpt", "steps": 2, "peer": True, "failed": "not installed"},
    ]
    entry = {"rows": rows, "outer_batch_cost": 1.5}
    lines = benchmark.cost_table(entry, {"machine": {"cuda": True}, "settings": {"outer_batch": 32}}).splitlines()
    assert lines[2] == "| StoreAll | 3.00 | 5.0 | 14 | 3.0 | 0.5000 | 2.5e-01 | 3 |"
    assert lines[3].startswith("| ForwardDifference | 2.00 |") and "not finite" in lines[3]
    assert "| 1.0e-06 |" in lines[4]
    assert lines[5].startswith("| TorchOpt | not installed | ")
    assert lines[-1].endswith("costs 1.50 inner steps. ForwardDifference takes this share of the fastest peer's time: "
                              "0.50 at T = 2.")
