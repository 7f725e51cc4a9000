"""The experiment on ways to text: every way, the same labels for all, set by set, from settings in a file."""


import pytest
import torch
import yaml

from distillkit.cli.main import main
from distillkit.evaluation.selection import METHODS
from distillkit.experiments import runner
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import by_set, paired_difference, read
from distillkit.experiments.runner import Run
from distillkit.experiments.ways_to_text import RECIPES, ROWS, STARTS, TEXTS, WAYS, TextCell, TextJob, hardened, text_table
from example_results import result_of

# Every method under two recipes, a few under the others too.
FEW = ("k_center", "sentences", "swaps")
MADE = tuple(row for row in ROWS if not row.endswith(("/transfer", "/fixed")) or row.split("/")[0] in FEW)
SMALL = {
    "name": "small", "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8,
    "seeds": [0, 1], "eval_seeds": [0, 1], "unroll_steps": 2, "outer_steps": 2, "outer_batch": 4, "label_steps": 2,
    "label_unroll_steps": 3, "label_adamw": 0.001, "label_rates": [0.2, 0.05],
    "judge_steps": 5, "sentence_steps": 2, "sentences": 20, "swap_steps": 2, "candidates": 4, "relax_steps": 2,
    "fixed_steps": 2, "target": "distilbert-base-uncased", "rows": list(MADE),
    "standard_steps": 2, "tuned_grid": {"step_size": [0.001], "steps": [1, 2]},
}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run from a file of settings."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"kind": "text"}))
    with standin_hub.patched(standin_home):
        assert main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, read(folder / "small.json")


def job(**changes):
    return TextJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in (SMALL | changes).items()})


def test_every_score_is_made(finished):
    _, result = finished
    notes = result["cells"]["small"]["notes"]
    inits = dict.fromkeys((*TEXTS, "embeddings"), (0, 1))
    assert [(score["row"], score["set_seed"], score["init_seed"]) for score in result["scores"]] == [
        (row, seed, init) for row in sorted(MADE) for seed in (0, 1) for init in inits.get(row.split("/")[0], (seed,))]
    for score in result["scores"]:
        recipe = score["recipe"]
        trained = notes[f"{score['row']} {score['set_seed']}"]["recipe"]["name"]
        assert trained == {"relabelled": "own", "transfer": "tuned", "fixed": "unroll"}.get(recipe, recipe)
        assert score["target"] == ("distilbert-base-uncased" if recipe == "transfer" else "bert-base-uncased")
        assert score["method"] == "full" or score["examples"] == 2
    searches = {f"{m} {s}" for m in ("sentences", "relaxed tokens", *STARTS) for s in (0, 1)}
    learned = {f"{m} {s}" for m in ("embeddings", "neighbor loss", "through projection") for s in (0, 1)}
    assert {name for name, note in notes.items() if "losses" in note} == searches | learned
    texts = {f"{m}{labels} {s}" for m in WAYS for labels in ("", " relabelled") for s in (0, 1)}
    assert {name for name, note in notes.items() if "text" in note} == texts


def test_hard_labels_are_the_same_for_all_and_learned_ones_belong_to_the_text(finished, standin_hub):
    cell = Run(TextCell, job(), finished[0], finished[0] / "work").cell
    for method in ("swaps", "projection", "through projection"):
        plain, labelled = (cell.saved(name, 0, lambda: pytest.fail("made again")) for name in (method, f"{method} relabelled"))
        assert torch.equal(plain.tokens, labelled.tokens) and plain.meta["text"] == labelled.meta["text"]
        assert labelled.soft and len(labelled.step_sizes) == 3 and labelled.meta["recipe"]["outer_steps"] == 2
        assert labelled.meta["recipe"]["optimizer"]["name"] == "AdamW"
        assert labelled.meta["recipe"]["distiller"]["rates"] == {"embeds": 0.12, "targets": 0.2, "step_sizes": 0.05}
        assert hardened(labelled).targets.tolist() == [0, 1] and "recipe" not in hardened(labelled).meta


def test_the_same_sentences_are_scored_once(finished):
    """At one a class herding and k-centre both take the medoid, for every set seed."""
    _, result = finished
    for recipe in ("tuned", "relabelled"):
        one, other = ([s for s in result["scores"] if s["row"] == f"{method}/{recipe}"] for method in ("k_center", "herding"))
        assert [score["accuracy"] for score in one] == [score["accuracy"] for score in other]
        assert all(score["same_set_as"].startswith("small: ") for score in other)
    assert not any("same_set_as" in score for score in result["scores"] if score["method"] == "random")


def test_an_interrupted_run_goes_on(finished, standin_hub, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(runner, "evaluate", lambda *a, **kw: pytest.fail("scored again"))
    run = Run(TextCell, job(), folder, folder / "work")
    assert run() == result
    monkeypatch.setattr(TextCell, "create", lambda *a: pytest.fail("made again"))
    assert run.cell.set_of("swaps", 1).tokens is not None


def test_the_table(finished):
    _, result = finished
    lines, sets = text_table(result).splitlines(), by_set(result)
    assert table_of(result).splitlines() == lines
    for method in WAYS:
        (line,) = (line for line in lines if line.startswith(f"| {method} |"))
        for recipe in (recipe for recipe in RECIPES if f"{method}/{recipe}" in MADE):
            scores = sets.loc[f"{method}/{recipe}"]
            assert f"{scores.mean():.3f} ± {scores.std():.3f}" in line
            mean, _ = paired_difference(sets, f"{method}/{recipe}", f"k_center/{recipe}")
            assert f"{mean:+.3f} (two sets)" in line
    assert lines[-1].startswith("Recovery") and len(lines) == 2 + len(TEXTS) + 2 + 2
    for method in METHODS:
        assert any(line.startswith(f"| {method} |") for line in lines)
    partial = result | {"scores": [score for score in result["scores"] if score["row"] != "swaps/tuned"]}
    assert "| swaps | not run |" in text_table(partial)


def test_recovery_by_hand():
    means = {"embeddings/own": 0.7, "projection/relabelled": 0.3, "swaps/relabelled": 0.6, "k_center/relabelled": 0.5}
    for seeds, end in ((1, "swaps 0.75 (one set)."), (2, "swaps 0.75.")):
        result = result_of({row: [mean + seed / 10 for seed in range(seeds)] for row, mean in means.items()})
        assert text_table(result).endswith(f"learned labels: {end}")


@pytest.mark.parametrize(("changes", "message"), [
    ({"rows": ["swaps/own"]}, "a row must be one of"),
    ({"candidates": 0}, "candidates must be"),
    ({"seeds": []}, "seeds must name at least one seed"),
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
