"""A relaxed choice of words: learn a distribution over the vocabulary at every place, and let it narrow down to one word.

A text is discrete, so no gradient leads from one word to the next.  A mixture of words is not: Σ softmax(z/τ)·e is an embedding
that depends smoothly on the logits z.  A mixture can encode things that no single word can, so the temperature τ falls until
the mixture is nearly a word (Jang et al., 2017, and Maddison et al., 2017, with noise; for text Guo et al., 2021).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.student import Student
from distillkit.io.checks import check_number, check_whole, require
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed
from distillkit.text.judges import Judge, check_search, swapped
from distillkit.text.projection import choosable, with_tokens

HOT, COLD = 1.0, 0.1  # the temperature at the first step and at the last
START_WEIGHT = 0.9  # probability at τ = 1 of the token that stands at a place

def relax_tokens(
    distilled: DistilledSet, student: Student, judge: Judge, *, steps: int = 100, lr: float = 0.3,
    allowed: Tensor | None = None, seed: int = 0,
) -> DistilledSet:
    """Choose words by a relaxed choice: a distribution over all allowed tokens at every free place, annealed to one of them.

    A place holds logits z over the tokens and represents the embedding Σ softmax(z/τ)·e.  The judge's gradient in that
    embedding gives the one in z, which Adam follows; the temperature τ falls geometrically from 1 to 0.1, so that the mixture,
    which no text can be, becomes a token (the relaxation of Jang et al., 2017, and Maddison et al., 2017, without their noise;
    for text Guo et al., 2021, "Gradient-based adversarial attacks against text transformers").  A step takes one gradient and
    judges no candidate, so that a judge which trains the real student is affordable too.

    At first the token that stands at a place has probability 0.9, and the others share the rest equally.  A token that is not
    allowed has no part in the mixture.

    Args:
        distilled: a set with tokens, such as one that was selected.
        student: whose tokenizer and embedding table.
        judge: any :class:`~distillkit.text.judges.Judge`; only its gradient is used.
        steps: of Adam.
        lr: learning rate of the logits.
        allowed: ``[v]`` bool, tokens to choose from; default: those of :func:`~distillkit.text.projection.allowed_tokens`.
            Memory is about 16 bytes for each of them at each free place.
        seed: draws the real rows of each step.

    Returns:
        the set with the likeliest token at each free place, its labels, and no recipe; ``meta["search"]`` holds the judge's
        loss of the mixture before each step.

    Raises:
        ValueError: a set without tokens, or no tokens to choose from.
        FloatingPointError: the judge's loss or gradient is not finite.
    """
    check_search(distilled, student, judge, "gradient")
    check_whole("steps", steps)
    check_number("lr", lr)
    words = choosable(student, allowed).nonzero().squeeze(1)
    tokens, table = swapped(distilled, []), student.embedding[words.to(student.device)]
    current = tokens[distilled.free][:, None] == words
    logits = (current * math.log(START_WEIGHT / (1 - START_WEIGHT) * max(1, len(words) - 1))).to(table).requires_grad_()
    temperatures = [HOT * (COLD / HOT) ** (step / max(1, steps - 1)) for step in range(steps)]
    losses = _anneal(logits, distilled, table, judge, temperatures, lr, seed)
    tokens[distilled.free] = words[logits.argmax(1).cpu()]
    text = with_tokens(distilled, student, tokens)
    for key in ("recipe", "selection"):
        text.meta.pop(key, None)
    text.meta["search"] = {"judge": judge.describe(), "steps": steps, "lr": lr, "hot": HOT, "cold": COLD,
                           "start_weight": START_WEIGHT, "losses": losses}
    return text


def _anneal(
    logits: Tensor, distilled: DistilledSet, table: Tensor, judge: Judge, temperatures: list[float], lr: float, seed: int
) -> list[float]:
    """Learn ``logits [places, words]`` in place, a step per temperature; returns the mixture's loss before each step."""
    adam, losses = torch.optim.Adam([logits], lr=lr), []
    for step, temperature in enumerate(progress(temperatures, desc="choosing words", unit="step")):
        mixed = (logits / temperature).softmax(1) @ table
        embeds = distilled.embeds.clone()
        embeds[distilled.free] = mixed.detach().to(embeds)
        mixture = dataclasses.replace(distilled, embeds=embeds, tokens=None)
        loss, gradient = judge.gradient(mixture, derive_seed("relax", seed, step))
        require(math.isfinite(loss) and gradient.isfinite().all(),
                f"step {step + 1}: the judge's loss is {loss} or its gradient not finite; lower lr, or "
                "the step size of the judge's student", FloatingPointError)
        adam.zero_grad()
        mixed.backward(gradient[distilled.free].to(mixed))
        adam.step()
        losses.append(round(loss, 4))
    return losses
