"""Widgets to play with a distilled set: thin shells over plain functions.

What a widget shows is made by a function that needs no front end, so that a test or an ordinary cell can call it, and what a
slider does is to call it again (``observe``):

* :func:`prompt_explorer`: a position's nearest words (:func:`candidates`), and what becomes of the score with one of them in
  its place (:func:`replaced`), drawn by :func:`prompt_html`.
* :func:`attention_explorer`: one head in real and in distilled text; the weights are computed once, and a head is cut out by
  :func:`attention_panels` and drawn by :func:`attention_html` (on paper by ``set_figures.attention_maps``).
* :func:`monitor`: a distillation as it runs, with a button that stops it (:func:`watch`, :func:`progress_figure`,
  :func:`text_html`).
* :func:`map_explorer`: a flat map whose points tell their text (:func:`map_html`; on paper
  :func:`~distillkit.view.set_figures.maps`).

Pictures that follow a slider are SVG: drawing a head's labels with matplotlib takes longer than a hand takes to move on.
Text comes from corpora that nobody has read, and an HTML widget runs what it is given: every piece of it goes through
:func:`escaped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import ipywidgets
import numpy as np
import seaborn as sns
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from distillkit.core.distilled import DistilledSet, embed
from distillkit.core.distiller import Distiller, StepRecord
from distillkit.core.student import Params, Student
from distillkit.io.checks import check_choice, check_whole
from distillkit.text.projection import allowed_tokens, nearest_tokens, project, with_tokens
from distillkit.view.figures import curves, html_table, text_table
from distillkit.view.measures import attention

Score = Callable[[DistilledSet], float]

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SHADES = [to_hex(colour) for colour in sns.color_palette("crest", 64)]
CELL, LABEL, GAP = 15, 96, 40  # pixels of an attention map: a cell's side, room for words, between panels
WIDTH, HEIGHT, EDGE = 720, 440, 12  # pixels of a flat map


def escaped(text: str) -> str:
    """``text`` for HTML and SVG, where it stands for itself; characters that neither can hold become U+FFFD."""
    return html.escape(_visible(text))


def _visible(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)


# ---------------------------------------------------------------------------------------------------------- prompts


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A word that could stand at a position: its ``token`` id and ``word``, its ``distance`` from what stands there, and,
    where they were asked for, the ``score`` of the set with it and the ``change`` that is."""

    token: int
    word: str
    distance: float
    score: float | None = None
    change: float | None = None


def replaced(distilled: DistilledSet, student: Student, example: int, position: int, token: int) -> DistilledSet:
    """The set with ``token`` at one position; the other positions stay what they are, embeddings or tokens.

    Raises:
        ValueError: a position that is not learned, a token that the embedding table does not have, or a set that was made with
            another table.
    """
    distilled.check_table(student)
    _check_place(distilled, example, position)
    check_whole("token", token, least=0, most=len(student.embedding) - 1, meaning="the embedding table")
    if distilled.tokens is not None:
        tokens = distilled.tokens.clone()
        tokens[example, position] = token
        return with_tokens(distilled, student, tokens)
    embeds = distilled.embeds.clone()
    embeds[example, position] = embed(student, torch.tensor([token]))[0]
    return dataclasses.replace(distilled, embeds=embeds)


def candidates(
    distilled: DistilledSet, student: Student, example: int, position: int, *, k: int = 8, more: Sequence[int] = (),
    near: Tensor | None = None, score: Score | None = None,
) -> list[Candidate]:
    """The words nearest to what stands at a position, nearest first, and what the score becomes with each in its place.

    Distances are Euclidean.

    Args:
        distilled: a set in ``student``'s embedding space, of embeddings or of tokens.
        example, position: a learned position.
        k: how many of the nearest words.
        more: ids of further tokens, which come last, whatever their distance.
        near: what :func:`nearest_words` has found, where many positions are looked at; default: searched for this one.
        score: from a set to a number, such as :func:`outer_loss` gives; called once for each word and once for the set as it
            is.  Default: no scores.
    """
    distilled.check_table(student)
    _check_place(distilled, example, position)
    table = student.embedding
    here = distilled.embeds[example, position].to(table.device, table.dtype)
    if near is None:
        ids = nearest_tokens(here[None], table, k=k, allowed=allowed_tokens(student.tokenizer, len(table)))[0][0].tolist()
    else:
        ids = near[example, position, :k].tolist()
    ids = list(dict.fromkeys([*ids, *more]))
    # From the difference: the search's own distances lose digits where they are small.
    distances = (here - table[ids]).float().norm(dim=1).tolist()
    words = student.tokenizer.convert_ids_to_tokens(ids)
    found = [Candidate(*one) for one in zip(ids, words, distances, strict=True)]
    if score is not None:
        before = score(distilled)
        after = [score(replaced(distilled, student, example, position, token)) for token in ids]
        found = [dataclasses.replace(c, score=s, change=s - before) for c, s in zip(found, after, strict=True)]
    return found


