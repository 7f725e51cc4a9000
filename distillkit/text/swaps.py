"""Token swaps: change one word of a text at a time, as the outer loss asks for it.

Nearest-token projection asks only which word is near, not which word teaches.  A swap search keeps the outer loss in sight.
The meta-gradient ranks the swaps: to put token w in the place of u changes the outer loss by about ⟨gradient, e_w − e_u⟩
(Ebrahimi et al., 2018, "HotFlip", used that estimate for adversarial examples).  The estimate is only good nearby, and another
word is far away, so a judge (:mod:`distillkit.text.judges`) then computes the outer loss of the best-ranked swaps, and a
swap goes in only if that loss falls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import digest
from distillkit.core.student import Student
from distillkit.io.checkpoint import Checkpoint
from distillkit.io.checks import check_whole, check_wholes
from distillkit.io.seeds import derive_seed, generator
from distillkit.text.judges import Judge, Swap, check_search, swapped
from distillkit.text.projection import choosable, with_tokens

PER_POSITION = 4  # most candidates at one place
POOL = 4  # candidates are drawn from this many times as many that look best

@dataclasses.dataclass(frozen=True)
class SwapRecord:
    """One step: its number (from 1), the judge's loss before and after it on the same real rows, the swaps made, the number
    of candidates judged, and the seconds it took."""

    step: int
    before: float
    after: float
    swaps: tuple[Swap, ...]
    judged: int
    seconds: float

    @property
    def loss(self) -> float:
        """The judge's loss after the step."""
        return self.after


