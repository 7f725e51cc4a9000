"""Rows without choices are scored by the loss of their responses, and a right choice is right wherever it stands."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import yaml

import distillkit as dk
from distillkit.applications.merging import rescaled, with_recipe
from distillkit.applications.processes import Team
from distillkit.applications.prompting import few_shot
from distillkit.cli.main import main
from distillkit.evaluation.recipes import as_recipe
from distillkit.evaluation.scoring import answered, response_loss
from distillkit.experiments.instruction import InstructionCell, InstructionJob
from distillkit.experiments.results import as_json
from distillkit.experiments.runner import Run
from distillkit.io.seeds import derive_seed

PAIRS = [("it was warm", "tender and fresh"), ("a dull story", "flat"), ("we saw a river and a coast", "the country"),
         ("what a stale day", "tired , almost boring"), ("so clever", "fun"), ("the market made all think", "of profit")]
STANDARD, TUNED = dk.Standard(least_steps=2), dk.Tuned({"step_size": (1e-3, 1e-2), "steps": (1, 3)})
ROWS = [{"instruction": prompt, "output": response} for prompt, response in PAIRS]


def written(folder, rows):
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return dk.load_task(written(tmp_path_factory.mktemp("data") / "replies", ROWS), max_length=32)


@pytest.fixture(scope="module")
def student(asked, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return dk.load_student("gpt2", asked, trainable="full", dtype="float64")  # its softmax is float64 too


def by_hand(student, params, task, split, rows):
    """The mean over all response tokens, one unpadded sequence at a time, from the model itself."""
    found = []
    for row in rows:
        prompt, response = task.token_ids(student.tokenizer, split)[row], task.response_ids(student.tokenizer, split)[row]
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([prompt + response])}
            logits = torch.func.functional_call(student.module, params, kwargs=inputs).logits[0].log_softmax(-1)
        found += [-float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(response)]
    return float(np.mean(found))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("rows", [None, [4, 1, 2]])
def test_the_loss_of_responses_by_hand(asked, student, rows, batch_size):
    params = student.init(0)
    expected = by_hand(student, params, asked, "test", rows or range(6))
    assert response_loss(student, params, asked, "test", rows, batch_size) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("recipe", [dk.Unroll(3, optimizer=dk.SGD(0.5)), STANDARD, TUNED])
def test_evaluate_tells_the_loss_where_there_are_no_choices(asked, student, recipe):
    distilled = dk.select(asked, student, "random", fraction=0.5)
    found = dk.evaluate(distilled, asked, student, seeds=(0, 1), recipe=recipe)
    for seed, loss in zip((0, 1), found.losses, strict=True):
        params = student.init(derive_seed("evaluate-init", seed))
        *_, params = as_recipe(recipe).plan(distilled, asked, student)(seed).train(student, params)
        assert loss == pytest.approx(by_hand(student, params, asked, "test", range(6)), rel=1e-9)
    assert found.loss == pytest.approx(np.mean(found.losses))
    assert math.isnan(found.mean) and all(map(math.isnan, found.scores)) and len(found.scores) == 2
    assert found.worth == -found.loss
    assert found.normalized is None and found.groups == {}
    assert f"{found.loss:.3f}" in str(found) and f"{math.exp(found.loss):.3g}" in str(found) and "nan" not in str(found)
    row = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert row["losses"] == [round(loss, 6) for loss in found.losses] and row["mean"] is None


def test_tuned_takes_the_lowest_validation_loss(asked, student):
    distilled = dk.select(asked, student, "random", fraction=0.5)
    recipe = dk.evaluate(distilled, asked, student, seeds=(0,), recipe=TUNED).recipe
    losses = {}
    for step_size in (1e-3, 1e-2):
        for steps in (1, 3):
            unroll = dk.Unroll(steps, optimizer=dk.AdamW(step_size), batch_size=32)
            plan = dk.Fixed(unroll).plan(distilled, asked, student)(0)
            *_, params = plan.train(student, student.init(derive_seed("tune-init", 0)))
            losses[steps, step_size] = by_hand(student, params, asked, "validation", range(6))
    best = min(losses, key=losses.__getitem__)
    assert (recipe["steps"], recipe["optimizer"]["step_size"]) == best
    assert recipe["validation_loss"] == pytest.approx(losses[best]) and "validation" not in recipe


def test_step_sizes_are_scaled_to_the_lowest_validation_loss(asked, student):
    distilled = with_recipe(dk.select(asked, student, "random", fraction=0.5), dk.Unroll(2, optimizer=dk.SGD(0.1)), student)
    best, worth = rescaled(distilled, asked, student, factors=(0.01, 1.0), seeds=(0,))
    sets = {factor: dataclasses.replace(distilled, step_sizes=factor * distilled.step_sizes) for factor in worth}
    seed = derive_seed("rescale", 0)
    losses = {f: dk.evaluate(s, asked, student, seeds=(seed,), recipe="own", split="validation").loss for f, s in sets.items()}
    assert worth == {factor: -loss for factor, loss in losses.items()} and losses[0.01] != losses[1.0]
    assert torch.equal(best.step_sizes, sets[min(losses, key=losses.__getitem__)].step_sizes)


def test_the_full_data_and_a_team_of_processes(asked, student):
    found, team = (of(None, asked, student, seeds=(0, 1), recipe=STANDARD) for of in (dk.evaluate, Team(0, 1).evaluate))
    assert found.losses == team.losses and found.examples == 6 and math.isnan(team.mean)


def test_rows_without_choices_among_others(tmp_path, student):
    rows = [{"prompt": prompt, "response": response} for prompt, response in PAIRS]
    rows[2] |= {"choices": ["the country", "the coast"]}
    mixed = dk.load_task(written(tmp_path / "mixed", rows), max_length=32)
    assert mixed.without_choices("test").tolist() == [0, 1, 3, 4, 5] and mixed.without_choices("test", [2]).tolist() == []
    found = dk.evaluate(dk.select(mixed, student, "random", fraction=0.5), mixed, student, seeds=(0,), recipe=STANDARD)
    assert len(found.losses) == 1 and found.losses[0] > 0
    assert few_shot(mixed, student, rows=[2]).rows == 1


def test_what_needs_choices_says_so_before_anything_is_trained(asked, student, standin_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(dk.Student, "init", None)
    for ask in (lambda: few_shot(asked, student), lambda: answered(student, {}, asked, "test")):
        with pytest.raises(ValueError, match="test' has 6 rows without choices, such as row 0"):
            ask()
    written(tmp_path / "replies", ROWS)
    job = InstructionJob(name="small", corpus=str(tmp_path / "replies"), student="facebook/opt-1.3b", trainable="full",
                         seeds=(0,), fraction=0.5, max_length=32)
    with pytest.raises(ValueError, match="validation' has 6 rows without choices"):
        Run(InstructionCell, job, tmp_path / "results", tmp_path / "work")
    assert not (tmp_path / "results").exists() and not (tmp_path / "work").exists()


def test_from_the_command_line_to_a_card(tmp_path, standin_hub, capsys):
    corpus = written(tmp_path / "replies", ROWS)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({
        "name": "a", "corpus": str(corpus), "student": "facebook/opt-1.3b", "trainable": "full", "fraction": 0.5,
        "outer_steps": 1, "unroll_steps": 1, "outer_batch": 2, "max_length": 32, "limit": {"test": 4}, "seeds": [0, 1]}))
    where = ["--work", str(tmp_path)]
    assert main(["distil", "--config", str(tmp_path / "a.yaml"), *where]) == 0
    assert main(["evaluate", "--name", "a", *where]) == 0
    (row,) = map(json.loads, (tmp_path / "a" / "scores.jsonl").read_text().splitlines())
    out = capsys.readouterr()
    assert f"response loss {np.mean(row['losses']):.3f}" in out.out and "6 / 6 / 4 rows" in out.err and row["mean"] is None
    assert main(["card", "--name", "a", *where]) == 0
    assert f"| response loss {np.mean(row['losses']):.3f} ± {np.std(row['losses'], ddof=1):.3f}" in capsys.readouterr().out


# --- equal choices ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["words", "letters"])
def twins(request, tmp_path, monkeypatch):
    """Questions all of whose choices read the same, the answer at any place among them."""
    if request.param == "words":
        rows = [{"prompt": prompt, "response": "dull", "choices": ["dull"] * 3, "answer": number % 3}
                for number, (prompt, _) in enumerate(PAIRS)]
        return dk.load_task(written(tmp_path / "twins", rows), max_length=32)
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    rows = [{"question": prompt, "choices": ["dull"] * 4, "answer": number % 4, "subject": "a"}
            for number, (prompt, _) in enumerate(PAIRS)]
    written(tmp_path / "mmlu", rows)
    return dk.load_task("mmlu", max_length=64)


def test_whichever_of_equal_choices_a_model_takes_is_right(twins, student):
    assert len({*twins.test["answer"]}) > 1
    assert all(right.all() for right in answered(student, student.init(0), twins, "test"))
    assert few_shot(twins, student).scores == few_shot(twins, student).normalized == (1.0,)
    found = dk.evaluate(dk.select(twins, student, "random", fraction=0.5), twins, student, seeds=(0,), recipe=TUNED)
    assert found.scores == found.normalized == (1.0,) and {*found.groups.values()} == {1.0} and found.losses is None
    assert found.recipe["validation"] == 1.0
