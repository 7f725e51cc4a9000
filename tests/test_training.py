"""The stock Trainer on distilled sets: the same loss, the same steps and the same scores as the kit's own inner step."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
import transformers

import distillkit as dk
from distillkit.applications.trainer import (
    Examples,
    Padded,
    hugging_face_model,
    own_recipe,
    response_cross_entropy,
    soft_cross_entropy,
    torch_optimizer,
)
from distillkit.core.inner import inner_step, set_parts
from distillkit.io.seeds import derive_seed

OPTIMIZERS = [dk.SGD(0.3), dk.SGD(0.3, clip_norm=0.05), dk.Momentum(0.1), dk.Momentum(0.1, nesterov=True),
              dk.AdamW(1e-2, weight_decay=0.1)]


@pytest.fixture(scope="module")
def proof(task, standin_home):
    """Students, in float64 where rounding is not to hide a difference."""
    import standin_hub

    with standin_hub.patched(standin_home):
        # Padded rows of a decoder are NaN in float64: transformers masks with its lowest number, and softmax takes float32.
        kinds = {"bert-base-uncased": "float64", "microsoft/deberta-v3-base": "float64", "facebook/opt-1.3b": "float32",
                 "gpt2": "float32", "answerdotai/ModernBERT-base": "float32", "google/gemma-3-270m": "float32"}
        return {name: dk.load_student(name, task, dtype=dtype) for name, dtype in kinds.items()}


@pytest.fixture(scope="module")
def minilm(task):
    return dk.load_student("offline:minilm", task)


def with_recipe(distilled, unroll, sizes):
    return dataclasses.replace(distilled, step_sizes=torch.tensor(sizes), meta={**distilled.meta, "recipe": unroll.recipe()})


def uneven(task, student, per_class=2):
    """Soft labels, free embeddings, and examples of different lengths."""
    found = dk.DistilledSet.from_real(task, student, per_class=per_class, length=8)
    mask, draw = found.mask.clone(), torch.Generator().manual_seed(0)
    mask[0, 5:] = False
    noise = torch.randn(found.embeds.shape, generator=draw, dtype=found.embeds.dtype)
    return dataclasses.replace(found, embeds=found.embeds + 0.1 * noise, mask=mask, free=found.free & mask, tokens=None)


def ours(student, params, distilled, unroll):
    """The kit's own inner steps on the whole set."""
    targets = distilled.targets.to(student.dtype) if distilled.soft else distilled.targets
    state = unroll.optimizer.init(params)
    for size in distilled.step_sizes.tolist():
        everything = torch.arange(len(distilled)), distilled.embeds, distilled.mask, targets
        parts = set_parts(*everything, micro_batch=None, dropout=None)
        params, state, *_ = inner_step(student, unroll.optimizer, params, state, parts, size)
    return params


def train(folder, student, params, data, loss=soft_cross_entropy, optimizers=(None, None), collator=None, **arguments):
    model = hugging_face_model(student, params)
    if callable(optimizers):
        arguments, optimizers = optimizers(model, arguments)
    settings = transformers.TrainingArguments(str(folder), report_to="none", save_strategy="no", disable_tqdm=True,
                                              use_cpu=True, logging_strategy="no", **arguments)
    trainer = transformers.Trainer(model, settings, collator or Padded(student), data, compute_loss_func=loss,
                                   optimizers=optimizers)
    trainer.train()
    return trainer


def own(distilled, **more):
    def settle(model, arguments):
        found, optimizers = own_recipe(distilled, model)
        return found | arguments | more, optimizers

    return settle


def trained(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def close(one, other, rtol=1e-9):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol, msg=lambda found, n=name: f"{n}: {found}")


# --- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-base-uncased", "microsoft/deberta-v3-base", "facebook/opt-1.3b", "gpt2",
                                  "answerdotai/ModernBERT-base", "google/gemma-3-270m"])
