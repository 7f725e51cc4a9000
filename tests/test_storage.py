"""Storage: what is written comes back exactly, damage is refused, and nothing of the user's is overwritten."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

from distillkit.io import files
from distillkit.io.files import read_file, read_header, write_file
from distillkit.io.storage import StorageError, cache_dir, save_text

TENSOR_SET = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, -100]),
    "c": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def saved(tmp_path):
    write_file(tmp_path / "set", kind="test", tensors=TENSOR_SET, data={"name": "ünï \"q\"", "list": [1, 2.5, None]},
               identity={"expert": 1})
    return tmp_path / "set"


def test_round_trip_is_exact(saved):
    stored = read_file(saved, kind="test", identity={"expert": 1})
    assert stored.data == {"name": "ünï \"q\"", "list": [1, 2.5, None]} and stored.identity == {"expert": 1}
    assert stored.tensors.keys() == TENSOR_SET.keys()
    for name, tensor in TENSOR_SET.items():
        assert stored.tensors[name].dtype == tensor.dtype and torch.equal(stored.tensors[name], tensor)
    assert read_header(saved).sha256 == stored.sha256 and read_header(saved).tensors == {}
    assert read_file(saved, prefix="a").tensors.keys() == {"a"}


def test_a_stranger_reads_it_with_safetensors_alone(saved):
    assert torch.equal(safetensors.torch.load_file(saved)["a"], TENSOR_SET["a"])
    with safetensors.safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()["distillkit"])["data"]["list"] == [1, 2.5, None]


def test_round_trip_of_nothing(tmp_path):
    write_file(tmp_path / "empty", kind="test")
    stored = read_file(tmp_path / "empty", kind="test")
    assert stored.tensors == {} and stored.data == {}


def test_tensors_that_share_memory_or_are_views(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "again": base, "transposed": base.T, "row": base[1], "leaf": base.clone().requires_grad_()}
    write_file(tmp_path / "views", kind="test", tensors=tensors)
    stored = read_file(tmp_path / "views", kind="test").tensors
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_same_content_same_bytes_and_the_users_mode(tmp_path):
    for name in "ab":
        before = os.umask(0o027)
        try:
            sha256 = write_file(tmp_path / name, kind="test", tensors=TENSOR_SET, data={"x": 1})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
        assert read_header(tmp_path / name).sha256 == sha256
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_flipped_bit_and_every_cut_is_refused_by_name(saved):
    original = saved.read_bytes()
    for position in range(0, len(original), 3):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        for content in (damaged, original[:position]):
            saved.write_bytes(content)
            with pytest.raises(StorageError, match=str(saved)):
                read_file(saved, kind="test")
    saved.write_bytes(original + b"\0")
    with pytest.raises(StorageError, match=f"{saved} does not have its SHA-256"):
        read_file(saved, kind="test")
    saved.write_bytes(original)
    read_file(saved, kind="test")


@pytest.mark.parametrize(("harm", "message"), [("missing", "is not there"), ("link", "is a link"), ("folder", "is not a file"),
                                               ("old", "is a folder that distillkit 0.1 wrote")])
def test_what_is_no_file_is_refused_by_name(saved, tmp_path, harm, message):
    saved.rename(tmp_path / "elsewhere")
    if harm == "link":
        saved.symlink_to(tmp_path / "elsewhere")
    elif harm != "missing":
        saved.mkdir()
    if harm == "old":
        (saved / "manifest.json").write_text("{}")
    with pytest.raises(StorageError, match=f"{saved} {message}"):
        read_file(saved, kind="test")


def raw(path, head, kind="distillkit"):
    """A file whose header says ``head``, whoever wrote it."""
    path.write_bytes(safetensors.torch.save({}, {kind: head if isinstance(head, str) else json.dumps(head)}))


@pytest.mark.parametrize(("change", "message"), [
    ({"format": "other"}, "no file of distillkit's"),
    ({"version": 3}, "format version 3"),
    ({"kind": None}, "no file of distillkit's"),
    ({"data": []}, "no file of distillkit's"),
    ({"identity": "x"}, "no file of distillkit's"),
    ({"sha256": "../secret"}, "no file of distillkit's"),
    ({"sha256": 7}, "no file of distillkit's"),
    ({}, "does not have its SHA-256"),
])
def test_strange_headers_are_refused(tmp_path, change, message):
    head = {"sha256": "0" * 64, "format": "distillkit", "version": 2, "kind": "test", "identity": {}, "data": {}}
    raw(tmp_path / "set", head | change)
    with pytest.raises(StorageError, match=message):
        read_file(tmp_path / "set", kind="test")


@pytest.mark.parametrize("head", ["", "{", "[]", "NaN", "[" * 100_000, '{"a": NaN}'])
def test_a_header_that_is_not_an_object_is_refused(tmp_path, head):
    raw(tmp_path / "set", head)
    with pytest.raises(StorageError, match=f"{tmp_path / 'set'} is no file of distillkit's"):
        read_file(tmp_path / "set", kind="test")


@pytest.mark.parametrize("content", [
    b"", b"x", b"cos\nsystem\n(S'true'\ntR.", b"\xff" * 20, (10**6).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "set").write_bytes(content)
    with pytest.raises(StorageError, match=str(tmp_path / "set")):
        read_file(tmp_path / "set", kind="test")


def test_the_size_of_a_header_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_HEADER", 1000)
    with pytest.raises(StorageError, match="more than 1000; put them into tensors"):
        write_file(tmp_path / "set", kind="test", data={"text": "x" * 1000})
    assert not any(tmp_path.iterdir())


def test_another_kind_or_identity_is_refused(saved):
    with pytest.raises(StorageError, match="holds 'test', not 'experts'"):
        read_file(saved, kind="experts")
    with pytest.raises(StorageError, match="another one of its kind: its expert is 1, not 2"):
        read_file(saved, kind="test", identity={"expert": 2})


def test_the_same_kind_is_replaced_and_nothing_else(saved, tmp_path):
    write_file(saved, kind="test", data={"new": True})
    assert read_file(saved, kind="test").data == {"new": True} and not read_file(saved, kind="test").tensors
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing is left lying beside"
    with pytest.raises(StorageError, match="will not overwrite .*set by 'experts': it holds 'test'"):
        write_file(saved, kind="experts")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("thesis", "file", "link"):
        with pytest.raises(StorageError, match=f"will not overwrite {tmp_path / name} by 'test'"):
            write_file(tmp_path / name, kind="test")
    for name in ("thesis", "link"):
        with pytest.raises(StorageError, match=f"will not overwrite {tmp_path / name}: it is a"):
            save_text(tmp_path / name, "text")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), {1}, "\ud800"])
def test_data_that_is_not_json_is_refused_and_leaves_nothing(saved, tmp_path, value):
    with pytest.raises(StorageError, match="not strict JSON"):
        write_file(saved, kind="test", data={"x": value})
    assert read_file(saved, kind="test").data["list"] == [1, 2.5, None]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """A process that saves without pause is killed; every version that a reader meets is whole."""
    script = textwrap.dedent("""
        import sys, torch
        from distillkit.io.files import write_file
        for number in range(10**6):
            write_file(sys.argv[1], kind="test", tensors={"x": torch.full((50_000,), number)}, data={"number": number})
            print(number, flush=True)
    """)
    writer = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    number = [int(writer.stdout.readline()) for _ in range(5)][-1]
    for _ in range(20):
        try:
            assert read_file(tmp_path / "run", kind="test").data["number"] >= number
        except StorageError as error:
            assert "does not have its SHA-256" not in str(error)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    stored = read_file(tmp_path / "run", kind="test")
    assert stored.data["number"] >= number and (stored.tensors["x"] == stored.data["number"]).all()


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    script = textwrap.dedent("""
        import sys
        from distillkit.io.files import write_file
        for number in range(30):
            write_file(sys.argv[1], kind="test", data={"writer": sys.argv[2], "number": number})
    """)
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "run", name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert read_file(tmp_path / "run", kind="test").data["number"] == 29
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
