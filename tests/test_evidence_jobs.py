"""The experiment on evidence: bootstraps, opponents, bytes, corrected gains and screening losses, from settings in a file."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.stats import t

import distillkit as dk
from distillkit.applications.costs import low_rank, low_rank_bytes, set_bytes, text_bytes
from distillkit.cli.main import main
from distillkit.evaluation.upper_lines import tfidf_accuracy
from distillkit.experiments.evidence import (
    ROWS,
    EvidenceCell,
    EvidenceGrid,
    EvidenceJob,
    best_cheap,
    evidence_table,
    written_sentences,
)
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import by_set, frame, paired_difference, rank_correlation, read, write
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import kind_of
from example_results import result_of

BASE = {
    "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8, "seeds": [0, 1],
    "eval_seeds": [0, 1], "full_seeds": [0], "unroll_steps": 2, "outer_steps": 2, "outer_batch": 4, "judge_steps": 5,
    "sentence_steps": 2, "sentences": 20, "candidates": 4, "rank": 2, "standard_steps": 2,
    "word_steps": 2, "word_candidates": 4, "writer": "facebook/opt-1.3b", "written_candidates": 3,
    "judges": ["bert-base-uncased", "distilbert-base-uncased"],
    "tuned_initialisations": 1, "tuned_rows": 10,
    "tuned_grid": {"step_size": [0.001], "steps": [1, 2]},
}
SETTINGS = {"kind": "evidence", "name": "small", "per_class": [1, 2], "base": BASE, "rows": list(ROWS)}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    import standin_hub

    folder = tmp_path_factory.mktemp("evidence")
    rows = [{"set": number, "text": f"{number} {label} text", "label": label}
            for number in (0, 1) for label in (1, 0)]
    (folder / "sets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = BASE | {"published": {1: str(folder / "sets.jsonl")}}
    (folder / "small.yaml").write_text(yaml.safe_dump(SETTINGS | {"base": base}, sort_keys=False))
    with standin_hub.patched(standin_home):
        assert main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, read(folder / "small.json")


@pytest.fixture(scope="module")
def cell(finished, standin_home):
    """The cell of one example per class, opened again."""
    import standin_hub

    with standin_hub.patched(standin_home):
        job = EvidenceGrid.from_yaml(finished[0] / "small.yaml").cells()["per_class=1"]
        return EvidenceCell(job, finished[0] / "work" / job.name, finished[0])


def test_which_sets_are_scored(finished):
    """What does not depend on the drawn rows is one set, everything else one for each seed."""
    _, result = finished
    scores = frame(result)
    for (_, row), of_row in scores.groupby(["cell", "row"]):
        once = row.startswith(("class names/", "written/")) or row.endswith("/corpus") or row == "full/standard"
        assert [*of_row["set_seed"].unique()] == ([0] if once else [0, 1]), row
    one, two = ({*scores[scores["cell"] == f"per_class={k}"]["row"]} for k in (1, 2))
    assert one == {*ROWS} and one - two == {
        "class names/tuned", "class names + teacher labels/tuned", "embeddings float16/own", "embeddings low rank/own",
        "published/tuned", "published + teacher labels/tuned"}


def test_every_method_of_a_seed_sees_the_same_bootstrap(cell, standin_hub):
    for seed in (0, 1):
        drawn = {*dk.bootstrap(cell.task, seed).train["text"][:]}
        texts = [cell.task.train[row]["text"] for row in range(len(cell.task.train))]
        assert drawn < {*texts}
        for method in ("random", "herding", "k_center", "k_means", "chosen sentences", "searched keywords"):
            distilled = cell.of_seed(seed).set_of(method, seed)
            task = cell.of_seed(seed).task
            assert distilled.meta["task_fingerprint"] == task.fingerprint and {*task.train["text"][:]} == drawn


def test_published_sets(cell):
    """Set number s for seed s, each label the class of its index."""
    for seed in (0, 1):
        published = cell.of_seed(seed).set_of("published", seed)
        assert published.meta["text"] == [f"{seed} {label} text" for label in (1, 0)]
        assert published.targets.tolist() == [1, 0]
    with pytest.raises(FileNotFoundError, match=r"sets.jsonl has no set 7"):
        cell.of_seed(0).set_of("published", 7)


def test_the_same_sentences_are_scored_once(finished):
    """At one example per class herding, k-centre and the medoid are the same sentences."""
    _, result = finished
    scores = [score for score in result["scores"] if score["cell"] == "per_class=1"]
    for method in ("herding", "k_means"):
        of_method = [score for score in scores if score["row"] == f"{method}/tuned"]
        assert of_method and all(score["same_set_as"].startswith("per_class=1: ") for score in of_method)
    assert "herding (the sentences of k_center)" in evidence_table(result)


def test_bytes_and_upper_lines(finished, cell, standin_hub):
    _, result = finished
    first = {score["row"]: score for score in result["scores"] if score["cell"] == "per_class=1" and score["set_seed"] == 0}
    learned = cell.of_seed(0).set_of("embeddings", 0)
    assert first["embeddings/own"]["nbytes"] == learned.nbytes == set_bytes(learned)
    assert first["embeddings float16/own"]["nbytes"] == learned.nbytes / 2
    numbers = 2 * (2 * 8 + 32) + learned.targets.numel() + learned.step_sizes.numel()  # rank 2, 2 × 8 positions of width 32
    assert first["embeddings low rank/own"]["nbytes"] == 2 * numbers
    rows = list(zip(cell.task.train["text"][:], cell.task.train["label"][:], strict=True))
    assert result["cells"]["per_class=1"]["training_text"]["compressed"] == text_bytes(rows)
    assert f"{learned.nbytes / text_bytes(rows):.2%}" in evidence_table(result)
    assert first["tfidf/all"]["accuracy"] == pytest.approx(tfidf_accuracy(dk.bootstrap(cell.task, 0)), abs=1e-6)
    assert first["tfidf/corpus"]["accuracy"] == pytest.approx(tfidf_accuracy(cell.task), abs=1e-6)


def test_low_rank_is_the_best_approximation(world):
    start = dk.DistilledSet.from_real(*world, per_class=2, length=6)
    start.tokens, start.step_sizes = None, None
    rows = start.embeds.flatten(0, 1).numpy()
    values = np.linalg.svd(rows, compute_uv=False)
    for rank in (1, 3, len(values)):
        error = np.linalg.norm(low_rank(start, rank).embeds.flatten(0, 1).numpy() - rows)
        assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-5)
    assert low_rank_bytes(start, 3) == 4 * (3 * (24 + 32) + start.targets.numel())
    with pytest.raises(ValueError, match="rank"):
        low_rank(start, 25)


def test_the_table_by_hand():
    """The best cheap row is the opponent; by hand-written texts, which are one set, every set is measured."""
    rows = {"written/tuned": [0.5, math.nan, math.nan], "random/tuned": [0.4, 0.5, 0.45], "keywords/tuned": [0.3, 0.4, 0.2],
            "chosen sentences/tuned": [0.6, 0.7, 0.62], "embeddings/own": [0.8, 0.7, 0.9], "tfidf/all": [0.9, 0.9, 0.9]}
    result = result_of(rows, {"per_class=1": rows}, per_class=[1])
    for score in result["scores"]:
        score |= {"nbytes": 100, "init_seed": 0}
    result["cells"] = {"per_class=1": {"notes": {}, "training_text": {"bytes": 4000, "compressed": 1000}}}
    assert best_cheap(by_set(result, cell="per_class=1")) == "written/tuned"
    table = evidence_table(result)
    differences = np.array([0.3, 0.2, 0.4])
    half = t.ppf(1 - 0.025 / 2, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert f"| embeddings | own | 100 | 10.00% | 0.800 ± 0.100 (3 sets) | +0.300 ± {half:.3f} |" in table
    assert "corrected for 2 comparisons" in table and "written/tuned (1 per class)" in table
    assert table_of(result | {"config": result["config"] | {"kind": "evidence"}}) == table


def test_gains_over_a_row_that_is_asked_for(tmp_path, capsys):
    rows = {"random/tuned": [0.4, 0.5, 0.45], "chosen sentences/tuned": [0.6, 0.7, 0.62], "embeddings/own": [0.8, 0.7, 0.9]}
    result = result_of(rows, {"per_class=1": rows}, per_class=[1], kind="evidence")
    for score in result["scores"]:
        score |= {"nbytes": 100, "init_seed": 0}
    result["cells"] = {"per_class=1": {"notes": {}, "training_text": {"bytes": 4000, "compressed": 1000}}}
    write(tmp_path / "mine.json", result)
    ask = ["table", "mine", "--results", str(tmp_path), "--against"]
    assert main([*ask, "chosen sentences/tuned"]) == 0
    shown = capsys.readouterr().out
    half = t.ppf(0.975, 2) * np.array([0.2, 0.0, 0.28]).std(ddof=1) / math.sqrt(3)
    assert f"| +0.160 ± {half:.3f} |" in shown and "gain over chosen sentences/tuned" in shown and "1 comparison " in shown
    assert main([*ask, "poetry/tuned"]) == 2 and "against must be one of random/tuned" in capsys.readouterr().err
    assert main(["table", "mine", "mine", "--results", str(tmp_path), "--against", "random/tuned"]) == 2
    assert "--against is for one result" in capsys.readouterr().err
    write(tmp_path / "mine.json", result | {"config": result["config"] | {"kind": "text"}})
    assert main([*ask, "random/tuned"]) == 2 and "for results of kind evidence" in capsys.readouterr().err


def test_encoders_side_by_side():
    """Gains and shares by hand; rows that no encoder has are left out; fewer than three sets have no interval."""
    def of(student, **rows):
        rows = {name.replace("_", " ") + "/" + recipe: values for name, (recipe, values) in rows.items()}
        result = result_of(rows, {"per_class=1": rows}, kind="evidence", base={"corpus": "news", "student": student})
        result["cells"] = {"per_class=1": {"notes": {"one": {"groups": {"a": 1, "b": 1}}}}}
        return result

    small = of("offline:small", searched_keywords=("tuned", [0.5, 0.5, 0.5]), keywords=("tuned", [0.6, 0.6, 0.6]),
               embeddings=("own", [0.8, 0.7, 0.75]), full=("standard", [1.0, math.nan, math.nan]))
    large = of("offline:large", keywords=("tuned", [0.6, 0.7, math.nan]), embeddings=("own", [0.8, 0.8, math.nan]))
    table = table_of(small, large)
    assert "| corpus | trained on | small | large |" in table and "searched" not in table and "herding" not in table
    assert "| news | embeddings/own | 0.750 ± 0.050 (3) | 0.800 ± 0.000 (2) |" in table
    half = t.ppf(0.975, 2) * 0.05 / math.sqrt(3)
    assert f"+0.150 ± {half:.3f} | +0.150 (two sets) |" in table and "corrected for 1 comparison " in table
    assert "*embeddings/own, share of full/standard above chance* | 50% |  |" in table
    others = {"two results of small on news": small, "kind evidence": small | {"config": {}}}
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            table_of(small, other)


def test_corrected_intervals():
    sets = pd.DataFrame({0: [0.5, 0.4], 1: [0.6, 0.4], 2: [0.7, 0.4]}, index=["a", "b"])
    mean, half = paired_difference(sets, "a", "b")
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(t.ppf(0.975, 2) * 0.1 / math.sqrt(3)))
    assert paired_difference(sets, "a", "b", 10)[1] == pytest.approx(t.ppf(1 - 0.0025, 2) * 0.1 / math.sqrt(3))


def test_rank_correlations():
    losses = pd.Series([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(losses, losses**2) == pytest.approx(1) and rank_correlation(losses, -losses) == pytest.approx(-1)
    assert rank_correlation(losses[:4], losses) is None, "four sets say nothing"


def test_keywords_with_learned_labels_are_the_keywords(cell, standin_hub):
    """Only labels and step sizes of the text are learned, from the start that embeddings have too."""
    of_seed = cell.of_seed(0)
    labelled, keywords = of_seed.set_of("keywords + learned labels", 0), of_seed.set_of("keywords", 0)
    assert torch.equal(labelled.tokens, keywords.tokens) and torch.equal(labelled.embeds, keywords.embeds)
    assert not torch.equal(labelled.targets, keywords.soften().targets) and "recipe" in labelled.meta


def test_screening_losses_are_kept(finished):
    notes = finished[1]["cells"]["per_class=2"]["notes"]
    for method in ("embeddings", "chosen sentences", "searched keywords", "real + learned labels"):
        assert all(math.isfinite(notes[f"{method} {seed}"]["outer_loss"]) for seed in (0, 1))


def test_a_finished_run_does_nothing(finished, standin_hub, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(EvidenceCell, "score", lambda *a: pytest.fail("scored again"))
    assert Run(EvidenceCell, EvidenceGrid.from_yaml(folder / "small.yaml"), folder, folder / "work")() == result


def test_shipped_settings():
    shipped = {path.stem: EvidenceGrid.from_yaml(path) for path in CONFIGS.glob("evidence_*.yaml")}
    real, others = ("rotten_tomatoes", "ag_news", "sst2", "imdb"), ("docstrings_three", "docstrings_keywords")
    encoders = [f"{corpus}_{encoder}" for corpus in real for encoder in ("l3", "mpnet")]
    assert {*shipped} == {f"evidence_{c}" for c in ("docstrings", *real, *encoders, *others, "ag_news_mpnet_large_rates")}
    for name, job in shipped.items():
        assert job.name == name and kind_of(CONFIGS / f"{name}.yaml") == "evidence"
        sentences = written_sentences(job.base["corpus"])
        judges = job.base.get("judges", [])  # none: no row needs them
        assert name.endswith(("_l3", "_mpnet", "imdb", "_rates")) == (job.base["student"] not in judges)
        assert judges or "searched keywords/tuned" not in job.base.get("rows", job.rows)
        assert len(sentences) > 1 and {len({*texts}) for texts in sentences} == {5}


def test_rows_that_are_none():
    with pytest.raises(ValueError, match="a row must be one of"):
        EvidenceJob(**BASE | {"name": "x", "rows": ("poetry/tuned",), "seeds": (0,), "eval_seeds": (0,), "full_seeds": (0,)})
