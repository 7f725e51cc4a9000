"""What a widget shows is what its plain function says, a slider calls that function, and no text of a corpus is mark-up."""

import asyncio
import dataclasses
import html.parser
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas
import PIL.Image
import pytest
import torch

import distillkit as dk
from distillkit.io.escaping import one_line as expected
from distillkit.view import figures as plots
from distillkit.view import measures as views
from distillkit.view import widgets

HOSTILE = [
    "<script>alert(1)</script>", "\"'><img src=x onerror='alert(1)'>", "a & b &lt; &#60;", "nul \0 and bell \a",
    "\u202eright to left", "\u05e9\u05dc\u05d5\u05dd", "emoji \U0001f99c \U0001f469\u200d\U0001f467",
    "</title></svg><b>out</b>", "lone \ud800 surrogate", "]]> <!-- ${x} {{y}} `z`",
]
ALLOWED = {"p", "bdi", "mark", "table", "thead", "tbody", "tr", "th", "td", "svg", "circle", "rect", "text", "title", "span"}


class Markup(html.parser.HTMLParser):
    """What a browser would make of it: elements, attributes and text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), set(), []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


def harmless(source):
    markup = Markup(source)
    assert markup.tags <= ALLOWED, markup.tags - ALLOWED
    assert not [name for name in markup.attributes if name.startswith("on") or name in ("href", "src")]
    source.encode("utf-8")
    assert not re.search("[\0\a\ud800\u202e]", source)
    return markup


def descendants(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from descendants(child)


def control(widget, description):
    """The control of that description, whichever box it is in."""
    return next(w for w in descendants(widget) if getattr(w, "description", None) == description)


def shown(widget):
    return [w for w in descendants(widget) if type(w).__name__ == "HTML"][-1]


@pytest.fixture(scope="module")
def real(world):
    return dk.DistilledSet.from_real(*world, per_class=2, length=10)


@pytest.fixture(scope="module")
def learned(real):
    """Its free positions moved by a little noise: the embeddings of no token."""
    noise = torch.randn(real.embeds.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    meta = {key: value for key, value in real.meta.items() if key != "text"}
    return dataclasses.replace(real, embeds=real.embeds + noise * real.free.unsqueeze(-1), tokens=None, meta=meta)


@pytest.fixture(scope="module")
def judge(world):
    return dk.FrozenJudge(*world, steps=20, batch_size=16)


# --- the prompt explorer ---------------------------------------------------------------------------------------------


def test_candidates_are_the_nearest_words_by_brute_force(world, learned):
    student = world[1]
    choices = widgets.candidates(learned, student, 1, 3, k=5, more=[7, 0])
    distances = (student.embedding - learned.embeds[1, 3]).norm(dim=1)
    nearest = sorted(set(range(len(distances))) - set(student.tokenizer.all_special_ids), key=distances.__getitem__)[:5]
    assert list(choices) == ["token", "word", "distance"]
    assert choices["token"].tolist() == [*nearest, *(i for i in (7, 0) if i not in nearest)]
    assert choices["distance"].tolist() == pytest.approx(distances[choices["token"].tolist()].tolist())
    assert choices["word"].tolist() == student.tokenizer.convert_ids_to_tokens(choices["token"].tolist())


def replaced(distilled, student, example, position, token):
    """The set that a score sees for a token, which comes before the set as it is."""
    scored = []
    widgets.candidates(distilled, student, example, position, k=1, more=[token], score=lambda s: scored.append(s) or 0.0)
    return scored[-2]


def test_a_replacement_changes_one_position_and_nothing_else(world, real, learned):
    student = world[1]
    for before in (real, learned):
        embeds = before.embeds.clone()
        after = replaced(before, student, 2, 4, 50)
        differs = (after.embeds != before.embeds).any(-1)
        assert differs.nonzero().tolist() == [[2, 4]] and torch.equal(after.embeds[2, 4], student.embedding[50])
        assert torch.equal(before.embeds, embeds), "the argument is left alone"
    after = replaced(real, student, 2, 4, 50)
    assert after.tokens[2, 4] == 50 and after.meta["text"][2] == student.tokenizer.decode(after.tokens[2, 1:9])
    assert after.meta["text"][:2] == real.meta["text"][:2]
    assert replaced(learned, student, 2, 4, 50).tokens is None


def test_scores_are_the_judges_own(world, real, judge):
    """The same losses as the judge gives for swaps of tokens, which it takes by another route."""
    from distillkit.text.judges import Swap

    choices = widgets.candidates(real, world[1], 0, 2, k=4, score=widgets.outer_loss(judge))
    before, *after = judge.losses(real, [[], *([Swap(0, 2, token)] for token in choices["token"])], 0)
    assert choices["score"].tolist() == pytest.approx(after) and len(set(after)) > 2
    assert choices["change"].tolist() == pytest.approx([loss - before for loss in after], abs=1e-6)


def test_scores_of_embeddings_are_those_of_the_replaced_set(world, learned, judge):
    score = widgets.outer_loss(judge)
    choices = widgets.candidates(learned, world[1], 1, 5, k=2, score=score)
    sets = [replaced(learned, world[1], 1, 5, token) for token in choices["token"]]
    by_hand = [judge.gradient(one, 0)[0] for one in sets]
    assert choices["score"].tolist() == by_hand and not learned.embeds.requires_grad
    assert choices["change"][0] == pytest.approx(by_hand[0] - score(learned))


@pytest.mark.parametrize("place", [(4, 1), (0, 10), (0, 0), (-1, 1)])
def test_a_position_that_is_not_learned(world, real, place):
    with pytest.raises(ValueError, match=f"example {place[0]} has no learned position {place[1]}"):
        widgets.candidates(real, world[1], *place)


def test_the_prompt_explorer_shows_what_its_functions_say(world, learned, judge):
    student, score = world[1], widgets.outer_loss(judge)
    explorer = widgets.prompt_explorer(learned, student, score=score, k=3)
    words = student.tokenizer.convert_ids_to_tokens

    def page(example, position, **options):
        choices = widgets.candidates(learned, student, example, position, k=3, **options)
        return widgets.prompt_html(words(dk.project(learned, student).tokens[example].tolist()), position, choices)

    assert shown(explorer).value == page(0, 1)
    control(explorer, "position").value = 4
    assert shown(explorer).value == page(0, 4) and "score" not in page(0, 4)
    control(explorer, "example").value = 3
    assert shown(explorer).value == page(3, control(explorer, "position").value)
    control(explorer, "judge").value = True
    assert shown(explorer).value == page(3, control(explorer, "position").value, score=score)
    control(explorer, "judge").value = False
    control(explorer, "try").value = "dull moving"
    more = student.tokenizer.convert_tokens_to_ids(["dull", "moving"])
    assert shown(explorer).value == page(3, control(explorer, "position").value, more=more)


def test_positions_are_the_learned_ones_and_judging_needs_a_score(world, real):
    free = real.free.clone()
    free[1, 4:] = False
    explorer = widgets.prompt_explorer(dataclasses.replace(real, free=free), world[1])
    position = control(explorer, "position")
    assert position.options == tuple(range(1, 9)) and control(explorer, "judge").disabled
    position.value = 8
    control(explorer, "example").value = 1
    assert position.options == (1, 2, 3) and position.value in (1, 2, 3)
    word = world[1].tokenizer.convert_ids_to_tokens(int(real.tokens[1, position.value]))
    assert f"<mark><bdi>{word}</bdi></mark>" in shown(explorer).value


def test_words_of_a_prompt_are_no_markup():
    words = [expected(word) for word in HOSTILE]
    choices = pandas.DataFrame({"token": range(len(words)), "word": words, "distance": 1.0, "score": 0.5, "change": -0.25})
    page = harmless(widgets.prompt_html(HOSTILE, 1, choices))
    assert page.tags == {"p", "bdi", "mark", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(page.texts.count(expected(word)) == 2 for word in HOSTILE)


# --- the attention explorer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(world, real, learned):
    return {"real": views.attention(world[1], real), "distilled": views.attention(world[1], learned)}


def shades(source):
    """The colours of an SVG's cells, panel after panel, and the weights they tell."""
    root = ET.fromstring(source)
    cells = [e for e in root if e.tag.endswith("rect")]
    return [e.get("fill") for e in cells], [float(e[0].text) for e in cells]