def test_the_loss_is_the_kits(task, proof, name):
    """Padding on either side, soft labels and hard ones."""
    student = proof[name]
    params, model = student.init(1), None
    for found in (uneven(task, student), dataclasses.replace(uneven(task, student), targets=torch.tensor([0, 0, 1, 1]))):
        batch = Padded(student)([Examples(found, student)[i] for i in range(len(found))])
        model = hugging_face_model(student, params)
        labels = batch.pop("labels")
        theirs = soft_cross_entropy(model(**batch), labels)
        targets = found.targets.to(student.dtype) if found.soft else found.targets
        mine = student.loss(params, {"inputs_embeds": found.embeds, "attention_mask": found.mask}, targets)
        torch.testing.assert_close(theirs, mine, rtol=1e-9 if student.dtype == torch.float64 else 1e-6, atol=0)
    assert labels.dtype == torch.int64
    close(trained(model), params, rtol=0)


def test_the_student_is_left_alone(task, proof):
    student = proof["bert-base-uncased"]
    before = {n: p.clone() for n, p in student.module.named_parameters()}
    model = hugging_face_model(student, student.init(0))
    assert not model.get_input_embeddings().weight.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {*student.trained_names}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[n], p) and not p.requires_grad for n, p in student.module.named_parameters())


def test_dropout_is_off_unless_asked_for(task, proof):
    student = proof["bert-base-uncased"]
    found = uneven(task, student)
    batch = Padded(student)([Examples(found, student)[0]])
    batch.pop("labels")
    quiet, loud = (hugging_face_model(student, student.init(0), dropout=d).train() for d in (False, True))
    assert torch.equal(quiet(**batch).logits, quiet(**batch).logits)
    assert not torch.equal(loud(**batch).logits, loud(**batch).logits)


def test_what_cannot_be(task, world, proof):
    student = proof["bert-base-uncased"]
    found = uneven(task, student)
    model = hugging_face_model(student, student.init(0))
    with pytest.raises(ValueError, match="carries no recipe"):
        own_recipe(found, model)
    with pytest.raises(ValueError, match=r"torch.optim has no optimiser that makes the steps of AdamW\(.*eps_root=0.1"):
        torch_optimizer(dk.AdamW(eps_root=0.1), model)
    with pytest.raises(ValueError, match="embeddings are 16 wide, student 'bert-base-uncased' wants 32"):
        Examples(dataclasses.replace(found, embeds=found.embeds[..., :16]), student)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_the_steps_are_the_kits(task, proof, optimizer, tmp_path):
    """Three steps of learned step sizes that all differ: every parameter, to rounding in float64."""
    student, unroll = proof["bert-base-uncased"], dk.Unroll(3, optimizer=optimizer)
    found = with_recipe(uneven(task, student), unroll, [0.02, 0.3, 0.1])
    params = student.init(3)
    trainer = train(tmp_path, student, params, Examples(found, student), optimizers=own(found))
    mine = ours(student, params, found, unroll)
    assert max(float((mine[n] - params[n]).abs().max()) for n in params) > 1e-3, "it has moved"
    close(trained(trainer.model), mine, rtol=1e-6)  # clip_grad_norm_ works in float32


