"""The drawings of lesson 10: which objections are judged, and on which side of 0 an interval lies."""

import math

import pandas as pd
import pytest

from distillkit.experiments import results
from distillkit.view.figures import describe
from pictures import reviewing, trajectories


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_only_what_is_ticked_is_judged():
    figure = reviewing.checklist(A=True, B=True, C=False)
    assert describe(figure).startswith(f"panel 1: 1 of {reviewing.PLANTED} mistakes found; objections without ground: 1")
    verdicts = [text for text in words(figure) if "mistake:" in text]
    assert [text.split(":")[0] for text in verdicts] == ["no mistake", "a mistake"]


def test_every_suspicion_has_a_box_and_a_line():
    assert list(reviewing.boxes()) == list(reviewing.SUSPICIONS)
    assert {suspicion.text for suspicion in reviewing.SUSPICIONS.values()} <= {*words(reviewing.checklist())}


def test_an_unknown_letter_is_an_error():
    with pytest.raises(ValueError, match="no suspicion 'Z'"):
        reviewing.checklist(Z=True)


@pytest.mark.parametrize(("mean", "half", "said"), [
    (0.1, 0.05, "above 0"), (-0.1, 0.05, "below 0"), (0.1, 0.2, "holds 0"), (0.1, math.inf, "no interval"),
])
def test_an_interval_says_where_it_lies(mean, half, said):
    figure = reviewing.gains("A finding", [("one", mean, half)])
    assert said in words(figure)[0] and "A finding" in describe(figure)


def test_groups_say_on_which_side_of_zero_the_corrected_interval_lies():
    lines = [("ours minus …", "LESS", 0.04, 0.02, 0.044), ("ours minus …", "random", 0.05, 0.02, 0.03),
             ("theirs minus …", "LESS", -0.05, 0.01, 0.02)]
    figure = reviewing.groups("A finding", lines, 9)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.split(": ")[1] for text in texts] == ["holds 0", "above 0", "below 0"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [
        "ours minus …", "LESS", "random", "theirs minus …", "LESS"]


def test_experiments_count_the_intervals_above_zero():
    figure = reviewing.experiments({"paired": ([0.01, 0.02, -0.03], [0.005, 0.03, 0.01])}, truth=0.015)
    assert figure.axes[0].get_title() == "Paired: 1 of 3 lie above 0"


def test_the_nine_differences_are_those_of_the_table():
    rows = sorted({row for pair in trajectories.COMPARED for row in pair})
    sets = pd.DataFrame({seed: [0.1 * place + 0.01 * seed * place for place in range(len(rows))] for seed in range(3)}, rows)
    lines = trajectories.differences(sets)
    assert len(lines) == len(trajectories.COMPARED) + 1 == 10
    for line, (one, other) in zip(lines[1:], trajectories.COMPARED, strict=True):
        mean, half = results.paired_difference(sets, one, other, 9)
        assert f"{mean:+.3f}" in line and line.endswith(f"{half:.3f}")