def test_a_panel_is_one_head_of_one_example(weights, real):
    words = {name: [[f"w{i}" for i in range(10)]] * 4 for name in weights}
    panels = widgets.attention_panels(weights, words, 2, 1, 0)
    assert [title for title, *_ in panels] == ["real", "distilled"]
    for title, values, names in panels:
        assert np.array_equal(values, weights[title][2, 1, 0]) and names == words[title][2]
    with pytest.raises(IndexError):
        widgets.attention_panels(weights, words, 4, 0, 0)


def test_a_cell_is_as_dark_as_its_weight_on_one_scale():
    left, right = np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([[0.25, 0.1], [0.0, 0.5]])
    colours, values = shades(widgets.attention_html([("a", left, ["x", "y"]), ("b", right, ["x", "y"])]))
    assert values == [0.5, 0.5, 0.0, 1.0, 0.25, 0.1, 0.0, 0.5]
    assert colours[0] == colours[1] == colours[7] and colours[2] == colours[6]
    light = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in colours]
    assert np.array_equal(np.argsort(np.argsort(values)), np.argsort(np.argsort([-v for v in light])))
    shades(widgets.attention_html([("nothing", np.zeros((2, 2)), ["x", "y"])]))


def test_the_attention_explorer_shows_what_its_functions_say(world, real, learned, weights, monkeypatch):
    student, passes = world[1], []
    monkeypatch.setattr(widgets, "attention", lambda *args: passes.append(1) or views.attention(*args))
    params = student.init(3)
    weights = {"real": views.attention(student, real, params), "distilled": views.attention(student, learned, params)}
    tokens = {"real": real.tokens, "distilled": dk.project(learned, student).tokens}
    words = {name: [student.tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids] for name, ids in tokens.items()}
    explorer = widgets.attention_explorer(student, params, learned, real)
    pages = set()
    for layer in (1, 2):
        for head in (1, 2):
            control(explorer, "layer").value, control(explorer, "head").value = layer, head
            panels = widgets.attention_panels(weights, words, 0, layer - 1, head - 1)
            assert shown(explorer).value == widgets.attention_html(panels)
            pages.add(shown(explorer).value)
    control(explorer, "example").value = 3
    assert shown(explorer).value not in pages and len(pages) == 4
    assert len(passes) == 2, "one pass for each set, however the sliders are moved"
    assert len(shades(shown(explorer).value)[0]) == 2 * 10 * 10