@pytest.mark.parametrize("soft", [True, False])
def test_accumulated_gradients_add_up(task, proof, soft, tmp_path):
    student, unroll = proof["bert-base-uncased"], dk.Unroll(2, optimizer=dk.SGD(0.3))
    found = with_recipe(uneven(task, student), unroll, [0.3, 0.2])
    found = found if soft else dataclasses.replace(found, targets=torch.tensor([0, 0, 1, 1]))
    params = student.init(3)
    parts = own(found, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = train(tmp_path, student, params, Examples(found, student), optimizers=parts)
    close(trained(trainer.model), ours(student, params, found, unroll))


def test_responses_train_as_the_kit_trains_them(tmp_path):
    task = dk.load_task("docstrings_qa:library", max_length=64, limit=24)
    student = dk.load_student("offline:tiny-opt", task)
    unroll = dk.Unroll(2, optimizer=dk.SGD(0.1))
    found = with_recipe(dk.DistilledSet.from_real(task, student, fraction=0.2), unroll, [0.1, 0.05])
    params = student.init(0)
    batch = Padded(student)([Examples(found, student)[i] for i in range(len(found))])
    labels, model = batch.pop("labels"), hugging_face_model(student, params)
    mine = student.loss(params, {"inputs_embeds": found.embeds, "attention_mask": found.mask}, found.targets)
    torch.testing.assert_close(response_cross_entropy(model(**batch), labels), mine, rtol=1e-5, atol=0)
    trainer = train(tmp_path, student, params, Examples(found, student), response_cross_entropy, optimizers=own(found))
    close(trained(trainer.model), ours(student, params, found, unroll), rtol=1e-4)
    with pytest.raises(ValueError, match="set gradient_accumulation_steps=1"):
        train(tmp_path, student, params, Examples(found, student), response_cross_entropy,
              optimizers=own(found, per_device_train_batch_size=2, gradient_accumulation_steps=2))


# --- scores ----------------------------------------------------------------------------------------------------------


def tokenized(rows, tokenizer, labels):
    return datasets.Dataset.from_dict({**tokenizer(rows["text"][:], truncation=True, max_length=12), "labels": labels})


def accuracy(trainer, task, tokenizer):
    """On the test split, as text: what any user of the Trainer would do."""
    trainer.compute_loss_func = None
    found = trainer.predict(tokenized(task.test, tokenizer, task.test["label"][:]))
    return float((found.predictions.argmax(-1) == np.array(task.test["label"])).mean())


def test_embeddings_score_under_the_trainer_as_under_evaluate(task, minilm, tmp_path):
    """The same fresh models and steps: at most one of 40 test rows may fall on the other side by rounding."""
    student, unroll = minilm, dk.Unroll(6, optimizer=dk.SGD(0.2))
    found = with_recipe(uneven(task, student), unroll, torch.linspace(0.3, 0.1, 6).tolist())
    expected = dk.evaluate(found, task, student, seeds=(0,), recipe="own").scores
    for seed, score in enumerate(expected):
        start = student.init(derive_seed("evaluate-init", seed))
        trainer = train(tmp_path, student, start, Examples(found, student), optimizers=own(found))
        trainer.data_collator = transformers.DataCollatorWithPadding(student.tokenizer)
        assert abs(accuracy(trainer, task, student.tokenizer) - score) <= 1 / 40 + 1e-9
    assert min(expected) > 0.6 and max(expected) < 1, "the scores say something"


def test_text_scores_under_the_trainer_as_under_evaluate(task, minilm, tmp_path):
    """Plain rows of ``to_text`` with the Trainer's own order, against the kit's order: means within seed noise."""
    student = minilm
    found = dk.select(task, student, "random", per_class=4, length=12)
    unroll, rows = dk.Unroll(10, optimizer=dk.AdamW(3e-4), batch_size=4), found.to_text()
    expected = dk.evaluate(found, task, student, seeds=(0, 1), recipe=unroll)
    scores = []
    for seed in range(2):
        data = tokenized(rows, student.tokenizer, rows["probabilities"][:])
        trainer = train(tmp_path, student, student.init(derive_seed("evaluate-init", seed)), data, seed=seed, max_steps=10,
                        collator=transformers.DataCollatorWithPadding(student.tokenizer), per_device_train_batch_size=4,
                        learning_rate=3e-4, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0)
        scores.append(accuracy(trainer, task, student.tokenizer))
    assert 0.6 < expected.mean < 1, "it learns"
    noise = max(expected.std, float(np.std(scores, ddof=1)), 0.025)
    assert abs(np.mean(scores) - expected.mean) <= 3 * noise, (scores, expected.scores)
