"""What a distilled set costs, and when it has paid for itself.

Three accounts, and one opponent for each:

* **Compute.**  Distilling is dear and training on its outcome cheap, so the question is after how many trainings the one
  has paid for the other (:func:`break_even`).  The opponent is training on everything each time.
* **Bits.**  A learned embedding is as long as hundreds of words, so a handful of examples is not a small thing.  The
  opponent is text under an ordinary compressor (:func:`text_bytes`), as many real rows of it as reach the same accuracy
  (:func:`rows_needed`).
* **Accuracy at equal budget.**  The opponent is as many random real sentences (:func:`over_random`).

FLOPs are counted by ``torch.utils.flop_counter``: two for each multiplication with its addition in matrix products and
attention, nothing for the rest, which is what papers count too.  Scoring on the test split is left out on both sides, and
so is the search for settings.  Seconds belong to the machine that a result names; FLOPs do not.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from distillkit.core.distilled import DistilledSet
from distillkit.core.objectives import meta_gradient
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation, flop_counter
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.seeds import derive_seed, generator

# Streams without a header: at the size of a distilled set a container would weigh more than its content.
CODECS = {
    "none": lambda data: data,
    "zlib": lambda data: zlib.compress(data, 9, wbits=-15),
    "lzma": lambda data: lzma.compress(
        data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    ),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


# --- compute ---------------------------------------------------------------------------------------------------------


def distilling_flops(distilled: DistilledSet, objective, steps: int, *, sample: int = 1, seed: int = 0) -> int:
    """Floating-point operations of ``steps`` outer steps, from a few that are made and counted.

    Args:
        distilled: the set at the start (or at any step; its values do not matter, its shape does).
        objective: what it is learned by.  An outer step is one meta-gradient of it; Adam's own arithmetic is not counted.
        sample: steps to count; they differ with the lengths of the real sentences they draw.  Where experts are followed,
            recording them comes on top.
        seed: of the distillation whose first steps these are.
    """
    check_whole("steps", steps)
    check_whole("sample", sample)
    with flop_counter() as counter:
        for step in range(sample):
            meta_gradient(distilled, objective, seed=derive_seed("distil", seed, step))
    return counter.get_total_flops() * steps // sample


def break_even(distilling: float, full: float, distilled: float) -> float:
    """The number of trainings after which distilling has cost no more than training on everything each time would have.

    Args:
        distilling: cost of distilling, once.
        full: cost of one training on all data.
        distilled: cost of one training on the distilled set; all three in one unit, FLOPs or seconds.

    Returns:
        the least n with ``distilling + n·distilled ≤ n·full``; infinite where a training on the set is not the cheaper one.

    Raises:
        ValueError: a cost below 0.
    """
    for name, value in (("distilling", distilling), ("full", full), ("distilled", distilled)):
        if not value >= 0:
            raise ValueError(f"{name} must be a cost of 0 or more, not {value!r}")
    return math.ceil(distilling / (full - distilled)) if full > distilled else math.inf


# --- bits ------------------------------------------------------------------------------------------------------------


def text_bytes(rows: Iterable[tuple[str, int]], codec: str = "lzma") -> int:
    """Bytes of labelled text under a compressor.

    Args:
        rows: (text, label) pairs; a training set has no order, so they are sorted, which a compressor is glad of.
        codec: ``"none"``, ``"zlib"`` or ``"lzma"``.  What the reader has to know besides, the codec and its settings, is
            not counted.
    """
    check_choice("codec", codec, CODECS)
    lines = sorted((label, text) for text, label in rows)
    return len(CODECS[codec]("\n".join(f"{label}\t{text}" for label, text in lines).encode()))


def set_bytes(distilled: DistilledSet, *, dtype: str = "float32", codec: str = "none") -> int:
    """Bytes of a distilled set under a compressor, as its reader needs it.

    Args:
        dtype: of the numbers, ``"float32"`` or ``"float16"``: embeddings, soft labels, step sizes.  Whether the set still
            trains as well in half the bits is for :func:`as_float16` and an evaluation to say.
        codec: ``"none"``, ``"zlib"`` or ``"lzma"``.

    Returns:
        for embeddings in float32 without a codec ``distilled.nbytes``; a set of tokens counts as its text, not as the
        four bytes a token that ``nbytes`` takes.
    """
    check_choice("dtype", dtype, DTYPES)
    check_choice("codec", codec, CODECS)
    numbers = [distilled.targets] if distilled.soft else []
    numbers += [] if distilled.step_sizes is None else [distilled.step_sizes]
    if distilled.tokens is None:
        numbers.insert(0, distilled.embeds)
    data = b"".join(t.detach().to(DTYPES[dtype]).contiguous().numpy().tobytes() for t in numbers)
    if distilled.tokens is None and not distilled.soft:
        data += distilled.targets.numpy().tobytes()
    if distilled.tokens is None:
        return len(CODECS[codec](data))
    labels = [""] * len(distilled) if distilled.soft else [f"{label}\t" for label in distilled.targets.tolist()]
    words = "\n".join(label + text for label, text in zip(labels, distilled.meta["text"], strict=True))
    return len(CODECS[codec](words.encode())) + len(CODECS[codec](data) if data else b"")


def as_float16(distilled: DistilledSet) -> DistilledSet:
    """The set with its numbers rounded to what float16 can hold; kept in the type they had."""

    def rounded(values):
        return None if values is None or not values.is_floating_point() else values.half().to(values.dtype)

    names = ("embeds", "step_sizes", *(["targets"] if distilled.soft else []))
    return dataclasses.replace(distilled, **{n: rounded(getattr(distilled, n)) for n in names}, meta=dict(distilled.meta))


def rows_needed(accuracy: float, curve: Mapping[int, float]) -> float:
    """How many real examples reach an accuracy, read off a measured curve.

    Args:
        accuracy: to be reached.
        curve: number of examples → accuracy when training on that many.

    Returns:
        the number where the curve, drawn straight between its points over the logarithm of the number, first comes to
        ``accuracy``; its smallest number where that is enough, infinity where its largest is not.
    """
    points = sorted(curve.items())
    if not points:
        raise ValueError("the curve has no points: measure the accuracy of some numbers of real examples first")
    if points[0][1] >= accuracy:
        return float(points[0][0])
    for (few, low), (many, high) in zip(points, points[1:], strict=False):
        if low < accuracy <= high:
            share = (accuracy - low) / (high - low)
            return few * (many / few) ** share
    return math.inf


def random_rows(task: Task, examples: int, seed: int = 0) -> list[tuple[str, int]]:
    """(text, label) of random training rows, the classes as equal as can be."""
    chosen = task.balanced_rows("train", examples, generator("cost-rows", seed)).tolist()
    found = task.train[chosen]
    return list(zip(found["text"], found["label"], strict=True))


# --- accuracy at equal budget ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gain:
    """What one row of a result has on another, both with the same number of examples and tokens.

    Attributes:
        points: difference of their mean accuracies.
        of_the_way: ``points`` as a share of what the full data has on the other; nan where that is not measured, or nothing.
    """

    points: float
    of_the_way: float


def over_random(rows: Mapping[str, Mapping | Evaluation], row: str, base: str = "random/tuned") -> Gain:
    """What a row gains on random real sentences.

    Args:
        rows: of a result, or evaluations by name.
        row: whose gain.
        base: on which other.

    Raises:
        ValueError: one of the two is not there, or they differ in their number of examples.
    """
    for name in (row, base):
        if name not in rows:
            raise ValueError(f"no row {name!r}; there are {', '.join(rows)}")
    if _of(rows[row], "examples") != _of(rows[base], "examples"):
        raise ValueError(f"{row} has {_of(rows[row], 'examples')} examples and {base} {_of(rows[base], 'examples')}: that is "
                         "no equal budget")
    points = _of(rows[row], "mean") - _of(rows[base], "mean")
    way = _of(rows["full/standard"], "mean") - _of(rows[base], "mean") if "full/standard" in rows else math.nan
    return Gain(points, points / way if way > 0 else math.nan)


def _of(row: Mapping | Evaluation, key: str):
    return getattr(row, key) if isinstance(row, Evaluation) else row[key]


# --- a table ---------------------------------------------------------------------------------------------------------


def cost_table(rows: Mapping[str, Mapping], names: Sequence[str], distilling: int | None = None) -> str:
    """The compute of some rows of a classification result as a Markdown table.

    Args:
        rows: by name, ``full/standard`` among them, each with ``method``, ``recipe``, ``mean`` and ``flops``.
        names: the rows to show, in this order.
        distilling: FLOPs of its distillation, for the break-even count of the rows that were distilled; see
            :func:`distilling_flops`.
    """
    full = rows["full/standard"]
    lines = [
        "| method | recipe | accuracy | TFLOPs to train | of full data | distilling, TFLOPs | pays after trainings |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        row = rows[name]
        learned = distilling if row["method"] in ("embeddings", "projected") else None
        count = "" if learned is None else _counted(break_even(learned, full["flops"], row["flops"]))
        cost = "" if learned is None else f"{learned / 1e12:,.1f}"
        lines.append(f"| {row['method']} | {row['recipe']} | {row['mean']:.2f} | {row['flops'] / 1e12:.3f} | "
                     f"1 / {full['flops'] / row['flops']:,.0f} | {cost} | {count} |")
    return "\n".join(lines)


def _counted(trainings: float) -> str:
    return "never" if math.isinf(trainings) else f"{trainings:,}"
