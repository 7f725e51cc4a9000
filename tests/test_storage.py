"""Storage: what is written comes back exactly, damage is refused, and nothing of the user's is overwritten."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from distillkit.io.storage import DATA, MANIFEST, TENSORS, StorageError, cache_dir, load_folder, save_folder

TENSOR_SET = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, -100]),
    "c": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def saved(tmp_path):
    return save_folder(tmp_path / "set", kind="test", tensors=TENSOR_SET, data={"name": "ünï", "list": [1, 2.5, None]})


def test_round_trip_is_exact(saved):
    stored = load_folder(saved, kind="test")
    assert stored.data == {"name": "ünï", "list": [1, 2.5, None]}
    assert stored.tensors.keys() == TENSOR_SET.keys()
    for name, tensor in TENSOR_SET.items():
        assert stored.tensors[name].dtype == tensor.dtype and torch.equal(stored.tensors[name], tensor)


def test_round_trip_of_nothing(tmp_path):
    stored = load_folder(save_folder(tmp_path / "empty", kind="test"), kind="test")
    assert stored.tensors == {} and stored.data == {}


def test_tensors_that_share_memory_or_are_views(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "again": base, "transposed": base.T, "row": base[1], "leaf": base.clone().requires_grad_()}
    stored = load_folder(save_folder(tmp_path / "views", kind="test", tensors=tensors), kind="test").tensors
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    alone = save_folder(tmp_path / "row", kind="test", tensors={"row": base[1]})
    assert torch.equal(load_folder(alone, kind="test").tensors["row"], base[1])


def test_same_content_same_bytes(tmp_path):
    one, two = (save_folder(tmp_path / name, kind="test", tensors=TENSOR_SET, data={"x": 1}) for name in "ab")
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in (DATA, TENSORS, MANIFEST))


@pytest.mark.parametrize("name", [DATA, TENSORS])
def test_every_flipped_bit_is_refused_by_name(saved, name):
    original = (saved / name).read_bytes()
    for position in range(0, len(original), 7):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        (saved / name).write_bytes(damaged)
        with pytest.raises(StorageError, match=f"{name} does not have the SHA-256"):
            load_folder(saved, kind="test")
    (saved / name).write_bytes(original)
    load_folder(saved, kind="test")


@pytest.mark.parametrize("name", [DATA, TENSORS, MANIFEST])
@pytest.mark.parametrize("harm", ["cut", "missing", "link", "folder"])
def test_harmed_files_are_refused_by_name(saved, tmp_path, name, harm):
    path, content = saved / name, (saved / name).read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif harm == "folder":
        path.mkdir()
    with pytest.raises(StorageError, match=name) as caught:
        load_folder(saved, kind="test")
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("change, message", [
    ({"format": "other"}, "not a distillkit manifest"),
    ({"version": 2}, "format version 2"),
    ({"kind": None}, "damaged"),
    ({"files": {}}, f"does not list {DATA}"),
    ({"files": {"../secret": {}, DATA: "x"}}, f"does not list {DATA}"),
])
def test_strange_manifests_are_refused(saved, change, message):
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(StorageError, match=message):
        load_folder(saved, kind="test")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_not_an_object_is_refused(saved, content):
    (saved / MANIFEST).write_bytes(content)
    with pytest.raises(StorageError, match=MANIFEST):
        load_folder(saved, kind="test")


def test_wrong_kind_and_absent_folder_are_refused(saved, tmp_path):
    with pytest.raises(StorageError, match="holds 'test', not 'experts'"):
        load_folder(saved, kind="experts")
    with pytest.raises(StorageError, match="nowhere is not a folder"):
        load_folder(tmp_path / "nowhere", kind="test")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file is not a folder"):
        load_folder(tmp_path / "file", kind="test")


def test_same_kind_and_empty_folders_are_replaced(saved, tmp_path):
    (saved / DATA).write_text("damaged")
    save_folder(saved, kind="test", data={"new": True})
    assert load_folder(saved, kind="test").data == {"new": True} and not load_folder(saved, kind="test").tensors
    (tmp_path / "made").mkdir()
    save_folder(tmp_path / "made", kind="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "set"], "nothing is left lying beside"


def test_what_is_not_ours_is_not_overwritten(saved, tmp_path):
    with pytest.raises(StorageError, match="will not overwrite .*holds 'test', not 'experts'"):
        save_folder(saved, kind="experts")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(StorageError, match="will not overwrite .*thesis"):
        save_folder(tmp_path / "thesis", kind="test")
    (saved / "notes.txt").write_text("precious")
    with pytest.raises(StorageError, match="also holds notes.txt"):
        save_folder(saved, kind="test")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StorageError, match="will not overwrite .*file"):
        save_folder(tmp_path / "file", kind="test")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), {1}])
def test_data_that_is_not_json_is_refused_and_leaves_nothing(saved, tmp_path, value):
    with pytest.raises(StorageError, match="not strict JSON"):
        save_folder(saved, kind="test", data={"x": value})
    assert load_folder(saved, kind="test").data["name"] == "ünï"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_crash_between_the_two_renames_loses_nothing(saved):
    saved.rename(saved.with_name(".set.0123456789abcdef.old"))
    assert load_folder(saved, kind="test").data["name"] == "ünï"
    save_folder(saved, kind="test", data={"new": True})
    assert load_folder(saved, kind="test").data == {"new": True}
    assert [path.name for path in saved.parent.iterdir()] == ["set"]


def test_a_killed_writer_leaves_a_whole_folder(tmp_path):
    """A process that saves without pause is killed; whatever version stands there must be whole."""
    script = textwrap.dedent("""
        import sys, torch
        from distillkit.io.storage import save_folder
        for number in range(10**6):
            save_folder(sys.argv[1], kind="test", tensors={"x": torch.full((50_000,), number)}, data={"number": number})
            print(number, flush=True)
    """)
    writer = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    seen = [int(writer.stdout.readline()) for _ in range(5)][-1]
    for _ in range(20):  # a reader meets whole versions only, or the moment in which one is replaced
        try:
            assert load_folder(tmp_path / "run", kind="test").data["number"] >= seen
        except (StorageError, FileNotFoundError):
            continue
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    stored = load_folder(tmp_path / "run", kind="test")
    assert stored.data["number"] >= seen and (stored.tensors["x"] == stored.data["number"]).all()


def test_two_writers_of_one_folder_leave_a_whole_one(tmp_path):
    """Either may be told that it lost a race; what stands there in the end is what one of them wrote."""
    script = textwrap.dedent("""
        import sys
        from distillkit.io.storage import StorageError, save_folder
        for number in range(30):
            try:
                save_folder(sys.argv[1], kind="test", data={"writer": sys.argv[2], "number": number})
            except (StorageError, FileNotFoundError):
                continue
    """)
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "run", name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    save_folder(tmp_path / "run", kind="test", data=load_folder(tmp_path / "run", kind="test").data)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DISTILLKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "distillkit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "distillkit"
    monkeypatch.setenv("DISTILLKIT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
