"""The course in other forms, for a lecturer: without its answers, with their code executed, and as slides.

    python notebooks/course.py student             # course/: every lesson without answers and outputs
    python notebooks/course.py answers [NAME ...]  # course/NAME.answers.ipynb: executed, with the code of its answers behind it
    python notebooks/course.py slides [NAME ...]   # course/NAME.slides.html, shown with any browser
    python notebooks/course.py handout             # course/10_handout.html: the paper of lesson 10, to print

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
from nbconvert import HTMLExporter, SlidesExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from pictures import paper, reviewing
from refresh import COLLAPSED, FAILURES, FOLDER, environment, execute, find, read, render

ANSWER = re.compile(r"<details>\s*<summary>Answer.*?</details>", re.DOTALL)
INSTEAD = "*Your answer:*"
# The code of what is folded away; a fragment, marked so, is to be put into a cell and does not run alone.
FOLDED, CODE = re.compile(r"<details>.*?</details>", re.DOTALL), re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TERMS = """**Terms.** *Set*: the examples made by one run of a method. *Initialisation*: the start of a student that is
trained on them. *k-centre*, *herding*: rules that pick real sentences by their place among all sentences. *Chosen
sentences*: real sentences that a search picked by the loss of a small model. *Fixed*, *tuned*, *own*, *standard*: recipes
of training. *Instruction pair*: a question and its answer. *LESS*: picks pairs by the direction of their gradients. *Full
data*: the same student trained on all rows."""


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


def answers(notebook: nbformat.NotebookNode) -> list[str]:
    """The code of a lesson's answers, in order; fragments are left out."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [code for text in texts for folded in FOLDED.findall(text) for code in CODE.findall(folded)]


def write_answers(paths: list[Path], into: Path) -> list[str]:
    """Execute lessons with the code of their answers behind them, and write them where all of it ran."""
    into.mkdir(parents=True, exist_ok=True)
    lines = []
    for path in paths:
        notebook = read(path)
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in answers(notebook)]
        try:
            execute(notebook, environment(), path.parent)
        except FAILURES as error:
            raise SystemExit(f"{path.stem}: an answer or the lesson itself fails\n{error}") from None
        target = into / f"{path.stem}.answers.ipynb"
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


def write_handout(into: Path) -> list[str]:
    """Write the paper of lesson 10 for printing: the paper with its terms, the objections to judge, and the verdicts."""
    into.mkdir(parents=True, exist_ok=True)
    judged = reviewing.SUSPICIONS.items()
    to_judge = "\n".join(f"| {letter} | {objection.text} | | |" for letter, objection in judged)
    verdicts = "\n".join(f"* **{letter}** {'a mistake' if objection.holds else 'no mistake'}: {objection.reason}"
                         for letter, objection in judged)
    pages = [f"{paper.text(FOLDER.parent / 'figures' / 'results')}\n{TERMS}",
             f"### Fifteen objections\n\n{reviewing.PLANTED} of them hold. Which?\n\n"
             f"| | objection | holds? | because |\n|---|---|---|---|\n{to_judge}",
             f"### For the lecturer: the verdicts\n\n{verdicts}"]
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell(f"<div style='break-before: page'></div>\n\n{page}") for page in pages])
    target = into / "10_handout.html"
    target.write_text(HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": "Handout"}})[0], encoding="utf-8")
    return [f"handout: {target.parent.name}/{target.name}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("form", choices=("student", "answers", "slides", "handout"))
    parser.add_argument("names", nargs="*", help="lessons (default: all)")
    parser.add_argument("--fresh", action="store_true", help="write lessons again that are there already")
    parser.add_argument("--into", type=Path, default=FOLDER.parent / "course", metavar="DIR", help="default: course")
    options = parser.parse_args(arguments)
    paths = find(options.names)
    if options.form == "handout":
        lines = write_handout(options.into)
    elif options.form == "answers":
        lines = write_answers(paths, options.into)
    elif options.form == "slides":
        lines = write_slides(paths, options.into)
    else:
        lines = write_student(paths, options.into, options.fresh)
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
