"""Ways to text: real tokens that train a model, instead of embeddings that lose it when they become tokens.

Nearest-token projection (:mod:`distillkit.text.projection`) asks only which word is near, not which word teaches.  The ways
here keep the outer loss in sight until the last token stands:

* :class:`SwapSearch`: change one token at a time.  The meta-gradient says which changes look promising, since swapping
  token u for w changes the outer loss by about ⟨gradient, e_w − e_u⟩ (Ebrahimi et al., 2018, "HotFlip", used that estimate
  for adversarial examples); a *judge* then takes the real outer loss of the best-looking ones, and the best of those is
  kept if it is better than what is there.
* :class:`ThroughProjection`: learn embeddings as ever, but train the student on their nearest tokens; the gradient at the
  tokens moves the embeddings behind them (the straight-through estimator of Bengio et al., 2013).
* :func:`relax_tokens`: learn a distribution over the words at every place, which narrows down to one of them.
* :func:`search_sentences`: change one whole sentence at a time for another *real* one, judged in the same way.  What comes
  out was written by people, so it cannot exploit what is odd about the judge's representations, as single tokens do.
* :func:`nearest_sentences`: snap each example to the nearest *real* sentence, as a reference.
* :func:`relabel`: learn soft labels and step sizes for a text that stays as it is, by the same budget for every text.

A judge is what makes a search affordable; see :mod:`distillkit.text.judges`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillkit.core.distilled import DistilledSet, decode, embed, from_rows
from distillkit.core.distiller import Distiller, digest
from distillkit.core.objectives import Objective, check_objective
from distillkit.core.students import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.selection import sentence_features
from distillkit.io.checks import check_choice, check_is, check_number, check_rate, check_whole
from distillkit.io.escaping import say
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator
from distillkit.io.signals import ending_signals
from distillkit.io.storage import Claim, is_vacant, load_folder, remove_orphans, save_folder
from distillkit.text.judges import FrozenJudge, Swap, swapped
from distillkit.text.projection import METRICS, allowed_tokens, project

KIND = "swap-search-checkpoint"


def corpus_tokens(task: Task, student: Student, *, least: int = 2) -> Tensor:
    """Which tokens may stand in a text: words of the vocabulary seen ``least`` times in the training split, ``[v]`` bool."""
    check_is("task", task, Task)
    check_is("student", student, Student)
    check_whole("least", least)
    allowed = allowed_tokens(student.tokenizer, len(student.embedding))
    counts = collections.Counter(i for ids in task.token_ids(student.tokenizer, "train") for i in ids)
    seen = torch.zeros_like(allowed)
    seen[[i for i, n in counts.items() if n >= least]] = True
    return allowed & seen


def with_tokens(distilled: DistilledSet, student: Student, tokens: Tensor) -> DistilledSet:
    """The set with other ``tokens [m, l]``: their embeddings and their text."""
    distilled.check_table(student)
    text = decode(student.tokenizer, tokens, distilled.free)
    meta = {**distilled.meta, "text": text, "table_sha256": student.table_sha256}
    return dataclasses.replace(distilled, embeds=embed(student, tokens), tokens=tokens, meta=meta)


# ------------------------------------------------------------------------------------------------------------ swaps


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
        judge: :class:`FrozenJudge` or :class:`StudentJudge`.
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
        self, distilled: DistilledSet, student: Student, judge, *, confirm=None, candidates: int = 64,
        examples: int | None = None, per_position: int = 4, pool: int = 4, allowed: Tensor | None = None, seed: int = 0,
        checkpoint_dir: str | Path | None = None, checkpoint_every: int = 10,
    ):
        _check_search(distilled, student, {"judge": judge} | ({} if confirm is None else {"confirm": confirm}))
        derive_seed("swap", seed)  # an error now if it is none
        given = {"candidates": candidates, "per_position": per_position, "pool": pool, "checkpoint_every": checkpoint_every}
        if examples is not None:
            given["examples"] = examples
        for name, value in given.items():
            check_whole(name, value)
        # As many as there are is all of them.
        self.examples = None if examples is None or examples >= len(distilled) else examples
        self.student, self.judge, self.confirm, self.seed = student, judge, confirm, seed
        self.candidates, self.per_position, self.pool = candidates, per_position, pool
        self.allowed = _words(student, allowed)
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
        made = {"steps": len(self.records), "swaps": sum(len(r.swaps) for r in self.records)}
        meta["search"] = {**self._settings, **made}
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
        theirs = stored.data["settings"]
        if different := [k for k in self._settings if theirs.get(k) != self._settings[k]]:
            raise ValueError(f"{self.checkpoint_dir} holds a search with other settings: {different[0]} is "
                             f"{theirs.get(different[0])!r} there and {self._settings[different[0]]!r} here; resume with the "
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
        begun, step = time.perf_counter(), len(self.records)
        seed = derive_seed("swap", self.seed, step)
        seen = self._seen(step)
        given = {} if seen is None else {"examples": seen}
        _, gradient = self.judge.gradient(self._set, seed, **given)
        swaps = self._candidates(gradient, seen, generator("swap-candidates", self.seed, step))
        before, *losses = self.judge.losses(self._set, [[], *([s] for s in swaps)], seed)
        kept, after = combined(swaps, losses, before, lambda groups: self.judge.losses(self._set, groups, seed))
        if kept and self.confirm is not None:
            there, here = self.confirm.losses(self._set, [[], kept], derive_seed("confirm", self.seed, step))
            if not here <= there:
                kept, after = [], before
        made = with_tokens(self._set, self.student, swapped(self._tokens, kept)) if kept else self._set
        changed = {s.example for s in kept}
        rejected = {s for s in self._rejected.union(swaps) if s.example not in changed}
        record = SwapRecord(step + 1, before, after, tuple(kept), len(swaps), time.perf_counter() - begun)
        # In one statement, as no signal comes between its parts: a step has either happened or not.
        self._set, self._rejected, self.records = made, rejected, [*self.records, record]
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
        listed = []
        for places in free.nonzero().split(256):  # memory is that many positions times the vocabulary
            example, position = places.T
            slopes, here = gradient[example, position].to(table), self._set.embeds[example, position].to(table)
            gains = (slopes * here).sum(1, keepdim=True) - slopes @ table[words.to(table.device)].T
            gains, best = gains.topk(min(4 * self.per_position, len(words)), dim=1)
            ids = words[best.cpu()]
            for place, row, scores in zip(places.tolist(), ids.tolist(), gains.tolist(), strict=True):
                found = [(gain, Swap(place[0], place[1], new)) for gain, new in zip(scores, row, strict=True)]
                listed += [item for item in found if self._is_worth_judging(*item)][: self.per_position]
        listed.sort(key=lambda item: (-item[0], item[1]))
        listed = listed[: self.pool * self.candidates]
        chosen = torch.randperm(len(listed), generator=draw)[: self.candidates]
        return [listed[i][1] for i in sorted(chosen.tolist())]

    def _is_worth_judging(self, gain: float, swap: Swap) -> bool:
        same = swap.new == int(self._tokens[swap.example, swap.position])
        return gain > 0 and not same and swap not in self._rejected


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
    best: dict = {}
    for change, loss in zip(changes, losses, strict=True):
        if loss < before and (change.example not in best or loss < best[change.example][0]):
            best[change.example] = (loss, change)
    order = sorted(best.values())
    if not order:
        return [], before
    kept, after = [order[0][1]], order[0][0]
    if len(order) > 1:
        # All prefixes of the order at once: sentences hardly depend on each other, so one of them is nearly the best.
        groups = [[change for _, change in order[:size]] for size in range(2, len(order) + 1)]
        for group, loss in zip(groups, judged(groups), strict=True):
            if loss < after:
                kept, after = group, loss
    return kept, after


# --------------------------------------------------------------------------------------------------- relaxed choice


def relax_tokens(
    distilled: DistilledSet, student: Student, judge, *, steps: int = 100, lr: float = 0.3, hot: float = 1.0,
    cold: float = 0.1, start_weight: float = 0.9, allowed: Tensor | None = None, seed: int = 0,
) -> DistilledSet:
    """Words found by a relaxed choice: a distribution over all allowed tokens at every free place, annealed to one of them.

    A place holds logits z over the tokens and stands for the embedding Σ softmax(z/τ)·e.  The judge's gradient in that
    embedding gives the one in z, which Adam follows; the temperature τ falls geometrically, so that the mixture, which no
    text can be, becomes a token (the relaxation of Jang et al., 2017, and Maddison et al., 2017, without their noise; for
    text Guo et al., 2021, "Gradient-based adversarial attacks against text transformers").  A step takes one gradient and
    judges no candidate, so that a judge which trains the real student is affordable too.

    Args:
        distilled: a set with tokens, such as one that was selected.
        student: whose tokenizer and embedding table.
        judge: :class:`FrozenJudge` or :class:`StudentJudge`.
        steps: of Adam.
        lr: its learning rate, of the logits.
        hot, cold: the temperature at the first step and at the last.
        start_weight: probability of the token that stands at a place, at τ = 1; the others share the rest alike.  A token
            that is not allowed has no say.
        allowed: ``[v]`` bool, tokens to choose from; default: those of :func:`~distillkit.text.projection.allowed_tokens`.
            Memory is about 16 bytes for each of them at each free place.
        seed: draws the real rows of each step.

    Returns:
        the set with the likeliest token at each free place, its labels, and no recipe; the judge's loss of the mixture
        before each step is in ``meta["search"]``.

    Raises:
        ValueError: a set without tokens, or no tokens to choose from.
        FloatingPointError: the judge's loss or gradient is not finite.
    """
    _check_search(distilled, student, {"judge": judge})
    check_whole("steps", steps)
    check_rate("lr", lr)
    for name, value in (("hot", hot), ("cold", cold)):
        check_number(name, value, without="least")
    check_number("start_weight", start_weight, most=1.0, without="least most")
    derive_seed("relax", seed)  # an error now if it is none
    words = _words(student, allowed).nonzero().squeeze(1)
    table, free = student.embedding[words.to(student.device)], distilled.free
    assert distilled.tokens is not None  # _check_search has seen to it
    same = distilled.tokens[free][:, None] == words
    logits = (same * math.log(start_weight / (1 - start_weight) * max(1, len(words) - 1))).to(table).requires_grad_()
    adam, losses = torch.optim.Adam([logits], lr=lr), []
    for step in progress(range(steps), desc="choosing words", unit="step"):
        temperature = hot * (cold / hot) ** (step / max(1, steps - 1))
        mixed = (logits / temperature).softmax(1) @ table
        embeds = distilled.embeds.clone()
        embeds[free] = mixed.detach().to(embeds)
        trial = dataclasses.replace(distilled, embeds=embeds, tokens=None)
        loss, gradient = judge.gradient(trial, derive_seed("relax", seed, step))
        if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
            raise FloatingPointError(f"step {step + 1}: the judge's loss is {loss} or its gradient not finite; lower lr, or "
                                     "the step size of the judge's student")
        adam.zero_grad()
        mixed.backward(gradient[free].to(mixed))
        adam.step()
        losses.append(round(loss, 4))
    tokens = distilled.tokens.clone()
    tokens[free] = words[logits.argmax(1).cpu()]
    found = with_tokens(distilled, student, tokens)
    meta = {k: v for k, v in found.meta.items() if k not in ("recipe", "selection")}
    meta["search"] = {"judge": judge.describe(), "steps": steps, "lr": lr, "hot": hot, "cold": cold,
                      "start_weight": start_weight, "losses": losses}
    return dataclasses.replace(found, meta=meta)


def _check_search(distilled: DistilledSet, student: Student, judges: dict) -> None:
    """What a search for words needs."""
    check_is("distilled", distilled, DistilledSet)
    check_is("student", student, Student)
    for name, judge in judges.items():
        if not callable(getattr(judge, "losses", None)):
            raise TypeError(f"{name} must be a judge such as FrozenJudge or StudentJudge, not {judge!r}")
    if distilled.tokens is None:
        raise ValueError("a search for words needs tokens to begin with, and this set holds free embeddings; project it "
                         "first: dk.project(set, student)")
    distilled.check_table(student)


def _words(student: Student, allowed: Tensor | None) -> Tensor:
    """Which tokens may be chosen: ``[v]`` bool."""
    words = allowed_tokens(student.tokenizer, len(student.embedding))
    if allowed is not None:
        check_is("allowed", allowed, Tensor)
        words = words & allowed.cpu()
    if not words.any():
        raise ValueError("allowed leaves no token to choose from")
    return words


# ------------------------------------------------------------------------------------------------ whole sentences


@dataclasses.dataclass(frozen=True, order=True)
class Sentence:
    """Sentence ``new``, a number in the pool, for the one that is ``example``."""

    example: int
    new: int


def search_sentences(
    distilled: DistilledSet, task: Task, student: Student, judge: FrozenJudge, *, steps: int = 100, candidates: int = 64,
    examples: int = 16, sentences: int = 2048, seed: int = 0,
) -> DistilledSet:
    """Real sentences that a judge likes best: whole sentences are changed for others of their class.

    A step looks at some examples.  The judge's gradient in their representations says which sentences of the pool look
    better; of those, ``candidates`` are judged by the outer loss on fresh real rows, and what makes it lower goes in, as in
    :class:`SwapSearch`.  The pool is read once, so that a step costs no forward pass.

    Args:
        distilled: where to start, such as a set that herding selected.
        judge: whose representations and outer loss to go by.
        steps, candidates, examples: of the search, and in each step.
        sentences: size of the pool, drawn from the training split in equal shares and filled up to the set's length.
        seed: draws the pool, examples, candidates and real rows.

    Returns:
        a set with the labels that ``distilled`` has and no recipe; the losses of the search, before and after each step,
        are in ``meta["search"]``.

    Raises:
        TypeError: another kind of judge, which has no representations.
    """
    for name, value, kind in (("distilled", distilled, DistilledSet), ("task", task, Task), ("student", student, Student),
                              ("judge", judge, FrozenJudge)):
        check_is(name, value, kind)
    for name, value in (("steps", steps), ("candidates", candidates), ("examples", examples), ("sentences", sentences)):
        check_whole(name, value)
    _check_search(distilled, student, {"judge": judge})
    start = distilled.in_classes(task.classes, f"task {task.name!r}")
    start.label_names()  # a set that does not tell them is an error
    labels = judge.labels(start)
    pool = _pool(task, student, sentences, start.embeds.shape[1], seed)
    x = torch.cat([judge.features(pool), judge.features(start)])  # [pool and set, n·d]
    of_class = [(pool.targets == label).nonzero().squeeze(1) for label in range(len(task.classes))]
    now = torch.arange(len(pool), len(x))  # where each example stands in x
    losses = []
    for step in progress(range(steps), desc="choosing sentences", unit="step"):
        address, draw = derive_seed("sentences", seed, step), generator("sentences-drawn", seed, step)
        features = x[now].clone().requires_grad_()
        (slope,) = torch.autograd.grad(judge.head_losses(features[None], labels, address)[0], features)
        changes = []
        for i in torch.randperm(len(now), generator=draw)[:examples].tolist():
            offered = of_class[start.meta["labels"][i]]
            taken = torch.tensor([*now.tolist(), *(change.new for change in changes)])
            gains = slope[i] @ x[now[i]] - x[offered] @ slope[i]
            gains[torch.isin(offered, taken)] = -math.inf  # no sentence stands twice
            share = max(1, candidates // min(examples, len(now)))
            best = gains.topk(min(6 * share, len(gains)))
            likely = offered[best.indices[best.values > -math.inf]]  # a sentence is a long way: the sign tells little
            changes += [Sentence(i, int(n)) for n in likely[torch.randperm(len(likely), generator=draw)[:share]]]

        def judged(groups: list[list[Sentence]], now=now, address=address) -> list[float]:
            with torch.no_grad():
                return judge.head_losses(x[torch.stack([_changed(now, group) for group in groups])], labels, address).tolist()

        before, *each = judged([[], *([change] for change in changes)])
        kept, after = combined(changes, each, before, judged)
        now = _changed(now, kept)
        losses.append([round(before, 4), round(after, 4)])
    return _picked(pool, start, now, {"judge": judge.describe(), "steps": steps, "sentences": len(pool), "losses": losses})


def _pool(task: Task, student: Student, sentences: int, length: int, seed: int) -> DistilledSet:
    rows = task.balanced_rows("train", min(sentences, len(task.train)), generator("sentence-pool", seed)).numpy()
    labels = task.labels("train")[rows]
    return from_rows(task, student, [rows[labels == c] for c in range(len(task.classes))], length=length, seed=seed)


def _changed(now: Tensor, changes: Sequence[Sentence]) -> Tensor:
    now = now.clone()
    for change in changes:
        now[change.example] = change.new
    return now


def _picked(pool: DistilledSet, start: DistilledSet, now: Tensor, found: dict) -> DistilledSet:
    """The examples at ``now`` of the pool and the start, one behind the other."""
    width = max(pool.embeds.shape[1], start.embeds.shape[1])

    def joined(name: str) -> Tensor:
        parts = (getattr(pool, name), getattr(start, name))
        tail = (0, 0) if name == "embeds" else ()
        return torch.cat([torch.nn.functional.pad(t, (*tail, 0, width - t.shape[1])) for t in parts])[now]

    meta = {k: v for k, v in start.meta.items() if k not in ("recipe", "selection", "rows")}
    for key in {"text", "rows"} & start.meta.keys():
        values = [*pool.meta[key], *start.meta[key]]
        meta[key] = [values[i] for i in now]
    meta["search"] = found
    assert pool.tokens is not None and start.tokens is not None
    parts = {name: joined(name) for name in ("embeds", "mask", "free", "tokens")}
    return dataclasses.replace(start, **parts, step_sizes=None, meta=meta)


# ------------------------------------------------------------------------------------------- through the projection


@dataclasses.dataclass(frozen=True, eq=False)
class ThroughProjection:
    """An objective whose students train on the nearest tokens of the embeddings that are learned.

    Use it in the place of the ``objective`` it wraps.  The meta-gradient is that of the projected set; the
    :class:`~distillkit.core.distiller.Distiller` applies it to the embeddings behind, which in time cross into another token's
    cell.  The end is a set to be projected.

    Args:
        objective: such as :class:`~distillkit.core.objectives.BPTT`.
        metric: of :func:`~distillkit.text.projection.project`.
    """

    objective: Objective
    _: dataclasses.KW_ONLY
    metric: str = "l2"

    def __post_init__(self):
        check_objective(self.objective)
        check_choice("metric", self.metric, METRICS)

    @property
    def student(self) -> Student:
        return self.objective.student

    @property
    def unroll(self):
        return self.objective.unroll

    @property
    def metagrad(self):
        return self.objective.metagrad

    def problems(self, distilled: DistilledSet, seed: int):
        """The wrapped objective's problems of the projected set."""
        return self.objective.problems(project(distilled, self.student, metric=self.metric), seed)

    def recipe(self) -> dict:
        """The wrapped objective's recipe, with the projection noted."""
        return {**self.objective.recipe(), "through_projection": self.metric}


