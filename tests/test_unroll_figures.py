"""The figures about meta-gradients: what they draw is what they are given."""

import dataclasses
from pathlib import Path

import pytest
import torch

from distillkit.experiments.results import read
from distillkit.view.figures import ROLE_COLOURS, describe
from pictures.unroll_figures import STRATEGY_COLOURS, MemoryTrace, Panel, cost_bars, line_panels, memory_films

COSTS = Path(__file__).resolve().parent.parent / "figures" / "results" / "metagrad.json"


def test_a_trace_follows_the_bytes_of_every_operation():
    with MemoryTrace() as trace:
        first = torch.zeros(1000, dtype=torch.float64)
        second = first + 1
        del first
        second.add_(1)
    assert trace.history == [8000, 16000, 8000]
    assert max(trace.history) == trace.total.peak


def test_panels_show_lines_marks_and_levels():
    panel = Panel("Falling", "steps", "loss", {"a": ([1, 2, 3], [3, 2, 1]), "b": ([1, 2, 3], [1, 1, 1])}, marks={"here": 2},
                  levels={"full data": (0.5, "full")}, ylim=(0, 4))
    figure = line_panels(panel, dataclasses.replace(panel, title="Log", log="xy", ylim=None))
    first, second = figure.axes
    assert describe(figure).splitlines()[0] == "panel 1: Falling | x: steps | y: loss | a: 3 points; b: 3 points"
    assert first.get_ylim() == (0, 4) and (second.get_xscale(), second.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in first.texts] == ["full data", "here"]
    assert not {*STRATEGY_COLOURS.values()} & {*ROLE_COLOURS.values()}, "a strategy in the colour of a role"


def test_bars_are_the_measured_costs():
    result, titles = read(COSTS), ("Memory", "Time")
    memory, time = cost_bars(result, (2, 32), {"StoreAll": "everything", "Replay": "Replay"}, titles).axes
    rows = {(row["contender"], row["steps"]): row for row in result["entries"][0]["rows"]}
    expected = [rows[name, steps]["cost"] for name in ("StoreAll", "Replay") for steps in (2, 32)]
    assert [bar.get_height() for bar in time.patches] == expected
    assert [text.get_text() for text in memory.get_legend().get_texts()][:2] == ["everything", "Replay"]
    assert max(bar.get_height() for bar in memory.patches) == rows["StoreAll", 32]["bytes"] / 1e9
    with pytest.raises(KeyError):
        cost_bars(result, (3,), {"StoreAll": "everything"}, titles)


def test_a_film_of_memory_keeps_the_peak_of_every_stretch():
    figure = memory_films({"StoreAll": [1.0, 9.0, 2.0, 3.0], "Replay": [5.0]}, "A finding", frames=2)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["StoreAll"] == [[50.0, 9.0], [100.0, 3.0]] and lines["Replay"] == [[50.0, 5.0], [100.0, 5.0]]
