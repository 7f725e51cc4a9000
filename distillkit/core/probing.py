"""Which architectures can be students: a model is tried on a few tokens, and refused where it cannot be one.

Its logits from embeddings must be those from tokens, whatever the padding and the attention mask; the trial also measures how
the model reads its input.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distillkit.core.model_files import in_brief
from distillkit.core.student import Student

PROBED, TRIAL_WINDOW = 7, 3  # tokens that a model is tried on, and the width of its attention windows during the trial
# Functions whose gradient jumps, by their names in torch and torch.nn.functional.
KINKED = {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "selu", "hardtanh", "hardswish",
          "hardsigmoid", "threshold"}
# What a forward pass raises that does not take an input as a student gives it.
FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


NO_LANGUAGE_MODEL = "an instruction task needs a language model whose tokens see only those before them, as in offline:tiny-opt"


def unsuitable(config: Any, source: str, why: str) -> ValueError:
    """The error for a model of this configuration, which cannot be a student."""
    return ValueError(f"{source!r} is a model of kind {config.model_type!r}, which cannot be a student: {why}")


def probe(student: Student, source: str) -> None:
    """Set how the student's model reads its input: ``causal``, ``has_kinks``, ``builds_masks`` and ``scale``.

    The reference is the model itself on token ids without padding.  The student has to give the same logits from embeddings,
    for a row alone and for a shorter row that is padded, and finite ones at points that are no token's embedding (Gemma 4
    finds its per-layer embeddings by the row of its table).

    Raises:
        ValueError: it does not, or the architecture cannot be a student for another reason.
    """
    module, ids = cast("Any", student.module), _trial_ids(student)
    changed = torch.cat([ids[:-1], ids[:1]])
    with torch.no_grad(), _short_windows(module):
        try:
            scale = _embedding_scale(module.get_input_embeddings(), ids)
            with _Kinks() as kinks:
                whole, other = (module(input_ids=row[None], output_hidden_states=True) for row in (ids, changed))
                short = module(input_ids=ids[None, :2])
        except FAILURES as error:
            raise unsuitable(module.config, source, f"it does not run on tokens alone ({in_brief(error)})") from error
        student.causal = torch.equal(whole.hidden_states[-1][:, :-1], other.hidden_states[-1][:, :-1])
        student.has_kinks, student.scale = kinks.seen, cast("float", scale)
        obstacles = {
            f"its logits are not finite in {student.dtype}; its weights may be damaged": not whole.logits.isfinite().all(),
            "its embedding layer does more than look up rows of a table and scale them": scale is None,
            NO_LANGUAGE_MODEL: student.kind == "instruction" and not student.causal,
        }
        reasons = [reason for reason, applies in obstacles.items() if applies]
        for builds_masks in (False, True) if not reasons else ():
            student.builds_masks = builds_masks
            reason = _disagreement(student, ids, whole.logits, short.logits)
            if reason is None:
                return
            reasons.append(reason)
    raise unsuitable(module.config, source, "; with other masks, ".join(dict.fromkeys(reasons)))


class _Kinks(TorchFunctionMode):
    """Notices whether a function with a kink is called."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = self.seen or getattr(func, "__name__", "") in KINKED
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _short_windows(module: torch.nn.Module) -> Iterator[None]:
    """A model whose attention windows are so short that the tokens of a trial look past them.

    Windows are read from the configuration in each pass.  A window that the student's masks lack shows in the trial.
    """
    configs: list[Any] = [part.config for part in module.modules() if hasattr(part, "config")]
    saved = [dict(vars(config)) for config in configs]
    for config in configs:
        for name in ("sliding_window", *(name for name in config.to_dict() if re.search("window|chunk", name))):
            width = getattr(config, name, None)
            if isinstance(width, int) and width > TRIAL_WINDOW:
                setattr(config, name, TRIAL_WINDOW)
    try:
        yield
    finally:
        for config, values in zip(configs, saved, strict=True):
            vars(config).update(values)


def _trial_ids(student: Student) -> Tensor:
    """Ordinary tokens ``[n]``, spread over the vocabulary."""
    special = set(student.tokenizer.all_special_ids)
    known = range(min(len(student.embedding), len(student.tokenizer)))
    ordinary = [i for i in known if i not in special] or known
    return torch.tensor([ordinary[i * len(ordinary) // PROBED] for i in range(PROBED)], device=student.device)


def _embedding_scale(layer: torch.nn.Module, ids: Tensor) -> float | None:
    """The factor that an embedding layer applies to the rows of its table; None where it does something else."""
    table = cast("Tensor", layer.weight)
    ones = torch.func.functional_call(layer, {"weight": torch.ones_like(table[:1]).expand_as(table)}, (ids,))
    scale = float(ones.flatten()[0])
    return scale if torch.equal(layer(ids), F.embedding(ids, table) * scale) else None


def _disagreement(student: Student, ids: Tensor, whole: Tensor, short: Tensor) -> str | None:
    """How the student's logits differ from the model's own for ``ids`` and for the first two of them; None: they do not."""
    language = student.kind == "instruction"
    mask = torch.ones(2, len(ids), dtype=torch.long, device=student.device)
    mask[1, 2:] = 0
    between = (student.embedding[ids] + student.embedding[ids.roll(1)]) / 2
    batch = {"input_ids": ids.expand(2, -1), "attention_mask": mask}
    try:
        read = student.logits({}, {"input_ids": ids[None], "attention_mask": mask[:1]})
        near = student.logits({}, {"inputs_embeds": between[None], "attention_mask": mask[:1]})
        long_row, short_row = student.logits({}, batch)
        last = student.log_likelihood({}, batch, ids[:1].expand(2, 1)) if language else None
    except FAILURES as error:
        return f"it does not run on points that are no rows of its embedding table ({in_brief(error)})"
    padded = torch.cat([long_row, short_row[:2]] if language else [long_row, short_row])
    if not _alike(read, whole):
        return "its logits from embeddings are not those from tokens: it reads tokens elsewhere than in its embedding table"
    if not near.isfinite().all():
        return "its logits at points between rows of its embedding table are not finite"
    if not _alike(padded, torch.cat([whole[0], short[0]])):
        advice = "" if student.dtype == torch.float32 else "; try dtype='float32'"
        return f"padding changes its logits in {str(student.dtype).removeprefix('torch.')}{advice}"
    if last is not None and not _alike(last, torch.stack([whole[0, -1], short[0, -1]]).log_softmax(-1)[:, ids[:1]]):
        return "its logits of the last token alone (logits_to_keep) are not those of the whole text"
    return None


def _alike(logits: Tensor, expected: Tensor) -> bool:
    """Whether they agree in half the digits, and a few units of rounding more where all logits are small."""
    eps = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)  # some layers compute in float32 always
    return bool((logits - expected).abs().max() <= math.sqrt(eps) * expected.abs().max() + 8 * eps)
