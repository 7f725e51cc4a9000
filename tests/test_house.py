"""The house: which room a module stands in, and that imports go down only."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "distillkit"
ROOMS = ("io", "data", "core", "evaluation", "text", "applications", "experiments", "view", "cli")  # from the ground up


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports from the package, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


def modules() -> dict[str, Path]:
    """The modules of the rooms, by dotted name."""
    paths = (path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))
    named = {path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = modules()


def floor(name: str) -> int:
    return ROOMS.index(name.split(".")[1])


def test_every_room_is_there_and_says_what_it_holds():
    for room in ROOMS:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))), room
    beside = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir() and path.name != "__pycache__"}
    assert beside == {*ROOMS, "assets", "__init__.py", "__main__.py"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name):
    for target in imported(MODULES[name]):
        assert target != "distillkit" and target.split(".")[1] in ROOMS, f"{name} imports {target}, which is in no room"
        assert floor(target) <= floor(name), f"{name} imports {target}, which is a room above it"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {t for t in imported(path) if t in MODULES and t != name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("room", ["core", "evaluation"])
def test_the_method_can_be_imported_without_datasets(room):
    names = [name for name in MODULES if name.split(".")[1] == room]
    code = f"import sys; sys.modules['datasets'] = None; import importlib; [importlib.import_module(n) for n in {names!r}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
