"""A figure that follows its controls: drawn again when one moves, and left alone where it fails."""

import io

import numpy as np
import PIL.Image
import pytest

from distillkit.view import figures as plots
from distillkit.view import widgets


def lines_of(steps, kind):
    if steps == 9:
        raise ValueError("<b>nine</b> is too many")
    return plots.curves([(kind, "x", "y", {"line": (range(steps), range(steps))})])


def test_a_figure_is_drawn_again_when_a_control_moves():
    explorer = widgets.explore(lines_of, steps=(1, 10), kind=["rising", "falling"])
    for name, value in (("steps", 3), ("kind", "falling")):
        before = explorer.picture.value
        explorer.controls[name].value = value
        assert explorer.picture.value != before
    expected = io.BytesIO()
    lines_of(3, "falling").savefig(expected, format="png")
    shown, drawn = (np.asarray(PIL.Image.open(io.BytesIO(png))) for png in (explorer.picture.value, expected.getvalue()))
    assert (shown == drawn).all()
    assert repr(explorer) == "Explorer(steps, kind)"  # what a notebook stores: the same on every machine


def test_a_figure_that_fails_leaves_the_last_one_and_says_why():
    explorer = widgets.explore(lines_of, steps=(1, 10), kind=["rising"])
    before = explorer.picture.value
    explorer.controls["steps"].value = 9
    assert explorer.picture.value == before and "nine" in explorer.problem.value and "<b>" not in explorer.problem.value
    explorer.controls["steps"].value = 2
    assert explorer.picture.value != before and explorer.problem.value == ""


def test_what_no_control_can_be_made_from_is_named():
    with pytest.raises(ValueError, match="steps=None"):
        widgets.explore(lines_of, steps=None)
