"""The experiment on any recipe: a grid that is fixed on validation first, then every set under every recipe of it."""

import pandas as pd
import pytest
import yaml

import distillkit as dk
from distillkit.cli.main import main
from distillkit.evaluation.recipes import grid_scores, tuning_rows, tuning_starts
from distillkit.experiments.any_recipe import (
    SMALL_RATES,
    AnyRecipeCell,
    AnyRecipeGrid,
    described,
    recipe_name,
    under_every_recipe,
)
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import frame, read
from distillkit.io.seeds import derive_seed

BASE = {
    "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8, "seeds": [0, 1],
    "eval_seeds": [0, 1], "unroll_steps": 2, "outer_steps": 2, "outer_batch": 4, "lr": 0.12,
    "tuned_initialisations": 2, "tuned_rows": 10, "tuned_grid": {"step_size": [0.001], "steps": [1]},
    "recipe_grid": {"SGD": [0.1, 1e-7], "AdamW": [0.01]}, "recipe_steps": [1, 3], "recipe_share": 0.8,
    "central_steps": 2, "central_step_size": 0.01, "most_steps": 3, "recipe_outer_steps": 3,
}
ROWS = ["keywords/every", "random/every", "embeddings/every", "longer unroll/every", "mixture/every", "mixture/own",
        "mixture/tuned", "embeddings from keywords/every"]
