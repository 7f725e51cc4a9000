"""Publishing: what goes up comes back bit for bit, reads without distillkit, and no name or text of it takes effect."""

import dataclasses
import html
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml

import distillkit as dk
from distillkit.applications import publish
from distillkit.applications.publish import (
    CARD,
    CHECKED,
    NOT_RECORDED,
    ROWS,
    SUMS,
    card,
    escaped,
    load_published,
    save_published,
)

HOSTILE = ["<script>alert(1)</script>", "a|b\n# c", "$x$ `y` *z* [l](http://e.vil) ![i](u) @you ~~s~~", "nul\0 \u202et\u2066",
           "---\nlicense: mit", "日本 🎉 \x1b[31m", ": {yaml: !!python/object:os.system x}", "' \" %s {0} ```"]


@pytest.fixture(scope="module")
def real(world):
    return dk.DistilledSet.from_real(*world, per_class=2, length=8)


@pytest.fixture(scope="module")
def distilled(real, world):
    """Two outer steps: free embeddings with a recipe."""
    distiller = dk.Distiller(real, dk.BPTT(*world, dk.Unroll(2), metagrad=dk.Replay(), batch_size=8), lr=0.05)
    assert len(list(distiller.run(2))) == 2
    return distiller.distilled


@pytest.fixture(scope="module")
def text(distilled, world):
    return dk.project(distilled, world[1])


@pytest.fixture(scope="module")
def score(text, world):
    return dk.evaluate(text, *world, seeds=(0, 1))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is a folder: what is uploaded lies in a cache laid out as huggingface_hub lays it out, with links."""
    cache, calls = tmp_path / "cache", []

    class Api:
        def create_repo(self, repo_id, **settings):
            calls.append((repo_id, settings))

        def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
            commit = f"{len(calls):040x}"
            home = cache / f"{repo_type}s--{repo_id.replace('/', '--')}"
            for path in sorted(p for p in folder_path.rglob("*") if p.is_file()):
                name = path.relative_to(folder_path)
                blob, link = home / "blobs" / publish.sha256_of(path), home / "snapshots" / commit / name
                blob.parent.mkdir(parents=True, exist_ok=True)
                link.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, blob)
                link.symlink_to(os.path.relpath(blob, link.parent))
            (home / "refs").mkdir(exist_ok=True)
            (home / "refs" / "main").write_text(commit)
            return type("Commit", (), {"commit_url": f"hub/{repo_id}/commit/{commit}", "oid": commit})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache, calls


def same(one, other):
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["real", "distilled", "text"])
def test_a_set_comes_back_whole(form, request, tmp_path):
    found = request.getfixturevalue(form)
    same(found, load_published(save_published(found, tmp_path / "a")))
    assert sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()) == sorted(
        (CARD, SUMS, *CHECKED))
    assert not [p for p in tmp_path.iterdir() if p.name != "a"], "nothing is left beside it"


def test_the_sums_are_those_that_sha256sum_checks(text, tmp_path):
    folder = save_published(text, tmp_path / "a")
    assert subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True).returncode == 0


@pytest.mark.parametrize("form", ["distilled", "text"])
def test_the_dataset_loads_without_distillkit(form, request, tmp_path):
    found = request.getfixturevalue(form)
    folder = save_published(found, tmp_path / "a")
    code = f"""
