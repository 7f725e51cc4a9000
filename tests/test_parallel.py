"""Several processes: the gradient of one, the run of one, and an end that can be taken up when one of them is lost."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import distillkit as dk
from distillkit.applications.processes import Team, team

ROOT = Path(__file__).resolve().parent.parent

# A rank: the tiny world, a shared objective of three initialisations (or segments), four outer steps, and what came of them
# as JSON.  Before its third step rank `lost` does what `how` says, and a third step takes the other one a minute.
RANK = """
    import dataclasses, json, os, signal, sys, time
    from pathlib import Path
    import torch
    import distillkit as dk
    from distillkit.applications.processes import RankLost, team
    from test_parallel import objective_of, set_of, world_of

    torch.set_num_threads(1)
    kind, folder, lost, how, timeout = sys.argv[1:]
    began = Path(folder, "began")

    class Long(dk.BPTT):
        def recipe(self):
            return super().recipe() | {"objective": "BPTT"}

        def problems(self, distilled, seed):
            for _ in range(600 if began.exists() else 0):
                time.sleep(0.1)
            return super().problems(distilled, seed)

    with team(timeout=float(timeout)) as ranks:
        task, student = world_of(torch.float64)
        objective, start = objective_of(task, student, kind, folder), set_of(task, student)
        mine = ranks.rank == int(lost)
        if mine and how == "other set":
            start = dataclasses.replace(start, embeds=1.1 * start.embeds)
        if kind == "bptt":
            objective = Long(**{f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)})
        shared = ranks.shared(objective)
        distiller = dk.Distiller(start, shared, lr=0.05, checkpoint=folder + "/run", checkpoint_every=100,
                                 writes=ranks.leads)
        results = {}
        try:
            if how == "none":
                first = dk.meta_gradient(start, shared, seed=5)
                results = {n: getattr(first, n).tolist() for n in ("embeds", "targets", "step_sizes")} | {"loss": first.loss}
            for record in distiller.run(4):
                if record.step == 2 and mine and how != "none":
                    began.write_text(str(time.time()))
                    os.kill(os.getpid(), {"kill": signal.SIGKILL, "end": signal.SIGTERM}[how])
        except RankLost as error:
            print(f"lost after {time.time() - float(began.read_text()):.1f} s: {error}", file=sys.stderr)
            sys.exit(3)
        scores = ranks.evaluate(start, task, student, seeds=(0, 1, 2), recipe=dk.Unroll(2))
        results |= {"losses": [r.loss for r in distiller.records], "set": distiller.distilled.embeds.tolist()}
        print(json.dumps(results | {"scores": [scores.scores, scores.mean, scores.std, scores.groups]}))