SETTINGS = {"kind": "any_recipe", "name": "travel", "per_class": [1], "base": BASE, "rows": ROWS}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    import standin_hub

    folder = tmp_path_factory.mktemp("any-recipe")
    (folder / "travel.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    with standin_hub.patched(standin_home):
        assert main(["run", str(folder / "travel.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, read(folder / "travel.json")


@pytest.fixture(scope="module")
def cell(finished, standin_home):
    """The cell, opened again."""
    import standin_hub

    with standin_hub.patched(standin_home):
        job = AnyRecipeGrid.from_yaml(finished[0] / "travel.yaml").cells()["per_class=1"]
        return AnyRecipeCell(job, finished[0] / "work" / job.name, finished[0])


def test_the_grid_is_what_real_sentences_reach_on_validation(finished, cell, monkeypatch):
    """The choice stands in the result, follows from validation alone, and is that of an independent computation."""
    stored = finished[1]["cells"]["per_class=1"]["notes"]["recipes"]
    real = dk.select(cell.task, cell.student, "random", per_class=1, length=8)
    optimizers = {f"SGD {size:g}": dk.SGD(size) for size in (0.1, 1e-7)} | {"AdamW 0.01": dk.AdamW(0.01)}
    validation = {}
    for name, optimizer in optimizers.items():
        for steps in (1, 3):
            recipe, accuracies = dk.Unroll(steps, optimizer=optimizer), []
            for seed in tuning_starts(cell.student, 2):
                plan = dk.evaluation.recipes.as_recipe(recipe).plan(real, cell.task, cell.student)(0)
                *_, params = plan.train(cell.student, cell.student.init(seed))
                rows = tuning_rows(cell.task, 10)
                accuracies.append(dk.evaluation.scoring.worth(cell.student, params, cell.task, "validation", rows))
            validation[f"{name} × {steps}"] = sum(accuracies) / 2
    assert stored["validation"] == pytest.approx(validation, abs=1e-6) and stored["chance"] == 0.5
    least = 0.8 * max(validation.values())
    assert stored["names"] == [name for name in validation if validation[name] >= least]


def test_every_set_is_scored_under_every_recipe_that_stayed(finished, cell):
    _, result = finished
    scores, names = frame(result), result["cells"]["per_class=1"]["notes"]["recipes"]["names"]
    for row in (row for row in ROWS if row.endswith("every")):
        of_row = scores[scores["row"] == row]
        assert {*zip(of_row["set_seed"], of_row["recipe"], of_row["init_seed"])} == {
            (seed, name, init) for seed in (0, 1) for name in names for init in (0, 1)}
        assert len(of_row) == 4 * len(names) and (of_row["split"] == "test").all()
    distilled = cell.of_seed(1).set_of("mixture", 1)
    points = {recipe_name(*point): point for point in cell.of_seed(1).recipes()} if names else {}
    name = names[-1]
    optimizer, steps = points[name]
    direct = dk.evaluate(distilled, cell.task, cell.student, seeds=(0, 1), recipe=dk.Unroll(steps, optimizer=optimizer))
    rows = scores[(scores["row"] == "mixture/every") & (scores["set_seed"] == 1) & (scores["recipe"] == name)]
    assert rows.sort_values("init_seed")["accuracy"].tolist() == pytest.approx(list(direct.scores), abs=1e-6)


def test_sets_are_learned_through_what_their_names_say(cell):
    for method in ("longer unroll", "mixture"):
        distilled = cell.of_seed(0).set_of(method, 0)
        recipe = distilled.meta["recipe"]
        assert recipe["optimizer"]["name"] == "AdamW" and recipe["steps"] == 2 and recipe["outer_steps"] == 3
        assert ("mixture" in recipe) == (method == "mixture")
        assert distilled.embeds.shape == cell.of_seed(0).set_of("keywords", 0).embeds.shape


@pytest.mark.parametrize(("name", "keywords", "small"), [
    ("embeddings", False, False), ("embeddings from keywords", True, True), ("embeddings at small rates", False, True),
    ("embeddings from keywords at large rates", True, False)])
def test_start_and_rates_are_crossed_and_nothing_else_differs(cell, name, keywords, small):
    of_seed = cell.of_seed(0)
    distilled, reference = of_seed.set_of(name, 0), of_seed.set_of("embeddings", 0)
    same = ("optimizer", "steps", "outer_steps")
    assert {key: distilled.meta["recipe"][key] for key in same} == {key: reference.meta["recipe"][key] for key in same}
    start = of_seed.set_of("keywords", 0) if keywords else of_seed.start(0)
    moved = (distilled.embeds - start.embeds).abs()[distilled.free].max()
    rate = SMALL_RATES["lr"] if small else of_seed.job.rates()["lr"]
    assert rate < moved <= 2.2 * rate, "two outer steps of Adam at the rate of its own"


def test_gains_are_over_embeddings_of_the_same_start(finished):
    lines = [line.split(" | ") for line in table_of(finished[1]).splitlines() if line.startswith("| per_class=1 |")]
    worst = {name: under_every_recipe(frame(finished[1]), name).min(axis=1) for name in ("mixture", "embeddings from keywords")}
    gained = (worst["mixture"] - worst["embeddings from keywords"]).mean()
    assert "worst: gain over embeddings from keywords" in table_of(finished[1])
    assert next(line for line in lines if line[1] == "mixture")[-1] == f"{gained:+.3f} (two sets) |"
    assert next(line for line in lines if line[1] == "embeddings from keywords")[-1].strip() == "|"


def test_a_second_run_computes_nothing(finished, standin_hub, monkeypatch):
    folder, result = finished
    monkeypatch.setattr("distillkit.experiments.any_recipe.grid_scores", None)
    assert main(["run", str(folder / "travel.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    assert read(folder / "travel.json")["scores"] == result["scores"]


def test_the_table_names_the_worst_recipe(finished):
    _, result = finished
    recipes, shown = result["cells"]["per_class=1"]["notes"]["recipes"], table_of(result)
    assert f"{len(recipes['names'])} of 6 recipes stay" in shown and f"{max(recipes['validation'].values()):.3f}" in shown
    lines = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|")]
    heads, mixture = [text.strip() for text in lines[0]], next(line for line in lines if "mixture" in line[1])
    of_set = under_every_recipe(frame(result), "mixture")
    worst = of_set.min(axis=1)
    cell = mixture[heads.index("worst recipe")]
    assert f"{worst.mean():.3f} ± {worst.std():.3f}" in cell and of_set.mean().idxmin() in cell
    assert all(any(name in line[0] for line in lines) for name in of_set.columns)


def test_ratio_of_worst_to_best_above_chance():
    table = pd.DataFrame({"a": [0.9, 0.7, 0.5], "b": [0.7, 0.7, 0.6], "c": [0.8, 0.3, 0.6]})
    best, median, worst, ratio = described(table, 0.2)
    assert best.startswith("0.733") and median.startswith("0.700") and worst == "0.500 ± 0.200 (c)"
    assert ratio == "0.71", "the median of 5/7, 1/5 and 3/4"


@pytest.mark.parametrize(("name", "value"), [
    ("recipe_grid", {"Adam": [0.1]}), ("recipe_steps", []), ("central_share", 0), ("recipe_share", 1.5), ("most_steps", 0)])
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        AnyRecipeGrid(**SETTINGS | {"base": BASE | {name: value}})


def test_recipes_of_one_optimizer_share_a_run(cell, monkeypatch):
    """As the step size is constant, the run of the most steps passes through the others."""
    distilled, starts = cell.of_seed(0).set_of("random", 0), []
    init = dk.Student.init
    monkeypatch.setattr(dk.Student, "init", lambda self, seed: starts.append(seed) or init(self, seed))
    recipes = [(dk.SGD(0.1), 1), (dk.SGD(0.1), 4), (dk.AdamW(0.1), 2)]
    scores = grid_scores(distilled, cell.task, cell.student, recipes, split="validation", starts=[5, derive_seed("a", 1)])
    assert len(starts) == 4 and [*scores] == recipes and all(len(values) == 2 for values in scores.values())
