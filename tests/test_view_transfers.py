"""Pictures of text on its way to another model: which characters a token stands for, what is struck through, what is hollow."""

import pandas as pd

from pictures import transfers
from pictures.transfers import Piece

TEXT = "Returns the eigenvalues café of a Hermitian matrix."


def test_chips_stand_over_their_characters_and_unread_ones_are_struck_through():
    text = "pay $5 now " * 12
    words = [Piece(start, start + 2, start < 100) for start in range(0, 132, 11)]
    other = [Piece(start, start + 3, True) for start in range(0, 132, 11)]
    figure = transfers.chips(text, {"one": words, "other": other}, "Cut")
    (axes,) = figure.axes
    assert len(axes.patches) == len(words) + len(other)
    assert len([line for line in axes.lines if line.get_label() == "_struck"]) == sum(not word.read for word in words)
    drawn = [label.get_text() for label in axes.texts]
    assert drawn.count("pa") == 12 == drawn.count("pay") and drawn.count("one") == 3  # three lines of text
    fills = {patch.get_facecolor()[:3] for patch in axes.patches}
    assert len(fills) == 2  # cut differently, and not read


def test_a_text_without_spaces_is_broken_all_the_same():
    figure = transfers.chips("a" * 150, {"one": [Piece(0, 1, True), Piece(149, 150, True)]}, "Long")
    assert len(figure.axes[0].patches) == 2


def test_slopes_join_what_was_measured():
    rows = [("random", "home", 0, 0.4), ("random", "home", 1, 0.6), ("random", "away", 0, 0.3), ("swaps", "away", 0, 0.5)]
    scores = pd.DataFrame(rows, columns=["method", "target", "set_seed", "accuracy"])
    figure = transfers.slopes({"Where": scores}, 0.25, {"home": 0.8, "elsewhere": 0.9})
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    aside = transfers.STEP / 2
    assert lines["real, random"].get_xydata().tolist() == [[0 - aside, 0.5], [1 - aside, 0.3]]
    assert lines["swaps"].get_xydata().tolist() == [[1 + aside, 0.5]]
    hollow = [line for line in axes.lines if line.get_label() == "_one set"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[1 - aside, 0.3]], [[1 + aside, 0.5]]]
    assert {line.get_markerfacecolor() for line in hollow} == {"white"} != {lines["swaps"].get_markerfacecolor()}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["home", "away"]
    assert [text.get_text() for text in axes.texts] == ["real, random", "swaps", "all data", "guessing"]
    low, high = (text.get_position()[1] for text in axes.texts[:2])
    assert high - low > 0.04  # names of equal scores do not cover each other