def test_absent_positions_are_not_drawn(world):
    task, student = world
    short = dk.DistilledSet.from_real(task, student, per_class=1, length=10)
    mask = short.mask.clone()
    mask[0, 6:] = False
    short = dataclasses.replace(short, mask=mask, free=short.free & mask)
    explorer = widgets.attention_explorer(student, None, short, short)
    assert len(shades(shown(explorer).value)[0]) == 2 * 6 * 6
    control(explorer, "example").value = 1
    assert len(shades(shown(explorer).value)[0]) == 2 * 10 * 10


def test_sets_without_counterparts(world, real):
    with pytest.raises(ValueError, match="real has 2 examples and distilled 4"):
        widgets.attention_explorer(world[1], None, real, dk.DistilledSet.from_real(*world, per_class=1, length=10))


def test_words_of_an_attention_map_are_no_markup():
    n = len(HOSTILE)
    source = widgets.attention_html([("<b>title</b>", np.eye(n), HOSTILE)])
    assert harmless(source).tags == {"svg", "text", "rect", "title"}
    labels = [expected(word, 13) for word in HOSTILE]
    assert [e.text for e in ET.fromstring(source) if e.tag.endswith("text")][1:] == [w for w in labels for _ in range(2)]


# --- the monitor -----------------------------------------------------------------------------------------------------


@pytest.fixture
def distillation(world, tmp_path):
    """Return a function that makes the same distillation, with its checkpoints in a folder of that name."""
    start = dk.DistilledSet.from_real(*world, per_class=1, length=8)
    goal = dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
    term = dk.NeighborLoss(world[1], weight=0.1)
    return lambda name: dk.Distiller(start, goal, regularizers=[term], checkpoint=tmp_path / name, checkpoint_every=100)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("embeds", "targets", "step_sizes"))


