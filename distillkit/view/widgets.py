"""A figure that follows its controls: the widget of the lessons.

What looks at a distilled set is :class:`~distillkit.view.lens.lens.Lens`.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping

import ipywidgets
from matplotlib.figure import Figure

from distillkit.io.escaping import LONGEST, one_line


def escaped(text: str, longest: int = LONGEST) -> str:
    """``text`` for HTML and SVG, on one line: mark-up stands for itself, and hidden characters are named."""
    return html.escape(one_line(text, longest))


class Explorer(ipywidgets.VBox):
    """Controls above a picture: what :func:`explore` returns.  ``picture.value`` is the PNG that is shown."""

    def __init__(self, draw: Callable[..., Figure], controls: Mapping[str, ipywidgets.Widget]):
        self.controls, self.picture, self.problem = dict(controls), ipywidgets.Image(format="png"), ipywidgets.HTML()
        self._draw_figure = draw
        for control in controls.values():
            control.observe(self.redraw, "value")
        super().__init__([ipywidgets.Box([*controls.values()], layout={"flex_flow": "row wrap"}), self.picture, self.problem])
        self.redraw()

    def __repr__(self) -> str:
        return f"Explorer({', '.join(self.controls)})"

    def redraw(self, _=None) -> None:
        """Draw the picture for the controls' values; where that fails, say why and leave the last picture."""
        try:
            figure = self._draw_figure(**{name: control.value for name, control in self.controls.items()})
        except Exception as error:  # a callback's traceback would be lost in the log of the front end
            self.problem.value = escaped(f"no picture for these values: {error}")
            return
        png = io.BytesIO()
        figure.savefig(png, format="png")
        self.picture.value, self.problem.value = png.getvalue(), ""


def explore(draw: Callable[..., Figure], **controls) -> Explorer:
    """Controls above a figure that is drawn again whenever one of them moves.

    Args:
        draw: from the values of the controls, by name, to a Figure; it should take less than a third of a second.
        controls: a widget each, or what stands for one as in ``ipywidgets.interact``: ``(lowest, highest)`` or
            ``(lowest, highest, step)`` for a slider, a list or dictionary of choices, True or False for a box to tick.

    Raises:
        ValueError: a control that is none of these.
    """
    made = {name: ipywidgets.interactive.widget_from_abbrev(control) for name, control in controls.items()}
    if wrong := [name for name, control in made.items() if control is None]:
        raise ValueError(f"no control can be made from {wrong[0]}={controls[wrong[0]]!r}; give a widget, a tuple or a list")
    for name, control in made.items():
        control.description = control.description or name.replace("_", " ")
    return Explorer(draw, made)