import sys
sys.modules["distillkit"] = None   # importing it fails from here on
import datasets
rows = datasets.load_dataset({str(folder)!r}, split="train", cache_dir={str(tmp_path / "cache")!r})
print(repr((rows.column_names, rows.to_list())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    names, rows = eval(done.stdout)  # what our own subprocess printed
    assert rows == publish.rows(found).to_list() and [row["label"] for row in rows] == ["neg", "neg", "pos", "pos"]
    assert names == (["text", "label", "probabilities"] if form == "text" else ["example", "tokens", "label", "probabilities"])


def test_responses_are_rows_too(tmp_path):
    task = dk.load_task("docstrings_qa:library", max_length=96, limit=24)
    found = dk.DistilledSet.from_real(task, dk.load_student("offline:tiny-opt", task), fraction=0.1)
    same(found, load_published(save_published(found, tmp_path / "a")))
    assert publish.rows(found).column_names == ["prompt", "response"]
    free = dataclasses.replace(found, tokens=None)
    assert publish.rows(free).column_names == ["example", "tokens", "response"]
    assert front(card(free, "a"))["task_categories"] == ["text-generation"]


def test_an_earlier_one_is_replaced_and_nothing_else(real, text, tmp_path):
    save_published(real, tmp_path / "a")
    same(text, load_published(save_published(text, tmp_path / "a")))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("all of it")
    with pytest.raises(dk.StorageError, match="will not overwrite .*b: it is no published set"):
        save_published(text, tmp_path / "b")
    assert (tmp_path / "b" / "thesis.tex").read_text() == "all of it"


@pytest.mark.parametrize("name", [*CHECKED, SUMS])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "link"])
def test_every_harm_is_a_named_error(text, tmp_path, name, harm):
    folder = save_published(text, tmp_path / "a")
    path = folder / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 3])
    else:
        path.rename(tmp_path / "elsewhere")
        if harm == "link":
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(dk.StorageError, match=re.escape(str(folder))):
        load_published(folder)


def test_a_set_that_an_older_version_published_is_named(text, tmp_path):
    folder = save_published(text, tmp_path / "a")
    (folder / "set").mkdir()
    (folder / "set" / "manifest.json").write_text("{}")
    with pytest.raises(dk.StorageError, match="distillkit 0.1 wrote, which is the last version that reads it"):
        load_published(folder)
    (folder / SUMS).write_text(f"{'0' * 64}  set/data.json\n")
    with pytest.raises(dk.StorageError, match="no published set of this version"):
        save_published(text, folder)


def test_sums_lead_nowhere_else(text, tmp_path):
    folder = save_published(text, tmp_path / "a")
    (folder / SUMS).write_text(f"{'0' * 64}  ../../secret\n" + (folder / SUMS).read_text())
    same(text, load_published(folder))


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_up_and_down_again(text, distilled, hub, score):
    _, calls = hub
    url = dk.push_to_hub(text, "someone/six-examples", evaluations=[score])
    assert calls == [("someone/six-examples", {"repo_type": "dataset", "private": True, "exist_ok": True})]
    same(text, dk.from_hub("someone/six-examples"))
    dk.push_to_hub(distilled, "someone/six-examples", private=False)
    assert calls[1][1]["private"] is False
    same(distilled, dk.from_hub("someone/six-examples"))
    same(text, dk.from_hub("someone/six-examples", revision=url.rsplit("/")[-1]))


def test_a_damaged_download_is_refused(text, hub):
    cache, _ = hub
    dk.push_to_hub(text, "someone/a")
    (blob,) = {p.resolve() for p in cache.rglob("set.safetensors")}
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(dk.StorageError, match=r"someone/a on the hub: .*snapshots.*set\.safetensors does not have"):
        dk.from_hub("someone/a")


def test_what_is_not_there(hub, text):
    with pytest.raises(FileNotFoundError, match="no set someone/nothing at revision 'v1' on the Hugging Face hub or in"):
        dk.from_hub("someone/nothing", revision="v1")
    for wrong in ("nothing", "a/b/c", "/b", "../b/c", 7):
        with pytest.raises(ValueError, match="repo_id must be 'owner/name', not"):
            dk.from_hub(wrong)
        with pytest.raises(ValueError, match="repo_id must be 'owner/name', not"):
            dk.push_to_hub(text, wrong)
    with pytest.raises(ValueError, match=r"\.\.|Repo id"):
        dk.push_to_hub(text, "../b")


