"""Every figure of the project is drawn from a committed result by one command, and shows what that result says."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from distillkit.cli.main import main
from distillkit.experiments.results import by_set, paired_difference, read, write
from distillkit.experiments.runner import CONFIGS
from distillkit.view import figures as plots
from distillkit.view import gallery
from example_results import result_of

RESULTS = Path(__file__).resolve().parent.parent / "figures" / "results"
COMMITTED = {path.stem for path in RESULTS.glob("*.json")}


def stored(name):
    return read(RESULTS / f"{name}.json")


@pytest.fixture
def moved():
    """A result on transfer: one pair has run, with the target's full data, one without, one has not run at all."""
    rows = {"a to b/random": [0.3, 0.32], "a to b/swaps": [0.5, 0.52], "b/full": [0.8], "b to a/random": [0.2]}
    return result_of(rows | {"b to a/swaps": [], "a/full": []}, students=["x/a", "x/b"], kind="transfer", groups="wxyz")


def test_the_command_draws_what_has_run_and_says_what_has_not(tmp_path, monkeypatch, moved, capsys):
    results = tmp_path / "results"
    results.mkdir()
    write(results / "moved.json", moved)
    write(results / "begun.json", moved | {"scores": []})
    monkeypatch.setattr(gallery, "FIGURES", {n: (n, plots.transfer_map) for n in ("moved", "begun", "absent")})
    assert main(["figures", "--results", str(results)]) == 0
    drawn, begun, absent = capsys.readouterr().out.splitlines()
    assert drawn == f"moved: {tmp_path / 'moved.png'}" and (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")
    assert "begun: skipped, nothing in" in begun and "absent: skipped, no result" in absent
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_every_result_can_be_drawn():
    drawn = {source for source, _ in gallery.FIGURES.values()}
    assert drawn <= COMMITTED | {path.stem for path in CONFIGS.glob("*.yaml")}, "a figure of what nobody makes"
    configs = {name: stored(name).get("config", {}) for name in COMMITTED}
    known = {name for name, config in configs.items() if config.get("kind") in ("instruction", "text", "transfer")}
    assert known | {name for name in COMMITTED if name.startswith("classification")} <= drawn


@pytest.mark.parametrize("name", [name for name, (source, _) in gallery.FIGURES.items() if source in COMMITTED])
def test_a_figure_of_a_committed_result(name):
    source, draw = gallery.FIGURES[name]
    with matplotlib.rc_context():
        figure = draw(stored(source))
    assert plots.describe(figure) and all(axes.get_xlabel() for axes in figure.axes)
    figure.draw_without_rendering()
    edges = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert edges.x0 - 1 <= box.x0 and box.x1 <= edges.x1 + 1 and edges.y0 - 1 <= box.y0 and box.y1 <= edges.y1 + 1


@pytest.fixture
def compared():
    """A result on instruction tuning: two sets of each row, and LESS has not run."""
    rows = {"zero-shot/none": [0.3, 0.3], "random/standard": [0.6, 0.63], "k_center/standard": [0.61, 0.6], "less/standard": [],
            "nacd/own": [0.7, 0.68], "nacd text/standard": [0.6, 0.63], "full/standard": [0.8]}
    return result_of(rows, kind="instruction")


def test_bars_of_seeded_results(compared):
    (axes,) = plots.seeded(compared, "Which?").axes
    sets = by_set(compared).dropna(how="all")
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.3, 0.615, 0.605, 0.69, 0.615, 0.8])
    assert [len(line.get_xdata()) for line in axes.lines] == [*sets.count(axis=1)] == [2, 2, 2, 2, 2, 1]
    assert "distilled, NACD (own)" in [label.get_text() for label in axes.get_yticklabels()]


