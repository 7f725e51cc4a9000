"""The rules that every lesson of the course keeps: a function each, from a notebook (its JSON) to complaints.

nbval executes the lessons and compares what they print. These rules check what it lets through: a notebook without
outputs, cells that ran out of order, an output that can never be the same twice, a tag that excuses an error; and the shape
of a lesson, so that every one of them begins with a picture and ends with what to believe.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

SECTIONS = ("The picture", "The equation", "Ten lines from scratch", "Guess first", "The experiment", "Read the evidence",
            "Exercises", "What to believe", "References")
EXERCISES = ("Exercise 1 (read)", "Exercise 2 (change)", "Exercise 3 (build)")
OPENING = ("**Question.**", "**After this notebook you can**", "**You need**", "**Time.**", "**Terms**", "**Contents**")
COLLAPSED = {"check", "setup"}  # tags of cells whose source is hidden until a reader asks for it
LONGEST_CELL, LONGEST_TABLE = 15, 12  # lines in view
CHECKED_WITHIN = 4  # code cells below one whose output is not compared
UNREPEATABLE = {
    "clear_output",
    "update_display",
    "interact",
    "interactive",
    "interactive_output",
    "Output",
    "get_ipython",
}
EXCUSES = {"raises-exception", "nbval-raises-exception", "nbval-skip"}
COMPARABLE = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}
PRIVATE = re.compile(r"(?<![\w.~])/(?:home|Users|root|work|tmp|opt|usr|var|mnt|srv)/[\w.-]+|[A-Z]:\\+Users\\")
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")
PROGRESS_BAR = re.compile(r"\d+%\|.*\| \d+/\d+")  # tqdm's notebook bars ignore TQDM_DISABLE; disable= they obey


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[tuple[int, dict]]:
    """Return (number from 1, cell) of every code cell."""
    return list(enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), start=1))


def prose(notebook: dict) -> list[str]:
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def syntax(cell: dict) -> ast.Module:
    """Return the cell's syntax tree, an empty one where it is not Python (which `plain_python` complains about)."""
    try:
        return ast.parse(source(cell))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def called(node: ast.AST) -> str | None:
    """Return the last name of what is called: "sizes" for `dk.sizes(...)`; None for anything but a call."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "attr", None) or getattr(node.func, "id", None)


def checks(cell: dict) -> int:
    """Return how many assertions the cell makes: `assert` statements and claims."""
    return sum(isinstance(node, ast.Assert) or called(node) == "claim" for node in ast.walk(syntax(cell)))


def collapsed(cell: dict) -> bool:
    return bool(COLLAPSED & set(cell["metadata"].get("tags", ())))


def texts(output: dict) -> list[tuple[str, str]]:
    """Return (mime type or stream, text) of everything in an output that is not a picture."""
    if output["output_type"] == "stream":
        return [(output["name"], "".join(output["text"]))]
    return [(mime, "".join(text)) for mime, text in output.get("data", {}).items() if not mime.startswith("image/")]


# The rules. Each yields complaints; `name` is the file name without .ipynb.


def title_with_its_number(notebook, name):
    number = int(name[:2])
    first = notebook["cells"][0]
    if first["cell_type"] != "markdown" or not re.match(rf"# 0*{number}\b", source(first)):
        yield f"the first cell is not a title with its number, '# {number:02d} ...'"


def opening_says_what_to_expect(notebook, name):
    opening = source(notebook["cells"][0])
    for part in OPENING:
        if part not in opening:
            yield f"the first cell does not say {part}"
    for word in ("one core", "GPU", "](GLOSSARY.md", "](#"):
        if word not in opening:
            yield f"the first cell does not contain {word!r}: time on one core and on a GPU, glossary, contents with links"


def sizes_are_in_the_first_cell(notebook, name):
    cells = [cell for _, cell in code_cells(notebook) if not collapsed(cell)]
    calls = [(n, node) for n, cell in enumerate(cells) for node in ast.walk(syntax(cell)) if called(node) == "sizes"]
    loads = any(called(node) == "load_student" for cell in cells for node in ast.walk(syntax(cell)))
    if [number for number, _ in calls] != [0] and (calls or loads):
        yield f"{len(calls)} calls of sizes(), instead of one in the first code cell"
    for _, node in calls[:1]:
        for keyword in node.keywords:
            for value, local in zip(ast.literal_eval(keyword.value), (True, False), strict=True):
                start = {"corpus": "docstrings", "student": "offline:"}.get(keyword.arg)
                if start and value.startswith(start) != local:
                    yield f"the cpu column must work without a network, the gpu column needs hub names: {keyword.arg} {value!r}"


def sections_are_in_order(notebook, name):
    headings = [line[3:] for text in prose(notebook) for line in text.splitlines() if line.startswith("## ")]
    if len(headings) != len(SECTIONS) or not all(map(str.startswith, headings, SECTIONS)):
        yield f"the sections are {headings}; a lesson has {list(SECTIONS)}, in this order"


def begins_with_a_drawing(notebook, name):
    drawings = re.findall(r"!\[([^\]]*)\]\(\.\./figures/diagrams/[\w.]+\.svg\)", "\n".join(prose(notebook)))
    if not drawings or min(map(len, drawings)) < 20:
        yield "no drawing of figures/diagrams/*.svg with a text that says what it shows"


def every_exercise_has_an_answer(notebook, name):
    text = "\n".join(prose(notebook))
    for exercise in EXERCISES:
        _, _, behind = text.partition(f"### {exercise}")
        if not re.search(r"<details>\s*<summary>Answer", re.split(r"^##", behind, flags=re.MULTILINE)[0]):
            yield f"'### {exercise}' is missing, or has no answer in <details><summary>Answer…"
    if text.count("<details>") != text.count("</details>"):
        yield "<details> without its end"


def cells_are_short(notebook, name):
    for number, cell in code_cells(notebook):
        lines = len(source(cell).splitlines())
        if lines > LONGEST_CELL and not collapsed(cell):
            yield f"code cell {number} has {lines} lines; {LONGEST_CELL} is the most in view"


def checks_are_collapsed(notebook, name):
    for number, cell in code_cells(notebook):
        if checks(cell) and "check" not in cell["metadata"].get("tags", ()):
            yield f"code cell {number} asserts something in the reader's way: put it into a cell tagged check"
        if collapsed(cell) and not cell["metadata"].get("jupyter", {}).get("source_hidden"):
            yield f"code cell {number} is tagged check or setup, but its source is in view: run notebooks/refresh.py"


def figures_are_titled_and_described(notebook, name):
    for number, cell in code_cells(notebook):
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        described = "".join(text for output in cell["outputs"] for _, text in texts(output))
        if pictures and "panel 1:" not in described:
            yield f"code cell {number} shows a figure without printing describe(figure)"
        if "untitled" in described:
            yield f"code cell {number} shows a panel without a title"


def tables_fit_into_view(notebook, name):
    outputs = [output for _, cell in code_cells(notebook) for output in cell["outputs"]]
    shown = [text for output in outputs for kind, text in texts(output) if kind == "text/markdown"]
    for text in prose(notebook) + shown:
        in_view = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
        longest = max((len(rows.split("\n")) for rows in re.findall(r"(?:^\|.*\n?)+", in_view, re.MULTILINE)), default=0)
        if longest > LONGEST_TABLE + 3:
            yield f"a table of {longest} lines in view; {LONGEST_TABLE} rows are the most, the others belong into <details>"


def nothing_was_not_run(notebook, name):
    outputs = [text for _, cell in code_cells(notebook) for output in cell["outputs"] for _, text in texts(output)]
    if any("not run" in text.lower() for text in prose(notebook) + outputs):
        yield "'not run': what has not been measured is not shown"


def anchors_are_there(notebook, name):
    text = "\n".join(prose(notebook))
    headings = {heading.strip().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    glossary = (FOLDER / "GLOSSARY.md").read_text(encoding="utf-8")
    sections = {section.lower().replace(" ", "-") for section in re.findall(r"^## (.*)$", glossary, re.MULTILINE)}
    terms = {*re.findall(r'id="([^"]+)"', glossary), *sections}
    for file, anchor in re.findall(r"\]\((GLOSSARY\.md)?#([^)\s]+)\)", text):
        if anchor not in (terms if file else headings):
            yield f"a link to #{anchor}, which {file or 'this lesson'} does not have"


def links_lead_somewhere(notebook, name):
    targets = [target for text in prose(notebook) for target in re.findall(r"\]\(([^)#\s]+)", text)]
    for target in targets:
        if not re.match(r"[a-z]+:", target) and not (FOLDER / target).exists():
            yield f"a link to {target}, which is not there"
    later = [path.name for path in NOTEBOOKS if path.stem > name]
    if later and later[0] not in source(notebook["cells"][-1]):
        yield f"the last cell does not link to the next notebook, {later[0]}"


def at_least_three_assertions(notebook, name):
    count = sum(checks(cell) for _, cell in code_cells(notebook))
    if count < 3:
        yield f"{count} assertions; three is the least: an invariant, an oracle, the lesson's claim"


def ran_from_top_to_bottom(notebook, name):
    counts = [cell["execution_count"] for _, cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts {counts} instead of 1 to {len(counts)}: run notebooks/refresh.py"


def has_outputs(notebook, name):
    if not any(cell["outputs"] for _, cell in code_cells(notebook)):
        yield "no outputs: run notebooks/refresh.py"


def every_cell_shows_or_checks(notebook, name):
    for number, cell in code_cells(notebook):
        if not cell["outputs"] and not checks(cell) and not collapsed(cell):
            yield f"code cell {number} neither shows anything nor asserts anything"


def plain_python(notebook, name):
    for number, cell in code_cells(notebook):
        try:
            ast.parse(source(cell))
        except SyntaxError as error:
            yield f"code cell {number} is not plain Python (a magic, a shell command?): {error.text}"


def no_trailing_semicolon(notebook, name):
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.DEDENT}
    for number, cell in code_cells(notebook):
        if syntax(cell).body:
            tokens = [t for t in tokenize.generate_tokens(io.StringIO(source(cell)).readline) if t.type not in blank]
            if tokens[-1].string == ";":
                yield f"code cell {number} ends with a semicolon, which nbval ignores"


def nothing_unrepeatable_is_used(notebook, name):
    for number, cell in code_cells(notebook):
        for node in ast.walk(syntax(cell)):
            used = {getattr(node, attribute, None) for attribute in ("id", "attr", "name")} & UNREPEATABLE
            if used:
                yield f"code cell {number} uses {used.pop()}: its output can never be compared"


def nothing_is_excused(notebook, name):
    for number, cell in code_cells(notebook):
        comments = re.findall(r"^\s*#\s*((?:NBVAL|PYTEST)_\w+)\s*$", source(cell), re.MULTILINE)
        marks = {mark.lower().replace("_", "-") for mark in comments} | set(cell["metadata"].get("tags", ()))
        if marks & EXCUSES:
            yield f"code cell {number} is excused by {sorted(marks & EXCUSES)}"
        behind = [checks(later) for _, later in code_cells(notebook)[number - 1 : number + CHECKED_WITHIN]]
        if marks & {"nbval-ignore-output", "pytest-validate-ignore-output"} and not any(behind):
            yield f"code cell {number} is not compared, and no cell soon below it checks anything"


def outputs_are_comparable(notebook, name):
    for number, cell in code_cells(notebook):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                yield f"code cell {number} failed with {output['ename']}"
            if output.get("name") == "stderr":
                yield f"code cell {number} wrote to stderr: {''.join(output['text'])[:200]}"
            if set(output.get("data", {})) - COMPARABLE:
                yield f"code cell {number} shows {sorted(set(output['data']) - COMPARABLE)}"
            for kind, text in texts(output):
                if ADDRESS.search(text):
                    yield f"code cell {number} shows an object's address ({kind}): {ADDRESS.search(text)[0]}"
                if PROGRESS_BAR.search(text):
                    yield f"code cell {number} shows a progress bar: {PROGRESS_BAR.search(text)[0]}"


def no_absolute_path(notebook, name):
    cells = [(f"cell {n}", source(cell)) for n, cell in enumerate(notebook["cells"], start=1)]
    outputs = [(n, output) for n, cell in code_cells(notebook) for output in cell["outputs"]]
    visible = [(f"code cell {n}", text) for n, output in outputs for _, text in texts(output)]
    for place, text in cells + visible:
        if PRIVATE.search(text):
            yield f"{place} names a path of one machine: {PRIVATE.search(text)[0]}"


RULES = (
    title_with_its_number,
    opening_says_what_to_expect,
    sizes_are_in_the_first_cell,
    sections_are_in_order,
    begins_with_a_drawing,
    every_exercise_has_an_answer,
    cells_are_short,
    checks_are_collapsed,
    figures_are_titled_and_described,
    tables_fit_into_view,
    nothing_was_not_run,
    anchors_are_there,
    links_lead_somewhere,
    at_least_three_assertions,
    ran_from_top_to_bottom,
    has_outputs,
    every_cell_shows_or_checks,
    plain_python,
    no_trailing_semicolon,
    nothing_unrepeatable_is_used,
    nothing_is_excused,
    outputs_are_comparable,
    no_absolute_path,
)
