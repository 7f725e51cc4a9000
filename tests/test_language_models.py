"""Language models as students: responses after prompts, padding, parameters, and their meta-gradients."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.core.problem import Problem
from distillkit.data.tasks import NO_TARGET
from distillkit.evaluation.scoring import answered, choice_scores, log_likelihoods, picks
from standin_hub import rounding

NAMES = ["facebook/opt-1.3b", "meta-llama/Llama-3.2-1B", "gpt2", "mistralai/Mistral-7B-v0.1", "google/gemma-2-2b",
         "google/gemma-3-270m", "Qwen/Qwen3-0.6B", "microsoft/Phi-3-mini-4k-instruct", "EleutherAI/pythia-70m"]
TASK = SimpleNamespace(kind="instruction", classes=(), max_length=16, name="questions")
BATCH = {
    "input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
}
RESPONSES = torch.tensor([[5, 6, NO_TARGET], [7, 8, 9]])


@pytest.fixture(scope="module")
def students(standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return {
            (name, trainable): dk.load_student(name, TASK, trainable=trainable, dtype="float64")
            for name in NAMES
            for trainable in ("full", "lora", "head")
        }


def by_hand(student, row):
    """Log-probabilities of a row's response tokens, from the model itself on the unpadded sequence."""
    prompt = BATCH["input_ids"][row][BATCH["attention_mask"][row] == 1]
    response = RESPONSES[row][RESPONSES[row] != NO_TARGET]
    with torch.no_grad():
        found = student.module(input_ids=torch.cat([prompt, response])[None]).logits[0].log_softmax(-1)
    places = torch.arange(len(response)) + len(prompt) - 1
    return found[places, response], found[: len(prompt)]


@pytest.mark.parametrize("name", NAMES)
def test_choices_behind_one_prompt_are_read_as_each_alone(students, name):
    """Prompts and choices of unlike lengths, more than a window's, one choice a single token, and two that begin alike."""
    student = students[name, "lora"]
    params, draw = student.init(3), np.random.default_rng(0)
    params = {key: value + 0.1 * torch.randn(value.shape, dtype=value.dtype, generator=torch.manual_seed(0))
              for key, value in params.items()}
    prompts = [draw.integers(3, 40, size).tolist() for size in (1, 7, 12)]
    choices = [[[5], [5, 6, 7], [5, 6, 8, 9]], [[9, 8], [4]], [draw.integers(3, 40, 6).tolist(), [3]]]
    student.cache["branches"] = False
    alone = log_likelihoods(student, prompts, choices, params=params)
    del student.cache["branches"]
    together = log_likelihoods(student, prompts, choices, params=params, batch_size=2)
    assert student.cache["branches"], "no model of these is read the slow way"
    for one, other in zip(alone, together, strict=True):
        assert np.allclose(one, other, rtol=rounding(student)) and (one < 0).all()


def test_a_model_that_reads_branches_otherwise_is_read_one_by_one(students, monkeypatch):
    student = students["facebook/opt-1.3b", "head"]
    true = log_likelihoods(student, [[5, 6, 7]], [[[3, 4], [8, 9, 3]]])[0]
    student.cache.pop("branches")
    inputs = type(student).branching_inputs
    monkeypatch.setattr(type(student), "branching_inputs", lambda self, ids, positions, branches: inputs(
        self, ids, torch.zeros_like(positions), branches))
    found = log_likelihoods(student, [[5, 6, 7]], [[[3, 4], [8, 9, 3]]])[0]
    assert not student.cache.pop("branches") and np.allclose(found, true)


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_log_likelihood_of_padded_batches(students, name, trainable):
    student = students[name, trainable]
    params = student.init(0)
    found, logits = student.log_likelihood(params, BATCH, RESPONSES), student.logits(params, BATCH)
    means = []
    for row in range(2):
        expected, prompt = by_hand(student, row)
        assert torch.allclose(found[row, : len(expected)], expected, rtol=rounding(student))
        assert not found[row, len(expected) :].any()
        assert torch.allclose(logits[row, : len(prompt)].log_softmax(-1), prompt, rtol=rounding(student))
        means.append(expected.mean())
    assert float(student.loss(params, BATCH, RESPONSES)) == pytest.approx(float(-sum(means) / 2), rel=rounding(student))


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_the_same_as_tokens(students, name):
    student = students[name, "full"]
    embedded = {"inputs_embeds": student.embedding[BATCH["input_ids"]], "attention_mask": BATCH["attention_mask"]}
    params = student.init(0)
    assert torch.equal(student.log_likelihood(params, embedded, RESPONSES), student.log_likelihood(params, BATCH, RESPONSES))


@pytest.mark.parametrize("name", NAMES)
def test_what_trains(students, name):
    full, lora, head = (students[name, t] for t in ("full", "lora", "head"))
    own = dict(full.module.named_parameters())
    assert full.module.get_input_embeddings().weight is not full.module.get_output_embeddings().weight
    assert "lm_head.weight" in full.trained_names and head.trained_names == ("lm_head.weight",)
    assert all(torch.equal(value, own[n]) for n, value in full.init(0).items()), "nothing of a language model is drawn afresh"
    assert lora.draws and not full.draws and not head.draws
    assert all(".lora_" in n for n in lora.trained_names)
    assert all(value.any() == (".lora_A." in n) for n, value in lora.init(0).items())
    assert any(not torch.equal(a, b) for a, b in zip(lora.init(0).values(), lora.init(1).values(), strict=True))