def test_a_grid_of_texts_has_a_panel_a_corpus():
    herding, sentences = {"herding/fixed": [0.5, 0.51]}, {"sentences/fixed": [0.6, 0.61]}
    cells = {"a,5": herding | sentences | {"swaps/fixed": [0.5, 0.51]}, "a,10": herding, "b,10": herding | sentences}
    rows = ["herding/fixed", "sentences/fixed", "swaps/fixed"]
    result = result_of(dict.fromkeys(rows), cells, corpora={"a": {}, "b": {}, "c": {}})
    first, second = plots.seeded_grid(result).axes
    assert [axes.get_title() for axes in (first, second)] == ["a", "b"]
    assert [t.get_text() for t in second.get_xticklabels()] == ["5", "10"]
    herding, dots, sentences, _ = first.lines  # and no swaps, which have been run at one size only
    assert herding.get_label() == "real, herding" and sentences.get_label() == "real, chosen by a judge"
    assert list(herding.get_ydata()) == pytest.approx([0.505, 0.505]) and list(sentences.get_ydata()) == pytest.approx([0.605])
    assert list(dots.get_ydata()) == pytest.approx([0.5, 0.51] * 2)
    assert [round(x) for x in second.lines[0].get_xdata()] == [1], "at its own size"


def test_differences_are_paired_with_their_intervals(compared):
    (axes,) = plots.differences(compared).axes
    assert len(axes.containers) == 2, "LESS has not run"
    line, _, (bars,) = axes.containers[0].lines
    for place, name in enumerate(("nacd/own", "nacd text/standard")):
        mean, half = paired_difference(by_set(compared), name, "random/standard")
        assert line.get_xdata()[place] == pytest.approx(mean) == pytest.approx([0.075, 0][place])
        assert bars.get_segments()[place][:, 0] == pytest.approx([mean - half, mean + half])


def test_no_differences_where_no_set_was_learned(compared):
    compared["scores"] = [score for score in compared["scores"] if not score["method"].startswith("nacd")]
    assert all(not len(container.lines[0].get_xdata()) for container in plots.differences(compared).axes[0].containers)


def test_the_cost_of_a_meta_gradient_against_its_steps():
    result = stored("metagrad")
    time, memory = plots.metagrad_cost(result).axes
    rows = [row for row in result["entries"][0]["rows"] if row["contender"] == "Replay"]
    for axes, key, scale in ((time, "cost", 1), (memory, "bytes", 1e-6)):
        (line,) = (line for line in axes.lines if line.get_label() == "Replay")
        assert list(line.get_xdata()) == [row["steps"] for row in rows]
        assert list(line.get_ydata()) == pytest.approx([row[key] * scale for row in rows])
        assert {line.get_label() for line in axes.lines} <= {*plots.STRATEGIES_SHOWN}


def test_the_map_of_transfer(moved):
    figure = plots.transfer_map(moved)
    absolute, relative = figure.axes
    assert [t.get_text() for t in absolute.get_xticklabels()] == ["a", "b"]
    assert [t.get_text() for t in absolute.get_yticklabels()] == [
        "a: real, random", "a: swaps", "b: real, random", "b: swaps"]
    words = [[t.get_text() for t in axes.texts] for axes in figure.axes]
    assert words[0] == ["", "0.31 ± 0.01", "", "0.51 ± 0.01", "0.20", "", "not run", ""]
    assert words[1] == ["", "11%", "", "47%", "no full score", "", "not run", ""]
    values = relative.collections[0].get_array().reshape(4, 2)
    assert values[1, 1] == pytest.approx(0.26 / 0.55) and np.ma.getmaskarray(values)[[0, 2], [0, 0]].all()
    (alone,) = plots.transfer_map(moved | {"scores": []}).axes  # no full data, so no share of it
    assert alone.texts[1].get_text() == "not run"


def test_no_two_methods_of_a_figure_share_a_colour():
    for names in (("instruction_library",), ("text_docstrings", "text_sizes")):
        methods = {name.split("/")[0] for source in names for name in stored(source)["config"]["rows"]}
        assert len({plots.METHOD_COLOURS[m] for m in methods}) == len(methods)
