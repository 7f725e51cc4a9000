"""Several processes: the gradient of one, the run of one, and an end that can be taken up when one of them is lost."""

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

# A rank: the tiny world, a shared objective of three initialisations (or segments), and what rank 0 found as JSON.
RANK = """
    import json, os, signal, sys
    import torch
    import distillkit as dk
    from distillkit.applications.processes import RankLost, team
    from test_parallel import objective_of, set_of, world_of

    torch.set_num_threads(1)
    kind, folder, lost = sys.argv[1:]
    with team(timeout=60) as ranks:
        task, student = world_of(torch.float64)
        objective, start = ranks.shared(objective_of(task, student, kind, folder)), set_of(task, student)
        try:
            if not ranks.leads:
                if lost == "lost":
                    told = ranks.told
                    calls = iter(range(100))
                    def dying(tensor):
                        if next(calls) == 8:   # in the third step: four messages a step
                            os.kill(os.getpid(), signal.SIGKILL)
                        return told(tensor)
                    object.__setattr__(ranks, "told", dying)
                    objective.team = ranks
                objective.serve(start)
            else:
                with objective:
                    first = dk.meta_gradient(start, objective, seed=5) if lost == "none" else None
                    distiller = dk.Distiller(start, objective, lr=0.05, checkpoint=folder + "/run", checkpoint_every=100)
                    records = list(distiller.run(4))
                tensors = {} if first is None else {n: getattr(first, n).tolist() for n in ("embeds", "targets", "step_sizes")}
                print(json.dumps({"loss": first and first.loss, "losses": [r.loss for r in records], **tensors}))
        except RankLost as error:
            print(f"lost: {error}", file=sys.stderr)
            sys.exit(3)
        scores = ranks.evaluate(start, task, student, seeds=(0, 1, 2), recipe=dk.Unroll(2))
        if ranks.leads:
            print(json.dumps([scores.scores, scores.mean, scores.std, scores.groups]))
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
    """Start two ranks of RANK on a free port and wait for their end; gives their exit codes and what rank 0 said."""
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
        ranks = [subprocess.Popen([sys.executable, str(tmp_path / "rank.py"), *argv], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.PIPE, cwd=tmp_path,
                                  env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(2)]
        said = [rank.communicate(timeout=300) for rank in ranks]
        return [rank.returncode for rank in ranks], said

    return start


@pytest.fixture
def here(standin_hub):
    return world_of()


@pytest.mark.parametrize("kind", ["bptt", "trajectory"])
def test_two_processes_make_the_run_of_one(launch, here, tmp_path, kind):
    """Three members on two ranks, so that one has twice as many as the other."""
    task, student = here
    if kind == "trajectory":
        dk.record_experts(task, student, tmp_path / "experts", count=2, snapshots_per_epoch=2, batch_size=40)
    codes, ((out, err), (_, other)) = launch(kind, str(tmp_path), "none")
    assert codes == [0, 0], err + other
    found, scores = (json.loads(line) for line in out.splitlines())
    start, objective = set_of(task, student), objective_of(task, student, kind, tmp_path)
    expected = dk.meta_gradient(start, objective, seed=5)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-12)
    for name in ("embeds", "targets", "step_sizes"):
        ours = getattr(expected, name)
        assert ours.abs().max() > 0
        torch.testing.assert_close(torch.tensor(found[name], dtype=ours.dtype), ours, rtol=1e-9, atol=1e-12)
    distiller = dk.Distiller(start, objective, lr=0.05)
    assert found["losses"] == pytest.approx([record.loss for record in distiller.run(4)], rel=1e-9)
    one = dk.evaluate(start, task, student, seeds=(0, 1, 2), recipe=dk.Unroll(2))
    assert scores == [list(one.scores), pytest.approx(one.mean), pytest.approx(one.std), pytest.approx(one.groups)]


def test_a_lost_rank_ends_the_run_which_can_be_taken_up(launch, here, tmp_path):
    """Rank 1 is killed in the third step: rank 0 says so, two steps are saved, and one process makes the others."""
    task, student = here
    codes, ((_, err), _) = launch("bptt", str(tmp_path), "lost")
    assert codes == [3, -signal.SIGKILL], err
    assert "lost: process 0 of 2 has lost touch with the others" in err and "go on from the checkpoint" in err
    objective = objective_of(task, student, "bptt", tmp_path)
    resumed = dk.Distiller(set_of(task, student), objective, lr=0.05, checkpoint=tmp_path / "run", checkpoint_every=100)
    assert resumed.step == 2, "the last complete step"
    whole = dk.Distiller(set_of(task, student), objective, lr=0.05)
    assert [r.loss for r in resumed.run(4)] == pytest.approx([r.loss for r in whole.run(4)][2:], rel=1e-9)


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
    start = set_of(*world)
    with team() as ranks, ranks.shared(objective) as shared:
        assert ranks == Team(0, 1) and ranks.leads and shared.recipe() == objective.recipe()
        one, other = dk.meta_gradient(start, shared, seed=3), dk.meta_gradient(start, objective, seed=3)
    torch.testing.assert_close(one.embeds, other.embeds)
    assert one.loss == pytest.approx(other.loss)


def test_too_few_seeds(world):
    with pytest.raises(ValueError, match="1 seeds are too few for 2 processes"):
        Team(0, 2).evaluate(set_of(*world), *world, seeds=(0,))
