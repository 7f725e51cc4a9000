"""The drawings of lesson 10: which objections are judged, and on which side of 0 an interval lies."""

import math

import pytest

from distillkit.view.figures import describe
from pictures import reviewing


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
