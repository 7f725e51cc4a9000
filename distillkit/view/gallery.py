"""Every figure of the project, drawn anew from the results it stands on: ``python -m distillkit figures``.

A figure in a file is only worth looking at while it shows the committed result, so none is drawn by hand.  Where a result is
not there, or none of its rows has run, its figure is left out and said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.figure import Figure

from distillkit.experiments.results import read
from distillkit.view import figures as plots


def _text(result: dict) -> Figure:
    return plots.seeded(result, f"Ways to text, one example per class: {result['config']['corpus']}")


# File → the result it is drawn from, and how.
FIGURES: dict[str, tuple[str, Callable[[dict], Figure]]] = {
    "quickstart": ("quickstart", plots.quickstart),
    "classification_docstrings": ("classification_docstrings", plots.scores),
    "classification_rotten_tomatoes": ("classification_rotten_tomatoes", plots.scores),
    "classification_ag_news": ("classification_ag_news", plots.scores),
    "instruction_library": ("instruction_library", lambda result: plots.seeded(result, "Which library?")),
    "instruction_library_differences": ("instruction_library", plots.differences),
    "instruction_library_words": ("instruction_library_words", lambda result: plots.seeded(result, "Text at a larger rate")),
    "instruction_function": ("instruction_function", lambda result: plots.seeded(result, "Which function?")),
    "instruction_arc_easy": ("instruction_arc_easy", lambda result: plots.seeded(result, "ARC-Easy")),
    "text_docstrings": ("text_docstrings", _text),
    "text_rotten_tomatoes": ("text_rotten_tomatoes", _text),
    "text_ag_news": ("text_ag_news", _text),
    "text_sizes": ("text_sizes", plots.seeded_grid),
    "transfer_docstrings": ("transfer_docstrings", plots.transfer_map),
    "transfer_ten_docstrings": ("transfer_ten_docstrings", plots.transfer_map),
    "transfer_encoders": ("transfer_encoders", plots.transfer_map),
    "transfer_origin_docstrings": ("transfer_origin_docstrings", plots.transfer_map),
    "transfer_library": ("transfer_library", plots.transfer_map),
    "metagrad": ("metagrad", plots.metagrad_cost),
}


def regenerate(results: Path, folder: Path) -> Iterator[str]:
    """Draw every figure of which there is a result into ``folder``; yields a line for each: where it is, or why it is not.

    Args:
        results: the folder of results.
        folder: where the figures go.
    """
    for name, (source, draw) in FIGURES.items():
        path = Path(results) / f"{source}.json"
        if not path.is_file():
            yield f"{name}: skipped, no result {path}"
            continue
        result = read(path)
        if not (result.get("scores") or result.get("entries")):
            yield f"{name}: skipped, nothing in {path} has run"
            continue
        yield f"{name}: {plots.save(draw(result), Path(folder) / f'{name}.png')}"
