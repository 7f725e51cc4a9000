"""The figures of the lessons on seeing prompts and on prompting: what they hold, and that corpus text is only text."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.view import figures as plots
from distillkit.view import measures
from pictures import attention_figures, forest, prompt_figures

HOSTILE = "<script>$x$</script>\x1b[2J"


def a_set(embeds):
    examples, length, _ = embeds.shape
    mask = torch.ones(examples, length, dtype=torch.bool)
    free = mask.clone()
    free[:, 0] = False
    targets = torch.zeros(examples, dtype=torch.long)
    return dk.DistilledSet(embeds=embeds, mask=mask, free=free, targets=targets, step_sizes=None,
                           tokens=None, meta={"classes": ["a"], "labels": [0] * examples})


def test_the_control_is_as_far_and_its_positions_move_together_or_apart():
    draw = torch.Generator().manual_seed(0)
    start = a_set(torch.randn(2, 4, 16, generator=draw))
    moved = torch.randn(2, 4, 16, generator=draw) * start.free[..., None]
    learned = dataclasses.replace(start, embeds=start.embeds + moved)
    control = measures.random_shift(learned, start, seed=1)
    shift = control.embeds - start.embeds
    assert torch.allclose(shift.norm(dim=-1), moved.norm(dim=-1), atol=1e-5)
    directions = torch.nn.functional.normalize(shift[:, 1:], dim=-1)
    assert torch.allclose(directions, directions[:, :1].expand_as(directions), atol=1e-5)
    assert not torch.allclose(directions[0], directions[1])
    assert torch.equal(control.embeds, measures.random_shift(learned, start, seed=1).embeds)
    apart = measures.random_shift(learned, start, seed=1, together=False).embeds - start.embeds
    assert torch.allclose(apart.norm(dim=-1), moved.norm(dim=-1), atol=1e-5)
    first, second = torch.nn.functional.normalize(apart[0, 1:3], dim=-1)
    assert not torch.allclose(first, second, atol=0.1), "a direction for each position"
    with pytest.raises(ValueError, match="started from"):
        measures.random_shift(learned, dataclasses.replace(start, embeds=start.embeds[:, :, :8]))


def test_thumbnails_put_every_head_in_its_place_on_a_scale_that_is_white_at_zero():
    values = np.zeros((2, 3, 4, 4))
    values[1, 2] = 0.25
    figure = attention_figures.thumbnails({"learned": values[0], "random": values[1]}, 7, "One head changes")
    (mesh,) = figure.axes[0].collections
    sheet, step = np.ma.filled(mesh.get_array(), np.nan).reshape(2 * 7 - 3, 3 * 7 - 3), 4 + attention_figures.GAP
    assert (sheet[step:, 2 * step :] == 0.25).all() and np.nansum(sheet) == 0.25 * 16 and np.isnan(sheet[4:7]).all()
    assert mesh.get_clim() == (-attention_figures.LIMIT, attention_figures.LIMIT)
    assert attention_figures.DIFFERENCE(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.02)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["learned", "random"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["7", "8", "9"]
    assert "One head changes" in plots.describe(figure)


def test_dots_hold_what_they_are_given():
    figure = attention_figures.by_kind([("t", "share", {"real": [0.1, 0.2], "learned": [0.3]}, 0.25)])
    assert "real: 2 points; learned: 1 points; chance: 2 points" in plots.describe(figure)


def test_a_prompt_is_drawn_in_its_order_with_the_question_last_and_as_text_only():
    labels = {"without": {"a": -1.0, "b": -2.0}, "with": {"a": -3.0, "b": -0.5}}
    figure = prompt_figures.prompt_and_labels([("first", "a"), (HOSTILE, "b")], "what?", labels, "b", "learned", "two", " --")
    written = [text.get_text() for text in figure.axes[0].texts]
    assert [line.strip() for line in written][-3:] == ["question", "what?", "?"]
    assert written[:4] == ["demonstration 1", "  first --", " a", ""], "an answer behind its cue, then an empty line"
    assert written.index("demonstration 1") < written.index("demonstration 2") < written.index("question")
    assert r"\$x\$" in "".join(written) and "\x1b" not in "".join(written)
    bars = figure.axes[1].patches
    assert sorted(bar.get_x() + bar.get_width() for bar in bars) == [-3, -2, -1, -0.5], "bars end at the log-likelihood"
    assert {bar.get_x() for bar in bars} == {figure.axes[1].get_xlim()[0]}, "a longer bar is a likelier label"
    assert [tick.get_weight() for tick in figure.axes[1].get_yticklabels()] == ["normal", "bold"]
    figure.canvas.draw()
    alone = prompt_figures.prompt_and_labels([], "what?", {"without": labels["without"]}, "a")
    assert len(alone.axes[1].patches) == 2
    assert figure.axes[1].get_xlim() == alone.axes[1].get_xlim(), "prompts are compared on one scale"
    unlikely = prompt_figures.prompt_and_labels([], "what?", {"without": {"a": -20.0, "b": -1.0}}, "a")
    assert unlikely.axes[1].get_xlim()[0] < -20


def test_labels_given_are_parts_of_a_bar_with_names_on_the_large_ones():
    figure = prompt_figures.labels_given({"right": {"a": 5, "b": 5}, "after": {"b": 9, "a": 1}}, ["a", "b"], "One label")
    (axes,) = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 5), (5, 5), (0, 1), (1, 9)]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "b"]
    assert axes.patches[0].get_facecolor() == axes.patches[2].get_facecolor() != axes.patches[1].get_facecolor()


def test_a_forest_has_a_row_for_each_method_and_no_interval_where_there_is_none():
    several, alone = forest.Gain("x", "real", -0.1, 0.05, 0.08, 3), forest.Gain("y", "learned", -0.3, math.inf, math.inf, 1)
    panels = {"k = 1": [several, alone], "k = 4": [forest.Gain("y", "learned", 0.1, 0.2, 0.3, 3)]}
    figure = forest.forest(panels, "title", "difference", {"chance": -0.4})
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["x", "y"] and left.get_xlim() == right.get_xlim()
    hollow = [line.get_markerfacecolor() for line in left.lines if line.get_label() == "y"]
    assert hollow == ["white"] and "x: 1 points" in plots.describe(figure)
    assert [line.get_xdata()[0] for line in left.lines if line.get_label() == "chance"] == [-0.4]
    intervals = [line.get_xdata().tolist() for line in left.lines if line.get_label() == "_interval"]
    assert intervals == [pytest.approx([-0.18, -0.02]), pytest.approx([-0.15, -0.05])]
