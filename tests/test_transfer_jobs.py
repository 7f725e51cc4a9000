"""The experiment on transfer: texts made on one student, scored on others, pair by pair, from settings in a file."""


import pytest
import yaml

import distillkit as dk
from distillkit.cli.main import main
from distillkit.experiments import runner
from distillkit.experiments import transfer as transfer_jobs
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import by_set, classes_of, paired_difference, read
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import kind_of
from distillkit.experiments.transfer import TransferCell, TransferJob, parsed, short_name, transfer_table
from example_results import result_of

SETS = {
    "kind": "text", "corpus": "rotten_tomatoes", "max_length": 12, "length": 8, "unroll_steps": 2, "outer_steps": 2,
    "outer_batch": 4, "judge_steps": 5, "swap_steps": 2, "candidates": 4,
}
METHODS = ("random", "k_center", "projection", "anchors", "swaps")
PAIR, BACK = "bert-base-uncased to roberta-base", "distilbert-base-uncased to bert-base-uncased"
SMALL = {
    "name": "small", "sets": SETS, "students": ["bert-base-uncased", "distilbert-base-uncased", "roberta-base"],
    "seeds": [0, 1], "eval_seeds": [0, 1], "standard_steps": 2, "tuned_grid": {"step_size": [0.001], "steps": [1, 2]},
    "rows": [*(f"{PAIR}/{m}" for m in METHODS), f"{BACK}/random", f"{BACK}/swaps", "roberta-base/full"],
}
FIXED = {"steps": 3, "step_size": 1e-3, "batch": 2}
ASKED = {
    "name": "asked", "students": ["facebook/opt-1.3b", "meta-llama/Llama-3.2-1B"], "seeds": [0], "eval_seeds": [0],
    "standard_steps": 2,
    "recipe": "standard", "rows": ["opt-1-3b to Llama-3-2-1B/random", "opt-1-3b to Llama-3-2-1B/nacd text"],
    "sets": {"kind": "instruction", "corpus": "arc_easy", "trainable": "full", "max_length": 48, "fraction": 0.2,
             "expert_count": 1, "expert_epochs": 1, "expert_batch": 8, "snapshots_per_epoch": 2, "match_epochs": 0.5,
             "unroll_steps": 2, "inner_batch": 4, "outer_steps": 2},
}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """Both kinds of run from files of settings: their folder and the two results."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    with standin_hub.patched(standin_home):
        for settings in (SMALL, ASKED):
            path = folder / f"{settings['name']}.yaml"
            path.write_text(yaml.safe_dump(settings | {"kind": "transfer"}))
            assert main(["run", str(path), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, *(read(folder / f"{name}.json") for name in ("small", "asked"))


def job(**changes):
    return TransferJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in (SMALL | changes).items()})


def test_every_score_is_made(finished):
    _, result, _ = finished
    notes = result["cells"]["small"]["notes"]
    assert [*dict.fromkeys(score["row"] for score in result["scores"])] == sorted(SMALL["rows"])
    for score in result["scores"]:
        source, target, method = parsed(score["row"])
        note = notes[f"{score['row']} {score['set_seed']}"]
        assert (score.get("source", ""), score["target"], score["method"]) == (source, target, method)
        assert score["init_seed"] in ([score["set_seed"]] if method == "full" else [0, 1])
        assert note["recipe"]["name"] == score["recipe"] == ("standard" if method == "full" else "tuned")
        how = "carried" if method == "anchors" else "retokenized"
        assert method == "full" or (score["examples"] == 2 and note[how]["from"] == source)
    assert {name for name, note in notes.items() if "losses" in note} == {
        f"{source} {method} {seed}" for source, method in (
            ("bert-base-uncased", "embeddings"), ("bert-base-uncased", "swaps"), ("distilbert-base-uncased", "swaps"))
        for seed in (0, 1)}


def test_what_is_scored_is_the_text_with_hard_labels(finished, standin_hub):
    folder, result, _ = finished
    cell = Run(TransferCell, job(), folder, folder / "work").cell
    text = cell.maker("bert-base-uncased").set_of("swaps", 1)
    moved = dk.retokenize(transfer_jobs.hardened(text), cell.task, cell.reader("roberta-base"))
    note = result["cells"]["small"]["notes"][f"{PAIR}/swaps 1"]
    scores = [score for score in result["scores"] if (score["row"], score["set_seed"]) == (f"{PAIR}/swaps", 1)]
    assert note["retokenized"] == moved.meta["retokenized"] and scores[0]["nbytes"] == moved.nbytes and not moved.soft
    recipe = dk.Unroll(note["recipe"]["steps"], optimizer=dk.AdamW(note["recipe"]["optimizer"]["step_size"]), batch_size=32)
    again = dk.evaluate(moved, cell.task, cell.reader("roberta-base"), seeds=(0, 1), recipe=recipe)
    assert again.scores == pytest.approx([score["accuracy"] for score in scores], abs=1e-6)


def test_prompts_move_too(finished):
    _, _, result = finished
    notes = result["cells"]["asked"]["notes"]
    for row in ASKED["rows"]:
        assert notes[f"{row} 0"]["recipe"]["name"] == "standard" and notes[f"{row} 0"]["retokenized"]["tokens_after"] > 0
    assert {name for name, note in notes.items() if "steps" in note} == {"opt-1-3b nacd 0"}


def test_one_fixed_training_for_every_text_of_a_target(finished, standin_hub, tmp_path):
    asked = job(recipe="fixed", fixed={"roberta-base": FIXED}, rows=(f"{PAIR}/random", f"{PAIR}/k_center", "roberta-base/full"))
    notes = Run(TransferCell, asked, tmp_path, tmp_path / "work")(seeds=(0,))["cells"]["small"]["notes"]
    for method in ("random", "k_center"):
        recipe = notes[f"{PAIR}/{method} 0"]["recipe"]
        assert (recipe["steps"], recipe["optimizer"]["step_size"], recipe["batch_size"]) == (3, 1e-3, 2)
    assert notes["roberta-base/full 0"]["recipe"]["name"] == "standard"


def test_an_interrupted_run_goes_on(finished, standin_hub, monkeypatch):
    folder, result, _ = finished
    monkeypatch.setattr(transfer_jobs, "evaluate", lambda *a, **kw: pytest.fail("scored again"))
    monkeypatch.setattr(runner, "evaluate", lambda *a, **kw: pytest.fail("scored again"))
    run = Run(TransferCell, job(), folder, folder / "work")
    assert run() == result
    monkeypatch.setattr(transfer_jobs.TextCell, "create", lambda *a: pytest.fail("made again"))
    assert run.cell.maker("bert-base-uncased").set_of("swaps", 1).tokens is not None


def test_keywords_are_one_set_whatever_the_seed():
    rows = {"a to b/random": [0.4, 0.5, 0.45], "a to b/keywords": [0.6, 0.6, 0.6], "a to b/anchors": [0.7, 0.6, 0.8]}
    result = result_of(rows, {"cell": rows}, students=["a", "b"])
    lines = {line.split(" | ")[2]: line for line in transfer_table(result).splitlines() if line.startswith("| a")}
    assert "| 0.600 |" in lines["keywords"] and lines["keywords"].endswith("| 1 |")
    assert "| 0.700 ± 0.100 |" in lines["anchors"] and lines["anchors"].endswith("| 3 |")


def test_the_table(finished):
    _, result, _ = finished
    lines, sets = transfer_table(result).splitlines(), by_set(result)
    assert table_of(result).splitlines() == lines and len(lines) == 2 + len(SMALL["rows"]) + 2
    gains = " | ".join("{:+.3f} (two sets)".format(paired_difference(sets, f"{PAIR}/swaps", f"{PAIR}/{other}")[0])
                       for other in ("random", "k_center"))
    scores = sets.loc[f"{PAIR}/swaps"]
    chance = 1 / len(classes_of(result))
    full = sets.loc["roberta-base/full"].mean()
    share = f"{(scores.mean() - chance) / (full - chance):.0%}" if full > chance else ""
    spread = f"{scores.mean():.3f} ± {scores.std():.3f}"
    assert f"| bert-base-uncased | roberta-base | swaps | {spread} | {gains} |  | {share} | 2 |" in lines
    over_words = "{:+.3f} (two sets)".format(paired_difference(sets, f"{PAIR}/anchors", f"{PAIR}/projection")[0])
    (anchors,) = (line for line in lines if "| anchors |" in line)
    assert "minus projection" in lines[0] and anchors.split(" | ")[6] == over_words
    assert lines[2 + SMALL["rows"].index(f"{BACK}/random")].endswith("|  |  |  | 2 |"), "no full score of that target"


def test_the_table_by_hand_and_unfinished():
    means = {"a to b/random": 0.3, "a to b/k_center": 0.45, "a to b/swaps": 0.4, "a to c/random": 0.3, "a to c/swaps": 0.2}
    rows = {row: [mean + seed / 1000 for seed in range(3)] for row, mean in means.items()}
    lines = transfer_table(result_of(rows | {"a to b/projection": [], "b/full": [0.8]}, groups="wxyz")).splitlines()
    assert lines[3] == "| a | b | k_center | 0.451 ± 0.001 | +0.150 ± 0.000 |  | 37% | 3 |"
    assert lines[4] == "| a | b | swaps | 0.401 ± 0.001 | +0.100 ± 0.000 | -0.050 ± 0.000 | 27% | 3 |"
    assert "| a | b | projection | not run | | | | |" in lines and "| — | b | full data | 0.800 |  |  | 100% | 1 |" in lines
    assert lines[-1] == (
        "swaps: above random real text in 1 of 2 pairs, by more than the 95 % interval in 1. "
        "swaps: above k-centre's in 0 of 1 pairs, by more than the 95 % interval in 0.")
    two_sets = transfer_table(result_of({row: values[:2] for row, values in rows.items()}, groups="wxyz"))
    assert "swaps: above random real text in 1 of 2 pairs, by more than the 95 % interval in 0." in two_sets
    unfinished = transfer_table(result_of(dict.fromkeys(rows, []))).splitlines()
    assert len(unfinished) == 2 + len(rows) and all("not run" in line for line in unfinished[2:])


def test_short_names():
    assert [short_name(s) for s in ("offline:small-bert", "meta-llama/Llama-3.2-1B", "folder/mine/")] == [
        "small-bert", "Llama-3-2-1B", "mine"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("transfer_*.yaml")), ids=lambda path: path.stem)
def test_the_settings_that_come_with_the_kit(path):
    found = TransferJob.from_yaml(path)
    assert kind_of(path) == "transfer" and found.name == path.stem
    pairs = {(source, target) for source, target, _ in map(parsed, found.rows) if source}
    assert {f"{target}/full" for _, target in pairs} <= set(found.rows), "relative scores need the targets' full data"
    assert all(f"{source} to {target}/random" in found.rows for source, target in pairs)


@pytest.mark.parametrize(("changes", "message"), [
    ({"recipe": "own"}, "recipe must be 'tuned', 'standard' or 'fixed', not 'own'"),
    ({"recipe": "fixed"}, "fixed must give steps, step_size, batch for the target 'roberta-base', not None"),
    ({"recipe": "fixed", "fixed": {"roberta-base": {"steps": 2}}}, "fixed must give steps, step_size, batch"),
    ({"recipe": "fixed", "fixed": {"roberta-base": FIXED | {"steps": 0}}}, "^steps must be a whole number"),
    ({"recipe": "fixed", "fixed": {"roberta-base": FIXED | {"step_size": "fast"}}}, "^step_size must be a number"),
    ({"recipe": "fixed", "fixed": {"roberta-base": FIXED}}, "for the target 'bert-base-uncased'"),
    ({"eval_seeds": []}, "eval_seeds must name at least one seed"),
    ({"sets": SETS | {"kind": "poetry"}}, "kind of sets must be one of text, instruction"),
    ({"sets": SETS | {"swap_step": 2}}, "sets: unknown setting 'swap_step'"),
    ({"sets": SETS | {"student": "gpt2"}}, "sets: unknown setting 'student'"),
    ({"sets": {"kind": "text"}}, "the setting 'corpus' is missing"),
    ({"sets": SETS | {"candidates": 0}}, "candidates must be"),
    ({"sets": "text"}, "sets must be a valid dictionary"),
    ({"rows": ["roberta-base/full"]}, "rows must hold at least one"),
    ({"rows": [f"{PAIR}/embeddings"]}, "the method must be one of random"),
    ({"rows": ["gpt2 to roberta-base/random"]}, "a student must be one of bert-base-uncased"),
    ({"students": ["a/bert", "b/bert"]}, "one short name"),
    ({"students": ["offline:small-bert", "roberta-base"], "rows": ["small-bert to roberta-base/random"]}, "random weights"),
])
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_gains_are_over_every_selection_that_has_run():
    means = {"random": [0.3], "herding": [0.4], "sentences": [0.6], "swaps": []}
    head, _, *lines = transfer_table(result_of({f"a to b/{method}": mean for method, mean in means.items()})).splitlines()
    assert "minus random | minus herding |" in head and "k-centre" not in head
    assert lines[1] == "| a | b | herding | 0.400 | +0.100 (one set) |  |  | 1 |"
    assert lines[2] == "| a | b | sentences | 0.600 | +0.300 (one set) | +0.200 (one set) |  | 1 |"
    assert lines[3].count("|") == head.count("|") and "not run" in lines[3]
    assert "sentences: above herding's in 1 of 1 pairs, by more than the 95 % interval in 0." in lines[-1]
