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
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import digest
from distillkit.core.student import Student
from distillkit.io.checks import check_whole, check_wholes
from distillkit.io.escaping import say
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator
from distillkit.io.signals import ending_signals
from distillkit.io.storage import Claim, is_vacant, load_folder, remove_orphans, save_folder
from distillkit.text.judges import Judge, Swap, check_search, swapped
from distillkit.text.projection import choosable, with_tokens

KIND = "swap-search-checkpoint"


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


class SwapSearch:
    """Token swaps led by the meta-gradient.

    A step takes the gradient at the text as it is, ranks all swaps by the linear estimate, draws ``candidates`` of the best
    looking (no more than ``per_position`` for a place, none that was rejected since its sentence last changed), and has
    them judged on fresh real rows.  The best goes in; then the best of the other sentences too, as long as the judge
    finds the whole better.  What does not lower the loss on those very rows is never kept.

    Args:
        distilled: a set with tokens, such as one that was selected or projected.
        student: whose tokenizer and embedding table.
        judge: any :class:`~distillkit.text.judges.Judge`, such as :class:`~distillkit.text.judges.FrozenJudge`.
        confirm: a second judge that must find a step's swaps no worse, or they are taken back.
        candidates: swaps judged a step.
        examples: sentences that a step looks at, in turn: the gradient of a few costs less; None: all of them.
        per_position: of them at one place at most.
        pool: candidates are drawn from the ``pool`` × ``candidates`` that look best.
        allowed: ``[v]`` bool, tokens to choose from; default: those of :func:`~distillkit.text.projection.allowed_tokens`.
        seed: draws candidates and real rows.
        checkpoint_dir: folder to save to, and to resume from where it holds a search; the same settings are demanded.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: a set without tokens, no tokens to choose from, or a checkpoint made with other settings.
    """

    def __init__(
        self, distilled: DistilledSet, student: Student, judge: Judge, *, confirm: Judge | None = None, candidates: int = 64,
        examples: int | None = None, per_position: int = 4, pool: int = 4, allowed: Tensor | None = None, seed: int = 0,
        checkpoint_dir: str | Path | None = None, checkpoint_every: int = 10,
    ):
        second = {} if confirm is None else {"confirm": (confirm, ("losses",))}
        check_search(distilled, student, {"judge": (judge, ("gradient", "losses")), **second})
        derive_seed("swap", seed)  # an error now if it is none
        check_wholes(candidates=candidates, per_position=per_position, pool=pool, checkpoint_every=checkpoint_every,
                     **({} if examples is None else {"examples": examples}))
        # As many examples as the set has is the same as all of them.
        self.examples = None if examples is None or examples >= len(distilled) else examples
        self.student, self.judge, self.confirm, self.seed = student, judge, confirm, seed
        self.candidates, self.per_position, self.pool = candidates, per_position, pool
        self.allowed = choosable(student, allowed)
        self.records: list[SwapRecord] = []
        self._set = with_tokens(distilled, student, distilled.tokens.clone())
        self._rejected: set[Swap] = set()
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_every = checkpoint_every
        self._settings = {
            "judge": judge.describe(), "confirm": confirm and confirm.describe(), "candidates": candidates,
            "examples": self.examples, "per_position": per_position, "pool": pool, "seed": seed, "start": digest(distilled),
            "allowed": hashlib.sha256(self.allowed.numpy().tobytes()).hexdigest(),
        }
        self._settings = json.loads(json.dumps(self._settings))
        self._claim = None if self.checkpoint_dir is None else Claim(self.checkpoint_dir)
        self._saved = 0  # steps in the checkpoint
        self._resume()

    @property
    def distilled(self) -> DistilledSet:
        """The text as it is now; how it was found is in ``meta["search"]``."""
        meta = {k: v for k, v in self._set.meta.items() if k != "recipe"}
        counts = {"steps": len(self.records), "swaps": sum(len(r.swaps) for r in self.records)}
        meta["search"] = {**self._settings, **counts}
        return dataclasses.replace(self._set, tokens=self._tokens.clone(), meta=meta)

    @property
    def _tokens(self) -> Tensor:
        assert self._set.tokens is not None  # every set here was made by with_tokens
        return self._set.tokens

    def run(self, n: int) -> Iterator[SwapRecord]:
        """Make steps until ``n`` in all have been made, yielding a record of each.

        With a ``checkpoint_dir``, a run that ends before saves its last complete step and says on stderr how to go on.

        Raises:
            StorageError: another run works in ``checkpoint_dir``, or the checkpoint cannot be written.
        """
        check_whole("n", n, least=0)
        with self._claim or nullcontext(), ending_signals():
            if self.checkpoint_dir is not None:
                remove_orphans(self.checkpoint_dir)
                self._resume()  # another run may have gone on since this object was made
            try:
                with progress(total=n, initial=len(self.records), desc="swapping", unit="step") as bar:
                    while len(self.records) < n:
                        record = self._one()
                        if self.checkpoint_dir is not None and (record.step % self.checkpoint_every == 0 or record.step == n):
                            self.save()
                        bar.update()
                        bar.set_postfix(loss=f"{record.after:.3f}")
                        yield record
            except BaseException:
                self._leave(n)
                raise

    def _leave(self, n: int) -> None:
        """Save what an early end would lose, and say how to go on."""
        if self.checkpoint_dir is None:
            return
        if len(self.records) > self._saved:
            self.save()
        if len(self.records) < n:
            say(f"the search ended after step {len(self.records)} of {n}, which is saved in {self.checkpoint_dir}; to go on, "
                f"make a SwapSearch with the same settings and call run({n})", error=True)

    def save(self) -> None:
        """Write a checkpoint of the search to ``checkpoint_dir``."""
        if self._claim is None:
            raise ValueError("this search has no checkpoint_dir to save to")
        rejected = [dataclasses.astuple(s) for s in sorted(self._rejected)]
        records = [dataclasses.asdict(r) for r in self.records]
        data = {"settings": self._settings, "records": records, "rejected": rejected}
        with self._claim:
            save_folder(self.checkpoint_dir, kind=KIND, tensors={"tokens": self._tokens}, data=data)
        self._saved = len(self.records)

    def _resume(self) -> None:
        """Take up the checkpoint, if it has more steps than have been made here."""
        if self.checkpoint_dir is None or is_vacant(self.checkpoint_dir):
            return
        stored = load_folder(self.checkpoint_dir, kind=KIND)
        settings = stored.data["settings"]
        if different := [k for k in self._settings if settings.get(k) != self._settings[k]]:
            raise ValueError(f"{self.checkpoint_dir} holds a search with other settings: {different[0]} is "
                             f"{settings.get(different[0])!r} there and {self._settings[different[0]]!r} here; resume with the "
                             "same settings or choose another checkpoint_dir")
        if len(stored.data["records"]) <= len(self.records):
            return
        self._set = with_tokens(self._set, self.student, stored.tensors["tokens"])
        self._rejected = {Swap(*s) for s in stored.data["rejected"]}
        self.records = [
            SwapRecord(**{**r, "swaps": tuple(Swap(**s) for s in r["swaps"])}) for r in stored.data["records"]
        ]
        self._saved = len(self.records)

    def _one(self) -> SwapRecord:
        begin, step = time.perf_counter(), len(self.records)
        seed = derive_seed("swap", self.seed, step)
        seen = self._seen(step)
        _, gradient = self.judge.gradient(self._set, seed, **({} if seen is None else {"examples": seen}))
        candidates = self._candidates(gradient, seen, generator("swap-candidates", self.seed, step))
        before, *losses = self.judge.losses(self._set, [[], *([s] for s in candidates)], seed)
        swaps, after = combined(candidates, losses, before, lambda groups: self.judge.losses(self._set, groups, seed))
        if swaps and self.confirm is not None:
            old, new = self.confirm.losses(self._set, [[], swaps], derive_seed("confirm", self.seed, step))
            if not new <= old:
                swaps, after = [], before
        text = with_tokens(self._set, self.student, swapped(self._set, swaps)) if swaps else self._set
        changed = {s.example for s in swaps}
        rejected = {s for s in self._rejected.union(candidates) if s.example not in changed}
        record = SwapRecord(step + 1, before, after, tuple(swaps), len(candidates), time.perf_counter() - begin)
        # In one statement, as no signal comes between its parts: a step has either happened or not.
        self._set, self._rejected, self.records = text, rejected, [*self.records, record]
        return record

    def _seen(self, step: int) -> Tensor | None:
        """Which sentences a step looks at: all have had their turn before one has another, in an order drawn for each round."""
        if self.examples is None:
            return None
        turns = -(-len(self._set) // self.examples)
        order = torch.randperm(len(self._set), generator=generator("swap-examples", self.seed, step // turns))
        return order.split(self.examples)[step % turns].sort().values

    def _candidates(self, gradient: Tensor, seen: Tensor | None, draw: torch.Generator) -> list[Swap]:
        """Swaps of the sentences ``seen`` (None: of all), drawn from those that the linear estimate likes best."""
        table, words = self.student.embedding, self.allowed.nonzero().squeeze(1)
        free = self._set.free if seen is None else self._set.free & torch.isin(torch.arange(len(self._set)), seen)[:, None]
        ranked: list[tuple[float, Swap]] = []  # minus the estimated gain, swap
        tokens = self._tokens.tolist()
        for places in free.nonzero().split(256):  # memory is that many positions times the vocabulary
            example, position = places.T
            slopes, current = gradient[example, position].to(table), self._set.embeds[example, position].to(table)
            gains = (slopes * current).sum(1, keepdim=True) - slopes @ table[words.to(table.device)].T
            gains, best = gains.topk(min(4 * self.per_position, len(words)), dim=1)
            for (i, j), row, row_gains in zip(places.tolist(), words[best.cpu()].tolist(), gains.tolist(), strict=True):
                gainful = [(-gain, Swap(i, j, new)) for gain, new in zip(row_gains, row, strict=True)
                           if gain > 0 and new != tokens[i][j]]
                ranked += [item for item in gainful if item[1] not in self._rejected][: self.per_position]
        ranked = sorted(ranked)[: self.pool * self.candidates]
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
