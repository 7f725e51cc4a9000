"""Figures of cost: the Pareto line holds what nothing beats, and a single set is hollow."""

import math

import numpy as np
import pandas as pd
import pytest

from distillkit.applications.costs import break_even
from distillkit.view import figures as plots
from pictures import cost_figures


@pytest.fixture
def points():
    rows = [("cheap", "full", 1.0, 0.7, 0.01, 3, "above"), ("dear and worse", "learned", 10.0, 0.6, 0.02, 3, "left"),
            ("dear and better", "full", 100.0, 0.8, np.nan, 1, "below left"),
            ("as dear, worse", "real", 1.0, 0.5, 0.1, 2, "right")]
    return pd.DataFrame(rows, columns=["label", "role", "cost", "accuracy", "deviation", "sets", "place"])


def test_nothing_on_the_pareto_line_is_beaten(points):
    best = cost_figures.front(points)
    assert [*best["label"]] == ["cheap", "dear and better"]
    for row in best.itertuples():
        cheaper = points[(points["cost"] <= row.cost) & (points["label"] != row.label)]
        assert (cheaper["accuracy"] < row.accuracy).all()


def test_a_single_set_is_hollow_and_several_have_their_deviation(points):
    figure = cost_figures.pareto({"Dear": points, "Cheap": points.assign(cost=1)}, "TFLOPs", chance=0.25)
    axes, shared = figure.axes
    assert axes.get_xlim() == shared.get_xlim() and shared.get_title() == "Cheap"
    fill = {line.get_label(): line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"}
    assert fill["dear and better"] == "white" and fill["cheap"] != "white"
    assert len(axes.containers) == 3 and axes.get_xscale() == "log"
    assert "Pareto line: 3 points" in plots.describe(figure)


def test_dots_of_bytes_say_what_they_are_worth():
    rows = pd.DataFrame({"label": ["set", "text"], "role": ["learned", "text"], "nbytes": [300, 40], "worth": ["(0.6)", "($)"]})
    figure = cost_figures.byte_dots(rows, "Text is lighter", ("corpus", 150))
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].texts] == ["300 B  (0.6)", r"40 B  (\$)"]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"] == [300, 40]


def test_settings_are_drawn_where_they_were_measured():
    cells = pd.DataFrame({"x": [1, 3], "line": "learned", "colour": "#0173b2", "accuracy": [0.5, 0.6], "deviation": np.nan,
                          "sets": 1})
    figure = cost_figures.varied([("More help", "examples", cells), ("More help", "steps", cells)], {"chance": 0.2})
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "3"]
    assert all(line.get_markerfacecolor() == "white" for line in figure.axes[1].lines if line.get_marker() == "o")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["learned", "chance"]


@pytest.mark.parametrize(("bill", "title"), [((10, 3, 1), "from training 5 on"), ((10, 1, 1), "never")])
def test_the_running_cost_crosses_at_the_break_even(bill, title):
    pays = break_even(*bill)
    figure = cost_figures.running_cost(*bill, pays)
    (axes,) = figure.axes
    assert title in axes.get_title() and len(axes.lines) == (2 if math.isinf(pays) else 3)
