"""The cell of a token, cut by a plane, and the point that was learned inside it.

A table of v rows in d dimensions divides the space into v cells: a point belongs to the row that it is nearest to.  A plane
through one token, along the way that was learned, cuts these cells.  With coordinates p in the plane, the squared distance to
row i is |p − s_i|² + h_i², where s_i is the row's shadow in the plane and h_i its height above it.  So the cut says
which cell each of its points belongs to, although nearly all rows lie outside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from distillkit.io.checks import require
from distillkit.text.projection import nearest_tokens
from distillkit.view.figures import ROLE_COLOURS, _figure, style
from distillkit.view.set_figures import drawn

COARSE, FINE = (60, 36), (720, 432)  # points of the cut across and up: to find the cells, and to draw them
LEAST = 0.03  # share of the cut that a cell needs to be named


def exits(origins: Tensor, moved: Tensor, tokens: Tensor, table: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """How far each of n points can go before another token is nearer than the one it starts from.

    From row u along the unit vector r, row w is as near as u at ‖w − u‖² / 2⟨w − u, r⟩.

    Args:
        origins: the rows where the points start, ``[n, d]``.
        moved: their ways ``[n, d]``; only the directions count.
        tokens: the tokens of ``origins``, ``[n]``.
        table: the embedding table ``[v, d]``.
        allowed: which tokens have a cell, ``[v]`` bool.

    Returns:
        distances ``[n]``, infinite where no cell follows, and the tokens ``[n]`` whose cells follow.
    """
    unit = torch.nn.functional.normalize(moved, dim=1)
    along = unit @ table.T - (unit * origins).sum(1, keepdim=True)
    squared = origins.square().sum(1, keepdim=True) - 2 * origins @ table.T + table.square().sum(1)
    walls = torch.where((along > 0) & allowed, squared / (2 * along), torch.inf)
    walls[torch.arange(len(tokens)), tokens] = torch.inf
    distances, following = walls.min(1)
    return distances, following


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """A plane through a token, as :func:`cut` gives it.

    Its ``origin [d]`` and unit vectors ``axes [2, d]``; the ``token`` at the origin, and the one whose cell ``follows``; how
    far the point has ``moved`` along the first axis, and where it ``leaves`` the cell; ``extent`` (left, right, bottom, top),
    and the nearest tokens ``cells [up, across]``.
    """

    origin: Tensor
    axes: Tensor
    token: int
    follows: int
    moved: float
    leaves: float
    extent: tuple[float, float, float, float]
    cells: np.ndarray
    table: Tensor
    allowed: Tensor


def cut(origin: Tensor, moved: Tensor, token: int, table: Tensor, allowed: Tensor) -> Cut:
    """The plane through a token, along the way of a learned point and through the row whose cell comes next on that way.

    Args:
        origin, moved, token, table, allowed: as :func:`exits` takes them, for one point.

    Raises:
        ValueError: the point has not moved, or no other cell lies that way.
    """
    leaves, follows = (value[0] for value in exits(origin[None], moved[None], torch.tensor([token]), table, allowed))
    length = float(moved.norm())
    require(length > 0 and bool(leaves.isfinite()), "the point has not moved towards any other cell, so no plane is given")
    first = moved / length
    second = table[follows] - origin
    second = torch.nn.functional.normalize(second - (second @ first) * first, dim=0)
    axes = torch.stack([first, second])
    right = 1.45 * max(length, float(leaves))
    extent = (-0.45 * right, right, -0.42 * right, 0.42 * right)
    # |p − s|² + h² = |p|² − 2⟨p, s⟩ + |row − origin|², of which |p|² is the same for every row.
    shadows, squared = (table - origin) @ axes.T, (table - origin).square().sum(1)
    present = _nearest(extent, COARSE, shadows, torch.where(allowed, squared, torch.inf)).unique()
    cells = present[_nearest(extent, FINE, shadows[present], squared[present])]
    return Cut(origin, axes, token, int(follows), length, float(leaves), extent, cells.numpy(), table, allowed)


def _nearest(extent, size: tuple[int, int], shadows: Tensor, squared: Tensor) -> Tensor:
    """Of a grid of points in the plane, the row that each is nearest to, ``[up, across]``."""
    x, y = (np.linspace(*ends, count) for ends, count in zip((extent[:2], extent[2:]), size, strict=True))
    points = torch.tensor(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)).to(shadows)
    rows = [torch.addmm(squared, part, shadows.T, alpha=-2).argmin(1) for part in points.split(2000)]
    return torch.cat(rows).reshape(len(y), len(x))


@style()
def cut_figure(plane: Cut, distance: float, word: Callable[[int], str]) -> Figure:
    """The cut of the cells with the point at ``distance`` on its way; the title says how far it is from the nearest word.

    Args:
        plane: as :func:`cut` returns it.
        distance: from the origin.
        word: the string of a token.
    """
    point = (plane.origin + distance * plane.axes[0])[None]
    token, gap = (float(value) for value in nearest_tokens(point, plane.table, allowed=plane.allowed))
    figure, (axes,) = _figure(7.2, 4.2)
    _draw_cells(axes, plane, word)
    axes.plot([0, plane.moved], [0, 0], color=ROLE_COLOURS["learned"], lw=2.5, label="what was learned")
    axes.plot(distance, 0, "o", color=ROLE_COLOURS["learned"], mec="white", mew=1.5, ms=13, label="the point")
    if distance > 0.15 * plane.extent[1]:  # else it would stand on the word
        axes.annotate("the point", (distance, 0), xytext=(0, -20), textcoords="offset points", ha="center", fontsize=11,
                      color=ROLE_COLOURS["learned"])
    axes.plot(plane.leaves, 0, "|", color="0.15", ms=16, mew=2, label="the wall")
    axes.annotate("the wall", (plane.leaves, 0), xytext=(7, 11), textcoords="offset points", fontsize=11)
    inside = int(token) == plane.token
    axes.set(title=f"{gap:.1f} from '{drawn(word(int(token)))}', " + ("and still in its cell" if inside else "past the wall"),
             xlabel="along the learned direction (units of the table)", ylabel="in the plane, towards\nthe row behind the wall")
    return figure


def _draw_cells(axes, plane: Cut, word: Callable[[int], str]) -> None:
    """The cells of a cut as areas with dark walls, the large ones with their words."""
    tokens, index, sizes = np.unique(plane.cells, return_inverse=True, return_counts=True)
    index = index.reshape(plane.cells.shape)
    special = {plane.token: "#cfe3f0", plane.follows: "#f8e3c0"}
    fills = np.array([to_rgb(special.get(int(token), ("0.97", "0.9")[n % 2])) for n, token in enumerate(tokens)])
    walls = np.zeros(index.shape, bool)
    walls[1:] |= index[1:] != index[:-1]
    walls[:, 1:] |= index[:, 1:] != index[:, :-1]
    axes.imshow(np.where(walls[..., None], 0.3, fills[index]), extent=plane.extent, origin="lower", aspect="auto", zorder=0)
    left, right, bottom, top = plane.extent
    for n, token in enumerate(tokens.tolist()):
        if sizes[n] > LEAST * index.size and token not in special:
            y, x = (place.mean() / size for place, size in zip(np.nonzero(index == n), index.shape, strict=True))
            x, y = left + x * (right - left), bottom + y * (top - bottom)
            y -= 0.06 * (top - bottom) * (abs(y) < 0.06 * (top - bottom))  # off the way of the point
            axes.text(x, y, drawn(word(token)), ha="center", va="center", fontsize=11, weight="bold")
    place = (plane.table[plane.follows] - plane.origin) @ plane.axes.T
    for token, dot in zip(special, ((0, 0), place.tolist()), strict=True):
        axes.annotate(drawn(word(token)), dot, xytext=(0, -17), textcoords="offset points", ha="center", fontsize=11,
                      weight="bold")
    axes.plot(0, 0, "o", color="0.15", ms=7)
    axes.plot(*place.tolist(), "o", color="0.15", ms=7, label="rows of the table")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.grid(False)