"""


def world_of(dtype=torch.float64):
    task = dk.load_task("rotten_tomatoes", max_length=12)
    return task, dk.load_student("bert-base-uncased", task, dtype=str(dtype).removeprefix("torch."))


def objective_of(task, student, kind, folder):
    unroll = dk.Unroll(2)
    if kind == "bptt":
        return dk.BPTT(task, student, unroll, metagrad=dk.Replay(), batch_size=8, inits=3)
    return dk.TrajectoryMatching(task, student, unroll, dk.Experts.load(f"{folder}/experts"), metagrad=dk.Replay(),
                                 expert_epochs=0.5, segments=3)


def set_of(task, student):
    return dk.DistilledSet.from_real(task, student, per_class=1, length=8)


@pytest.fixture
def launch(standin_home, tmp_path):
    """Start two ranks of RANK on a free port and wait for their end; gives their exit codes, outputs and errors."""
    import standin_hub

    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))

    def start(*argv):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = standin_hub.environment(standin_home) | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        ranks = [subprocess.Popen([sys.executable, str(tmp_path / "rank.py"), *map(str, argv)], stdout=subprocess.PIPE,
                                  text=True, stderr=subprocess.PIPE, cwd=tmp_path,
                                  env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(2)]
        outputs = [rank.communicate(timeout=300) for rank in ranks]
        return [rank.returncode for rank in ranks], *zip(*outputs, strict=True)

    return start


@pytest.mark.parametrize("kind", ["bptt", "trajectory"])
def test_two_processes_make_the_run_of_one(launch, standin_hub, tmp_path, kind):
    """Three members on two ranks, so that one has twice as many as the other."""
    task, student = world_of()
    if kind == "trajectory":
        dk.record_experts(task, student, tmp_path / "experts", count=2, snapshots_per_epoch=2, batch_size=40)
    codes, outputs, errors = launch(kind, tmp_path, 0, "none", 30)
    assert codes == [0, 0], errors
    results, others = map(json.loads, outputs)
    assert results == others, "every rank ends with the same set and the same scores"
    start, objective = set_of(task, student), objective_of(task, student, kind, tmp_path)
    expected = dk.meta_gradient(start, objective, seed=5)
    assert results["loss"] == pytest.approx(expected.loss, rel=1e-12)
    for name in ("embeds", "targets", "step_sizes"):
        gradient = getattr(expected, name)
        assert gradient.abs().max() > 0
        torch.testing.assert_close(torch.tensor(results[name], dtype=gradient.dtype), gradient, rtol=1e-9, atol=1e-12)
    distiller = dk.Distiller(start, objective, lr=0.05)
    assert results["losses"] == pytest.approx([record.loss for record in distiller.run(4)], rel=1e-9)
    one = dk.evaluate(start, task, student, seeds=(0, 1, 2), recipe=dk.Unroll(2))
    assert results["scores"] == [list(one.scores), pytest.approx(one.mean), pytest.approx(one.std), pytest.approx(one.groups)]


@pytest.mark.parametrize(("lost", "how", "code"), [(0, "kill", -signal.SIGKILL), (1, "kill", -signal.SIGKILL),
                                                   (1, "end", 128 + signal.SIGTERM)])
def test_a_lost_rank_is_noticed_and_the_last_complete_step_is_saved(launch, standin_hub, tmp_path, lost, how, code):
    """In the middle of a step of a minute; whoever is left has saved two steps, and one process makes the other two."""
    codes, _, errors = launch("bptt", tmp_path, lost, how, 6)
    assert codes[lost] == code and codes[1 - lost] == 3, errors
    assert "has lost another one" in errors[1 - lost] and "go on from the checkpoint" in errors[1 - lost]
    assert float(errors[1 - lost].split("lost after ")[1].split()[0]) < 20
    task, student = world_of()
    objective = objective_of(task, student, "bptt", tmp_path)
    resumed = dk.Distiller(set_of(task, student), objective, lr=0.05, checkpoint=tmp_path / "run", checkpoint_every=100)
    assert resumed.step == 2, "the last complete step"
    whole = dk.Distiller(set_of(task, student), objective, lr=0.05)
    assert [r.loss for r in resumed.run(4)] == pytest.approx([r.loss for r in whole.run(4)][2:], rel=1e-9)


def test_a_lost_rank_is_noticed_within_a_minute():
    assert inspect.signature(team).parameters["timeout"].default < 60


def test_ranks_with_different_sets_are_named(launch, tmp_path):
    codes, _, errors = launch("bptt", tmp_path, 1, "other set", 30)
    assert codes == [1, 1]
    assert all("process 1 differs from process 0 in its embeddings" in error for error in errors), errors


def test_torchrun_spreads_experts_steps_and_seeds(standin_home, tmp_path):
    """The commands as a user starts them, on two processes, make what one process makes."""
    import standin_hub

    shared = standin_hub.environment(standin_home) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tiny = ["--corpus", "rotten_tomatoes", "--student", "bert-base-uncased", "--max-length", "12", "--limit", "16"]
    steps = {
        "experts": ["--expert-count", "2", "--expert-batch", "8", "--snapshots-per-epoch", "2"],
        "distil": ["--objective", "trajectory", "--outer-steps", "2", "--unroll-steps", "2", "--length", "8", "--inits", "2",
                   "--metagrad", "replay"],
        "evaluate": ["--seeds", "0", "1"],
    }
    made = {}
    for many in (True, False):
        work = tmp_path / ("many" if many else "one")
        for step, own in steps.items():
            argv = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if many else [])]
            argv += ["-m", "distillkit", step, "--name", "tiny", "--work", str(work), *own]
            argv += [] if step == "evaluate" else tiny
            done = subprocess.run(argv, env=shared, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        folder = work / "tiny"
        (row,) = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        made[many] = dk.Experts.load(folder / "experts"), dk.DistilledSet.load(folder / "set"), row["scores"]
    for expert in range(2):
        ours, theirs = (made[many][0].snapshot(expert, 2)[0] for many in (True, False))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.testing.assert_close(made[True][1].embeds, made[False][1].embeds, rtol=1e-4, atol=1e-6)
    assert made[True][2] == made[False][2]


def test_a_team_of_one(world, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    objective = objective_of(*world, "bptt", None)
    with team() as ranks:
        assert ranks.leads and ranks.size == 1 and ranks.shared(objective) is objective


def test_too_few_seeds(world):
    with pytest.raises(ValueError, match="1 seeds are too few for 2 processes"):
        Team(0, 2).evaluate(set_of(*world), *world, seeds=(0,))
