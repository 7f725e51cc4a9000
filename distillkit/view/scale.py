"""The sizes of a notebook: one column for a laptop, one for a workstation.

A notebook has to run offline on two cores, where it is read and tested, and on a GPU, where it is worth doing.  So its first
code cell shows two dictionaries of numbers, and the environment variable DISTILLKIT_SCALE chooses one of them::

    cfg = dk.scale(
        cpu={"corpus": "docstrings", "student": "offline:minilm", "outer_steps": 20},
        gpu={"corpus": "ag_news", "student": "bert-base-uncased", "outer_steps": 1000},
    )
    cfg.outer_steps

DISTILLKIT_REDUCED=1 cuts the sizes to :data:`REDUCED`, the smallest at which every line still does something.  The tests run
the gpu column that way, with tiny random models under the hub's names.  Nothing is learned there, so a notebook states what
it claims about learning through :meth:`Scale.claim`, and everything else with ``assert``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from distillkit.io.checks import check_choice

# The largest sizes of a reduced run; a size that is not named here stays.
REDUCED = {
    "corpus_limit": 96, "max_length": 48, "length": 12, "question_length": 48, "rows": 12, "batch_size": 4, "outer_batch": 8,
    "unroll_steps": 2, "outer_steps": 2, "swap_steps": 2, "stream_steps": 2, "expert_epochs": 1, "expert_batch": 16,
    "snapshots_per_epoch": 2,
}


class Scale(SimpleNamespace):
    """The chosen sizes as attributes, ``scale`` ("cpu" or "gpu"), and ``reduced``, whether they were cut for a test."""

    def claim(self, condition: bool, text: str) -> None:
        """Raise AssertionError with the sentence ``text`` unless ``condition`` holds; a reduced run claims nothing."""
        if not (condition or self.reduced):
            raise AssertionError(f"{text} (this did not hold at {self.scale} scale)")


def scale(cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> Scale:
    """Return the sizes that DISTILLKIT_SCALE names; those of ``cpu`` where it is not set.

    The notebooks share these names: ``corpus`` and ``student`` as `load_task` and `load_student` take them; ``corpus_limit``,
    rows per split (None: all); ``max_length`` and ``length``, tokens of a real text and of a synthetic example; ``per_class``,
    synthetic examples per class; ``unroll_steps``, inner steps; ``outer_steps``, updates of the synthetic examples;
    ``outer_batch``, real examples in one outer loss; ``seeds``, of the students that score a set.

    Args:
        cpu, gpu: sizes by name, the same names in both.

    Raises:
        ValueError: DISTILLKIT_SCALE is neither cpu nor gpu, or DISTILLKIT_REDUCED neither 0 nor 1.
    """
    name, reduced = os.environ.get("DISTILLKIT_SCALE") or "cpu", os.environ.get("DISTILLKIT_REDUCED") or "0"
    check_choice("the environment variable DISTILLKIT_SCALE", name, ("cpu", "gpu"))
    check_choice("the environment variable DISTILLKIT_REDUCED", reduced, ("0", "1"))
    sizes = dict({"cpu": cpu, "gpu": gpu}[name])
    if reduced == "1":
        sizes |= {size: min(sizes[size] or most, most) for size, most in REDUCED.items() if size in sizes}
        sizes["seeds"] = sizes.get("seeds", ())[:2]
    return Scale(**sizes, scale=name, reduced=reduced == "1")
