"""Expert trajectories: what is recorded, that it can be walked again, and what is refused."""

import shutil

import pytest
import torch

import distillkit as dk
from distillkit.core import experts as module
from distillkit.core.experts import Experts, record_experts
from distillkit.core.inner import inner_step
from distillkit.io.seeds import derive_seed

SETTINGS = {"epochs": 2, "batch_size": 16, "snapshots_per_epoch": 2, "optimizer": dk.AdamW(0.01), "seed": 3}


@pytest.fixture(scope="module")
def recorded(world, tmp_path_factory):
    return record_experts(*world, tmp_path_factory.mktemp("experts") / "two", count=2, **SETTINGS)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_what_is_recorded(world, recorded):
    task, student = world
    assert (len(recorded), recorded.epochs, recorded.snapshots) == (2, 2, 5)
    assert [recorded.step(i) for i in range(5)] == [0, 2, 5, 7, 10], "80 rows are 5 steps of 16"
    for expert in range(2):
        params, state = recorded.snapshot(expert, 0)
        assert same(params, student.init(derive_seed("expert-init", 3, expert))) and state["count"] == 0
        rows = torch.cat(list(recorded.batches(expert, 0, 2)))
        assert sorted(rows.tolist()) == list(range(len(task.train))), "an epoch is every row once"
    orders = [torch.cat(list(recorded.batches(e, a, b))).tolist() for e in range(2) for a, b in ((0, 2), (2, 4))]
    assert len({tuple(order) for order in orders}) == 4
    assert recorded.nbytes > 2 * 5 * 3 * sum(p.numel() * 4 for p in student.init(0).values())


def test_snapshots_are_on_the_path(world, recorded):
    task, student = world
    params, state = recorded.snapshot(1, 1)
    for rows in recorded.batches(1, 1, 3):
        batch = task.batch(student.tokenizer, "train", rows.tolist())
        part = (1.0, batch, batch["labels"], None)
        params, state, *_ = inner_step(student, SETTINGS["optimizer"], params, state, [part], 0.01)
    there, state_there = recorded.snapshot(1, 3)
    assert same(params, there) and state["count"] == state_there["count"] == 7
    assert same(state["m"], state_there["m"]) and same(state["v"], state_there["v"])
    assert recorded.snapshot(1, 3, state=False)[1] == {"count": 7}