def test_lora_is_the_default_of_hub_models(standin_hub):
    assert dk.load_student("facebook/opt-1.3b", TASK).trainable == "lora"


def problem(student, steps=3):
    draw = torch.Generator().manual_seed(0)
    embeds = student.embedding[BATCH["input_ids"]]
    embeds = embeds + 0.1 * torch.randn(embeds.shape, generator=draw, dtype=torch.float64)
    params = student.init(0)
    return Problem(
        student=student, optimizer=dk.SGD(0.1), params=params, embeds=embeds, mask=BATCH["attention_mask"],
        targets=RESPONSES, step_sizes=torch.full((steps,), 0.1, dtype=torch.float64), rows=[torch.arange(2)] * steps,
        outer=[lambda p: student.loss(p, BATCH, RESPONSES.flip(0))],
    )


@pytest.mark.parametrize("trainable", ["full", "lora", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_replay_agrees_with_store_all(students, name, trainable):
    """To the rounding of the float32 softmax and norms that OPT and Llama keep in whatever type they compute."""
    run = problem(students[name, trainable])
    expected, found = dk.StoreAll()(run), dk.Replay()(run)
    assert expected.targets is None and expected.embeds.abs().max() > 0
    assert (found.embeds - expected.embeds).abs().max() <= 1e-5 * expected.embeds.abs().max()
    assert torch.allclose(found.step_sizes, expected.step_sizes, rtol=1e-5)


def test_a_classifier_scores_no_responses(world):
    with pytest.raises(ValueError, match="'bert-base-uncased' is a classifier; load it for an instruction task"):
        world[1].log_likelihood(world[1].init(0), BATCH, RESPONSES)


@pytest.mark.parametrize("responses", [torch.tensor([1, 2]), torch.ones(2, 3)])
def test_responses_of_another_shape(students, responses):
    student = students["gpt2", "head"]
    with pytest.raises(ValueError, match=r"responses must be token ids \[b, r\], not torch\.\w+ \(2"):
        student.log_likelihood(student.init(0), BATCH, responses)


@pytest.mark.parametrize(("source", "kind"), [("bert-base-uncased", "bert"), ("microsoft/mpnet-base", "mpnet")])
def test_an_encoder_is_no_language_model(standin_hub, source, kind):
    with pytest.raises(ValueError, match=f"kind '{kind}', which cannot be a student: an instruction task needs a") as error:
        dk.load_student(source, TASK)
    assert "download" not in str(error.value), "the files are whole; another copy would not help"


WORDS = ["the", "a", "of", "in", "and", "is", "to", "at", "on", "by", "for", "new", "it", "was", "year", "team"]


def questions(student, folder):
    """A task of three questions, two with choices of unequal length and one with choices of a single token."""

    def task_of(rows):
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return dk.load_task(str(folder), max_length=32)

    probe = task_of([{"prompt": "one or two", "response": WORDS[0], "choices": WORDS, "answer": 0}])
    short = [w for w, ids in zip(WORDS, probe.choice_ids(student.tokenizer, "test", 0), strict=True) if len(ids) == 1]
    assert len(short) > 1
    rows = [
        {"prompt": "red or green ?", "response": "a house", "choices": ["a", "a house", "a house by the sea"], "answer": 1},
        {"prompt": "one", "response": "two", "choices": ["two", "one and two"], "answer": 0},
        {"prompt": "one or two", "response": short[0], "choices": short, "answer": 0},
    ]
    return rows, task_of(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_choices_are_those_of_the_model_itself(students, name, batch_size, tmp_path):
    student = students[name, "full"]
    rows, task = questions(student, tmp_path)
    plain, by_length = choice_scores(student, student.init(0), task, "test", [1, 2, 0], batch_size)
    prompts = task.token_ids(student.tokenizer, "test")
    for place, number in enumerate([1, 2, 0]):
        row = rows[number]
        for i, (choice, ids) in enumerate(zip(row["choices"], task.choice_ids(student.tokenizer, "test", number), strict=True)):
            whole = torch.tensor([[*prompts[number], *ids]])
            with torch.no_grad():
                found = student.module(input_ids=whole).logits[0].log_softmax(-1)
            start = len(prompts[number])
            expected = sum(float(found[start + j - 1, token]) for j, token in enumerate(ids))
            assert plain[place][i] == pytest.approx(expected, rel=1e-6)  # decoders take their softmax in float32
            assert by_length[place][i] == pytest.approx(expected / len(choice), rel=1e-6)


@pytest.mark.parametrize("scores, right", [
    ([math.nan, math.nan, math.nan], False),  # and not the first choice, which is the answer
    ([-math.inf, -math.inf, -math.inf], False),
    ([-3.0, math.nan, -math.inf], True),
    ([-3.0, -2.0, math.nan], False),
])
def test_a_choice_without_a_finite_score_is_never_picked(scores, right):
    assert (picks([np.array(scores)]) == [0]) == right


def test_a_model_that_fell_apart_has_answered_nothing(students, tmp_path):
    student = students[NAMES[0], "full"]
    _, task = questions(student, tmp_path)
    broken = {name: torch.full_like(p, math.nan) for name, p in student.init(0).items()}
    assert not any(right.any() for right in answered(student, broken, task, "test"))
