"""The picture of text on its way to another model: what is joined, what is hollow, and names that do not cover each other."""

import pandas as pd

from pictures import transfers


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
