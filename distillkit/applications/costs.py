"""What a distilled set costs, and after how many trainings it has paid for itself.

Three costs, each beside an alternative:

* **Compute.**  Distilling is expensive and training on a distilled set is cheap.  :func:`break_even` is the number of
  trainings after which distilling has cost less than training on all data each time.
* **Bits.**  A learned embedding takes as many bytes as hundreds of words.  The alternative is compressed text
  (:func:`text_bytes`): as many real rows as reach the same accuracy (:func:`rows_needed`).
* **Accuracy at equal budget.**  The alternative is the same number of random real sentences (:func:`over_random`).

FLOPs are counted by ``torch.utils.flop_counter``: two for each multiplication with its addition in matrix products and
attention, and none for the rest, as in papers.  Scoring on the test split and the search for settings are not counted on
either side.  Seconds depend on the machine that a result names; FLOPs do not.
"""

from __future__ import annotations

import dataclasses
import itertools
import lzma
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from distillkit.core.distilled import DistilledSet
from distillkit.core.objectives import meta_gradient
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import flop_counter
from distillkit.io.checks import check_choice, check_number, check_whole, require
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


def distilling_flops(distilled: DistilledSet, objective, steps: int) -> int:
    """Floating-point operations of ``steps`` outer steps, extrapolated from one, which is computed and counted.

    Args:
        distilled: the set at any step; its shape counts, and its values do not.
        objective: what the set is learned by.  An outer step is one meta-gradient; Adam's own arithmetic is not counted, nor
            is the recording of experts.
        steps: outer steps.
    """
    check_whole("steps", steps)
    with flop_counter() as counter:
        # An attempt that memory had no room for does not count.
        meta_gradient(distilled, objective, seed=derive_seed("distil", 0, 0), on_retry=lambda _: counter.flop_counts.clear())
    return counter.get_total_flops() * steps


def break_even(distilling: float, full: float, distilled: float) -> float:
    """The number of trainings after which distilling has cost no more than training on all data each time.

    Args:
        distilling: cost of distilling, once.
        full: cost of one training on all data.
        distilled: cost of one training on the distilled set.  All three are in one unit, FLOPs or seconds.

    Returns:
        the least n with ``distilling + n·distilled ≤ n·full``; infinity where training on the set is not cheaper.

    Raises:
        ValueError: a cost below 0.
    """
    for name, value in (("distilling", distilling), ("full", full), ("distilled", distilled)):
        check_number(name, value)
    return math.ceil(distilling / (full - distilled)) if full > distilled else math.inf


# --- bits ------------------------------------------------------------------------------------------------------------


def text_bytes(rows: Iterable[tuple[str, int]], codec: str = "lzma") -> int:
    """Bytes of labelled text under a compressor.

    Args:
        rows: (text, label) pairs.  They are sorted: order carries no information, and sorted text compresses better.
        codec: ``"none"``, ``"zlib"`` or ``"lzma"``; the codec and its settings, which a reader must know, are not counted.
    """
    check_choice("codec", codec, CODECS)
    lines = sorted((label, text) for text, label in rows)
    return len(CODECS[codec]("\n".join(f"{label}\t{text}" for label, text in lines).encode()))


def set_bytes(distilled: DistilledSet, *, dtype: str = "float32", codec: str = "none") -> int:
    """Bytes of a set of learned embeddings under a compressor.

    Args:
        dtype: type of embeddings, soft labels and step sizes, ``"float32"`` or ``"float16"``.  To see whether the set trains
            as well in half the bits, evaluate :func:`as_float16`.
        codec: ``"none"``, ``"zlib"`` or ``"lzma"``.

    Returns:
        for float32 embeddings without a codec ``distilled.nbytes``.

    Raises:
        ValueError: a set of tokens, whose text is what would be sent.
    """
    check_choice("dtype", dtype, DTYPES)
    check_choice("codec", codec, CODECS)
    require(distilled.tokens is None, "set_bytes counts learned embeddings, and this set is text: use text_bytes on its texts")
    values = (distilled.embeds, distilled.targets, distilled.step_sizes, distilled.attention)
    numbers = [value for value in values if value is not None]
    stored = [value.detach().to(DTYPES[dtype]) if value.is_floating_point() else value for value in numbers]
    return len(CODECS[codec](b"".join(value.numpy().tobytes() for value in stored)))