def test_a_stop_leaves_a_checkpoint_that_goes_on_to_the_same_set(distillation, tmp_path):
    whole = distillation("whole")
    for _ in whole.run(6):
        pass
    stopped = distillation("stopped")
    box = widgets.Monitor(stopped, 6)

    def press(change):
        box.stop.value = change.new.startswith("step 3 of 6: loss")

    box.status.observe(press, "value")
    asyncio.run(box.run())
    assert stopped.step == 3 and box.status.value.startswith("stopped at step 3 of 6")
    assert not same(stopped.distilled, whole.distilled)
    resumed = distillation("stopped")
    assert resumed.step == 3 and same(resumed.distilled, stopped.distilled)
    again = widgets.Monitor(resumed, 6)
    asyncio.run(again.run())
    assert again.status.value.startswith("done at step 6 of 6")
    assert same(resumed.distilled, whole.distilled) and same(distillation("stopped").distilled, whole.distilled)
    assert [r.loss for r in resumed.records] == [r.loss for r in whole.records]


def test_the_monitor_shows_loss_and_text(distillation, world):
    distiller = distillation("run")
    box = widgets.Monitor(distiller, 4)
    asyncio.run(box.run())
    picture = next(w for w in descendants(box) if type(w).__name__ == "Image")
    assert PIL.Image.open(io.BytesIO(picture.value)).format == "PNG"
    assert shown(box).value == widgets.text_html(distiller.distilled, world[1])
    rows = dk.project(distiller.distilled, world[1]).to_text().to_list()
    assert all(plots.html.escape(row["text"]) in shown(box).value for row in rows)


def test_the_progress_figure_has_every_term(distillation):
    distiller = distillation("figure")
    records = list(distiller.run(2))
    assert plots.describe(widgets.progress_figure(records)).splitlines() == [
        "panel 1: Loss | x: outer step | y: loss | outer: 2 points; neighbor: 2 points; all, weighted: 2 points",
    ]
    (axes,) = widgets.progress_figure(records).axes
    assert list(axes.lines[0].get_ydata()) == [r.terms["outer"] for r in records]
    assert list(axes.lines[2].get_ydata()) == [r.loss for r in records]


def test_others_get_their_turn_between_two_steps(distillation):
    """A click that comes while the distillation runs ends it."""
    distiller = distillation("turns")

    async def click():
        box = widgets.monitor(distiller, 50)
        assert box.task is not None and not box.task.done()
        while distiller.step < 2:
            await asyncio.sleep(0)
        box.stop.value = True
        await box.task
        return box

    box = asyncio.run(click())
    assert 2 <= distiller.step < 50 and box.stop.disabled
    assert distillation("turns").step == distiller.step


def test_an_error_is_shown_in_the_widget(distillation, monkeypatch):
    distiller = distillation("error")

    def run_and_break(steps):
        raise RuntimeError("the student <broke>")
        yield

    monkeypatch.setattr(distiller, "run", run_and_break)

    async def run():
        box = widgets.monitor(distiller, 3)
        with pytest.raises(RuntimeError, match="broke"):
            await box.task
        await asyncio.sleep(0)
        return box

    box = asyncio.run(run())
    assert "the student &lt;broke&gt;" in box.status.value and box.stop.disabled


def test_a_monitor_that_cannot_be(distillation, world):
    distiller = distillation("unused")
    distiller.checkpoint.path = None
    with pytest.raises(ValueError, match="give its Distiller a checkpoint"):
        widgets.Monitor(distiller, 3)
    with pytest.raises(RuntimeError, match="no running event loop"):
        widgets.monitor(distillation("unused"), 3)


def test_distilled_text_is_no_markup(world, real):
    meta = real.meta | {"text": HOSTILE[:4], "classes": ["<i>one</i>", "\0two"]}
    page = harmless(widgets.text_html(dataclasses.replace(real, meta=meta), world[1]))
    assert {expected(text) for text in [*HOSTILE[:4], *meta["classes"]]} <= set(page.texts)
    prompts = {"text": HOSTILE[:4], "classes": [], "labels": [], "responses": HOSTILE[4:8]}
    page = harmless(widgets.text_html(dataclasses.replace(real, meta=prompts), world[1]))
    assert {expected(text) for text in HOSTILE[:8]} <= set(page.texts)


# --- the map ---------------------------------------------------------------------------------------------------------


def circles(source):
    return [e for e in ET.fromstring(source[: source.index("</svg>") + 6]) if e.tag.endswith("circle")]


