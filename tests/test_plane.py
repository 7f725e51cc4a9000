"""Two points on a plane: the widget's numbers against an independent computation, its mouse in a browser, the film."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from distillkit.view import figures as plots
from pictures import plane
from test_browser import CHROMIUM, MISSING


@pytest.fixture
def cloud():
    return plane.clouds(60, seed=3)


@pytest.fixture
def widget(cloud):
    return plane.Plane(plane.random_pairs(1, *cloud, seed=1)[0], *cloud)


def outer_loss(points, step_size, starts, real, labels, steps):
    """The same loss without torch, a start and a point at a time."""
    total = 0.0
    for weights in starts.numpy():
        for _ in range(steps):
            pull = [(1 / (1 + math.exp(-weights @ point)) - k) * np.array(point) for k, point in enumerate(points)]
            weights = weights - step_size * (pull[0] + pull[1]) / 2
        signs = 2 * labels.numpy() - 1
        total += np.log1p(np.exp(-signs * (real.numpy() @ weights))).mean()
    return total / len(starts)


def test_moving_a_point_changes_the_loss_as_computed_independently(widget, cloud):
    starts = plane.random_starts(32, seed=0)
    before = widget.state["loss"]
    moved = [[-0.5, -1.0], [0.2, 1.5]]
    for points, step_size, steps in [(widget.points, 5.0, 5), (moved, 5.0, 5), (moved, 1.5, 2)]:
        widget.points, widget.step_size, widget.steps = points, step_size, steps
        assert widget.state["loss"] == pytest.approx(outer_loss(points, step_size, starts, *cloud, steps), rel=1e-9)
    assert widget.state["loss"] != before


def test_the_arrows_are_the_slope_of_that_loss(widget, cloud):
    starts, small = plane.random_starts(32, seed=0), 1e-5
    for k in range(2):
        for axis in range(2):
            moved = np.array([widget.points, widget.points])
            moved[:, k, axis] += small, -small
            up, down = (outer_loss(points, 5.0, starts, *cloud, 5) for points in moved)
            assert widget.state["gradient"][k][axis] == pytest.approx((up - down) / (2 * small), abs=1e-7)
    up, down = (outer_loss(widget.points, 5.0 * math.exp(sign * small), starts, *cloud, 5) for sign in (1, -1))
    assert widget.state["step_gradient"] == pytest.approx((up - down) / (2 * small), abs=1e-7)


def test_following_the_arrows_lowers_the_loss_and_starting_again_brings_it_back(widget):
    first = (widget.points, widget.step_size, widget.state)
    widget._answer(widget, {"ask": "follow", "times": 25}, [])
    assert widget.state["loss"] < first[2]["loss"]
    widget._answer(widget, {"ask": "again"}, [])
    assert (widget.points, widget.step_size, widget.state) == first


def test_values_of_a_front_end_are_not_trusted(widget):
    widget.points, widget.step_size, widget.steps = [[-99, 0], [0, 99]], 1e9, 10**9
    assert widget.points == [[-plane.EDGE, 0], [0, plane.EDGE]]
    assert (widget.step_size, widget.steps) == (plane.LARGEST_STEP, plane.MOST_STEPS)
    for wrong in ([[0, 0]], [[0, math.nan], [0, 0]], [["a", 0], [0, 0]]):
        with pytest.raises((ValueError, TypeError, plane.traitlets.TraitError)):
            widget.points = wrong
    widget._answer(widget, {"ask": "something else"}, [])


def test_a_widget_without_a_front_end_is_one_fixed_line_and_a_figure(widget):
    assert re.fullmatch(r"Plane: [\w ,()]+", repr(widget))
    described = plots.describe(widget.figure())
    assert "point to move, class 1: 1 points" in described and "many steps" not in described
    full = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    assert "all real points, many steps: 3 points" in plots.describe(widget.figure(full))


def test_figures_say_what_they_show(cloud):
    real, labels = cloud
    full, starts = torch.tensor([-2.0, 3.0], dtype=torch.float64), plane.random_starts(4, seed=0)
    run = plane.trajectory(starts, real[:2], plane.LABELS, 1.0, 3)
    fans = plots.describe(plane.fans([("A", starts, None, "real"), ("B", run[-1], real[:2], "learned")], real, labels, full))
    assert "panel 1: A |" in fans and "learned point, class 0: 1 points" in fans and "class 1: 30 points" in fans
    paths = plots.describe(plane.paths([("C", run, "real")], real, labels, full))
    assert "random start: 4 points; after 3 steps: 4 points" in paths and "second weight" in paths
    points = torch.tensor([[-3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)  # push along the first and along the second weight
    (axes,) = plane.paths([("D", run, "real", points)], real, labels, full).axes
    pushes = [[end - begin for end, begin in zip(arrow.xy, arrow.get_position())] for arrow in axes.texts]
    assert [[round(step, 6) for step in push] for push in pushes] == [[1.125, 0], [0, 1.125]]  # a quarter of 1.5 · 3


def test_the_film_is_a_gif_that_ends_lower(tmp_path):
    path = plane.film(tmp_path / "short.gif", last=3)
    with Image.open(path) as film:
        assert film.n_frames == 4 and film.size == (560, 740)


SHELL = """async ([source, values]) => {
    const url = URL.createObjectURL(new Blob([source], {type: 'text/javascript'})), heard = [];
    const update = fresh => { Object.assign(values, fresh); heard.forEach(call => call()); };
    const model = {
        get: name => values[name], set: (name, value) => { values[name] = value; }, off: () => {},
        on: (name, call) => { if (name === 'change:state') heard.push(call); },
        send: async message => update(await window.python({message})),
        save_changes: async () => update(await window.python(
            {points: values.points, step_size: values.step_size, steps: values.steps})),
    };
    (await import(url)).default.render({model, el: document.body});
}"""


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"nothing is dragged here: {' and '.join(MISSING)} missing")
def test_a_point_is_dragged_in_a_browser(widget):
    """The drawing in Chromium, with the widget itself behind it."""
    from playwright.sync_api import sync_playwright

    def python(asked):
        if "message" in asked:
            widget._answer(widget, asked["message"], [])
        for name in asked.keys() - {"message"}:
            setattr(widget, name, asked[name])
        return {name: getattr(widget, name) for name in ("points", "step_size", "steps", "state")}

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": 800, "height": 700})
        page.set_default_timeout(120_000)
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.expose_function("python", python)
        page.set_content("<body></body>")
        names = ("points", "step_size", "steps", "real", "looks", "state")
        page.evaluate(SHELL, [widget._esm, {name: getattr(widget, name) for name in names}])

        def settled():
            shown = "text => document.querySelector('.loss').textContent === text"
            page.wait_for_function(shown, arg=f"{widget.state['loss']:.3f}")

        settled()
        assert page.locator("line").count() == 12 + 2  # boundaries and arrows
        (x, y), other, before = widget.points[1], widget.points[0], widget.state["loss"]
        box, arrow = page.locator(".point-1").bounding_box(), page.locator(".arrow-1").get_attribute("x2")
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] - 80, middle[1], steps=4)
        page.mouse.up()
        page.wait_for_function("old => document.querySelector('.arrow-1').getAttribute('x2') !== old", arg=arrow)
        assert widget.points[0] == other and widget.points[1][0] < x - 0.5 and widget.points[1][1] == pytest.approx(y, abs=0.3)
        assert widget.state["loss"] != before
        settled()
        x, y = widget.points[1]
        page.keyboard.press("ArrowUp")  # the dragged point has the focus
        page.locator(f'.point-1[aria-label*="{round((y + 0.05) * 100) / 100:g};"]').wait_for()
        assert widget.points[1] == [x, pytest.approx(y + 0.05)]
        before = widget.state["loss"]
        page.get_by_role("button", name="Follow them 25 times").click()
        page.wait_for_function("old => document.querySelector('.loss').textContent !== old", arg=f"{before:.3f}")
        settled()
        page.get_by_label("inner steps").press("ArrowRight")
        page.get_by_text("6 steps of size").wait_for()
        browser.close()
    assert widget.steps == 6 and not problems