class SwapSearch:
    """Token swaps led by the meta-gradient.

    A step takes the gradient at the current text and ranks all swaps by the linear estimate.  It draws ``candidates`` of the
    best-ranked ones, which are four times as many: at most four for a place, and none that was rejected since its sentence last
    changed.  The judge says what they do on fresh real rows.  The best swap is made; the best of the other sentences follow as
    long as the judge's loss falls further.  A swap that does not lower the loss on those rows is not made.

    Args:
        distilled: a set with tokens, such as one that was selected or projected.
        student: whose tokenizer and embedding table.
        judge: any :class:`~distillkit.text.judges.Judge`, such as :class:`~distillkit.text.judges.FrozenJudge`.
        candidates: swaps judged per step.
        examples: sentences that a step looks at, in turn, since the gradient of a few costs less; None: all of them.
        allowed: ``[v]`` bool, tokens to choose from; default: those of :func:`~distillkit.text.projection.allowed_tokens`.
        seed: draws candidates and real rows.
        checkpoint: file to save to, and to resume from where it exists; the same settings are demanded.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: a set without tokens, no tokens to choose from, or a checkpoint made with other settings.
    """

    def __init__(
        self, distilled: DistilledSet, student: Student, judge: Judge, *, candidates: int = 64,
        examples: int | None = None, allowed: Tensor | None = None, seed: int = 0,
        checkpoint: str | Path | None = None, checkpoint_every: int = 10,
    ):
        check_search(distilled, student, judge, "gradient", "losses")
        derive_seed("swap", seed)  # an error now if it is none
        check_wholes(candidates=candidates, checkpoint_every=checkpoint_every,
                     **({} if examples is None else {"examples": examples}))
        # As many examples as the set has is the same as all of them.
        self.examples = None if examples is None or examples >= len(distilled) else examples
        self.student, self.judge, self.seed = student, judge, seed
        self.candidates, self.allowed = candidates, choosable(student, allowed)
        self.records: list[SwapRecord] = []
        self._set = with_tokens(distilled, student, distilled.tokens.clone())
        self._rejected: set[Swap] = set()
        settings = {
            "judge": judge.describe(), "candidates": candidates,
            "examples": self.examples, "per_position": PER_POSITION, "pool": POOL, "seed": seed, "start": digest(distilled),
            "allowed": hashlib.sha256(self.allowed.numpy().tobytes()).hexdigest(),
        }
        self.checkpoint = Checkpoint(
            checkpoint, kind="swap-search-checkpoint", settings=settings, every=checkpoint_every, activity="swapping")
        self.checkpoint.resume(self)

    @property
    def distilled(self) -> DistilledSet:
        """The current text; ``meta["search"]`` holds the settings of the search."""
        meta = {k: v for k, v in self._set.meta.items() if k != "recipe"}
        counts = {"steps": len(self.records), "swaps": sum(len(r.swaps) for r in self.records)}
        meta["search"] = {**self.checkpoint.settings, **counts}
        return dataclasses.replace(self._set, tokens=swapped(self._set, []), meta=meta)

    def run(self, n: int) -> Iterator[SwapRecord]:
        """Make steps until ``n`` in all have been made, yielding a record of each.

        With a checkpoint, a run that ends before saves its last complete step and says on stderr how to go on.

        Raises:
            StorageError: another run uses the checkpoint, or it cannot be written.
        """
        check_whole("n", n, least=0)
        yield from self.checkpoint.steps(self, n)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """All that steps change but the records, for the checkpoint."""
        rejected = torch.tensor([dataclasses.astuple(swap) for swap in sorted(self._rejected)], dtype=torch.int64)
        return {"tokens": swapped(self._set, []), "rejected": rejected.reshape(-1, 3)}, {}

    def restore(self, tensors: dict[str, Tensor], data: dict, records: list[dict]) -> None:
        """Become what :meth:`state` returned."""
        self._set = with_tokens(self._set, self.student, tensors["tokens"])
        self._rejected = {Swap(*swap) for swap in tensors["rejected"].tolist()}
        swaps = [tuple(Swap(**swap) for swap in fields["swaps"]) for fields in records]
        self.records = [SwapRecord(**{**fields, "swaps": own}) for fields, own in zip(records, swaps, strict=True)]

    def make_step(self, n: int) -> SwapRecord:
        """Make one of ``n`` steps: all of it, or nothing where an exception ends it."""
        begin, step = time.perf_counter(), len(self.records)
        seed = derive_seed("swap", self.seed, step)
        seen = self._seen(step)
        _, gradient = self.judge.gradient(self._set, seed, **({} if seen is None else {"examples": seen}))
        candidates = self._candidates(gradient, seen, generator("swap-candidates", self.seed, step))
        before, *losses = self.judge.losses(self._set, [[], *([s] for s in candidates)], seed)
        swaps, after = combined(candidates, losses, before, lambda groups: self.judge.losses(self._set, groups, seed))
        text = with_tokens(self._set, self.student, swapped(self._set, swaps)) if swaps else self._set
        changed = {s.example for s in swaps}
        rejected = {s for s in self._rejected.union(candidates) if s.example not in changed}
        record = SwapRecord(step + 1, before, after, tuple(swaps), len(candidates), time.perf_counter() - begin)
        # In one statement, as no signal comes between its parts: a step has either happened or not.
        self._set, self._rejected, self.records = text, rejected, [*self.records, record]
        return record

    def _seen(self, step: int) -> Tensor | None:
        """Which sentences a step looks at: each of them once per round, in an order drawn for the round."""
        if self.examples is None:
            return None
        turns = -(-len(self._set) // self.examples)
        order = torch.randperm(len(self._set), generator=generator("swap-examples", self.seed, step // turns))
        return order.split(self.examples)[step % turns].sort().values

    def _candidates(self, gradient: Tensor, seen: Tensor | None, draw: torch.Generator) -> list[Swap]:
        """Swaps of the sentences ``seen`` (None: of all), drawn from those that the linear estimate ranks highest."""
        table, words = self.student.embedding, self.allowed.nonzero().squeeze(1)
        free = self._set.free if seen is None else self._set.free & torch.isin(torch.arange(len(self._set)), seen)[:, None]
        ranked: list[tuple[float, Swap]] = []  # minus the estimated gain, swap
        tokens = swapped(self._set, []).tolist()
        for places in free.nonzero().split(256):  # memory is that many positions times the vocabulary
            example, position = places.T
            slopes, current = gradient[example, position].to(table), self._set.embeds[example, position].to(table)
            gains = (slopes * current).sum(1, keepdim=True) - slopes @ table[words.to(table.device)].T
            gains, best = gains.topk(min(4 * PER_POSITION, len(words)), dim=1)
            for (i, j), row, row_gains in zip(places.tolist(), words[best.cpu()].tolist(), gains.tolist(), strict=True):
                gainful = [(-gain, Swap(i, j, new)) for gain, new in zip(row_gains, row, strict=True)
                           if gain > 0 and new != tokens[i][j]]
                ranked += [item for item in gainful if item[1] not in self._rejected][:PER_POSITION]
        ranked = sorted(ranked)[: POOL * self.candidates]
        chosen = torch.randperm(len(ranked), generator=draw)[: self.candidates]
        return [ranked[i][1] for i in sorted(chosen.tolist())]


def combined(
    changes: list, losses: list[float], before: float, judged: Callable[[list[list]], list[float]]
) -> tuple[list, float]:
    """Of changes judged one by one, the best, and the best of other sentences that make the whole still better.

    Args:
        changes: with an ``example`` each, and an order.
        losses: of the set after each, ``before`` without any.
        judged: gives the losses after several groups of changes.

    Returns:
        what to change, and the loss then; nothing and ``before`` where no change is better.
    """
    best: dict = {}  # example → (loss, change)
    for loss, change in zip(losses, changes, strict=True):
        if loss < best.get(change.example, (before,))[0]:
            best[change.example] = (loss, change)
    order = sorted(best.values())
    if not order:
        return [], before
    after, first = order[0]
    chosen = [first]
    # All prefixes of the order at once: sentences hardly depend on each other, so one of them is nearly the best.
    groups = [[change for _, change in order[:size]] for size in range(2, len(order) + 1)]
    for group, loss in zip(groups, judged(groups) if groups else [], strict=True):
        if loss < after:
            chosen, after = group, loss
    return chosen, after