# ------------------------------------------------------------------------------------------------------- references


def nearest_sentences(distilled: DistilledSet, task: Task, student: Student, *, length: int | None = None) -> DistilledSet:
    """For each example the real training sentence of its class whose representation is nearest; none is taken twice.

    Args:
        distilled: a set of a classification task, embeddings or text.
        length: tokens an example; default: the set's own.

    Returns:
        a set of real sentences with hard labels and no recipe.
    """
    check_is("distilled", distilled, DistilledSet)
    check_is("task", task, Task)
    check_is("student", student, Student)
    distilled.check_table(student)
    distilled = distilled.in_classes(task.classes, f"task {task.name!r}")
    real = sentence_features(task, student)
    with torch.no_grad():
        x = student.features({"inputs_embeds": distilled.embeds, "attention_mask": distilled.mask.long()})
    x = torch.nn.functional.normalize(x.float(), dim=1).cpu().numpy()
    distilled.label_names()  # a set that does not tell them is an error
    rows, labels = [], np.array(distilled.meta["labels"])
    for label, pool in enumerate(task.rows_by_class("train")):
        chosen: list[int] = []
        for example in np.flatnonzero(labels == label):
            near = pool[np.argsort(-(real[pool] @ x[example]), kind="stable")]
            chosen.append(int(next(row for row in near if row not in chosen)))
        rows.append(np.array(chosen))
    found = from_rows(task, student, rows, length=length or distilled.embeds.shape[1])
    found.meta["selection"] = {"method": "nearest sentences"}
    return found


def relabel(
    distilled: DistilledSet, objective, *, steps: int, lr: float = 0.08, seed: int = 0, **settings
) -> DistilledSet:
    """Learn soft labels and step sizes for a set whose examples stay as they are.

    What learned labels gain is theirs and not the text's, so that texts are compared fairly only if all get them.

    Args:
        distilled: hard labels are softened first; its own step sizes are forgotten.
        objective, steps, lr, seed, settings: as :class:`~distillkit.core.distiller.Distiller` takes them.
    """
    check_is("distilled", distilled, DistilledSet)
    check_whole("steps", steps, least=0)
    start = distilled if distilled.soft else distilled.soften()
    start = dataclasses.replace(start, step_sizes=None)
    distiller = Distiller(start, objective, lr=lr, learn=("targets", "step_sizes"), seed=seed, **settings)
    for _ in distiller.run(steps):
        pass
    return distiller.distilled
