"""The sizes of a lesson: what runs on a laptop beside what is worth running on a workstation.

A lesson runs offline on two cores, where it is read and tested, and on a GPU, where it is worth doing.  Its first code cell
shows both columns of numbers, and the environment variable DISTILLKIT_SCALE chooses one::

    cfg = dk.sizes(   #  cpu               gpu
        corpus=        ("docstrings",     "ag_news"),
        student=       ("offline:minilm", "bert-base-uncased"),
        outer_steps=   (20,               1000),
    )
    cfg.outer_steps

DISTILLKIT_REDUCED=1 caps the sizes at :data:`CAPS`, the smallest at which every line still does something; tests run the gpu
column so, with tiny random models under the hub's names.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from distillkit.io.checks import check_choice

SCALES = ("cpu", "gpu")
# The largest sizes of a reduced run; a size that is not named here stays.
CAPS = {
    "corpus_limit": 96, "max_length": 48, "length": 12, "question_length": 48, "rows": 12, "batch_size": 4, "outer_batch": 8,
    "unroll_steps": 2, "outer_steps": 2, "swap_steps": 2, "expert_epochs": 1, "snapshots_per_epoch": 2,
}


class Sizes(SimpleNamespace):
    """The chosen sizes as attributes, ``scale`` ("cpu" or "gpu"), and ``reduced``, whether they were capped for a test."""

    def claim(self, condition: bool, text: str) -> None:
        """Check what a lesson says about learning, where its stored outputs are made or compared.

        A reader who changes a number trips over nothing: claims are checked only under DISTILLKIT_CLAIMS=1, which
        ``notebooks/refresh.py`` and the tests set, and not at reduced sizes, where nothing is learned.

        Raises:
            AssertionError: the condition does not hold; the message is ``text``.
        """
        if os.environ.get("DISTILLKIT_CLAIMS") == "1" and not (condition or self.reduced):
            raise AssertionError(f"{text} (this did not hold at {self.scale} scale)")


def sizes(**columns: tuple[Any, Any]) -> Sizes:
    """The sizes that DISTILLKIT_SCALE names; those of the cpu where it is not set.

    Lessons share these names: ``corpus`` and ``student`` as `load_task` and `load_student` take them; ``corpus_limit``, rows
    per split (None: all); ``max_length`` and ``length``, tokens of a real text and of a synthetic example; ``per_class``,
    synthetic examples per class; ``unroll_steps``, inner steps; ``outer_steps``, updates of the synthetic examples;
    ``outer_batch``, real examples in one outer loss; ``seeds``, of the students that score a set.

    Args:
        columns: each size as (cpu, gpu).

    Raises:
        ValueError: a size is not a pair, DISTILLKIT_SCALE is neither cpu nor gpu, or DISTILLKIT_REDUCED neither 0 nor 1.
    """
    scale, reduced = os.environ.get("DISTILLKIT_SCALE") or "cpu", os.environ.get("DISTILLKIT_REDUCED") or "0"
    check_choice("the environment variable DISTILLKIT_SCALE", scale, SCALES)
    check_choice("the environment variable DISTILLKIT_REDUCED", reduced, ("0", "1"))
    for name, pair in columns.items():
        if not isinstance(pair, tuple) or len(pair) != len(SCALES):
            raise ValueError(f"size {name} is {pair!r}; give a pair: (for cpu, for gpu)")
    chosen = {name: pair[SCALES.index(scale)] for name, pair in columns.items()}
    if reduced == "1":
        chosen |= {name: min(chosen[name] or cap, cap) for name, cap in CAPS.items() if name in chosen}
        if "seeds" in chosen:
            chosen["seeds"] = chosen["seeds"][:2]
    return Sizes(**chosen, scale=scale, reduced=reduced == "1")