def test_an_interrupted_recording_goes_on(world, recorded, tmp_path, monkeypatch):
    saves, save = [], module._save

    def counted(*args):
        saves.append(args)
        save(*args)

    def interrupted(*args):
        if len(saves) == 7:
            raise KeyboardInterrupt
        counted(*args)

    monkeypatch.setattr(module, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record_experts(*world, tmp_path / "e", count=2, **SETTINGS)
    with pytest.raises(dk.StorageError, match="expert 1 ends before snapshot 2 of 4; its recording was interrupted: call"):
        Experts.load(tmp_path / "e")
    monkeypatch.setattr(module, "_save", counted)
    found = record_experts(*world, tmp_path / "e", count=2, **SETTINGS)
    assert len(saves) == 7 + 3, "what was there is not made again"
    assert all(same(found.snapshot(1, i)[0], recorded.snapshot(1, i)[0]) for i in range(5))


def test_more_epochs_and_experts_of_the_same_recording(world, recorded, tmp_path):
    shorter = {**SETTINGS, "epochs": 1}
    record_experts(*world, tmp_path / "e", count=1, **shorter)
    found = record_experts(*world, tmp_path / "e", count=2, **SETTINGS)
    assert same(found.snapshot(0, 4)[0], recorded.snapshot(0, 4)[0]) and len(found) == 2
    assert record_experts(*world, tmp_path / "e", count=1, **shorter).snapshots == 5, "and fewer take nothing away"


def test_other_settings_are_refused(world, recorded):
    with pytest.raises(ValueError, match=r"holds a run with other settings: seed is 3 there and 4 here"):
        record_experts(*world, recorded.folder, count=2, **{**SETTINGS, "seed": 4})
    with pytest.raises(ValueError, match=r"optimizer.name is 'AdamW' there and 'SGD' here"):
        record_experts(*world, recorded.folder, count=2, **{**SETTINGS, "optimizer": dk.SGD(0.1)})
    with pytest.raises(ValueError, match="there is no snapshot 5 of expert 0: .* holds 2 experts of 5 snapshots"):
        recorded.snapshot(0, 5)


@pytest.mark.parametrize(("change", "message"), [
    ({"batch_size": 0}, "batch_size must be a whole number from 1 to 80, not 0"),
    ({"batch_size": 81}, "batch_size must be .* not 81"),
    ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
    ({"count": 1.5}, "count must be .* not 1.5"),
    ({"snapshots_per_epoch": 6}, "snapshots_per_epoch must be a whole number from 1 to 5, not 6"),
])
def test_bad_settings_are_named(world, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        record_experts(*world, tmp_path / "e", **(SETTINGS | change))
    assert not (tmp_path / "e").exists()


def test_another_folder_is_left_alone(world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(dk.StorageError, match="holds something else than experts"):
        record_experts(*world, tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damage_is_noticed(world, recorded, tmp_path):
    shutil.copytree(recorded.folder, tmp_path / "e")
    path = tmp_path / "e" / "expert-000" / "0002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = Experts.load(tmp_path / "e")
    found.snapshot(0, 1)
    with pytest.raises(dk.StorageError, match=f"{path} does not have its SHA-256"):
        found.snapshot(0, 2)


def test_snapshots_that_changed_places_or_are_missing_are_named(world, recorded, tmp_path):
    folder = shutil.copytree(recorded.folder, tmp_path / "e")
    one, other = (folder / f"expert-00{i}" / "0002.safetensors" for i in range(2))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(dk.StorageError, match=f"{one} is another one of its kind: its expert is 1, not 0"):
        Experts.load(folder).snapshot(0, 2)
    one.unlink()
    with pytest.raises(dk.StorageError, match=f"{one} is missing"):
        Experts.load(folder)
    again = record_experts(*world, tmp_path / "other", count=2, **{**SETTINGS, "seed": 4})
    shutil.copy(again.folder / "expert-000" / "0002.safetensors", one)
    with pytest.raises(dk.StorageError, match=f"{one} is another one of its kind: its settings is"):
        Experts.load(folder).snapshot(0, 2)


def test_a_recording_is_known_by_its_index(world, recorded, tmp_path):
    """Whatever matches experts says which; another folder of experts in their place is another run."""
    from distillkit.core.objectives import TrajectoryMatching

    goal = TrajectoryMatching(*world, dk.Unroll(2, optimizer=dk.SGD(0.1)), recorded, expert_epochs=1, metagrad=dk.Replay())
    assert goal.recipe()["experts"]["sha256"] == Experts.load(recorded.folder).sha256
    more = record_experts(*world, tmp_path / "more", count=3, **SETTINGS)
    assert more.sha256 != recorded.sha256


def test_a_full_disk_is_said_before_the_start(world, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"5 snapshots of \d+ tensors take 0.0 GB, and .* free; record fewer"):
        record_experts(*world, tmp_path / "e", **SETTINGS)
    assert not (tmp_path / "e").exists()


def test_an_expert_that_diverges_is_said(world, tmp_path):
    with pytest.raises(FloatingPointError, match=r"expert 0 is not finite after \d+ steps at step size 1e\+30; lower it"):
        record_experts(*world, tmp_path / "e", **(SETTINGS | {"optimizer": dk.SGD(1e30)}))


@pytest.mark.parametrize("optimizer", [dk.SGD(0.1), dk.Momentum(0.1)])
def test_other_optimisers_and_lora(task, standin_home, tmp_path, optimizer):
    import standin_hub

    with standin_hub.patched(standin_home):
        student = dk.load_student("bert-base-uncased", task, trainable="lora")
    found = record_experts(task, student, tmp_path / "e", batch_size=40, optimizer=optimizer)
    params, state = found.snapshot(0, 1)
    assert params.keys() == set(student.trained_names) and state.keys() == optimizer.init(params).keys()


def test_experts_of_another_student_or_task(world, recorded, standin_hub):
    task, student = world
    other = dk.load_student("roberta-base", task)
    with pytest.raises(ValueError, match=r"were made with another student \('bert-base-uncased'\) than student 'roberta-base'"):
        recorded.check(other, task)
    head = dk.load_student("bert-base-uncased", task, trainable="head")
    with pytest.raises(ValueError, match=r"another trainable \('full'\)"):
        recorded.check(head, task)
    fewer = dk.load_task("rotten_tomatoes", max_length=12, limit=20)
    with pytest.raises(ValueError, match="another task .* on task 'rotten_tomatoes'"):
        recorded.check(student, fewer)