def test_points_stand_where_they_should_and_tell_their_text():
    points = np.array([[0.0, 0.0], [2.0, 1.0], [1.0, 4.0]])
    drawn = circles(widgets.map_html(points, ["a", "b", "c"], ["x", "y", "x"]))
    x, y = (np.array([float(e.get(axis)) for e in drawn]) for axis in ("cx", "cy"))
    assert [e[0].text for e in drawn] == ["a", "b", "c"]
    assert np.allclose((x - x[0]) / (x[1] - x[0]), points[:, 0] / 2, atol=1e-3)
    assert np.allclose((y[0] - y) / (y[0] - y[2]), points[:, 1] / 4, atol=1e-3), "up is up"
    assert drawn[0].get("fill") == drawn[2].get("fill") != drawn[1].get("fill")
    assert len(circles(widgets.map_html([[3.0, 3.0]], ["alone"], ["x"]))) == 1


def test_a_group_is_singled_out(world):
    points, texts, groups = np.eye(4)[:, :2], list("abcd"), ["x", "y", "x", "<y>"]
    explorer = widgets.map_explorer(points, texts, groups)
    assert shown(explorer).value == widgets.map_html(points, texts, groups)
    control(explorer, "show").label = "y"
    assert shown(explorer).value == widgets.map_html(points, texts, groups, only="y")
    drawn = circles(shown(explorer).value)
    assert [e[0].text for e in drawn if e.get("fill-opacity") == "0.85"] == ["b"] == [drawn[-1][0].text]
    control(explorer, "show").label = "all"
    assert shown(explorer).value == widgets.map_html(points, texts, groups)


@pytest.mark.parametrize(
    ("points", "texts"),
    [
        (np.zeros((2, 3)), ["a", "b"]), (np.zeros((2, 1)), ["a", "b"]), (np.zeros((0, 2)), []),
        ([[0.0, np.nan], [0, 1]], ["a", "b"]), (np.zeros((2, 2)), ["a"]),
    ],
)
def test_a_map_that_cannot_be(points, texts):
    with pytest.raises(ValueError):
        widgets.map_html(points, texts, ["x"] * len(points))


def test_texts_of_a_map_are_no_markup():
    n = len(HOSTILE)
    source = widgets.map_html(np.random.default_rng(0).normal(size=(n, 2)), HOSTILE, HOSTILE)
    assert harmless(source).tags == {"svg", "circle", "title", "p", "span", "bdi"}
    assert [e[0].text for e in circles(source)] == [expected(text) for text in HOSTILE]
    explorer = widgets.map_explorer(np.zeros((n, 2)), HOSTILE, HOSTILE)
    assert [label for label, _ in control(explorer, "show").options] == ["all", *map(expected, HOSTILE)]


# --- a figure that follows its controls


def lines_of(steps, kind):
    if steps == 9:
        raise ValueError("<b>nine</b> is too many")
    return plots.curves([(kind, "x", "y", {"line": (range(steps), range(steps))})])


def test_a_figure_is_drawn_again_when_a_control_moves():
    explorer = widgets.explore(lines_of, steps=(1, 10), kind=["rising", "falling"])
    for name, value in (("steps", 3), ("kind", "falling")):
        before = explorer.picture.value
        explorer.controls[name].value = value
        assert explorer.picture.value != before
    expected = io.BytesIO()
    lines_of(3, "falling").savefig(expected, format="png")
    shown, drawn = (np.asarray(PIL.Image.open(io.BytesIO(png))) for png in (explorer.picture.value, expected.getvalue()))
    assert (shown == drawn).all()
    assert repr(explorer) == "Explorer(steps, kind)"  # what a notebook stores: the same on every machine


def test_a_figure_that_fails_leaves_the_last_one_and_says_why():
    explorer = widgets.explore(lines_of, steps=(1, 10), kind=["rising"])
    before = explorer.picture.value
    explorer.controls["steps"].value = 9
    assert explorer.picture.value == before and "nine" in explorer.problem.value and "<b>" not in explorer.problem.value
    explorer.controls["steps"].value = 2
    assert explorer.picture.value != before and explorer.problem.value == ""


def test_what_no_control_can_be_made_from_is_named():
    with pytest.raises(ValueError, match="steps=None"):
        widgets.explore(lines_of, steps=None)
