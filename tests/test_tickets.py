"""The tickets of lesson 11 and its figures."""

import math

import pytest

from distillkit.view import figures as plots
from pictures import tickets


def test_no_pattern_and_no_ticket_stands_in_two_splits():
    rows, patterns = tickets.support_tickets()
    assert {split: len(found) for split, found in rows.items()} == {"train": 128, "validation": 48, "test": 72}
    assert len(patterns) == 72 and len({*patterns}) == 18 == 72 // tickets.FILLINGS
    texts = [text for found in rows.values() for text, _ in found]
    assert len({*texts}) == len(texts)
    of = {split: {pattern for _, _, pattern in tickets.filled(split)} for split in tickets.PATTERNS}
    assert not (of["train"] & of["test"] or of["train"] & of["validation"] or of["validation"] & of["test"])
    assert {label for _, label in rows["test"]} == {"billing", "delivery", "technical"}


@pytest.mark.parametrize(("n_star", "marks"), [(13, 1), (math.inf, 0), (5000, 0)])
def test_the_bill_marks_where_distilling_has_paid(n_star, marks):
    figure = tickets.bill(n_star, "distil", 30, distilling=4.0, full=0.3, small=0.01)
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert f"n* = {n_star}" in axes.get_title() and "30 trainings" in texts
    assert sum(text.startswith("n* =") for text in texts) == marks


def test_bars_stand_in_order_with_a_value_each():
    accuracy = {"k_center, tuned": 0.4, "linear probe on all rows": 0.9, "distilled, own": 0.7}
    figure = tickets.bars(accuracy, {"distilled, own": [0.65, 0.75]}, 1 / 3)
    axes = figure.axes[0]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["linear probe on all rows", "distilled, own", "k_center, tuned"]
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.70", "0.40"]
    assert axes.get_title() == "The linear probe on all rows is first with 0.90; the best learned set has 0.70"
    assert "accuracy on the test tickets" in plots.describe(figure)
