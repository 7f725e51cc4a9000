"""The notebooks as files (no kernel needed), and the machinery that executes them.

nbval executes every notebook in the same `make test` and compares what it prints. This module checks what nbval lets
through: a notebook without outputs, one whose cells ran out of order, an output that can never be the same twice, a tag
that excuses an error, a magic that switches the rest of its cell off. Each rule is a function from a notebook to
complaints, and each is itself tested on a notebook that breaks it.
"""

import ast
import copy
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

_spec = importlib.util.spec_from_file_location("distillkit_refresh", FOLDER / "refresh.py")
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)

SECTIONS = ("What would break this", "References", "Check yourself")
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
    """Return the last name of what is called: "scale" for `dk.scale(...)`; None for anything but a call."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "attr", None) or getattr(node.func, "id", None)


def checks(cell: dict) -> int:
    """Return how many assertions the cell makes: `assert` statements and claims."""
    return sum(isinstance(node, ast.Assert) or called(node) == "claim" for node in ast.walk(syntax(cell)))


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


def says_how_long_it_takes(notebook, name):
    opening = " ".join(source(cell) for cell in notebook["cells"][:3] if cell["cell_type"] == "markdown").lower()
    if not ("two cores" in opening or "2 cores" in opening) or "gpu" not in opening:
        yield "the opening does not say how long it takes on two cores and on a GPU"


def sizes_are_in_the_first_cell(notebook, name):
    calls = [(n, node) for n, cell in code_cells(notebook) for node in ast.walk(syntax(cell)) if called(node) == "scale"]
    if [number for number, _ in calls] != [1]:
        yield f"{len(calls)} calls of scale(), instead of one in the first code cell"
        return
    columns = {keyword.arg: ast.literal_eval(keyword.value) for keyword in calls[0][1].keywords}
    cpu, gpu = columns.get("cpu", {}), columns.get("gpu", {})
    if cpu.keys() != gpu.keys() or not cpu:
        yield f"scale() must be given cpu={{...}} and gpu={{...}} with the same names, not {columns}"
    for column, local in ((cpu, True), (gpu, False)):
        for key, start in (("corpus", "docstrings"), ("student", "offline:")):
            if column.get(key, start if local else "").startswith(start) != local:
                yield f"the cpu column must work without a network and the gpu column needs hub names: {key} {column[key]!r}"


def sections_are_there(notebook, name):
    lines = [line for text in prose(notebook) for line in text.splitlines()]
    headings = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    for section in SECTIONS:
        if not any(heading.startswith(section.lower()) for heading in headings):
            yield f"no section '{section}'"


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
        if not cell["outputs"] and not checks(cell):
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
        if marks & {"nbval-ignore-output", "pytest-validate-ignore-output"} and not checks(cell):
            yield f"code cell {number} is not compared and asserts nothing"


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
    says_how_long_it_takes,
    sizes_are_in_the_first_cell,
    sections_are_there,
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


# The notebooks themselves


def test_there_are_notebooks_and_their_names_give_an_order():
    assert NOTEBOOKS
    names = [path.stem for path in NOTEBOOKS]
    assert [name for name in names if not re.fullmatch(r"\d\d_[a-z0-9_]+", name)] == []
    numbers = [name[:2] for name in names]
    assert len(set(numbers)) == len(numbers), f"two notebooks with the same number: {names}"
    assert numbers[0] == "00"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_notebook(path, rule):
    complaints = list(rule(json.loads(path.read_text(encoding="utf-8")), path.stem))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_written_by_the_refresh_script(path):
    notebook = refresh.read(path)
    refresh.normalise(notebook)
    written = refresh.render(notebook) == path.read_text(encoding="utf-8")
    assert written, f"{path.name} was edited or run by hand since: run notebooks/refresh.py {path.stem}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_at_gpu_scale(path, standin_home, tmp_path):
    """Every line of the workstation's path, with tiny models and data under the hub's names and the least budgets."""
    from standin_hub import environment  # imports transformers, which the rest of this module need not wait for

    command = [sys.executable, str(FOLDER / "refresh.py"), path.stem, "--scale", "gpu", "--reduced", "--into", tmp_path]
    options = {"env": environment(standin_home), "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / path.name).is_file()


# The rules, each on a notebook that breaks it


def markdown(text):
    return {"cell_type": "markdown", "id": f"m{abs(hash(text))}", "metadata": {}, "source": text}


def code(text, *outputs, count=1, tags=()):
    metadata = {"tags": list(tags)} if tags else {}
    kind = {"cell_type": "code", "id": f"c{count}", "execution_count": count, "metadata": metadata}
    return kind | {"outputs": list(outputs), "source": text}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def shown(**data):
    data = {mime.replace("__", "+").replace("_", "/", 1): value for mime, value in data.items()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


SIZES = "cfg = dk.scale(cpu={'student': 'offline:minilm'}, gpu={'student': 'gpt2'})\n"


def lesson() -> dict:
    """Return a notebook, the last of its folder, that breaks no rule."""
    cells = [
        markdown("# 99 A lesson\n\nWhat is one and one? A second on two cores, and on a GPU."),
        code(SIZES + "print(1)", printed("1\n")),
        code("assert 1 + 1 == 2\nassert [1]\ncfg.claim(2 > 1, 'two is more than one')", count=2),
        markdown("## What would break this\n\n## References\n\n[a paper](https://arxiv.org/abs/1811.10959)"),
        markdown("## Check yourself\n\nThis is the end."),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def with_code(*arguments, **options):
    return lambda notebook: notebook["cells"].__setitem__(2, code(*arguments, **{"count": 2} | options))


def with_prose(position, text):
    return lambda notebook: notebook["cells"].__setitem__(position, markdown(text))


def with_first_code(text):
    return lambda notebook: notebook["cells"][1].update(source=text)


def with_another_cell(*arguments, **options):
    return lambda notebook: notebook["cells"].insert(3, code(*arguments, count=3, **options))


THREE = "assert True\n" * 3
BREAKS = [
    ("title_with_its_number", with_prose(0, "# A lesson\n\nA second on two cores and on a GPU.")),
    ("says_how_long_it_takes", with_prose(0, "# 99 A lesson")),
    ("sizes_are_in_the_first_cell", with_code(THREE + SIZES)),
    ("sizes_are_in_the_first_cell", with_first_code("print(1)")),
    ("sizes_are_in_the_first_cell", with_first_code("print(dk.scale(cpu={'length': 8}, gpu={'per_class': 1}))")),
    ("sizes_are_in_the_first_cell", with_first_code("print(dk.scale(cpu={'student': 'gpt2'}, gpu={'student': 'gpt2'}))")),
    ("sizes_are_in_the_first_cell", with_first_code("dk.scale(cpu={'corpus': 'docstrings'}, gpu={'corpus': 'docstrings'})")),
    ("sections_are_there", with_prose(4, "This is the end.")),
    ("links_lead_somewhere", with_prose(4, "## Check yourself\n\n[next](98_nothing.ipynb)")),
    ("links_lead_somewhere", None),
    ("at_least_three_assertions", with_code("assert True\nassert True")),
    ("ran_from_top_to_bottom", with_code(THREE, count=3)),
    ("ran_from_top_to_bottom", with_code(THREE, count=None)),
    ("has_outputs", lambda nb: nb["cells"][1].update(source=SIZES + "assert cfg", outputs=[])),
    ("every_cell_shows_or_checks", with_another_cell("x = 1")),
    ("plain_python", with_another_cell("%matplotlib inline\nprint(1)", printed("1\n"))),
    ("plain_python", with_another_cell("!pip list", printed("distillkit\n"))),
    ("no_trailing_semicolon", with_code(THREE + "print(2);  # quiet\n\n")),
    ("nothing_unrepeatable_is_used", with_code("from IPython.display import clear_output\n" + THREE)),
    ("nothing_unrepeatable_is_used", with_code("widgets.interact(print, x=3)\n" + THREE)),
    ("nothing_unrepeatable_is_used", with_code("out = widgets.Output()\n" + THREE)),
    ("nothing_is_excused", with_code(THREE, tags=["raises-exception"])),
    ("nothing_is_excused", with_code("# NBVAL_SKIP\n" + THREE)),
    ("nothing_is_excused", with_another_cell("# NBVAL_IGNORE_OUTPUT\nprint(1)", printed("1"))),
    ("outputs_are_comparable", with_code(THREE, printed("UserWarning: careful", "stderr"))),
    ("outputs_are_comparable", with_code(THREE, {"output_type": "error", "ename": "E", "evalue": "", "traceback": []})),
    ("outputs_are_comparable", with_code(THREE, shown(image_svg__xml="<svg/>"))),
    ("outputs_are_comparable", with_code(THREE, shown(text_plain="<object at 0x7f00deadbeef>"))),
    ("outputs_are_comparable", with_code(THREE, shown(text_plain="reading:   0%|          | 0/6 [00:00<?, ?it/s]"))),
    ("no_absolute_path", with_code(THREE, printed("saved to /home" + "/somebody/runs"))),
    ("no_absolute_path", with_code("open('/root" + "/x')\n" + THREE)),
]


def test_a_good_lesson_breaks_no_rule():
    assert [complaint for rule in RULES for complaint in rule(lesson(), "99_lesson")] == []


@pytest.mark.parametrize(("rule", "change"), BREAKS, ids=[f"{n}-{rule}" for n, (rule, _) in enumerate(BREAKS)])
def test_each_rule_notices_what_it_is_for(rule, change, monkeypatch):
    notebook = copy.deepcopy(lesson())
    if change is None:  # a lesson that is not the last one has to name the next
        monkeypatch.setitem(globals(), "NOTEBOOKS", [Path("99_lesson.ipynb"), Path("99_more.ipynb")])
    else:
        change(notebook)
    complaining = {r.__name__ for r in RULES if list(r(notebook, "99_lesson"))}
    assert complaining == {rule}


def test_every_rule_is_tested():
    assert {rule for rule, _ in BREAKS} == {rule.__name__ for rule in RULES}


# The refresh script, on scratch notebooks


NOBODYS_KERNEL = {"name": "nobody-has-this", "display_name": "A kernel that is not registered"}


@pytest.fixture
def scratch(tmp_path):
    """Return a function that writes a notebook of code cells into an empty folder, as an editor would, and its path."""

    def make(*sources: str) -> Path:
        cells = [nbformat.v4.new_code_cell(text, metadata={"collapsed": False}) for text in sources]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": NOBODYS_KERNEL})
        path = tmp_path / "00_scratch.ipynb"
        nbformat.write(notebook, path)
        return path

    return make


def run_refresh(path: Path, *arguments: str) -> int:
    return refresh.main([path.stem, "--folder", str(path.parent), *arguments])


def test_refresh_writes_outputs_that_stay_the_same(scratch):
    show = "import sys, os\nprint(sys.executable == os.environ['EXPECTED'])\nprint(os.path.basename(os.getcwd()))"
    path = scratch("x = 1", show + "\nx + 1", "import ipywidgets\nipywidgets.IntSlider(value=3)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPECTED", sys.executable)
        assert run_refresh(path) == 0
        first = path.read_bytes()
        assert run_refresh(path) == 0
        assert run_refresh(path, "--check") == 0
    assert path.read_bytes() == first
    notebook = json.loads(first)
    assert [cell["execution_count"] for cell in notebook["cells"]] == [1, 2, 3]
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}, {}, {}]
    assert "".join(notebook["cells"][1]["outputs"][0]["text"]) == f"True\n{path.parent.name}\n"
    assert set(notebook["cells"][2]["outputs"][0]["data"]) == {"text/plain"}, "a random widget id was stored"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


def test_refresh_leaves_the_file_alone_when_a_cell_fails(scratch, capsys):
    path = scratch("print('fine')", "1 / 0", "print('never')")
    before = path.read_bytes()
    assert run_refresh(path) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_check_finds_stale_outputs_and_writes_nothing(scratch, capsys):
    path = scratch("print(1)", "print(2)")
    assert run_refresh(path) == 0
    stale = path.read_text(encoding="utf-8").replace('"2\\n"', '"3\\n"')
    path.write_text(stale, encoding="utf-8")
    assert run_refresh(path, "--check") == 1
    assert "stale in code cells [2]" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == stale


def test_another_scale_is_written_elsewhere(scratch, tmp_path):
    path = scratch("import os\nprint(os.environ['DISTILLKIT_SCALE'], os.environ['DISTILLKIT_REDUCED'])")
    before = path.read_bytes()
    assert run_refresh(path, "--scale", "gpu", "--reduced", "--into", str(tmp_path / "out")) == 0
    assert path.read_bytes() == before
    executed = json.loads((tmp_path / "out" / path.name).read_text(encoding="utf-8"))
    assert executed["cells"][0]["outputs"][0]["text"] == ["gpu 1\n"]


@pytest.mark.parametrize("arguments", [["--scale", "gpu"], ["--reduced"], ["--check", "--into", "x"]], ids=" ".join)
def test_refresh_refuses_what_would_spoil_the_stored_outputs(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        refresh.parse(arguments)
    assert refusal.value.code == 2 and "--into" in capsys.readouterr().err.splitlines()[-1]


def test_refresh_names_a_notebook_that_is_not_there(scratch):
    path = scratch("print(1)")
    with pytest.raises(SystemExit, match="77_nothing.*00_scratch"):
        refresh.find(["77_nothing"], path.parent)


def test_cells_without_ids_get_lasting_ones(scratch):
    path = scratch("print(1)", "print(1)")
    content = json.loads(path.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        del cell["id"]
    path.write_text(json.dumps(content | {"nbformat_minor": 4}), encoding="utf-8")
    first, second = ([cell.id for cell in refresh.read(path).cells] for _ in range(2))
    assert first == second
    assert len(set(first)) == 2


def test_drift_compares_installed_versions_with_the_pins(tmp_path):
    constraints = tmp_path / "constraints.txt"
    pytest_version = pytest.__version__
    constraints.write_text(f"# pins\npytest=={pytest_version}\nnobody-has-this==1.0\n")
    assert refresh.drift(constraints) == []
    constraints.write_text("pytest==0.1\n")
    assert refresh.drift(constraints) == [f"pytest {pytest_version} (pinned: ==0.1)"]


def test_the_tier_is_strict_only_on_the_pinned_environment(monkeypatch, capsys):
    monkeypatch.setattr(refresh, "drift", list)
    assert refresh.tier() == "--nbval"
    monkeypatch.setattr(refresh, "drift", lambda: ["torch 9 (pinned: ==8)"])
    assert refresh.tier() == "--nbval-lax"
    assert "torch 9 (pinned: ==8)" in capsys.readouterr().err


# nbval, with the hooks of notebooks/conftest.py


def run_nbval(path: Path, option: str) -> str:
    """Return pytest's summary line for the notebook at `path`, run as `make test` runs the real ones."""
    for name in ("conftest.py", "refresh.py"):
        shutil.copy(FOLDER / name, path.parent)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-current-env", option, str(path)]
    options = {"cwd": path.parent, "env": variables, "stdin": subprocess.DEVNULL}
    result = subprocess.run(command, capture_output=True, text=True, **options)
    return result.stdout.strip().splitlines()[-1]


def test_nbval_compares_strictly_or_not_at_all(scratch):
    path = scratch("import os\nprint(os.environ['DISTILLKIT_SCALE'], os.environ['OMP_NUM_THREADS'])", "print(2)")
    assert run_refresh(path) == 0
    assert "2 passed" in run_nbval(path, "--nbval")
    path.write_text(path.read_text(encoding="utf-8").replace('"cpu 1\\n"', '"cpu 2\\n"'), encoding="utf-8")
    assert "1 failed, 1 passed" in run_nbval(path, "--nbval"), "a stale output is one failure, not one per later cell"
    assert "2 passed" in run_nbval(path, "--nbval-lax")


def test_nbval_skips_the_cells_below_a_failed_one(scratch):
    path = scratch("print(1)", "raise RuntimeError('broken')", "print(2)", "print(3)")
    assert "1 failed, 1 passed, 2 skipped" in run_nbval(path, "--nbval-lax")
