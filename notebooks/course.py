"""The course in other forms, for a lecturer: without its answers, and as slides.

    python notebooks/course.py student             # course/: every lesson without answers and outputs
    python notebooks/course.py slides [NAME ...]   # course/NAME.slides.html, shown with any browser

Everything goes into course/ beside notebooks/, so that links and results are found from there. A lesson that a student has
changed is left alone; --fresh writes it again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from refresh import COLLAPSED, FOLDER, find, read, render

ANSWER = re.compile(r"<details>\s*<summary>Answer.*?</details>", re.DOTALL)
INSTEAD = "*Your answer:*"


def without_answers(notebook: nbformat.NotebookNode) -> None:
    """Leave every answer out, and every output, which would give the guesses away."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = ANSWER.sub(INSTEAD, cell.source)
        else:
            cell.outputs, cell.execution_count = [], None


def write_student(paths: list[Path], into: Path, fresh: bool = False) -> list[str]:
    """Write lessons without answers, the glossary, and what lessons import; returns a line for each lesson."""
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDER / "GLOSSARY.md", into)
    shutil.copytree(FOLDER / "pictures", into / "pictures", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    lines = []
    for path in paths:
        target = into / path.name
        if target.exists() and not fresh:
            lines.append(f"{path.stem}: there already, left alone")
            continue
        notebook = read(path)
        without_answers(notebook)
        target.write_text(render(notebook), encoding="utf-8")
        lines.append(f"{path.stem}: {target.parent.name}/{target.name}")
    return lines


def write_slides(paths: list[Path], into: Path) -> list[str]:
    """Write lessons as slides, a slide for each section; checks are left out, the code of set-up cells is hidden."""
    into.mkdir(parents=True, exist_ok=True)
    exporter = SlidesExporter(exclude_output_prompt=True, exclude_input_prompt=True)
    tags = TagRemovePreprocessor(remove_cell_tags={"check"}, remove_input_tags=COLLAPSED, enabled=True)
    exporter.register_preprocessor(tags, enabled=True)
    lines = []
    for path in paths:
        notebook = read(path)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = ANSWER.sub("", cell.source)
        target = into / f"{path.stem}.slides.html"
        target.write_text(exporter.from_notebook_node(notebook)[0], encoding="utf-8")
        lines.append(f"{path.stem}: {target.parent.name}/{target.name}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("form", choices=("student", "slides"))
    parser.add_argument("names", nargs="*", help="lessons (default: all)")
    parser.add_argument("--fresh", action="store_true", help="write lessons again that are there already")
    parser.add_argument("--into", type=Path, default=FOLDER.parent / "course", metavar="DIR", help="default: course")
    options = parser.parse_args(arguments)
    paths = find(options.names)
    lines = write_slides(paths, options.into) if options.form == "slides" else write_student(paths, options.into, options.fresh)
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
