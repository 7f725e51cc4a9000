"""Heat maps of a stream: what is kept, and what the panels hold."""

import numpy as np
import pytest

from distillkit.view import figures as plots
from pictures import stream_figures

R = np.array([[0.9, 0.0, 0.0], [0.1, 0.8, 0.0], [0.0, 0.2, 0.7]])


def test_a_student_that_forgets_nothing_keeps_what_it_had():
    reference = stream_figures.kept(R)
    assert reference[2].tolist() == [0.9, 0.8, 0.7]
    assert np.isnan(reference[0, 1:]).all() and np.isnan(reference[1, 2])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_matrix_has_its_panel_and_its_numbers(count):
    panels = {f"memory {n}": R + n / 100 for n in range(count)}
    figure = stream_figures.accuracy_maps(panels, ["after 1", "after 2", "after 3"], ["a", "b", "c"], "Forgotten")
    figure.draw_without_rendering()
    assert [axes.get_title() for axes in figure.axes] == [*panels]
    assert figure.axes[0].texts[0].get_text() == "0.90" and len(figure.axes[-1].texts) == R.size
    assert plots.describe(figure).count("9 cells") == count


def test_what_has_not_come_yet_stays_white():
    figure = stream_figures.accuracy_maps({"kept": stream_figures.kept(R)}, "123", "abc", "Nothing is forgotten")
    assert len(figure.axes[0].texts) == 6
