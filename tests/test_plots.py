"""Figures hold what they are given, and corpus text is never taken for mathematics or for HTML."""

import hashlib
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distillkit.view import figures as plots


@pytest.fixture
def result():
    rows = {"random/tuned": 0.31, "embeddings/own": 0.6, "full/standard": 0.77}
    scores = [{"cell": "a", "row": row, "method": row.split("/")[0], "recipe": row.split("/")[1], "set_seed": 0,
               "accuracy": mean + change, "examples": 1200} for row, mean in rows.items() for change in (-0.01, 0.01)]
    notes = {"embeddings 0": {"losses": [1.5, 1.2, 1.1] * 5}, "random/tuned 0": {"groups": {"a": 0.3, "b": 0.3}}}
    return {"config": {"rows": [*rows], "per_class": 1, "seed": 0}, "cells": {"a": {"notes": notes}}, "scores": scores}


def test_the_curve_of_the_outer_loss():
    losses = [2.0 - 0.1 * step for step in range(15)]
    axes = Figure().subplots()
    plots.draw_curve(axes, losses)
    each, mean = axes.lines
    assert each.get_xdata().tolist() == list(range(1, 16)) and each.get_ydata().tolist() == pytest.approx(losses)
    # The mean of steps 1 to 10 stands at step 10.
    assert mean.get_xdata()[0] == 10 and mean.get_ydata().tolist() == pytest.approx(
        [sum(losses[i : i + 10]) / 10 for i in range(6)])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("outer step", "loss on real text")
    short = Figure().subplots()
    plots.draw_curve(short, losses[:9])
    assert len(short.lines) == 1, "too few steps for a mean"


def test_scores(result):
    (axes,) = plots.scores(result).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.77, 0.6, 0.31]), "the best on top"
    dots = [list(line.get_xdata()) for line in axes.lines]
    assert dots[:-1] == [pytest.approx([mean - 0.01, mean + 0.01]) for mean in (0.77, 0.6, 0.31)] and dots[-1] == [0.5, 0.5]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[2] == "real, random\n(1,200 examples, tuned)" and axes.get_xlim() == (0, 1)
    assert {"0.60 ± 0.01", "chance"} <= {text.get_text() for text in axes.texts}
    assert len({bar.get_facecolor() for bar in axes.patches}) == 3


def test_quickstart(result):
    figure = plots.quickstart(result)
    left, right = figure.axes
    assert left.get_xlabel() == "outer step" and len(left.lines[0].get_ydata()) == 15
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0.77, 0.6, 0.31]), "the best on top"
    assert right.get_ylim()[0] > right.get_ylim()[1]
    assert right.get_title() == "Training on 1 example of each of 2 classes"
    assert [line.get_xdata()[0] for line in right.lines if line.get_linestyle() == ":"] == [0.5]


def one_curve(values):
    return plots.curves([("falling", "step", "loss", {"a": (range(len(values)), values)})])


@pytest.mark.parametrize("make", [lambda r: one_curve([1.0, 2.0]), plots.quickstart, plots.scores])
def test_figures_belong_to_nobody_and_settings_stay(result, make):
    import matplotlib.pyplot as plt

    settings, open_figures = dict(matplotlib.rcParams), plt.get_fignums()
    assert isinstance(make(result), Figure)
    assert plt.get_fignums() == open_figures, "pyplot would show it twice and keep it alive"
    assert dict(matplotlib.rcParams) == settings


def test_describe(result):
    lines = plots.describe(plots.quickstart(result)).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("panel 1: Learning the set | x: outer step | y: loss on real text | ")
    assert "each step: 15 points" in lines[0]
    assert "mean of 10 steps: 6 points" in lines[0]
    assert "Training on 1 example" in lines[1] and "3 bars" in lines[1]
    mesh = Figure()
    mesh.colorbar(mesh.subplots().pcolormesh(np.ones((3, 2))))
    (cells,) = plots.describe(mesh).splitlines()  # a colour bar is no panel
    assert "6 cells" in cells
    result["cells"]["a"]["notes"]["embeddings 0"]["losses"] = [1.0]
    assert plots.describe(plots.quickstart(result)).splitlines() != lines


@pytest.mark.parametrize("text", ["costs $5 or $6", "$x^2$", r"\alpha", r"$\alpha$ and \$5", "100 %", r"a\$b$c"])
def test_plain_text_is_printed_letter_by_letter(text):
    """The same pixels as the text drawn with mathematics switched off."""

    def drawn(text, **settings):
        figure = Figure(figsize=(4, 1))
        FigureCanvasAgg(figure)
        figure.text(0.1, 0.4, text, **settings)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba()).copy()

    assert np.array_equal(drawn(plots.plain(text)), drawn(text, parse_math=False))


def test_saved_figures_are_the_same_bytes(result, tmp_path):
    paths = [plots.save(plots.quickstart(result), tmp_path / "new" / "folder" / f"{n}.png") for n in "ab"]
    raw = [path.read_bytes() for path in paths]
    assert raw[0] == raw[1] and raw[0].startswith(b"\x89PNG") and b"Matplotlib" not in raw[0]
    other = plots.save(one_curve([1.0]), str(tmp_path / "c.png"))
    assert hashlib.sha256(other.read_bytes()).digest() != hashlib.sha256(raw[0]).digest()


def test_text_tables_are_escaped():
    rows = [{"text": "<script>alert('x')</script> & $y$", "label": "<b>", "probabilities": [0.25, 0.75]}]
    found = plots.text_table(rows, ["<b>", "c & d"])
    tree = ET.fromstring(found)  # well-formed, and the text is text
    assert [cell.text for cell in tree.iter("th")] == ["class", "text", "<b>", "c & d"]
    assert [cell.text for cell in tree.iter("td")] == ["<b>", "<script>alert('x')</script> & $y$", "0.25", "0.75"]


def test_a_notebook_shows_a_figure_as_a_picture():
    figure = one_curve([1.0, 0.5, 0.2])
    assert figure._repr_png_().startswith(b"\x89PNG\r\n")
    assert figure._repr_png_() == figure._repr_png_()


def test_curves():
    lines = {"a": ([1, 2], [3.0, 4.0]), "b": ([1, 2], [1.0, 0.1])}
    figure = plots.curves([("left", "x", "y", lines), ("right", "x", "y", {"a": lines["a"]})])
    assert [axes.get_title() for axes in figure.axes] == ["left", "right"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert "b: 2 points" in plots.describe(figure)
    assert all(axes.get_legend() for axes in figure.axes) and not figure.legends


def test_many_curves_are_named_once_below():
    lines = {name: ([1, 2, 3], [1.0, 2.0, 3.0]) for name in "abcde"}
    figure = plots.curves([("left", "x", "y", lines), ("right", "x", "y", lines)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list("abcde")
    assert not any(axes.get_legend() for axes in figure.axes)
    assert all(float(tick).is_integer() for axes in figure.axes for tick in axes.get_xticks())


def test_points():
    figure = plots.points("swaps", "promised", "done", {"a": ([1, 2, 3], [1.0, 2.0, 0.5])})
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 2.0], [3, 0.5]]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("swaps", "promised", "done")
    assert "a: 3 points" in plots.describe(figure) and "y = x" in plots.describe(figure)
