"""Widgets to play with a distilled set: thin shells over plain functions.

What a widget shows comes from a function that needs no front end, so that a test or an ordinary cell can call it.  Moving a
slider calls that function again:

* :func:`explore`: any function that returns a figure, drawn again when a control moves.
* :func:`prompt_explorer`: a position's nearest words and the score with each (:func:`candidates`, :func:`prompt_html`).
* :func:`attention_explorer`: one head on real and on distilled text.  The weights are computed once; :func:`attention_panels`
  cuts out a head and :func:`attention_html` draws it.
* :func:`monitor`: a running distillation with a button that stops it (:func:`progress_figure`, :func:`text_html`).
* :func:`map_explorer`: a flat map whose points show their text (:func:`map_html`).

Pictures that follow a slider are SVG: matplotlib takes too long to label a head.  Corpus text is not trusted, and an HTML
widget runs its value, so every piece of text goes through :func:`escaped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import ipywidgets
import numpy as np
import pandas
import seaborn as sns
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.utils import check_array, check_consistent_length
from torch import Tensor

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller, StepRecord
from distillkit.core.student import Params, Student
from distillkit.io.escaping import LONGEST, one_line
from distillkit.text.projection import allowed_tokens, nearest_tokens, project, with_tokens
from distillkit.view.explore import explore as explore
from distillkit.view.figures import curves, html_table, text_table
from distillkit.view.measures import attention

Score = Callable[[DistilledSet], float]

_SHADES = [to_hex(colour) for colour in sns.color_palette("crest", 64)]
CELL, LABEL, GAP = 15, 96, 40  # pixels of an attention map: a cell's side, room for words, between panels
MOST = 24  # positions of an attention map, the first ones
EVERY = 5  # steps between two pictures of a distillation
WIDTH, HEIGHT, EDGE = 720, 440, 12  # pixels of a flat map


def escaped(text: str, longest: int = LONGEST) -> str:
    """``text`` for HTML and SVG, on one line: mark-up stands for itself, and hidden characters are named."""
    return html.escape(one_line(text, longest))


def _explorer(controls: Sequence[ipywidgets.Widget], draw: Callable[[], str]) -> ipywidgets.VBox:
    """Controls above the HTML that ``draw`` returns, which is drawn again whenever one of them changes."""
    picture = ipywidgets.HTML()

    def redraw(_=None):
        picture.value = draw()

    for control in controls:
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([ipywidgets.Box(controls, layout={"flex_flow": "row wrap"}), picture])


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """An SVG in the text colour of the page, as wide as there is room but no wider than ``width``."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(label)}" '
        f'style="width:100%;max-width:{width}px" font-family="sans-serif" font-size="11" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def _in_words(distilled: DistilledSet, student: Student) -> DistilledSet:
    """The set itself where it has tokens, else its projection."""
    return project(distilled, student) if distilled.tokens is None else distilled


def _words(distilled: DistilledSet, student: Student) -> list[list[str]]:
    """The words of each example's present positions; of embeddings, the nearest words."""
    rows = zip(cast(Tensor, _in_words(distilled, student).tokens), distilled.mask, strict=True)
    return [cast("list[str]", student.tokenizer.convert_ids_to_tokens(row[mask].tolist())) for row, mask in rows]


def _replaced(distilled: DistilledSet, student: Student, example: int, position: int, token: int) -> DistilledSet:
    """The set with ``token`` at one learned position; the other positions keep their embeddings or tokens."""
    if distilled.tokens is None:
        embeds = distilled.embeds.clone()
        embeds[example, position] = student.embedding[token]
        return dataclasses.replace(distilled, embeds=embeds)
    tokens = distilled.tokens.clone()
    tokens[example, position] = token
    return with_tokens(distilled, student, tokens)