def nearest_words(distilled: DistilledSet, student: Student, k: int) -> Tensor:
    """The ids ``[m, l, k]`` of the words nearest to each learned position, nearest first; -1 elsewhere.

    One search through a vocabulary of 30,000 takes as long as a hand rests between two moves; one for all takes little more.
    """
    distilled.check_table(student)
    found = torch.full((*distilled.free.shape, k), -1)
    allowed = allowed_tokens(student.tokenizer, len(student.embedding))
    found[distilled.free], _ = nearest_tokens(distilled.embeds[distilled.free], student.embedding, k=k, allowed=allowed)
    return found


def outer_loss(judge, *, seed: int = 0) -> Score:
    """The score of a judge: its outer loss on the real rows that ``seed`` draws, the same for every set; lower is better."""

    def score(distilled: DistilledSet) -> float:
        if distilled.tokens is None:
            own = dataclasses.replace(distilled, embeds=distilled.embeds.clone())  # it is marked for gradients
            return judge.gradient(own, seed)[0]
        return judge.losses(distilled, [[]], seed)[0]

    return score


def prompt_html(words: Sequence[str], position: int, found: Sequence[Candidate]) -> str:
    """An example's ``words`` with the one at ``position`` marked, over a table of the candidates for its place."""
    shown = [f"<bdi>{escaped(word)}</bdi>" for word in words]
    shown[position] = f"<mark>{shown[position]}</mark>"
    rows = []
    for one in found:
        row = {"word": _visible(one.word), "distance": f"{one.distance:.3f}"}
        if one.score is not None:
            row |= {"score with it": f"{one.score:.4f}", "change": f"{one.change:+.4f}"}
        rows.append(row)
    return f"<p>{' '.join(shown)}</p>{html_table(rows)}"


def prompt_explorer(
    distilled: DistilledSet, student: Student, *, score: Score | None = None, k: int = 8
) -> ipywidgets.VBox:
    """Choose an example and a position; see the nearest words and, if asked to, what the score becomes with each of them.

    Args:
        distilled: a set in ``student``'s embedding space; of embeddings, its text is shown in the nearest words.
        score: as :func:`candidates` takes it, called k + 1 times at every move while *judge* is pressed.
        k: how many of the nearest words.

    Returns:
        A widget; *try* takes text whose tokens are looked at besides.
    """
    words, near = _words(distilled, student), nearest_words(distilled, student, k)
    places = [row.nonzero().squeeze(1).tolist() for row in distilled.free]
    example = ipywidgets.IntSlider(description="example", max=len(distilled) - 1)
    position = ipywidgets.SelectionSlider(description="position", options=places[0])
    tried = ipywidgets.Text(description="try", placeholder="a word of your own", continuous_update=False)
    judge = ipywidgets.ToggleButton(description="judge", tooltip="the score with each word", disabled=score is None)
    shown = ipywidgets.HTML()

    def choose(_):
        position.options = places[example.value]
        draw(_)

    def draw(_):
        more = student.tokenizer(tried.value, add_special_tokens=False)["input_ids"]
        found = candidates(
            distilled, student, example.value, position.value, k=k, more=more, near=near,
            score=score if judge.value else None,
        )
        shown.value = prompt_html(words[example.value], position.value, found)

    example.observe(choose, "value")
    for control in (position, tried, judge):
        control.observe(draw, "value")
    draw(None)
    return ipywidgets.VBox([ipywidgets.HBox([example, position]), ipywidgets.HBox([tried, judge]), shown])


def _check_place(distilled: DistilledSet, example: int, position: int) -> None:
    check_whole("example", example, least=0, most=len(distilled) - 1, meaning="the set's examples")
    check_whole("position", position, least=0, most=distilled.free.shape[1] - 1, meaning="its positions")
    if not distilled.free[example, position]:
        learned = distilled.free[example].nonzero().squeeze(1).tolist()
        raise ValueError(f"position {position} of example {example} is not learned; those that are: {learned}")


