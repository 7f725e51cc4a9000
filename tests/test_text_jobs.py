"""The experiment on ways to text: every way, the same labels for all, set by set, from settings in a file."""


import numpy as np
import pytest
import torch
import yaml

import distillkit as dk
from distillkit.cli.main import draw, main
from distillkit.evaluation.recipes import NAMED, Standard, Tuned
from distillkit.evaluation.selection import METHODS
from distillkit.experiments import ways_to_text as text_jobs
from distillkit.experiments.results import paired_difference, read
from distillkit.experiments.ways_to_text import RECIPES, ROWS, STARTS, TEXTS, WAYS, TextJob, TextRun, hardened, text_table

# Every method under two recipes, a few under the others too.
FEW = ("k_center", "sentences", "swaps")
MADE = tuple(row for row in ROWS if not row.endswith(("/transfer", "/fixed")) or row.split("/")[0] in FEW)
SMALL = {
    "name": "small", "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8,
    "seeds": [0, 1], "eval_seeds": [0, 1], "unroll_steps": 2, "outer_steps": 2, "outer_batch": 4, "label_steps": 2,
    "label_unroll_steps": 3, "label_adamw": 0.001, "label_rates": [0.2, 0.05],
    "judge_steps": 5, "sentence_steps": 2, "sentences": 20, "swap_steps": 2, "candidates": 4, "relax_steps": 2,
    "fixed_steps": 2, "target": "distilbert-base-uncased", "rows": list(MADE),
}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run from a file of settings."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"kind": "text"}))
    with standin_hub.patched(standin_home), pytest.MonkeyPatch.context() as patch:
        patch.setitem(NAMED, "tuned", Tuned({"step_size": (1e-3,), "steps": (1, 2)}))
        patch.setitem(NAMED, "standard", Standard(least_steps=2))
        assert main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, read(folder / "small.json")


def job(**changes):
    return TextJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in (SMALL | changes).items()})


def test_every_score_is_made(finished):
    _, result = finished
    assert list(result["rows"]) == list(MADE)
    for name, row in result["rows"].items():
        method, recipe = name.split("/")
        assert row.keys() == {"0", "1"}
        for score in row.values():
            assert len(score["scores"]) == (1 if method == "full" else 2)
            assert score["recipe"]["name"] == {"relabelled": "own", "transfer": "tuned", "fixed": "unroll"}.get(recipe, recipe)
            assert ("text" in score) == (method in WAYS and recipe != "transfer")
            if method != "full":
                assert score["examples"] == 2
    searches = {f"{m} {s}" for m in ("sentences", "relaxed tokens", *STARTS) for s in (0, 1)}
    learned = {f"{m} {s}" for m in ("embeddings", "neighbor loss", "through projection") for s in (0, 1)}
    assert result["distilling"].keys() == searches | learned


def test_hard_labels_are_the_same_for_all_and_learned_ones_belong_to_the_text(finished):
    folder, _ = finished
    for method in ("swaps", "projection", "through_projection"):
        plain = dk.DistilledSet.load(folder / "work" / "small" / f"{method}-0")
        labelled = dk.DistilledSet.load(folder / "work" / "small" / f"{method}_relabelled-0")
        assert torch.equal(plain.tokens, labelled.tokens) and plain.meta["text"] == labelled.meta["text"]
        assert labelled.soft and len(labelled.step_sizes) == 3 and labelled.meta["recipe"]["outer_steps"] == 2
        assert labelled.meta["recipe"]["optimizer"]["name"] == "AdamW"
        assert labelled.meta["recipe"]["distiller"]["rates"] == {"embeds": 0.12, "targets": 0.2, "step_sizes": 0.05}
        assert hardened(labelled).targets.tolist() == [0, 1] and "recipe" not in hardened(labelled).meta


def test_the_same_sentences_are_scored_once(finished):
    """At one a class herding and k-centre both take the medoid."""
    _, result = finished
    for recipe in ("tuned", "relabelled"):
        for seed in "01":
            one, other = (result["rows"][f"{method}/{recipe}"][seed] for method in ("k_center", "herding"))
            assert {**one, "same_set_as": "k_center"} == other and "same_set_as" not in one
    assert not any("same_set_as" in score for score in result["rows"]["random/tuned"].values())


def test_an_interrupted_run_goes_on(finished, standin_hub, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(text_jobs, "evaluate", lambda *a, **kw: pytest.fail("scored again"))
    assert TextRun(job(), folder, folder / "work")() == result
    monkeypatch.setattr(TextRun, "create", lambda *a: pytest.fail("made again"))
    assert TextRun(job(), folder, folder / "work").set_of("swaps", 1).tokens is not None


def test_the_table(finished):
    _, result = finished
    lines = text_table(result).splitlines()
    assert draw(result).splitlines() == lines
    for method in WAYS:
        (line,) = (line for line in lines if line.startswith(f"| {method} |"))
        for recipe in (recipe for recipe in RECIPES if f"{method}/{recipe}" in MADE):
            scores = [result["rows"][f"{method}/{recipe}"][s]["mean"] for s in "01"]
            assert f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}" in line
            mean, half = paired_difference(result["rows"], f"{method}/{recipe}", f"k_center/{recipe}")
            assert f"{mean:+.3f} ± {half:.3f}" in line
    assert lines[-1].startswith("Recovery") and len(lines) == 2 + len(TEXTS) + 2 + 2
    for method in METHODS:
        assert any(line.startswith(f"| {method} |") for line in lines)
    del result["rows"]["swaps/tuned"]
    assert "| swaps | not run |" in text_table(result)


def test_recovery_by_hand():
    rows = {f"{n}": {"0": {"mean": v}} for n, v in (
        ("embeddings/own", 0.7), ("projection/relabelled", 0.3), ("swaps/relabelled", 0.6), ("k_center/relabelled", 0.5))}
    table = text_table({"rows": rows, "config": {"rows": list(rows)}})
    assert table.endswith("learned labels: swaps 0.75 (one set).")
    for row in rows.values():
        row["1"] = {"mean": row["0"]["mean"] + 0.1}
    assert text_table({"rows": rows, "config": {"rows": list(rows)}}).endswith("learned labels: swaps 0.75.")


@pytest.mark.parametrize(("changes", "message"), [
    ({"rows": ["swaps/own"]}, "a row must be one of"),
    ({"candidates": 0}, "candidates must be"),
    ({"seeds": []}, "seeds must have at least 1 item"),
    ({"neighbor_weight": 0}, "neighbor_weight must be a number above 0"),
    ({"label_lr": -1}, "label_lr must be"),
    ({"label_rates": [0.1]}, "label_rates"),
    ({"examples": 0}, "examples must be"),
])
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_an_unknown_kind_is_named(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("kind: poetry\nname: x\n")
    assert main(["run", str(tmp_path / "x.yaml")]) == 2
    said = capsys.readouterr().err
    assert "kind must be one of classification, instruction" in said and "not 'poetry'" in said
