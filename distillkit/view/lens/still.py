"""Lens on paper: a film strip of the map, the words of an example, all attention heads; and the film as a GIF.

What the front end draws, drawn by matplotlib: notebooks show it under the widget, and it is the picture that a stored widget
leaves behind.  Colours mean the same in both: classes by :data:`CLASS_COLOURS`, shades of blue for how far, and a difference of
attention by :data:`DIFFERENCE`, which is white at zero.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from distillkit.io.checks import check_choice, require
from distillkit.io.storage import absolute, replacing
from distillkit.view.figures import ROLE_COLOURS, _Shown, style
from distillkit.view.lens.film import Film
from distillkit.view.lens.maps import Map
from distillkit.view.lens.reading import Stretch
from distillkit.view.set_figures import drawn

CLASS_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3db0ea", "#7a4fb5", "#6b8e23")
DIFFERENCE = LinearSegmentedColormap.from_list("difference", [ROLE_COLOURS["text"], "white", ROLE_COLOURS["learned"]])
DISTANCE = LinearSegmentedColormap.from_list("distance", ["white", ROLE_COLOURS["learned"]])
SAME, CUT, LOST = "#eeeeee", "#d9c8ec", "#b3261e"  # tokens of another model: cut alike, cut differently, not read
MOST = 0.5  # a difference of attention that has the last colour
STRIP = 4  # frames of a film strip
STILLS = 48  # pictures of a GIF
PAUSE, FIRST, LAST = 110, 900, 2500  # milliseconds of a picture of a GIF
LABELS = 14  # words beside the points of a map
ON_A_WORD = 1e-3  # word distances; a position nearer to its word is that word
PANES = ("map", "tokens", "heads")  # what a picture can show


def checked(picture: Sequence[str]) -> tuple[str, ...]:
    """The panes that a picture names, some of :data:`PANES`."""
    require(isinstance(picture, Sequence) and not isinstance(picture, str) and picture,
            f"picture must name some of {', '.join(PANES)}, such as ('tokens',), not {picture!r}")
    for pane in picture:
        check_choice("a pane of picture", pane, PANES)
    return tuple(picture)


def colour(label: int) -> str:
    """The colour of a class."""
    return CLASS_COLOURS[label % len(CLASS_COLOURS)]


def draw_map(axes, film: Film, flat: Map, time: float, labels: np.ndarray, words: Sequence[str], example: int = 0) -> None:
    """One moment of a film: words in grey, learned positions in the colours of their classes, with trails.

    Args:
        time: from 0 to f − 1; between two frames positions are between their places.
        labels: ``[f, m]`` the class of each example in each frame.
        words: for each of the p learned positions the nearest word.
        example: whose positions are labelled with their words.
    """
    before, share = int(time), time - int(time)
    after = min(before + 1, len(flat.points) - 1)
    now = (1 - share) * flat.points[before] + share * flat.points[after]
    axes.scatter(*flat.background.T, s=1, color=ROLE_COLOURS["real"], alpha=0.18, linewidths=0, rasterized=True)
    owners = film.places[:, 0]
    labels = labels[round(time)]
    colours = [colour(label) for label in labels[owners]]
    if not film.choices and flat.method == "pca":  # from one set to another nothing has moved, and UMAP tears paths apart
        trails = np.stack([*flat.points[: before + 1], now], 1)  # [p, frames so far, 2]
        axes.add_collection(LineCollection(trails, colors=colours, linewidths=0.7, alpha=0.3))
    near = owners == example
    axes.scatter(*now[~near].T, s=13, c=[c for c, one in zip(colours, near) if not one], alpha=0.8, linewidths=0)
    axes.scatter(*now[near].T, s=34, c=colour(labels[example]), edgecolors="black", linewidths=0.8, zorder=3)
    for place in np.flatnonzero(near)[:LABELS]:
        if np.isfinite(now[place]).all():
            axes.annotate(drawn(words[place])[:16], now[place], xytext=(4, 3), textcoords="offset points", fontsize=7, zorder=4)
    inner = np.concatenate([np.quantile(flat.background, (0.002, 0.998), axis=0), flat.points.reshape(-1, 2)])
    inner = inner[np.isfinite(inner).all(1)]
    middle, span = (inner.max(0) + inner.min(0)) / 2, 0.53 * np.ptp(inner, axis=0)
    box = axes.get_window_extent()
    unit = max(span[0] / box.width, span[1] / box.height)  # the same on both axes
    axes.set(xlim=middle[0] + unit * box.width * np.array([-1, 1]), ylim=middle[1] + unit * box.height * np.array([-1, 1]))
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def draw_tokens(axes, real: Sequence[str], words: Sequence[str], distances: Sequence[float],
                reading: Sequence[Stretch] | None = None) -> None:
    """The words of an example as chips in lines: the real word in grey above, the nearest one below it.

    A chip is blue where the position is far from every word; its frame is orange where its word is not the real one.

    Args:
        real, words: a word a position, empty where there is none.
        distances: of each position from its nearest word, in word distances; NaN for a fixed position.
        reading: the same words as another tokenizer cuts them, which stand below; violet where it cuts them differently.
    """
    points = axes.get_window_extent().width / axes.figure.dpi * 72
    shade = Normalize(0, max([*(value for value in distances if np.isfinite(value)), 1e-9]))
    depth = 31 if reading is None else 50
    x, y = 0.0, 0.0
    for places, others, alike in reading or [Stretch([place], [], True) for place in range(len(words))]:
        pieces = [(drawn(text)[:14], read) for text, read in others]
        chips = [(drawn(real[place])[:14], drawn(words[place])[:14], distances[place]) for place in places]
        widths = [5.4 * max(len(above) * 0.85, len(word)) + 11 for above, word, _ in chips]
        lower = [5.4 * len(text) + 11 for text, _ in pieces]
        width = max(sum(widths), sum(lower))
        if x + width > points:
            x, y = 0.0, y + depth
        for (above, word, distance), middle in zip(chips, _middles(x, widths, width)):
            face = DISTANCE(0.62 * shade(distance)) if np.isfinite(distance) else "white"
            frame = {} if above in ("", word) else {"edgecolor": ROLE_COLOURS["text"], "linewidth": 1.8}
            axes.text(middle, y, above, fontsize=7, color="0.4", ha="center", va="center")
            _chip(axes, middle, y + 13, word, face, **frame)
        for (text, read), middle, wide in zip(pieces, _middles(x, lower, width), lower):
            _chip(axes, middle, y + 29, text, SAME if alike else CUT, "black" if read else "0.45")
            if not read:
                axes.plot([middle - wide / 2 + 3, middle + wide / 2 - 3], [y + 29] * 2, color=LOST, lw=1, zorder=4)
        x += width
    axes.set(xlim=(0, points), ylim=(max(y + depth - 7, 125), -8))
    axes.axis("off")


def _middles(x: float, widths: Sequence[float], width: float) -> np.ndarray:
    """The middle of each chip of a stretch ``width`` points wide, in whose middle the chips stand."""
    ends = x + (width - sum(widths)) / 2 + np.cumsum(widths)
    return ends - np.array(widths) / 2


def _chip(axes, x: float, y: float, text: str, face, color: str = "black", **frame) -> None:
    axes.text(x, y, text, fontsize=8.5, ha="center", va="center", color=color,
              bbox={"boxstyle": "round,pad=0.25", "facecolor": face, "edgecolor": "0.7"} | frame)


def draw_heads(axes, difference: np.ndarray) -> None:
    """All heads in one picture: a row of tiles per layer; blue: attention gained, orange: attention lost.

    Args:
        difference: ``[layers, heads, l, l]``.
    """
    layers, heads, length, _ = difference.shape
    gap = max(1, length // 12)
    tiles = np.pad(difference, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    picture = tiles.transpose(0, 2, 1, 3).reshape(layers * (length + gap), heads * (length + gap))
    axes.imshow(picture, cmap=DIFFERENCE, vmin=-MOST, vmax=MOST, interpolation="nearest", aspect="auto")
    axes.set_xticks((np.arange(heads) + 0.45) * (length + gap), range(1, heads + 1), fontsize=7)
    axes.set_yticks((np.arange(layers) + 0.45) * (length + gap), range(1, layers + 1), fontsize=7)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(length=0, pad=1)
    axes.grid(False)


def draw_classes(figure: Figure, names: Sequence[str], **place) -> None:
    """A legend of classes: in a row below the figure, or at another ``place``, as ``Figure.legend`` takes it."""
    marks = [Line2D([], [], color=colour(label), marker="o", ls="", label=drawn(name)[:24]) for label, name in enumerate(names)]
    marks.append(Line2D([], [], color=ROLE_COLOURS["real"], marker="o", ls="", ms=3, label="words"))
    place = place or {"loc": "lower center", "ncols": min(len(marks), 9)}
    figure.legend(handles=marks[:9], frameon=False, fontsize=8, **place)


@style()
def still(film: Film, flat: Map, names: Sequence[str], labels: np.ndarray, words: Sequence[Sequence[str]], *, example: int,
          frame: int, real: Sequence[str], chips: Sequence[str], difference: np.ndarray | None,
          reading: Sequence[Stretch] | None = None, reader: str | None = None, picture: Sequence[str] = PANES) -> Figure:
    """Film strip, words and heads of one moment; with a ``reader`` its tokens in the place of the heads.

    Args:
        film, flat: a film and its map.
        names, labels: of classes, and the class of each example in each frame ``[f, m]``.
        words: for each frame, for each of the p learned positions, the nearest word.
        example, frame: which are looked at.
        real, chips: the words of the example in real text and in the frame, a word a position.
        difference: of attention, ``[layers, heads, l, l]``; None: no heads.
        reading, reader: as :func:`draw_tokens` takes it, and whose it is.
        picture: which of :data:`PANES` are drawn.
    """
    with_map, below = "map" in picture, [pane for pane in picture if pane != "map"]
    if "heads" in below and "tokens" in below and (difference is None or reading is not None):
        below.remove("heads")  # the tokens take their place
    height = (6.6 if below else 4.2) if with_map else 3.2 if "heads" in below else 2.6
    figure = _Shown(figsize=(10, height))
    if with_map:
        _draw_strip(figure, film, flat, names, labels, words, example=example, frame=frame, bottom=0.49 if below else 0.14)
    if not below:
        return figure
    edges = {"top": 0.4, "bottom": 0.12} if with_map else {"top": 0.81, "bottom": 0.14}
    widths = (1.3, 1)[: len(below)]
    columns = figure.add_gridspec(1, len(below), width_ratios=widths, left=0.03, right=0.96, wspace=0.1, **edges)
    places = dict(zip(below, columns))
    if "tokens" in places:
        axes = figure.add_subplot(places["tokens"])
        lower = drawn(film.names[frame])[:24] if film.choices else "nearest words"
        title = f"Example {example + 1}, {drawn(names[labels[frame, example]])[:24]}: real words (grey) and {lower}"
        far = np.nanmax(film.distances[frame, example], initial=0) > ON_A_WORD
        if reading is None:
            title += "\n(orange frame: not the real word" + ("; blue: far from every word)" if far else ")")
        else:
            read = [flag for part in reading for _, flag in part.pieces]
            title += (f"; below, {drawn(str(reader))[:24]} needs {len(read)} tokens and reads {sum(read)}\n"
                      "(violet: cut differently; struck through: not read, no room or unknown)")
        axes.set_title(title, fontsize=9, loc="left")
        draw_tokens(axes, real, chips, film.distances[frame, example], reading)
    if "heads" in places and difference is not None:
        axes = figure.add_subplot(places["heads"])
        moved = drawn(film.names[frame])[:24] if film.choices else "distilled"
        axes.set_title(f"Attention, {moved} − real", fontsize=9, loc="left")
        draw_heads(axes, difference)
        bar = figure.colorbar(ScalarMappable(Normalize(-MOST, MOST), DIFFERENCE), ax=axes, fraction=0.04, pad=0.02)
        bar.ax.tick_params(labelsize=7)
    return figure


def _draw_strip(figure: Figure, film: Film, flat: Map, names: Sequence[str], labels: np.ndarray, words: Sequence[Sequence[str]],
                *, example: int, frame: int, bottom: float) -> None:
    """The map at several moments, side by side above ``bottom``, with what it keeps of neighbours and a legend."""
    shown = sorted({round(step) for step in np.linspace(0, len(film.sets) - 1, STRIP)})
    strip = figure.add_gridspec(1, len(shown), left=0.03, right=0.985, top=0.91, bottom=bottom, wspace=0.04)
    for place, moment in enumerate(shown):
        axes = figure.add_subplot(strip[place])
        draw_map(axes, film, flat, moment, labels, words[moment], example)
        axes.set_title(drawn(film.names[moment])[:24], fontsize=10, loc="left")
    counted = frame if frame in flat.preserved else max(flat.preserved)
    figure.text(0.03, 0.96, f"The {flat.method.upper()} keeps {flat.preserved[counted]:.1%} of the neighbours in "
                            f"'{drawn(film.names[counted])[:24]}' (shuffled: {flat.shuffled:.2%})", fontsize=9)
    draw_classes(figure, names)


@style()
def save_gif(path: str | Path, film: Film, flat: Map, names: Sequence[str], labels: np.ndarray,
             words: Sequence[Sequence[str]], *, example: int) -> Path:
    """Write the map's film as a GIF of at most :data:`STILLS` pictures, and return where it is."""
    last = len(film.sets) - 1
    pictures = []
    for time in np.linspace(0, last, min(STILLS, 3 * last + 1)):
        figure = _Shown(figsize=(7.2, 5.2), dpi=100)
        axes = figure.add_axes((0.02, 0.03, 0.71, 0.9))
        axes.spines[:].set_visible(False)
        frame = round(time)
        draw_map(axes, film, flat, time, labels, words[frame], example)
        axes.set_title(f"{drawn(film.names[frame])}", fontsize=11, loc="left")
        chosen = [word for word, (owner, _) in zip(words[frame], film.places) if owner == example]
        lines = textwrap.fill(" ".join(map(drawn, chosen)), 25, max_lines=14, placeholder=" …")
        figure.text(0.74, 0.53, f"nearest words of example {example + 1}", fontsize=8, color="0.4", va="top")
        figure.text(0.74, 0.49, lines, fontsize=9, va="top", linespacing=1.4)
        draw_classes(figure, names, loc="upper left", bbox_to_anchor=(0.725, 0.95))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    palette = _palette()
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pauses = [FIRST, *[PAUSE] * max(0, len(pictures) - 2), LAST][: len(pictures)]
    path = absolute(path)
    with replacing(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=pauses, loop=0, optimize=True)
    return path


def _palette() -> Image.Image:
    """The colours of a GIF: greys, and each class in several strengths on white."""
    classes = np.array([to_rgb(name) for name in CLASS_COLOURS])
    strengths = np.linspace(0.15, 1, 6)[:, None, None]
    mixed = (1 - strengths) + strengths * classes
    greys = np.linspace(0, 1, 16)[:, None].repeat(3, 1)
    image = Image.new("P", (1, 1))
    image.putpalette((255 * np.concatenate([greys, mixed.reshape(-1, 3)])).round().astype(int).ravel().tolist())
    return image