def candidates(
    distilled: DistilledSet, student: Student, example: int, position: int, *, k: int = 8, more: Sequence[int] = (),
    score: Score | None = None,
) -> pandas.DataFrame:
    """The words nearest to a learned position, nearest first, and the score of the set with each of them in its place.

    Args:
        distilled: a set in ``student``'s embedding space, of embeddings or of tokens.
        example, position: a learned position.
        k: number of nearest words.
        more: ids of further tokens, added at the end whatever their distance.
        score: from a set to a number, such as :func:`outer_loss` returns; called once for each word and once for the set as it
            is.  Default: no scores.

    Returns:
        A row per word: ``token`` id, ``word``, Euclidean ``distance``, and with a score ``score`` and ``change``.

    Raises ValueError for a position that is not learned, or a set of another table.
    """
    distilled.check_table(student)
    if [example, position] not in distilled.free.nonzero().tolist():
        raise ValueError(f"example {example!r} has no learned position {position!r}; choose one of distilled.free.nonzero()")
    table = student.embedding
    embedding = distilled.embeds[example, position].to(table.device, table.dtype)
    nearest, _ = nearest_tokens(embedding[None], table, k=k, allowed=allowed_tokens(student.tokenizer, len(table)))
    ids = list(dict.fromkeys([*nearest[0].tolist(), *more]))
    # From the difference: the distances of the search lose digits where they are small.
    distances = (embedding - table[ids]).float().norm(dim=1).tolist()
    words = [one_line(word) for word in student.tokenizer.convert_ids_to_tokens(ids)]
    choices = pandas.DataFrame({"token": ids, "word": words, "distance": distances})
    if score is not None:
        choices["score"] = [score(_replaced(distilled, student, example, position, token)) for token in ids]
        choices["change"] = choices["score"] - score(distilled)
    return choices


def outer_loss(judge) -> Score:
    """The score of a judge: its outer loss on real rows, the same for every set; lower is better."""

    def score(distilled: DistilledSet) -> float:
        if distilled.tokens is None:  # a copy, because the judge marks the embeddings for gradients
            return judge.gradient(dataclasses.replace(distilled, embeds=distilled.embeds.clone()), 0)[0]
        return judge.losses(distilled, [[]], 0)[0]

    return score


def prompt_html(words: Sequence[str], position: int, choices: pandas.DataFrame) -> str:
    """An example's ``words`` with the one at ``position`` marked, above the table of :func:`candidates` for its place."""
    marked = [f"<bdi>{escaped(word)}</bdi>" for word in words]
    marked[position] = f"<mark>{marked[position]}</mark>"
    texts = {"word": str, "distance": "{:.3f}".format, "score": "{:.4f}".format, "change": "{:+.4f}".format}
    rows = [{name: texts[name](value) for name, value in row.items() if name != "token"} for row in choices.to_dict("records")]
    return f"<p>{' '.join(marked)}</p>{html_table(rows)}"


def prompt_explorer(distilled: DistilledSet, student: Student, *, score: Score | None = None, k: int = 8) -> ipywidgets.VBox:
    """Choose an example and a position; see the nearest words and, while *judge* is pressed, the score with each of them.

    Args:
        distilled: a set in ``student``'s embedding space; a set of embeddings is shown in its nearest words.
        score: as :func:`candidates` takes it.
        k: number of nearest words.

    Returns:
        A widget; the tokens of the text in *try* are added to the words.
    """
    words = _words(distilled, student)
    positions = [row.nonzero().squeeze(1).tolist() for row in distilled.free]
    example = ipywidgets.IntSlider(description="example", max=len(distilled) - 1)
    position = ipywidgets.SelectionSlider(description="position", options=positions[0])
    text = ipywidgets.Text(description="try", placeholder="a word of your own", continuous_update=False)
    judge = ipywidgets.ToggleButton(description="judge", tooltip="the score with each word", disabled=score is None)

    def choose_example(change):
        position.options = positions[change.new]

    def draw():
        more = student.tokenizer(text.value, add_special_tokens=False)["input_ids"]
        place = example.value, cast(int, position.value)
        choices = candidates(distilled, student, *place, k=k, more=more, score=score if judge.value else None)
        return prompt_html(words[example.value], place[1], choices)

    example.observe(choose_example, "value")
    return _explorer([example, position, text, judge], draw)


def attention_panels(
    weights: Mapping[str, np.ndarray], words: Mapping[str, Sequence[Sequence[str]]], example: int, layer: int, head: int
) -> list[tuple[str, np.ndarray, list[str]]]:
    """One head's attention in one example of several sets, as :func:`attention_html` draws it.

    Args:
        weights: name → ``[examples, layers, heads, l, l]``, as :func:`~distillkit.view.measures.attention` returns them.
        words: name → for each example the words of its positions.
        example, layer, head: counted from 0.

    Returns:
        For each name its title, weights ``[n, n]`` and n words, n at most :data:`MOST`.
    """
    panels = []
    for name, values in weights.items():
        shown = list(words[name][example][:MOST])
        panels.append((name, values[example, layer, head, : len(shown), : len(shown)], shown))
    return panels