def _words(distilled: DistilledSet, student: Student) -> list[list[str]]:
    """The words of each present position, of embeddings the nearest ones."""
    distilled.check_table(student)
    tokens = (project(distilled, student) if distilled.tokens is None else distilled).tokens
    assert tokens is not None  # what is projected has tokens
    there = [row[mask].tolist() for row, mask in zip(tokens, distilled.mask, strict=True)]
    return [cast("list[str]", student.tokenizer.convert_ids_to_tokens(row)) for row in there]


# -------------------------------------------------------------------------------------------------------- attention


def attention_panels(
    weights: Mapping[str, np.ndarray], words: Mapping[str, Sequence[Sequence[str]]], example: int, layer: int, head: int, *,
    most: int = 24,
) -> list[tuple[str, np.ndarray, list[str]]]:
    """One head's attention in one example of several sets, as :func:`~distillkit.view.set_figures.attention_maps` draws it.

    Args:
        weights: name → ``[examples, layers, heads, l, l]``, as :func:`~distillkit.view.measures.attention` returns them.
        words: name → of each example the words of its positions.
        example, layer, head: counted from 0.
        most: positions shown, the first ones.

    Returns:
        For each name its title, weights ``[n, n]`` and n words, n no more than ``most``.
    """
    panels = []
    for name, found in weights.items():
        for what, which, size in zip(("example", "layer", "head"), (example, layer, head), found.shape, strict=False):
            check_whole(what, which, least=0, most=size - 1, meaning=f"counted from 0, of {name}")
        shown = list(words[name][example][:most])
        panels.append((name, found[example, layer, head, : len(shown), : len(shown)], shown))
    return panels


def attention_html(panels: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> str:
    """Attention as an SVG, panels side by side on one scale: a row looks at the columns; a cell tells its weight when hovered.

    Args:
        panels: as :func:`attention_panels` returns them.
    """
    top = max(float(np.max(weights)) for _, weights, _ in panels)
    parts, left = [], 0
    for title, weights, words in panels:
        shades = (np.asarray(weights) / (top or 1) * (len(_SHADES) - 1)).round().astype(int)
        x, side = left + LABEL, CELL * len(words)
        parts.append(f'<text x="{x}" y="14" font-weight="bold">{escaped(title)}</text>')
        for i, word in enumerate(words):
            label, at = escaped(word if len(word) <= 13 else f"{word[:12]}…"), CELL * i + 11
            parts.append(f'<text x="{x - 4}" y="{LABEL + at}" text-anchor="end">{label}</text>')
            parts.append(f'<text transform="translate({x + at},{LABEL - 4}) rotate(-90)">{label}</text>')
            parts += [
                f'<rect x="{x + CELL * j}" y="{LABEL + CELL * i}" width="{CELL}" height="{CELL}" fill="{_SHADES[shade]}">'
                f"<title>{weight:.3f}</title></rect>"
                for j, (shade, weight) in enumerate(zip(shades[i].tolist(), weights[i].tolist(), strict=True))
            ]
        left = x + side + GAP
    height = LABEL + CELL * max(len(words) for *_, words in panels)
    return _svg(left, height, f"attention from 0 to {top:.2f}", parts)


def attention_explorer(
    student: Student, params: Params | None, distilled: DistilledSet, real: DistilledSet, *, most: int = 24
) -> ipywidgets.VBox:
    """Layer and head by slider, real beside distilled text.

    Args:
        student, params: whose attention; None: the weights the student was loaded with.
        distilled: a set in ``student``'s embedding space; its words are the nearest ones.
        real: as many examples of real text, such as the set it was distilled from.
        most: positions shown, the first ones.

    Raises:
        ValueError: sets of different sizes.
    """
    if len(real) != len(distilled):
        raise ValueError(f"real has {len(real)} examples and distilled {len(distilled)}; give as many, so that each has its "
                         "counterpart, such as the set it was distilled from")
    sets = {"real": real, "distilled": distilled}
    weights = {name: attention(student, found, params) for name, found in sets.items()}
    words = {name: _words(found, student) for name, found in sets.items()}
    examples, layers, heads, *_ = weights["real"].shape
    example = ipywidgets.IntSlider(description="example", max=examples - 1)
    layer = ipywidgets.IntSlider(description="layer", value=1, min=1, max=layers)
    head = ipywidgets.IntSlider(description="head", value=1, min=1, max=heads)
    shown = ipywidgets.HTML()

    def draw(_):
        panels = attention_panels(weights, words, example.value, layer.value - 1, head.value - 1, most=most)
        shown.value = attention_html(panels)

    for control in (example, layer, head):
        control.observe(draw, "value")
    draw(None)
    return ipywidgets.VBox([ipywidgets.HBox([example, layer, head]), shown])


# ---------------------------------------------------------------------------------------------------------- monitor


async def watch(
    distiller: Distiller, steps: int, on_step: Callable[[StepRecord], object], stopped: Callable[[], bool]
) -> None:
    """Run ``distiller`` until ``steps`` in all have been made, or until ``stopped``; then save its checkpoint.

    Between two steps the kernel is left to others, such as the press of a button.  It is no thread of its own: a student that
    trains in one while another cell uses it would be seen by that cell with somebody else's parameters.

    Args:
        on_step: told of every step.
        stopped: asked after every step.
    """
    with contextlib.closing(distiller.run(steps)) as records:
        for record in records:
            on_step(record)
            await asyncio.sleep(0.01)  # a zero would let one message through, and a click is several
            if stopped():
                break
    distiller.save()


def progress_figure(records: Sequence[StepRecord], scores: Mapping[int, float] | None = None) -> Figure:
    """The terms of the loss at every step, and the scores at those steps where one was taken.

    Args:
        records: at least one.
        scores: step → score.
    """
    steps = [record.step for record in records]
    names = dict.fromkeys(name for record in records for name in record.terms if name != "skipped")
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        name: (steps, [record.terms.get(name, np.nan) for record in records]) for name in names
    }
    if len(lines) > 1:
        lines["all, weighted"] = (steps, [record.loss for record in records])
    panels = [("Loss", "outer step", "loss", lines)]
    if scores:
        panels.append(("Score", "outer step", "score", {"of the set as it was": ([*scores], [*scores.values()])}))
    return curves(panels)


