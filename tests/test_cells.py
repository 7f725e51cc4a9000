"""The cut through the cells of tokens, and the forest of gains: what lesson 03 draws."""

import math

import pytest
import torch

from distillkit.text.projection import nearest_tokens
from distillkit.view.figures import describe
from pictures import cells, forest


@pytest.fixture
def table():
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def test_a_point_leaves_its_cell_where_the_nearest_token_changes(table):
    allowed = torch.arange(60) != 7
    tokens = torch.tensor([0, 1, 2])
    ways = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    leaves, follows = cells.exits(table[tokens], ways, tokens, table, allowed)
    assert leaves.isfinite().tolist() == [False, True, True], "the first cell is open on that side"
    tokens, ways, leaves, follows = (values[1:] for values in (tokens, ways, leaves, follows))
    unit = ways / ways.norm(dim=1, keepdim=True)
    for share, expected in ((0.99, tokens), (1.01, follows)):
        points = table[tokens] + share * leaves[:, None] * unit
        assert nearest_tokens(points, table, allowed=allowed)[0][:, 0].tolist() == expected.tolist()


def test_a_cut_shows_the_cells_of_its_points(table):
    way = torch.randn(8, generator=torch.Generator().manual_seed(2))
    plane = cells.cut(table[0], way, 0, table, torch.ones(60, dtype=torch.bool))
    left, right, bottom, top = plane.extent
    across, up = cells.FINE
    for row, column in ((10, 20), (up // 2, across - 1), (up - 5, 100)):
        p = torch.tensor([left + (right - left) * column / (across - 1), bottom + (top - bottom) * row / (up - 1)])
        nearest = nearest_tokens((table[0] + p @ plane.axes)[None], table)[0].item()
        assert plane.cells[row, column] == nearest
    assert torch.allclose(plane.axes @ plane.axes.T, torch.eye(2), atol=1e-5)


def test_the_figure_of_a_cut_names_the_nearest_word(table):
    plane = cells.cut(table[0], torch.ones(8), 0, table, torch.ones(60, dtype=torch.bool))
    figure = cells.cut_figure(plane, 0.0, lambda token: f"<w{token}>$")
    assert describe(figure).startswith(r"panel 1: 0.0 from '<w0>\$', and still in its cell")


def test_a_point_that_has_not_moved_gives_no_plane(table):
    with pytest.raises(ValueError, match="not moved"):
        cells.cut(table[0], torch.zeros(8), 0, table, torch.ones(60, dtype=torch.bool))


def result(**rows):
    scores = [{"row": row, "set_seed": n, "accuracy": value, "cell": "c"} for row, values in rows.items()
              for n, value in enumerate(values)]
    return {"config": {"rows": list(rows)}, "scores": scores}


def test_gains_are_paired_and_one_set_has_no_interval():
    table = result(base=[0.5, 0.4, 0.6], better=[0.6, 0.52, 0.68], once=[0.7], same=[0.6, 0.5, 0.7])
    rows = {row: (row, "text") for row in ("better", "once", "same", "missing")}
    gains = {gain.label: gain for gain in forest.gains(table, "base", rows)}
    assert [*gains] == ["better", "once", "same"]
    better = gains["better"]
    assert better.mean == pytest.approx(0.1)
    assert 0 < better.alone < better.together < math.inf
    assert gains["once"].sets == 1
    assert math.isinf(gains["once"].alone)


def test_a_forest_has_a_row_per_method_and_hollow_marks_for_one_set():
    table = result(base=[0.5, 0.4, 0.6], better=[0.6, 0.52, 0.68], once=[0.7])
    gains = forest.gains(table, "base", {"better": ("better", "text"), "once": ("once $x$", "real")})
    figure = forest.forest({"here": gains, "there": gains[:1]}, "Better is better", "accuracy minus base")
    assert describe(figure) == (
        "panel 1: here | x: accuracy minus base | y:  | better: 1 points; once \\$x\\$: 1 points\n"
        "panel 2: there | x: accuracy minus base | y:  | better: 1 points")
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [face == "white" for face in faces] == [False, True]