def attention_html(panels: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> str:
    """Attention as an SVG, panels side by side on one scale: a row looks at the columns; hovering a cell shows its weight.

    Args:
        panels: as :func:`attention_panels` returns them.
    """
    top = max(float(np.max(weights)) for _, weights, _ in panels) or 1.0
    parts, x = [], LABEL
    for title, weights, words in panels:
        parts.append(f'<text x="{x}" y="14" font-weight="bold">{escaped(title)}</text>')
        for i, word in enumerate(words):
            label, middle = escaped(word, 13), CELL * i + 11
            parts.append(f'<text x="{x - 4}" y="{LABEL + middle}" text-anchor="end">{label}</text>')
            parts.append(f'<text transform="translate({x + middle},{LABEL - 4}) rotate(-90)">{label}</text>')
        for (i, j), weight in np.ndenumerate(weights):
            place = f'x="{x + CELL * j}" y="{LABEL + CELL * i}" width="{CELL}" height="{CELL}"'
            shade = _SHADES[round(weight / top * (len(_SHADES) - 1))]
            parts.append(f'<rect {place} fill="{shade}"><title>{weight:.3f}</title></rect>')
        x += CELL * len(words) + GAP + LABEL
    height = LABEL + CELL * max(len(words) for *_, words in panels)
    return _svg(x - LABEL, height, f"attention from 0 to {top:.2f}", parts)


def attention_explorer(
    student: Student, params: Params | None, distilled: DistilledSet, real: DistilledSet
) -> ipywidgets.VBox:
    """Attention on real beside distilled text, with a slider for example, layer and head.

    Args:
        student, params: the model whose attention is shown; params None: the weights the student was loaded with.
        distilled: a set in ``student``'s embedding space; its words are the nearest ones.
        real: as many examples of real text, such as the set it was distilled from.

    Raises ValueError for sets of different sizes.
    """
    if len(real) != len(distilled):
        raise ValueError(f"real has {len(real)} examples and distilled {len(distilled)}; give as many, such as its initial set")
    sets = {"real": real, "distilled": distilled}
    weights = {name: attention(student, examples, params) for name, examples in sets.items()}
    words = {name: _words(examples, student) for name, examples in sets.items()}
    example = ipywidgets.IntSlider(description="example", max=len(real) - 1)
    layer = ipywidgets.IntSlider(description="layer", value=1, min=1, max=weights["real"].shape[1])
    head = ipywidgets.IntSlider(description="head", value=1, min=1, max=weights["real"].shape[2])

    def draw():
        return attention_html(attention_panels(weights, words, example.value, layer.value - 1, head.value - 1))

    return _explorer([example, layer, head], draw)


def progress_figure(records: Sequence[StepRecord]) -> Figure:
    """The terms of the loss at every step; ``records`` holds at least one."""
    steps = [record.step for record in records]
    terms = pandas.DataFrame([record.terms for record in records])
    lines: dict[str, tuple[Sequence[float], Sequence[float]]]
    lines = {str(name): (steps, values.tolist()) for name, values in terms.items()}
    if len(lines) > 1:
        lines["all, weighted"] = (steps, [record.loss for record in records])
    return curves([("Loss", "outer step", "loss", lines)])


def text_html(distilled: DistilledSet, student: Student) -> str:
    """The set as a table of text, embeddings in their nearest words; every piece of text is escaped."""
    texts = _in_words(distilled, student).to_text().to_list()
    rows = [{key: one_line(value) if isinstance(value, str) else value for key, value in row.items()} for row in texts]
    classes = [one_line(name) for name in distilled.meta["classes"]]
    return text_table(rows, classes) if classes else html_table(rows)


class Monitor(ipywidgets.VBox):
    """The widget of :func:`monitor`: ``stop`` is the button, ``task`` the running distillation."""

    def __init__(self, distiller: Distiller, steps: int):
        if distiller.checkpoint.path is None:
            raise ValueError("a distillation that can be stopped needs a checkpoint: give its Distiller a checkpoint")
        self.distiller, self.steps = distiller, steps
        self.task: asyncio.Task | None = None
        self.stop = ipywidgets.ToggleButton(description="stop", tooltip="after this step, with a checkpoint")
        self.status = ipywidgets.HTML(f"step {distiller.step} of {steps}")
        layout = {"display": "none", "align_self": "flex-start", "max_width": "100%"}  # hidden until there is a picture
        self._picture, self._text = ipywidgets.Image(format="png", layout=layout), ipywidgets.HTML()
        super().__init__([ipywidgets.HBox([self.stop, self.status]), self._picture, self._text])

    async def run(self) -> None:
        """Run to the end, to a stop or to an error, which is shown; then save the checkpoint.

        Other cells and the button get their turn between two steps.  The distillation is no thread: a cell that used the same
        student meanwhile would see its parameters change.
        """
        try:
            with contextlib.closing(self.distiller.run(self.steps)) as records:
                for record in records:
                    self._show(record)
                    await asyncio.sleep(0.01)  # 0 would let one message through, and a click is several
                    if self.stop.value:
                        break
            self._draw()
            state = "done" if self.distiller.step >= self.steps else "stopped"
            self.status.value = f"{state} at step {self.distiller.step} of {self.steps}; the checkpoint is saved"
        except Exception as error:
            self.status.value = escaped(f"ended by an error: {error}")
            raise
        finally:
            self.stop.disabled = True

    def _show(self, record: StepRecord) -> None:
        self.status.value = f"step {record.step} of {self.steps}: loss {record.loss:.3f}, {record.seconds:.1f} s"
        if record.step % EVERY == 0:
            self._draw()

    def _draw(self) -> None:
        if self.distiller.records:
            png = io.BytesIO()
            progress_figure(self.distiller.records).savefig(png, format="png")
            self._picture.value, self._picture.layout.display = png.getvalue(), None
            self._text.value = text_html(self.distiller.distilled, self.distiller.objective.student)


def monitor(distiller: Distiller, steps: int) -> Monitor:
    """Start a distillation in the kernel's own event loop, and show its loss and text while it runs.

    Cells run between its steps, so the notebook stays usable, but a slider waits for the step to end.

    Args:
        distiller: with a ``checkpoint``.  After a stop, or in another session, a Distiller with that file goes on to the
            very set that an uninterrupted run gives.
        steps: in all, as :meth:`~distillkit.core.distiller.Distiller.run` counts them.

    Raises:
        ValueError: a distiller without ``checkpoint``.
        RuntimeError: no event loop is running, as in a script; there ``distiller.run`` does the same.
    """
    loop, box = asyncio.get_running_loop(), Monitor(distiller, steps)
    box.task = loop.create_task(box.run())
    return box


def map_html(points, texts: Sequence[str], groups: Sequence[str], *, only: str | None = None) -> str:
    """A flat map as an SVG, coloured by group; hovering a point shows its text.

    Args:
        points: ``[n, 2]``, as :func:`~distillkit.view.measures.flat_map` returns them.
        texts, groups: n texts and n names of groups.
        only: a group; the points of the others are drawn faint and behind it.

    Raises:
        ValueError: points that are not finite ``[n, 2]``, or another number of texts or groups.
    """
    points = check_array(points, dtype="float64", ensure_min_features=2)
    check_consistent_length(points, texts, groups)
    names = list(dict.fromkeys(groups))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names)).as_hex(), strict=True))
    span = np.ptp(points, axis=0)
    share = (points - points.min(0)) / np.where(span > 0, span, 1)
    places = share * (WIDTH - 2 * EDGE, 2 * EDGE - HEIGHT) + (EDGE, HEIGHT - EDGE)
    parts = [
        f'<circle cx="{places[i, 0]:.1f}" cy="{places[i, 1]:.1f}" r="5" fill="{colours[groups[i]]}" stroke="white" '
        f'fill-opacity="{0.85 if only in (None, groups[i]) else 0.12}"><title>{escaped(texts[i])}</title></circle>'
        for i in sorted(range(len(points)), key=lambda i: groups[i] == only)
    ]
    legend = " ".join(f'<span style="color:{colours[name]}">&#9679;</span>&nbsp;<bdi>{escaped(name)}</bdi>' for name in names)
    return f"{_svg(WIDTH, HEIGHT, f'{len(points)} points in {len(names)} groups', parts)}<p>{legend}</p>"


def map_explorer(points, texts: Sequence[str], groups: Sequence[str]) -> ipywidgets.VBox:
    """A flat map to hover over, and a choice of the group to single out; arguments as :func:`map_html` takes them."""
    options = [("all", None), *((one_line(name), name) for name in dict.fromkeys(groups))]
    group = ipywidgets.Dropdown(description="show", options=options)
    return _explorer([group], lambda: map_html(points, texts, groups, only=cast("str | None", group.value)))
