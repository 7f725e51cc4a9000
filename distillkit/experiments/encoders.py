"""Evidence of several encoders side by side: the table that the slides by Anirudh, Xindi and Sabhya leave pending.

Each column is an encoder, each block a corpus, every score that of sets of one size from bootstraps of the training rows
(:mod:`distillkit.experiments.evidence`).  Two questions are answered in lines of their own: how far learned embeddings are
above keywords and sentences written by hand, and which share of the way from chance to full training they go.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from distillkit.experiments.evidence import by_hand_everywhere
from distillkit.experiments.results import by_set, classes_of, corrected, gain, has_interval, markdown, spread
from distillkit.io.checks import require

LEARNED = ("embeddings/own", "embeddings/tuned")
OPPONENTS = ("keywords/tuned", "written/tuned")
CEILINGS = ("full/standard", "linear probe/all")  # what shares are measured by
SHOWN = ("random/tuned", "herding/tuned", "chosen sentences/tuned", "keywords/tuned", "written/tuned",
         "keywords + learned labels/own", "keywords + learned labels/tuned", *LEARNED, "tfidf/all", *CEILINGS[::-1])


def encoders_table(results: Sequence[Mapping], per_class: int = 1) -> str:
    """Results of kind ``evidence`` as one Markdown table, at one number of examples per class.

    Args:
        results: of one or more corpora; of their rows those of :data:`SHOWN`.
        per_class: the size.

    Raises:
        ValueError: a result of another kind or without this size, or two of the same corpus and encoder.
    """
    cell, columns = f"per_class={per_class}", {}
    for result in results:
        config = result["config"]
        require(config.get("kind") == "evidence", f"result {config.get('name')!r} is not of kind evidence; only such stand "
                "side by side")
        require(cell in result["cells"], f"result {config.get('name')!r} has nothing at {per_class} per class")
        corpus, encoder = config["base"]["corpus"], config["base"]["student"].removeprefix("offline:")
        require((corpus, encoder) not in columns, f"two results of {encoder} on {corpus}; name one of them")
        columns[corpus, encoder] = by_set(result, cell=cell), 1 / len(classes_of(result))
    encoders = [*dict.fromkeys(encoder for _, encoder in columns)]
    comparisons = max(1, sum(has_interval(by_hand_everywhere(sets), one, other)
                             for sets, _ in columns.values() for one, other in itertools.product(LEARNED, OPPONENTS)))
    lines = []
    for corpus in dict.fromkeys(corpus for corpus, _ in columns):
        of_corpus = {encoder: columns[corpus, encoder] for encoder in encoders if (corpus, encoder) in columns}
        lines += [[corpus, name, *(texts.get(encoder, "") for encoder in encoders)]
                  for name, texts in _block(of_corpus, comparisons)]
    note = ("Means ± sd over sets, their number in brackets. Gains are paired by set; their 95 % intervals are "
            f"{corrected(comparisons)}.")
    return f"{markdown(['corpus', 'trained on', *encoders], lines, 'll')}\n\n{note}"


def _block(of_corpus: Mapping[str, tuple[pd.DataFrame, float]], comparisons: int) -> list[tuple[str, dict[str, str]]]:
    """The lines of a corpus: a name, and a text for each encoder."""
    scores = {row: {encoder: _counted(sets, row) for encoder, (sets, _) in of_corpus.items()} for row in SHOWN}
    lines = [(row, texts) for row, texts in scores.items() if any(texts.values())]
    for one, other in itertools.product(LEARNED, OPPONENTS):
        gains = {encoder: gain(by_hand_everywhere(sets), one, other, comparisons) for encoder, (sets, _) in of_corpus.items()}
        if any(gains.values()):
            lines.append((f"*{one} − {other}*", gains))
    for one, ceiling in itertools.product(LEARNED[:1], CEILINGS):
        shares = {encoder: _share(sets, one, ceiling, chance) for encoder, (sets, chance) in of_corpus.items()}
        if any(shares.values()):
            lines.append((f"*{one}, share of {ceiling} above chance*", shares))
    return lines


def _has(sets: pd.DataFrame, row: str) -> bool:
    return row in sets.index and bool(sets.loc[row].notna().any())


def _counted(sets: pd.DataFrame, row: str) -> str:
    return f"{spread(sets.loc[row])} ({sets.loc[row].count()})" if _has(sets, row) else ""


def _share(sets: pd.DataFrame, one: str, ceiling: str, chance: float) -> str:
    if not (_has(sets, one) and _has(sets, ceiling)):
        return ""
    return f"{(sets.loc[one].mean() - chance) / (sets.loc[ceiling].mean() - chance):.0%}"