def test_a_hub_that_says_no(text, hub, monkeypatch):
    def refused(self, *args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    with pytest.raises(ConnectionError, match="could not push to someone/a: offline; log in .* upload that later"):
        dk.push_to_hub(text, "someone/a")


# --- the card --------------------------------------------------------------------------------------------------------


def test_a_card_says_what_is_known(text, world, score, standin_hub):
    task, student = world
    found = card(text, "six examples", evaluations={"test split": score}, task=task, student=student, license="cc-by-4.0",
                 corpus_license="unknown to its authors")
    head = front(found)
    assert head["license"] == "cc-by-4.0" and head["task_categories"] == ["text-classification"]
    assert head["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": ROWS}]}]
    recipe, plain = text.meta["recipe"], html.unescape(found)
    for fact in (task.fingerprint, task.origin, "bert-base-uncased", "cc-by-4.0", "unknown to its authors", "neg, pos",
                 "distilled by BPTT (learned: embeds, targets, step_sizes); then projected to the nearest tokens (l2)",
                 "2 outer steps, 8 real examples each, 1 initialisations each, 2 inner steps", "distilling 0",
                 f"| test split | own | 2 | SGD | {score.mean:.3f} ± {score.std:.3f} | 2 |", *text.meta["text"]):
        assert fact in plain, fact
    assert yaml.safe_load(re.search(r"```json\n(.*?)\n```", found, re.DOTALL)[1]) == recipe
    assert f"| base model's revision | {'5' * 40} |" in found
    assert "no score was recorded" not in found and "none is recorded" not in found


def test_a_card_invents_nothing(real, distilled):
    found = card(dataclasses.replace(real, meta={k: real.meta[k] for k in ("classes", "labels", "text")}), "a")
    assert "license" not in front(found)
    for fact in ("method", "base model", "base model's revision", "corpus", "corpus' fingerprint (SHA-256)", "corpus came from",
                 "corpus' licence", "licence of this set", "budget of learning", "seeds"):
        assert f"| {fact} | {NOT_RECORDED} |" in found
    assert "no score was recorded" in found and "## Scores\n\n*not recorded*" in found
    assert "No recipe is recorded, so take its sentences for ones of the corpus" in found
    assert "no other model and no person can read them" in card(distilled, "a") and "have no text" in card(distilled, "a")


def test_a_card_mixes_no_two_origins(text, world):
    task, student = world
    with pytest.raises(ValueError, match="task: the set was made with another one"):
        card(text, "a", task=dataclasses.replace(task, fingerprint="0" * 64))
    with pytest.raises(ValueError, match="student: the set was made with another one"):
        card(text, "a", student=dataclasses.replace(student, name="another"))


@pytest.mark.parametrize("text_", HOSTILE)
def test_hostile_names_and_texts_stand_for_themselves(real, tmp_path, text_):
    meta = {**real.meta, "classes": [text_, text_ + "2"], "text": [text_] * 4, "task": text_, "student": text_,
            "recipe": {"objective": text_, "distiller": {"learn": [text_], "seed": text_}, text_: text_}}
    hostile = dataclasses.replace(real, meta=meta)
    folder = save_published(hostile, tmp_path / "a", corpus_license=text_)
    found = (folder / CARD).read_text(encoding="utf-8")
    assert set(front(found)) == {"pretty_name", "tags", "task_categories", "size_categories", "configs"}
    body = re.sub(r"```.*?```", "", found.split("---\n", 2)[2], flags=re.DOTALL)
    for mark in ("<", "](", "![", "@", "$", "\0", "\u202e", "\x1b", "~~", "http:"):
        assert mark not in body.replace("](#", ""), mark
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3,) for line in tables), "no cell ends early"
    same(hostile, load_published(folder))
    assert publish.rows(load_published(folder))["text"][0] == text_
    assert front(card(real, text_))["pretty_name"] == " ".join(text_.split())


def test_escaping_loses_no_character_that_is_seen():
    seen = "a <b> & |c| `d` *e* _f_ $g$ #h! [i](j) {k}^l@m: ~n\\ = é 日本 🎉"
    assert html.unescape(escaped(seen)) == seen
    assert escaped("a\0b\u202ec\ud800") == "a(U+0000)b(U+202E)c(U+D800)"
    assert escaped("x" * 50, 10) == "x" * 9 + "…"


def test_a_failed_write_leaves_the_earlier_one(real, text, tmp_path, monkeypatch):
    save_published(real, tmp_path / "a")
    monkeypatch.setattr(publish, "rows", lambda found: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(dk.StorageError, match="No space left on device; free some space"):
        save_published(text, tmp_path / "a")
    same(real, load_published(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
