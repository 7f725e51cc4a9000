"""Dataset distillation on a plane: two points that teach logistic regression, to look at, to drag, and as a film.

The first lesson writes the idea out in its own cells.  Here stands what it shows: figures (:func:`fans`, :func:`paths`),
:class:`Plane`, a widget whose points follow the mouse, and the film, which is made by

    python notebooks/pictures/plane.py figures/00_plane.gif

The student has two weights θ and calls a point x class 1 where θ·x > 0, so its boundary is a line through the origin.  The
synthetic points are one per class.  Inner loop: T gradient steps on them.  Outer loss: the mean cross-entropy of the trained
students on real points.  After Maclaurin et al. (2015) and Wang et al. (2018).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import anywidget
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from distillkit.view.figures import ROLE_COLOURS, _figure, _Shown, style

CLASS_COLOURS = [to_hex(sns.color_palette("Dark2")[i]) for i in (0, 3)]  # class 0 green, class 1 pink
MARKERS = "o^"
LABELS = torch.tensor([0.0, 1.0], dtype=torch.float64)  # of the two synthetic points
STUDENTS = {"real": "student, untrained or on real points", "learned": "student on learned points"}  # lines of that role
SPREAD = 2.0  # standard deviation of the weights that a student starts from
EDGE = 4.0  # the plane is drawn from -EDGE to EDGE
MOST_STEPS, LEAST_STEP, LARGEST_STEP = 20, 0.1, 60.0
LONGEST_MOVE = 0.2  # of one followed arrow, and of the logarithm of the step size


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of two tilted, elongated classes, alternately of class 0 and class 1: (count, 2), and their labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % 2).double()
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.6, 0.35], dtype=torch.float64)
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    return noise @ turn + (2 * labels[:, None] - 1) * torch.tensor([0.0, 0.8], dtype=torch.float64), labels


def random_pairs(count: int, real: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Pairs of real points (count, 2, 2): one of class 0 and one of class 1, drawn at random."""
    rows = torch.randint(len(real) // 2, (count, 2), generator=torch.Generator().manual_seed(seed))
    return torch.stack([real[labels == 0][rows[:, 0]], real[labels == 1][rows[:, 1]]], dim=1)


def random_starts(count: int, seed: int) -> Tensor:
    """The weights (count, 2) that fresh students start from."""
    return SPREAD * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trajectory(weights: Tensor, points: Tensor, labels: Tensor, step_size: Tensor | float, steps: int) -> list[Tensor]:
    """The weights before the first step of gradient descent and after each of ``steps`` steps, all starts at once."""
    visited = [weights]
    for _ in range(steps):
        error = torch.sigmoid(weights @ points.mT) - labels
        weights = weights - step_size * error @ points / points.shape[-2]
        visited.append(weights)
    return visited


def loss(weights: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each student, (starts, 2) weights, on points with labels."""
    logits = weights @ points.mT
    return (F.softplus(logits) - labels * logits).mean(-1)


def accuracy(weights: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The share of the points that each student calls by their class."""
    return ((weights @ points.mT > 0) == (labels > 0)).double().mean(-1)


def meta_gradient(
    points: Tensor, step_size: float, starts: Tensor, real: Tensor, labels: Tensor, steps: int,
) -> tuple[float, Tensor, float]:
    """The outer loss, and its gradient with respect to the two points and to the logarithm of the step size."""
    points, log_step = points.clone().requires_grad_(), torch.tensor(math.log(step_size), dtype=points.dtype).requires_grad_()
    trained = trajectory(starts, points, LABELS, log_step.exp(), steps)[-1]
    outer = loss(trained, real, labels).mean()
    of_points, of_step = torch.autograd.grad(outer, (points, log_step))
    return outer.item(), of_points, of_step.item()


# Figures


def _draw_real(axes, real: Tensor, labels: Tensor) -> None:
    for number, (colour, marker) in enumerate(zip(CLASS_COLOURS, MARKERS)):
        x, y = real[labels == number].T
        axes.plot(x, y, marker, color=colour, ms=4, alpha=0.45, mew=0, label=f"real, class {number}")


def _draw_points(axes, points: Tensor, role: str, name: str = "") -> None:
    for number, (point, colour, marker) in enumerate(zip(points, CLASS_COLOURS, MARKERS)):
        axes.plot(*point[:, None], marker, color=colour, ms=14, mec=ROLE_COLOURS[role], mew=3, zorder=5,
                  label=f"{name or f'{role} point'}, class {number}")


def _lines(weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The boundaries θ·x = 0 as one line that is broken between them."""
    along = torch.stack([-weights[:, 1], weights[:, 0]], 1) / weights.norm(dim=1, keepdim=True)
    ends = torch.stack([-20 * along, 20 * along, torch.full_like(along, math.nan)], 1)
    return ends[..., 0].flatten().numpy(), ends[..., 1].flatten().numpy()


def _sides(weights: Tensor, at: float = 3.3, size: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """A tick on each boundary, as far from the origin as ``at``, on the side of class 1 (θ·x > 0)."""
    across = weights / weights.norm(dim=1, keepdim=True)
    along = torch.stack([-across[:, 1], across[:, 0]], 1)
    ends = torch.stack([at * along, at * along + size * across, torch.full_like(along, math.nan)], 1)
    return ends[..., 0].flatten().numpy(), ends[..., 1].flatten().numpy()


def _set_plane(axes, title: str, edge: float = EDGE) -> None:
    axes.set(title=title, xlabel="first coordinate", ylabel="second coordinate", xlim=(-edge, edge), ylim=(-edge, edge),
             aspect="equal")
    axes.grid(False)


def _legend(figure: Figure, handles: dict, columns: int) -> None:
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)


@style()
def fans(panels: Sequence[tuple[str, Tensor, Tensor | None, str]], real: Tensor, labels: Tensor, full: Tensor,
         edge: float = EDGE) -> Figure:
    """Real points and the boundaries of several students, a panel for each way to train them.

    Args:
        panels: title, weights (starts, 2), the two points the students were trained on (None: not drawn), and the role whose
            colour the boundaries have.
        real, labels: the real points.
        full: the weights (2,) that training on all real points leads to.
        edge: the plane is drawn from -edge to edge.
    """
    figure, axes = _figure(max(3.8 * len(panels), 6.0), 5.2 if len(panels) > 1 else 6.4, len(panels))
    for where, (title, weights, points, role) in zip(axes, panels, strict=True):
        _draw_real(where, real, labels)
        where.plot(*_lines(weights), color=ROLE_COLOURS[role], lw=1.3, alpha=0.75, label=STUDENTS[role])
        where.plot(*_sides(weights), color=ROLE_COLOURS[role], lw=2.4, label="_side")
        where.plot(*_lines(full[None]), color=ROLE_COLOURS["full"], lw=3.5, ls="--", zorder=1.9,
                   label="all real points, many steps")
        if points is not None:
            _draw_points(where, points, role)
        _set_plane(where, title, edge)
        where.title.set_fontsize(12)
    handles = {line.get_label(): line for where in axes for line in where.lines if line.get_label() != "_side"}
    _legend(figure, handles, 3 if len(panels) > 1 else 2)
    return figure


@style()
def paths(panels: Sequence[tuple[str, Sequence[Tensor], str]], real: Tensor, labels: Tensor, full: Tensor) -> Figure:
    """The plane of the weights: where students are before and after each step, over level lines of the loss on real points.

    Args:
        panels: title, the weights (starts, 2) that :func:`trajectory` returns, the role that colours the paths, and the two
            points (2, 2), for arrows in a corner that show where each of them pushes the weights.
        real, labels: the real points, whose loss the level lines show.
        full: the weights (2,) that training on all real points leads to.
    """
    edge = 1.5 * float(full.abs().max())
    axis = torch.linspace(-edge, edge, 81, dtype=real.dtype)
    grid = torch.cartesian_prod(axis, axis)
    levels = loss(grid, real, labels).reshape(81, 81).T.numpy()
    figure, axes = _figure(4.6 * len(panels), 6.5, len(panels))
    handles = {"random start": Line2D([], [], marker="o", ls="", color="white", mec="black", ms=7)}
    for where, (title, visited, role, *points) in zip(axes, panels, strict=True):
        where.contour(axis, axis, levels, levels=[0.14, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4], colors="0.8", linewidths=0.9)
        for x, y in torch.stack(list(visited), 1).mT:
            handles[f"steps on {role} points"], = where.plot(x, y, ".-", color=ROLE_COLOURS[role], lw=1.1, ms=7, label="_path")
        where.plot(*visited[0].T, "o", color="white", mec="black", ms=7, label="random start")
        ends, = where.plot(*visited[-1].T, "o", color=ROLE_COLOURS[role], ms=8, label=f"after {len(visited) - 1} steps")
        handles[f"{ends.get_label()} on {role} points"] = ends
        handles["all real points, many steps"], = where.plot(
            *full[:, None], "*", color=ROLE_COLOURS["full"], ms=16, label="all real points, many steps")
        for label, point in enumerate(points[0] if points else []):
            push = (point if label else -point) / point.norm() * edge / 4
            arrow = {"arrowstyle": "-|>", "color": CLASS_COLOURS[label], "lw": 2.5, "shrinkA": 0, "shrinkB": 0}
            where.annotate("", xy=(push - 0.66 * edge).tolist(), xytext=(-0.66 * edge, -0.66 * edge), arrowprops=arrow)
            handles[f"direction in which point {label} pushes"] = Line2D([], [], color=CLASS_COLOURS[label], lw=2.5)
        where.set(title=title, xlabel="first weight $w_1$", ylabel="second weight $w_2$", xlim=(-edge, edge),
                  ylim=(-edge, edge), aspect="equal")
        where.title.set_fontsize(12)
        where.grid(False)
    handles["level line of the loss on real points"] = Line2D([], [], color="0.8", lw=0.9)
    _legend(figure, handles, 2)
    return figure


# The widget


class Plane(anywidget.AnyWidget):
    """Two synthetic points to drag: the boundaries they teach, the outer loss, and the arrows against its gradient.

    The numbers are computed here, the front end (``plane.js``) draws them: ``state`` has ``loss``, ``accuracy``, the trained
    weights ``fan`` of the first students, ``gradient`` (two arrows) and ``step_gradient``.  Setting ``points``, ``step_size``
    or ``steps``, in Python or by hand, computes it again.

    Args:
        points: the two points (2, 2), class 0 first.
        real, labels: the real points of the outer loss.
        step_size, steps: of the inner loop.
        starts: the weights (count, 2) that students start from; the same ones for every position, so that a change of the
            loss comes from the points.
    """

    _esm = Path(__file__).with_name("plane.js").read_text(encoding="utf-8")
    points = traitlets.List().tag(sync=True)
    step_size = traitlets.Float(1.0).tag(sync=True)
    steps = traitlets.Int(5).tag(sync=True)
    real = traitlets.List().tag(sync=True)
    looks = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, points, real: Tensor, labels: Tensor, *, step_size: float = 5.0, steps: int = 5,
                 starts: Tensor | None = None):
        self._real, self._labels = real.double(), labels.double()
        self._starts = random_starts(32, seed=0) if starts is None else starts.double()
        super().__init__(
            points=torch.as_tensor(points).tolist(), step_size=step_size, steps=steps,
            real=[[*map(float, row), int(label)] for row, label in zip(real, labels)],
            looks={"classes": CLASS_COLOURS, "line": ROLE_COLOURS["learned"], "edge": EDGE, "steps": MOST_STEPS,
                   "step_size": [LEAST_STEP, LARGEST_STEP]},
        )
        self._first = (self.points, self.step_size)
        self.observe(self._compute, ["points", "step_size", "steps"])
        self.on_msg(self._answer)
        self._compute()

    def __repr__(self) -> str:
        return "Plane: two points to drag (in a notebook with a running kernel)"

    @traitlets.validate("points")
    def _valid_points(self, proposal):
        points = np.asarray(proposal["value"], dtype=float)
        if points.shape != (2, 2) or not np.isfinite(points).all():
            raise traitlets.TraitError(f"points must be two pairs of finite numbers, not {proposal['value']!r}")
        return points.clip(-EDGE, EDGE).tolist()

    @traitlets.validate("step_size")
    def _valid_step_size(self, proposal):
        if not math.isfinite(proposal["value"]):
            raise traitlets.TraitError(f"step_size must be finite, not {proposal['value']!r}")
        return min(max(proposal["value"], LEAST_STEP), LARGEST_STEP)

    @traitlets.validate("steps")
    def _valid_steps(self, proposal):
        return min(max(proposal["value"], 1), MOST_STEPS)

    def _compute(self, _=None) -> None:
        points = torch.tensor(self.points, dtype=torch.float64)
        outer, arrows, of_step = meta_gradient(points, self.step_size, self._starts, self._real, self._labels, self.steps)
        trained = trajectory(self._starts, points, LABELS, self.step_size, self.steps)[-1]
        self.state = {
            "loss": outer, "accuracy": accuracy(trained, self._real, self._labels).mean().item(),
            "fan": trained[:12].tolist(), "gradient": arrows.tolist(), "step_gradient": of_step,
        }

    @style()
    def figure(self, full: Tensor | None = None) -> Figure:
        """What the widget shows now, on paper; with the boundary of the weights ``full`` (2,), where they are given."""
        figure, (axes,) = _figure(6.0, 6.4)
        _draw_real(axes, self._real, self._labels)
        axes.plot(*_lines(torch.tensor(self.state["fan"], dtype=torch.float64)), color=ROLE_COLOURS["learned"], lw=1.4,
                  label="students after training")
        if full is not None:
            axes.plot(*_lines(full[None]), color=ROLE_COLOURS["full"], lw=2.5, ls="--", label="all real points, many steps")
        for (x, y), gradient in zip(self.points, self.state["gradient"]):
            ahead = [-1.2 * part / max(math.hypot(*gradient), 1e-12) for part in gradient]
            axes.annotate("", (x + ahead[0], y + ahead[1]), (x, y), arrowprops={"width": 3, "headwidth": 11, "color": "black"})
        _draw_points(axes, torch.tensor(self.points), "learned", "point to move")
        first = f"Step size {self.step_size:g}, {self.steps} steps, outer loss {self.state['loss']:.2f}:"
        _set_plane(axes, f"{first}\nthe arrows turn the fan towards the line between the clouds")
        axes.title.set_fontsize(12)
        handles = {line.get_label(): line for line in axes.lines}
        handles["against the meta-gradient"] = Line2D([], [], color="black", marker=">", lw=3, ms=9)
        _legend(figure, handles, 2)
        return figure

    def follow(self, times: int = 1, rate: float = 0.3) -> None:
        """Move the points and the step size against the meta-gradient: plain gradient descent, in short steps."""
        for _ in range(times):
            move = -rate * torch.tensor(self.state["gradient"], dtype=torch.float64)
            move *= (LONGEST_MOVE / move.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            longer = min(max(-rate * self.state["step_gradient"], -LONGEST_MOVE), LONGEST_MOVE)
            self._move((torch.tensor(self.points, dtype=torch.float64) + move).tolist(), self.step_size * math.exp(longer))

    def _move(self, points, step_size: float) -> None:
        """Set both, and compute once."""
        self.unobserve(self._compute, ["points", "step_size", "steps"])
        try:
            self.points, self.step_size = points, step_size
        finally:
            self.observe(self._compute, ["points", "step_size", "steps"])
        self._compute()

    def _answer(self, _, content, buffers) -> None:
        if content.get("ask") == "follow":
            self.follow(25 if content.get("times") == 25 else 1)
        elif content.get("ask") == "again":
            self._move(*self._first)


# The film


def distil(
    points: Tensor, real: Tensor, labels: Tensor, *, step_size: float = 5.0, steps: int = 5, starts: int = 16, seed: int = 0,
) -> Iterator[tuple[Tensor, float]]:
    """The points and the step size before every outer step, without end: Adam, and fresh random starts each time."""
    generator = torch.Generator().manual_seed(seed)
    points, log_step = points.clone().requires_grad_(), torch.tensor(math.log(step_size), dtype=points.dtype).requires_grad_()
    adam = torch.optim.Adam([points, log_step], lr=0.05)
    while True:
        yield points.detach().clone(), log_step.exp().item()
        fresh = SPREAD * torch.randn(starts, 2, generator=generator, dtype=points.dtype)
        outer = loss(trajectory(fresh, points, LABELS, log_step.exp(), steps)[-1], real, labels).mean()
        adam.zero_grad()
        outer.backward()
        adam.step()


@style()
def _frame(number: int, trail: Sequence[Tensor], losses: Sequence[float], trained: Tensor, real: Tensor, labels: Tensor,
           full: Tensor, last: int, best: float) -> Image.Image:
    figure = _Shown(figsize=(5.6, 7.4), dpi=100)
    plane, curve = figure.subplots(2, 1, height_ratios=(3, 1))
    _draw_real(plane, real, labels)
    plane.plot(*_lines(trained), color=ROLE_COLOURS["learned"], lw=1.3, alpha=0.8)
    plane.plot(*_lines(full[None]), color=ROLE_COLOURS["full"], lw=2.5, ls="--")
    for of_class, colour in zip(torch.stack(list(trail), 1), CLASS_COLOURS):
        plane.plot(*of_class.T, color=colour, lw=2)
    _draw_points(plane, trail[-1], "learned")
    _set_plane(plane, f"outer step {number}: {len(trained)} students, 5 steps each, on two points")
    plane.title.set_fontsize(12)
    curve.plot(range(len(losses)), losses, color=ROLE_COLOURS["learned"], lw=2)
    curve.plot(number, losses[-1], "o", color=ROLE_COLOURS["learned"], ms=7)
    curve.axhline(best, color=ROLE_COLOURS["full"], lw=1.5, ls="--")
    curve.set(xlabel="outer step", ylabel="outer loss", xlim=(-0.02 * last, 1.02 * last), ylim=(0, 1.05 * losses[0]))
    figure.subplots_adjust(0.13, 0.08, 0.97, 0.95, hspace=0.27)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def film(path: str | Path, last: int = 400, seed: int = 0) -> Path:
    """Write a GIF of two points that learn to teach: the plane with twelve students' boundaries, the outer loss below."""
    (real, labels), starts = clouds(400, seed=0), random_starts(12, seed=1)
    full = trajectory(torch.zeros(2, dtype=torch.float64), real, labels, 5.0, 3000)[-1]
    first = random_pairs(1, real, labels, seed=5)[0]
    shown = sorted({*range(20), *range(20, 60, 2), *range(60, 150, 5), *range(150, last + 1, 25)})
    trail, losses, frames = [], [], []
    for number, (points, step_size) in zip(range(last + 1), distil(first, real, labels, seed=seed)):
        trained = trajectory(starts, points, LABELS, step_size, 5)[-1]
        trail.append(points)
        losses.append(loss(trained, real, labels).mean().item())
        if number in shown:
            best = loss(full, real, labels).item()
            frames.append(_frame(number, trail, losses, trained, real, labels, full, last, best))
    palette = frames[-1].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pauses = [1200] + [110] * (len(frames) - 2) + [3000]
    path = Path(path)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses, loop=0, optimize=True)
    return path


if __name__ == "__main__":
    print(film(*sys.argv[1:2]))