def text_html(distilled: DistilledSet, student: Student) -> str:
    """The set as a table of text, of embeddings in their nearest words; every piece of it escaped."""
    found = project(distilled, student) if distilled.tokens is None else distilled
    rows = [
        {key: _visible(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in found.to_text().to_list()
    ]
    classes = [_visible(name) for name in distilled.meta["classes"]]
    return text_table(rows, classes) if classes else html_table(rows)


class Monitor(ipywidgets.VBox):
    """What :func:`monitor` shows: ``stop`` is the button, ``task`` the running distillation, ``scores`` are those so far."""

    def __init__(self, distiller: Distiller, steps: int, *, score: Score | None = None, every: int = 5):
        check_whole("steps", steps)
        check_whole("every", every)
        if distiller.checkpoint.path is None:
            raise ValueError("a distillation that can be stopped must have a place to go on from: give its Distiller a "
                             "checkpoint")
        self.distiller, self.steps, self.score, self.every = distiller, steps, score, every
        self.scores: dict[int, float] = {}
        self.task: asyncio.Task | None = None
        self.stop = ipywidgets.ToggleButton(description="stop", tooltip="after this step, with a checkpoint")
        self.status = ipywidgets.HTML(f"step {distiller.step} of {steps}")
        layout = {"display": "none", "align_self": "flex-start", "max_width": "100%"}  # not shown until there is one
        self._picture, self._text = ipywidgets.Image(format="png", layout=layout), ipywidgets.HTML()
        super().__init__([ipywidgets.HBox([self.stop, self.status]), self._picture, self._text])

    async def run(self) -> None:
        """Run to the end, or to a stop."""
        await watch(self.distiller, self.steps, self._step, lambda: self.stop.value)
        made = self.distiller.step
        self._draw()
        ended = "done" if made >= self.steps else "stopped"
        self.status.value = f"{ended} at step {made} of {self.steps}; the checkpoint is saved"

    def start(self) -> None:
        """Run in the event loop that this is called in, and tell of an error where one can see it."""
        self.task = asyncio.get_running_loop().create_task(self.run())
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self.stop.disabled = True
        if not task.cancelled() and (error := task.exception()):
            self.status.value = escaped(f"ended by an error: {error}")

    def _step(self, record: StepRecord) -> None:
        self.status.value = f"step {record.step} of {self.steps}: loss {record.loss:.3f}, {record.seconds:.1f} s"
        if record.step % self.every == 0 or record.step == self.steps:
            if self.score is not None:
                self.scores[record.step] = self.score(self.distiller.distilled)
            self._draw()

    def _draw(self) -> None:
        if not self.distiller.records:
            return
        out = io.BytesIO()
        progress_figure(self.distiller.records, self.scores).savefig(out, format="png")
        self._picture.value, self._picture.layout.display = out.getvalue(), None
        self._text.value = text_html(self.distiller.distilled, self.distiller.objective.student)


def monitor(distiller: Distiller, steps: int, *, score: Score | None = None, every: int = 5) -> Monitor:
    """Start a distillation in the kernel's own event loop, and show its loss, score and text while it runs.

    Cells run between its steps, so the notebook stays usable, but a slider waits for the step to end.

    Args:
        distiller: with a ``checkpoint``.  After a stop, or in another session, a Distiller with that file goes on to the
            very set that an uninterrupted run gives.
        steps: in all, as :meth:`~distillkit.core.distiller.Distiller.run` counts them.
        score: from a set to a number, such as its accuracy on the validation split; taken every ``every`` steps.
        every: steps between pictures.

    Raises:
        ValueError: a distiller without ``checkpoint``.
        RuntimeError: no event loop is running, as in a script; there ``distiller.run`` does the same.
    """
    found = Monitor(distiller, steps, score=score, every=every)
    found.start()
    return found


# -------------------------------------------------------------------------------------------------------------- map


def map_html(points, texts: Sequence[str], groups: Sequence[str], *, only: str | None = None) -> str:
    """A flat map as an SVG, coloured by group; a point tells its text when hovered.

    Args:
        points: ``[n, 2]``, as :func:`~distillkit.view.measures.flat_map` returns them.
        texts, groups: of each point.
        only: a group; the points of the others are drawn faint and behind it.

    Raises:
        ValueError: points that are not finite ``[n, 2]``, another number of texts or groups, or an unknown group.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"points must be a finite array [n, 2], not one of shape {points.shape} with "
                         f"{int((~np.isfinite(points)).sum())} values that are not finite")
    if not len(texts) == len(groups) == len(points):
        raise ValueError(f"{len(points)} points need as many texts and groups, not {len(texts)} and {len(groups)}")
    names = list(dict.fromkeys(groups))
    if only is not None:
        check_choice("only", only, names)
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)).as_hex(), strict=True))
    span = np.where(np.ptp(points, axis=0) > 0, np.ptp(points, axis=0), 1)
    where = (points - points.min(0)) / span * (WIDTH - 2 * EDGE, 2 * EDGE - HEIGHT) + (EDGE, HEIGHT - EDGE)
    order = sorted(range(len(points)), key=lambda i: groups[i] == only)
    parts = [
        f'<circle cx="{where[i, 0]:.1f}" cy="{where[i, 1]:.1f}" r="5" fill="{colours[groups[i]]}" stroke="white" '
        f'fill-opacity="{0.85 if only in (None, groups[i]) else 0.12}"><title>{escaped(texts[i])}</title></circle>'
        for i in order
    ]
    legend = " ".join(f'<span style="color:{colours[name]}">&#9679;</span>&nbsp;<bdi>{escaped(name)}</bdi>' for name in names)
    return f"{_svg(WIDTH, HEIGHT, f'{len(points)} points in {len(names)} groups', parts)}<p>{legend}</p>"


def map_explorer(points, texts: Sequence[str], groups: Sequence[str]) -> ipywidgets.VBox:
    """A flat map to hover over, and a choice of the group to single out; arguments as :func:`map_html` takes them."""
    names = list(dict.fromkeys(groups))
    chosen = ipywidgets.Dropdown(
        description="show", options=[("all", -1), *((_visible(name), i) for i, name in enumerate(names))]
    )
    shown = ipywidgets.HTML()

    def draw(_):
        place = cast("int", chosen.value)
        shown.value = map_html(points, texts, groups, only=None if place < 0 else names[place])

    chosen.observe(draw, "value")
    draw(None)
    return ipywidgets.VBox([chosen, shown])


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """Drawn in the colour and on the ground of the page, as wide as there is room but no wider than ``width``."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(label)}" '
        f'style="width:100%;max-width:{width}px" font-family="sans-serif" font-size="11" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )
