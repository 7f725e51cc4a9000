"""Heat maps of a stream: what the panels hold."""

import numpy as np
import pytest

from distillkit.view import figures as plots
from pictures import stream_figures

R = np.array([[0.9, 0.0, 0.0], [0.1, 0.8, 0.0], [0.0, 0.2, 0.7]])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_matrix_has_its_panel_and_its_numbers(count):
    panels = {f"memory {n}": R + n / 100 for n in range(count)}
    figure = stream_figures.accuracy_maps(panels, ["after 1", "after 2", "after 3"], ["a", "b", "c"], "Forgotten")
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == [*panels]
    assert figure.axes[0].texts[0].get_text() == "0.90" and len(figure.axes[-1].texts) == R.size
    assert plots.describe(figure).count("9 cells") == count


def test_what_has_not_come_yet_stays_white():
    figure = stream_figures.accuracy_maps({"so far": np.where(np.tri(3), R, np.nan)}, "123", "abc", "So far")
    assert len(figure.axes[0].texts) == 6
