"""The lessons as files (no kernel needed), and the machinery that executes them.

The rules of `lesson_rules.py` are applied to every lesson, and each is itself tested on a notebook that breaks it.
"""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import lesson_rules
from lesson_rules import EXERCISES, FOLDER, NOTEBOOKS, OPENING, RULES, SECTIONS

_spec = importlib.util.spec_from_file_location("distillkit_refresh", FOLDER / "refresh.py")
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)


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
    metadata = {"tags": list(tags)} | ({"jupyter": {"source_hidden": True}} if {"check", "setup"} & {*tags} else {})
    kind = {"cell_type": "code", "id": f"c{count}", "execution_count": count, "metadata": metadata if tags else {}}
    return kind | {"outputs": list(outputs), "source": text}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def shown(**data):
    data = {mime.replace("__", "+").replace("_", "/", 1): value for mime, value in data.items()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


SIZES = "cfg = dk.sizes(student=('offline:minilm', 'gpt2'))\n"
LINKS = " a second on one core and on a GPU [terms](GLOSSARY.md) [picture](#The-picture)"
OPENED = "# 99 A lesson\n\n" + " ".join(OPENING) + LINKS
DRAWING = "![Two loops, one inside the other](../figures/diagrams/99.svg)"
ANSWERED = "\n\n".join(f"### {exercise}\n\nHow?\n\n<details><summary>Answer</summary>So.</details>" for exercise in EXERCISES)
BODY = "\n\n".join(f"## {section}\n\n" + {"The picture": DRAWING, "Exercises": ANSWERED}.get(section, "Text.")
                   for section in SECTIONS)
THREE = "assert True\n" * 3


def lesson() -> dict:
    """Return a notebook, the last of its folder, that breaks no rule."""
    cells = [
        markdown(OPENED),
        code(SIZES + "print(1)", printed("1\n")),
        code("assert 1 + 1 == 2\nassert [1]\ncfg.claim(2 > 1, 'two is more than one')", count=2, tags=["check"]),
        markdown(BODY),
        markdown("This is the end."),
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def with_code(*arguments, tags=("check",), **options):
    return lambda notebook: notebook["cells"].__setitem__(2, code(*arguments, **{"count": 2, "tags": tags} | options))


def with_prose(position, text):
    return lambda notebook: notebook["cells"].__setitem__(position, markdown(text))


def without(text, instead=""):
    """Leave a piece of prose out, or put another in its place."""
    def change(notebook):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = cell["source"].replace(text, instead)
    return change


def with_first_code(text):
    return lambda notebook: notebook["cells"][1].update(source=text)


def with_another_cell(*arguments, **options):
    return lambda notebook: notebook["cells"].insert(3, code(*arguments, count=3, **options))


PICTURE = shown(image_png="iVBORw0KGgo=")
BREAKS = [
    ("title_with_its_number", without("# 99 A lesson", "# A lesson")),
    *(("opening_says_what_to_expect", without(part)) for part in (*OPENING, "one core", "a GPU", "(GLOSSARY.md)", "(#")),
    ("sizes_are_in_the_first_cell", with_another_cell(SIZES + "print(1)", printed("1\n"))),
    ("sizes_are_in_the_first_cell", with_first_code("print(dk.load_student('offline:minilm'))")),
    ("sizes_are_in_the_first_cell", with_first_code("print(dk.sizes(student=('gpt2', 'gpt2')))")),
    ("sizes_are_in_the_first_cell", with_first_code("print(dk.sizes(corpus=('docstrings', 'docstrings')))")),
    ("sections_are_in_order", without("## Guess first")),
    ("sections_are_in_order", without("## Guess first", "## References")),
    ("begins_with_a_drawing", without(DRAWING)),
    ("begins_with_a_drawing", without("Two loops, one inside the other", "loops")),
    ("every_exercise_has_an_answer", without("### Exercise 2 (change)")),
    ("every_exercise_has_an_answer", without("<details><summary>Answer</summary>So.</details>")),
    ("every_exercise_has_an_answer", without("</details>")),
    ("cells_are_short", with_another_cell("x = 1\n" * 15 + "print(1)", printed("1\n"))),
    ("checks_are_collapsed", with_code(THREE, tags=())),
    ("checks_are_collapsed", lambda nb: nb["cells"][2]["metadata"].pop("jupyter")),
    ("figures_are_titled_and_described", with_another_cell("figure", PICTURE)),
    ("figures_are_titled_and_described", with_another_cell("figure", printed("panel 1: untitled"), PICTURE)),
    ("tables_fit_into_view", with_another_cell("table", shown(text_markdown="| a |\n" * 16))),
    ("nothing_was_not_run", with_another_cell("print(1)", printed("not run"))),
    ("anchors_are_there", with_prose(4, "[up](#Nowhere)")),
    ("anchors_are_there", with_prose(4, "[word](GLOSSARY.md#nothing)")),
    ("links_lead_somewhere", with_prose(4, "[next](98_nothing.ipynb)")),
    ("links_lead_somewhere", None),
    ("at_least_three_assertions", with_code("assert True\nassert True")),
    ("ran_from_top_to_bottom", with_code(THREE, count=3)),
    ("ran_from_top_to_bottom", with_code(THREE, count=None)),
    ("has_outputs", lambda nb: nb["cells"][1].update(source=SIZES, outputs=[], metadata=nb["cells"][2]["metadata"])),
    ("every_cell_shows_or_checks", with_another_cell("x = 1")),
    ("plain_python", with_another_cell("%matplotlib inline\nprint(1)", printed("1\n"))),
    ("plain_python", with_another_cell("!pip list", printed("distillkit\n"))),
    ("no_trailing_semicolon", with_code(THREE + "print(2);  # quiet\n\n")),
    ("nothing_unrepeatable_is_used", with_code("from IPython.display import clear_output\n" + THREE)),
    ("nothing_unrepeatable_is_used", with_code("widgets.interact(print, x=3)\n" + THREE)),
    ("nothing_unrepeatable_is_used", with_code("out = widgets.Output()\n" + THREE)),
    ("nothing_is_excused", with_code(THREE, tags=["check", "raises-exception"])),
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


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The drawing of the lesson is there, beside the course's own files."""
    (tmp_path / "figures" / "diagrams").mkdir(parents=True)
    (tmp_path / "figures" / "diagrams" / "99.svg").touch()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "GLOSSARY.md").touch()
    monkeypatch.setattr(lesson_rules, "FOLDER", tmp_path / "notebooks")


def test_a_good_lesson_breaks_no_rule(drawn):
    assert [complaint for rule in RULES for complaint in rule(lesson(), "99_lesson")] == []


@pytest.mark.parametrize(("rule", "change"), BREAKS, ids=[f"{n}-{rule}" for n, (rule, _) in enumerate(BREAKS)])
def test_each_rule_notices_what_it_is_for(rule, change, monkeypatch, drawn):
    notebook = copy.deepcopy(lesson())
    if change is None:  # a lesson that is not the last one has to name the next
        monkeypatch.setattr(lesson_rules, "NOTEBOOKS", [Path("99_lesson.ipynb"), Path("99_more.ipynb")])
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


def test_nbval_runs_reduced_sizes_where_it_is_asked_to(scratch, monkeypatch):
    path = scratch("import os\nassert os.environ['DISTILLKIT_REDUCED'] == '1'")
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    assert "1 passed" in run_nbval(path, "--nbval-lax")
