"""Pictures of trajectory matching: coordinates that keep the matching loss, a forest plot that says how many sets it has."""

import numpy as np
import pytest
import torch

from distillkit.view import figures as plots
from pictures import trajectories


def weights(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"b": torch.randn(3, generator=draw), "a": torch.randn(4, 2, generator=draw)}


def squared(one, other) -> float:
    return sum(float((one[name] - other[name]).double().square().sum()) for name in one)


def test_the_plane_keeps_both_distances():
    start, end, point = map(weights, range(3))
    along, off = trajectories.in_plane(point, start, end)
    move = squared(start, end)
    assert (1 - along) ** 2 + off**2 == pytest.approx(squared(point, end) / move, rel=1e-6)
    assert along**2 + off**2 == pytest.approx(squared(point, start) / move, rel=1e-6)


def test_the_ends_and_a_right_angle():
    start, end, aside = ({"w": torch.tensor(values)} for values in ([1.0, 1.0], [4.0, 5.0], [5.0, -2.0]))
    assert trajectories.in_plane(start, start, end) == (0, 0)
    assert trajectories.in_plane(end, start, end) == pytest.approx((1, 0))
    assert trajectories.in_plane(aside, start, end) == pytest.approx((0, 1))


def test_an_expert_that_stands_still_has_no_plane():
    with pytest.raises(ValueError, match="same point"):
        trajectories.in_plane(weights(0), weights(1), weights(1))


def test_the_sheet_shows_each_path_and_joins_its_end_to_the_experts():
    paths = {"expert": ("full", [(0, 0), (0.5, 0.3), (1, 0)]), "learned": ("learned", [(0, 0), (0.7, 0.2)])}
    figure = trajectories.plane(paths, "Nearer $than$ before")
    (axes,) = figure.axes
    assert "expert: 3 points; learned: 2 points" in plots.describe(figure)
    dotted = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == [[[0.7, 0.2], [1, 0]]]
    for ring, loss in zip((line for line in axes.lines if line.get_label() == "_ring"), trajectories.RINGS, strict=True):
        x, y = ring.get_xydata().T
        assert np.allclose((1 - x) ** 2 + y**2, loss)


def test_the_legend_names_what_is_left():
    figure = trajectories.plane({"expert": ("full", [(0, 0), (1, 0)])}, "Alone")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][-1].startswith("what is left")


def test_the_right_axis_is_the_root_of_the_matching_loss():
    figure = trajectories.losses({"set 0": [0.25, 0.36, 0.09], "set 1": [0.25, 0.3, 0.1]}, "Falls")
    (axes,) = figure.axes
    assert "set 0: 3 points; set 1: 3 points" in plots.describe(figure)
    figure.draw_without_rendering()
    (way,) = axes.child_axes
    assert np.square(way.get_ylim()) == pytest.approx(axes.get_ylim())
    assert len({line.get_color() for line in axes.lines if line.get_label().startswith("set")}) == 2


@pytest.fixture
def result():
    scores = {"zero-shot/none": [0.3], "full/standard": [0.8], "random/standard": [0.60, 0.62, 0.64],
              "nacd/own": [0.66, 0.69, 0.69], "bptt/own": [0.63]}
    rows = [{"row": row, "set_seed": seed, "accuracy": score} for row, of_sets in scores.items()
            for seed, score in enumerate(of_sets)]
    return {"config": {"rows": [*scores, "less/standard"]}, "cells": {}, "scores": rows}


def test_a_forest_plot_shows_sets_gains_and_intervals(result):
    figure = trajectories.gains(result, "random/standard", 0.25, "Learned", "Gain", comparisons=3)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "distilled, NACD (own)", "distilled, BPTT (own)", "real, random (standard)"]
    dots = {line.get_label(): line for line in left.lines}
    assert dots["distilled, NACD (own)"].get_xdata().tolist() == [0.66, 0.69, 0.69]
    assert dots["distilled, BPTT (own)"].get_markerfacecolor() == "white" != dots["distilled, NACD (own)"].get_markerfacecolor()
    assert [line.get_xdata()[0] for line in left.lines if list(line.get_ydata()) == [0, 1]] == [0.8]
    assert all(f"{level:.2f}" in left.get_xlabel() for level in (0.25, 0.3))  # left of the axis, in words
    learned, single = (line.get_xdata()[0] for line in right.lines if line.get_label() == "_gain")
    assert learned == pytest.approx(0.06) and single == pytest.approx(0.03)
    together, alone = (line for line in right.lines if line.get_label() == "_interval")
    assert [np.mean(line.get_xdata()) for line in (together, alone)] == pytest.approx([0.06, 0.06])
    assert np.ptp(together.get_xdata()) > np.ptp(alone.get_xdata()) > 0