def as_float16(distilled: DistilledSet) -> DistilledSet:
    """The set with its numbers rounded to float16 and stored in their original type."""
    names = ["embeds"] + ["targets"] * distilled.soft
    names += [name for name in ("step_sizes", "attention") if getattr(distilled, name) is not None]
    halves = {name: getattr(distilled, name).half().to(getattr(distilled, name).dtype) for name in names}
    return dataclasses.replace(distilled, **halves, meta={**distilled.meta})


def low_rank(distilled: DistilledSet, rank: int, *, dtype: str = "float32") -> DistilledSet:
    """The set with its embeddings replaced by their best approximation of a rank, over all positions of all examples.

    Args:
        rank: of the matrix ``[m · l, d]``, which is stored as two factors (:func:`low_rank_bytes`).
        dtype: type of the factors, and of soft labels and step sizes.
    """
    check_choice("dtype", dtype, DTYPES)
    rows = distilled.embeds.flatten(0, 1)
    check_whole("rank", rank, most=min(rows.shape))
    u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    factors = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
    left, right = (factor.to(DTYPES[dtype]).double() for factor in factors)
    embeds = (left @ right).to(distilled.embeds.dtype).view_as(distilled.embeds)
    rounded = as_float16(distilled) if dtype == "float16" else distilled
    return dataclasses.replace(rounded, embeds=embeds, meta={**distilled.meta})


def low_rank_bytes(distilled: DistilledSet, rank: int, *, dtype: str = "float32") -> int:
    """Bytes of the two factors of :func:`low_rank`, of labels and of step sizes."""
    positions, width = distilled.embeds.flatten(0, 1).shape
    fewer = positions * width - rank * (positions + width)
    return set_bytes(distilled, dtype=dtype) - fewer * DTYPES[dtype].itemsize


def rows_needed(accuracy: float, curve: Mapping[int, float]) -> float:
    """How many real examples reach an accuracy, interpolated on a measured curve.

    Args:
        accuracy: the accuracy to reach.
        curve: number of examples → accuracy when training on that many; not empty.

    Returns:
        the number where the curve, linear in the logarithm of the number between its points, first reaches ``accuracy``; its
        smallest number where that is enough, infinity where its largest is not.
    """
    points = sorted(curve.items())
    if points[0][1] >= accuracy:
        return float(points[0][0])
    for (few, low), (many, high) in itertools.pairwise(points):
        if low < accuracy <= high:
            return few * (many / few) ** ((accuracy - low) / (high - low))
    return math.inf


def random_rows(task: Task, examples: int) -> list[tuple[str, int]]:
    """(text, label) of random training rows, the classes as equal as can be."""
    chosen = task.balanced_rows("train", examples, generator("cost-rows", 0)).tolist()
    rows = task.train[chosen]
    return list(zip(rows["text"], rows["label"], strict=True))


# --- accuracy at equal budget ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain of one row of a result over another with the same number of examples and tokens.

    Attributes:
        points: difference of the mean accuracies.
        of_the_way: ``points`` as a share of the gain of the full data; nan where that is not measured, or not positive.
    """

    points: float
    of_the_way: float


def over_random(rows: Mapping[str, Mapping], row: str, base: str = "random/tuned") -> Gain:
    """The gain of a row over random real sentences.

    Args:
        rows: by name, of a result, or ``vars(evaluation)``: ``mean`` and ``examples`` of each.
        row: the one whose gain is wanted.
        base: the one that it is compared with.

    Raises:
        KeyError: one of the two is missing.
        ValueError: they differ in their number of examples.
    """
    if rows[row]["examples"] != rows[base]["examples"]:
        raise ValueError(f"{row} has {rows[row]['examples']} examples and {base} {rows[base]['examples']}: that is no equal "
                         "budget")
    points = rows[row]["mean"] - rows[base]["mean"]
    way = rows["full/standard"]["mean"] - rows[base]["mean"] if "full/standard" in rows else math.nan
    return Gain(points, points / way if way > 0 else math.nan)


# --- a table ---------------------------------------------------------------------------------------------------------


def cost_table(rows: Mapping[str, Mapping], names: Sequence[str], distilling: int) -> str:
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
        cost = pays = ""
        if row["method"] in ("embeddings", "projected"):
            trainings = break_even(distilling, full["flops"], row["flops"])
            cost, pays = f"{distilling / 1e12:,.1f}", "never" if math.isinf(trainings) else f"{trainings:,}"
        lines.append(f"| {row['method']} | {row['recipe']} | {row['mean']:.2f} | {row['flops'] / 1e12:.3f} | "
                     f"1 / {full['flops'] / row['flops']:,.0f} | {cost} | {pays} |")
    return "\n".join(lines)
