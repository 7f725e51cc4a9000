"""Distilled sets under the stock ``transformers.Trainer``.

The kit trains by its own inner step, because it differentiates through it.  Training alone needs no such step: a Hugging
Face model takes ``inputs_embeds`` in the place of token ids, and ``Trainer`` takes a ``compute_loss_func`` for labels that
are distributions.  This module holds the small pieces in between::

    model = hugging_face_model(student, student.init(0))
    arguments, optimizers = own_recipe(distilled, model)          # or any TrainingArguments of your own
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments("out", report_to="none", **arguments), Padded(student),
        Examples(distilled, student), compute_loss_func=soft_cross_entropy, optimizers=optimizers,
    )
    trainer.train()

Three things differ from fine-tuning on a corpus, and each changes scores.  The embedding table stays frozen, as it did while
the set was learned.  Dropout is off unless it is asked for.  ``Trainer`` clips gradients to norm 1 and decays its learning
rate by default, so :func:`own_recipe` passes the set's own recipe, learned step sizes included.  With these the parameters
after each step are those of the kit's own inner step.

The prompts of an instruction set are embeddings and its responses are tokens.  The loss is taken on the responses: the mean
over examples of the mean over their tokens, as while the set was learned.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import from_recipe
from distillkit.core.optimizers import SGD, AdamW, Momentum, Optimizer
from distillkit.core.problem import bound_step_sizes
from distillkit.core.student import Params, Student
from distillkit.data.tasks import NO_TARGET


def hugging_face_model(student: Student, params: Params, *, dropout: bool = False) -> transformers.PreTrainedModel:
    """The student as a model that owns its weights, at ``params``; the student itself is not touched.

    Args:
        params: as ``student.init`` returns them.
        dropout: let ``train()`` switch the model's dropout on.  Off, as in the kit's own inner step, the model stays in
            evaluation mode whatever the ``Trainer`` says.

    Returns:
        a copy of the module, which trains what the student trains and has its embedding table frozen.
    """
    model = copy.deepcopy(student.module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in params)
            if name in params:
                parameter.copy_(params[name])
    if not dropout:
        model.train = lambda mode=True: model  # training mode has no other effect than dropout
    return model


def params_of(model: torch.nn.Module, student: Student) -> Params:
    """The trained parameters of a model, as ``student.logits`` and the kit's scoring take them."""
    return {name: model.get_parameter(name).detach().clone() for name in student.trained_names}


