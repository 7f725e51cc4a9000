"""The README's lines that read a published set, run where distillkit cannot be imported; and how the kit is cited."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import distillkit as dk
from distillkit.applications.publish import save_published
from distillkit.io.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["text", "embeddings"])
def test_a_published_set_is_read_without_the_kit(world, tmp_path, kind):
    task, student = world
    published = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    if kind == "embeddings":
        distiller = dk.Distiller(published, dk.BPTT(task, student, dk.Unroll(2), batch_size=8))
        assert len(list(distiller.run(1))) == 1
        published = distiller.distilled
    folder = save_published(published, tmp_path / "published")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### Loading a published set without the kit")[1]
    lines = section.split("```python\n")[1].split("```")[0]
    assert lines.count("\n") <= 10 and 'snapshot_download("owner/name", repo_type="dataset")' in lines
    lines = lines.replace('snapshot_download("owner/name", repo_type="dataset")', repr(str(folder)))
    report = "print(json.dumps([len(rows), rows.column_names, tensors['embeds'].tolist(), meta['classes'], 'recipe' in meta]))"
    code = f"import sys; sys.modules['distillkit'] = None\n{lines}\n{report}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, columns, embeds, classes, has_recipe = json.loads(done.stdout)
    assert count == len(published) and classes == list(task.classes)
    assert ("text" in columns) == (kind == "text") and has_recipe == (kind == "embeddings")
    torch.testing.assert_close(torch.tensor(embeds, dtype=published.embeds.dtype), published.embeds, rtol=0, atol=1e-7)


def test_the_citation_names_this_version_and_both_source_works():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0" and citation["authors"] == [{"name": "the distillkit authors"}]
    titles = [reference["title"] for reference in citation["references"]]
    assert titles == ["Transferable text data distillation by trajectory matching",
                      "Dataset Distillation for Large Language Models"]