class Examples(torch.utils.data.Dataset):
    """A distilled set as a torch Dataset of single examples without padding.

    An item holds ``inputs_embeds`` ``[l, d]``, scaled as the model takes them, and ``labels``: probabilities ``[c]`` for soft
    labels, a class for hard ones.  In an instruction set the embeddings of the response follow those of the prompt, and
    ``labels`` ``[l]`` are -100 at the prompt and the tokens of the response.

    Raises:
        ValueError: the embeddings belong to another table than the student's, or the classes have other names.
    """

    def __init__(self, distilled: DistilledSet, student: Student):
        distilled = distilled.for_student(student)
        self.distilled, self.table, self.scale = distilled, student.embedding.cpu(), student.scale
        self.labels = distilled.targets.to(student.dtype).softmax(-1) if distilled.soft else distilled.targets

    def __len__(self) -> int:
        return len(self.distilled)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        embeds = self.distilled.embeds[i, self.distilled.mask[i] != 0].to(self.table.dtype)
        labels = self.labels[i]
        if labels.is_floating_point() or labels.ndim == 0:
            return {"inputs_embeds": embeds * self.scale, "labels": labels}
        response = labels[labels != NO_TARGET]
        return {
            "inputs_embeds": torch.cat([embeds, F.embedding(response, self.table)]) * self.scale,
            "labels": torch.cat([labels.new_full((len(embeds),), NO_TARGET), response]),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """Collates :class:`Examples`: ``inputs_embeds`` ``[b, l, d]``, ``attention_mask`` ``[b, l]``, ``labels``.

    Encoders are padded on the right.  A decoder classifies by its last position, so it is padded on the left, and is told
    its ``position_ids``.
    """

    student: Student

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        side = "left" if self.student.causal else "right"
        embeds = [item["inputs_embeds"] for item in items]
        mask = _joined([torch.ones(len(e), dtype=torch.long) for e in embeds], 0, side)
        batch = {"inputs_embeds": _joined(embeds, 0.0, side), "attention_mask": mask}
        if self.student.causal:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        labels = [item["labels"] for item in items]
        tokens = self.student.kind == "instruction"
        return batch | {"labels": _joined(labels, NO_TARGET, side) if tokens else torch.stack(labels)}


def _joined(rows: list[Tensor], value: float, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """``compute_loss_func`` for classes ``[b]`` or probabilities ``[b, c]``: the mean cross-entropy of an optimiser step.

    Args:
        outputs: the model's, with ``logits`` ``[b, c]``.
        labels: as :class:`Examples` has them, or the column ``probabilities`` of a set's text.
        num_items_in_batch: entries of ``labels`` in the whole step, as ``Trainer`` counts them, so that gradients that are
            accumulated over several batches add up to that of one.
    """
    total = F.cross_entropy(outputs.logits, labels, reduction="sum")
    if num_items_in_batch is None:
        return total / len(labels)
    return total / (num_items_in_batch / (labels.shape[1] if labels.ndim == 2 else 1))


def response_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """``compute_loss_func`` of an instruction set: mean over examples of the mean over the tokens of the response.

    Args:
        outputs: the model's, with ``logits`` ``[b, l, v]``.
        labels: ``[b, l]``, -100 wherever no token of a response stands.

    Raises:
        ValueError: gradients are accumulated, for which ``Trainer`` counts tokens where examples would have to be.
    """
    tokens = labels[:, 1:]
    lengths = (tokens != NO_TARGET).sum(1)
    if num_items_in_batch is not None and int(num_items_in_batch) != int(lengths.sum()):
        raise ValueError("gradients are accumulated, for which the Trainer counts tokens and not examples: set "
                         "gradient_accumulation_steps=1 and per_device_train_batch_size to the examples of a step")
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), tokens, reduction="none", ignore_index=NO_TARGET)
    return (losses.sum(1) / lengths).mean()


def own_recipe(
    distilled: DistilledSet, model: torch.nn.Module
) -> tuple[dict[str, Any], tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
    """A set's own recipe for the ``Trainer``: keywords for ``TrainingArguments``, and ``optimizers`` for ``Trainer``.

    The learned step sizes become the learning rate of each step.  Where the recipe has batches, the ``Trainer`` draws their
    order, which differs from the kit's; otherwise each step sees the whole set, and the run is the kit's own.

    Raises:
        ValueError: the set carries no recipe, or one that torch's optimisers cannot follow.
    """
    if "recipe" not in distilled.meta:
        raise ValueError("this set carries no recipe (it was selected, not distilled); choose TrainingArguments of your own")
    unroll = from_recipe(distilled.meta["recipe"])
    sizes = bound_step_sizes(distilled, unroll).tolist()
    optimizer = torch_optimizer(unroll.optimizer, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: sizes[min(t, len(sizes) - 1)] / unroll.optimizer.step_size
    )
    arguments = {
        "max_steps": unroll.steps,
        "per_device_train_batch_size": min(unroll.batch_size or len(distilled), len(distilled)),
        "max_grad_norm": unroll.optimizer.clip_norm or 0.0,  # 0: off; its default is 1
    }
    return arguments, (optimizer, schedule)


def torch_optimizer(optimizer: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """torch's optimiser that makes the steps of one of the kit's, over what ``model`` trains.

    Raises:
        ValueError: AdamW with ``eps_root`` above 0, which torch's has not.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    match optimizer:
        case SGD():
            return torch.optim.SGD(trained, lr=optimizer.step_size)
        case Momentum():
            return torch.optim.SGD(trained, lr=optimizer.step_size, momentum=optimizer.decay, nesterov=optimizer.nesterov)
        case AdamW() if not optimizer.eps_root:
            groups = [  # weight decay acts on matrices only
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": optimizer.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, lr=optimizer.step_size, betas=optimizer.betas, eps=optimizer.eps)
    raise ValueError(f"torch.optim has no optimiser that makes the steps of {optimizer!r}; train with evaluate(), or use "
                     "eps_root=0")
