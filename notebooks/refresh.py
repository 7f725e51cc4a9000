"""Write the outputs of the notebooks: the only program that does.

A notebook committed without outputs teaches nobody who reads it on the web, and makes nbval's comparison pass by
comparing nothing. A notebook whose outputs were made by hand has cells run out of order, on whatever its author had
installed. So outputs come from here alone: each notebook runs from top to bottom in a fresh kernel of *this*
interpreter, in a fixed environment, and replaces the file only when every cell succeeded.

    python notebooks/refresh.py                       # all of them
    python notebooks/refresh.py 00_the_idea_on_a_plane         # some
    python notebooks/refresh.py --check               # execute and compare, write nothing
    python notebooks/refresh.py --scale gpu --into out [--reduced]   # the workstation's settings, into another folder
    python notebooks/refresh.py --tier                # print --nbval or --nbval-lax, as pytest may compare outputs here
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

import ipykernel.kernelspec
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from packaging.requirements import Requirement

FOLDER = Path(__file__).resolve().parent
CONSTRAINTS = FOLDER.parent / "constraints.txt"
WIDGET = "application/vnd.jupyter.widget-view+json"
# Mime types whose bytes differ between machines that agree on everything a reader can see.
INCOMPARABLE = ("image/png", "image/jpeg")
COLAB_SETUP = """# Where the kit is missing, as on Colab: get the course and install it.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("distillkit") is None:
    subprocess.run(["git", "clone", "--depth", "1", "{address}", "course"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./course[offline,notebooks]"], check=True)
    os.chdir("course/notebooks")"""
COLLAPSED = {"check", "setup"}  # tags of cells whose source is hidden until a reader asks for it
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)  # what `execute` raises


def environment(scale: str = "cpu", reduced: bool = False) -> dict[str, str]:
    """Return the variables every kernel is given on top of the caller's, so that outputs can be compared at all.

    One thread, because sums taken by two threads differ in the last digit and the outer loop amplifies that. No
    progress bars, which are never the same twice. At cpu scale nothing may be downloaded and no GPU is used; at gpu
    scale the caller's own hub settings stay.
    """
    variables = {
        "DISTILLKIT_SCALE": scale,
        "DISTILLKIT_REDUCED": "1" if reduced else "0",
        "DISTILLKIT_CLAIMS": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    if scale == "cpu":
        variables |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def drift(constraints: Path = CONSTRAINTS) -> list[str]:
    """Return the installed packages whose version is not the pinned one, as "name installed (pinned: version)"."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    found = []
    for requirement in (Requirement(line) for line in lines if line):
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a constraint asks for nothing to be installed
        if installed not in requirement.specifier:  # "2.13.0+cpu" satisfies "==2.13.0": the build does not count
            found.append(f"{requirement.name} {installed} (pinned: {requirement.specifier})")
    return found


class OwnKernel(AsyncKernelManager):
    """Starts the running interpreter's own kernel, whatever kernels are registered on this machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--log-level=ERROR"]  # else every kernel warns on the terminal that it listens on this machine
        launch = ipykernel.kernelspec.get_kernel_dict(extra_arguments=quiet)
        return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **launch)


def execute(
    notebook: nbformat.NotebookNode, variables: dict[str, str], folder: Path = FOLDER, timeout: int = 3600
) -> None:
    """Run every cell of `notebook` in a fresh kernel that works in `folder`, leaving the outputs in place.

    Raises one of FAILURES when a cell fails, takes longer than `timeout` seconds, or takes the kernel with it.
    """
    client = NotebookClient(
        notebook,
        kernel_manager_class=OwnKernel,
        timeout=timeout,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        allow_errors=False,
        force_raise_errors=True,  # a cell tagged raises-exception is no excuse
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | variables)


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Remove what changes from run to run, so that a diff shows what a reader would see change."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(cell_metadata(cell))
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET, None)  # a random model id, which no page can show without its kernel
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})


def cell_metadata(cell: nbformat.NotebookNode) -> dict:
    """Return what is stored with a cell: its tags, whether its source is collapsed, and where a slide begins."""
    metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
    if cell.cell_type == "markdown" and cell.source.startswith("#"):
        metadata["slideshow"] = {"slide_type": "subslide" if cell.source.startswith("###") else "slide"}
    if set(metadata.get("tags", ())) & COLLAPSED:
        metadata["jupyter"] = {"source_hidden": True}
    return metadata


def read(path: Path) -> nbformat.NotebookNode:
    """Return the notebook at `path`.

    A cell without an id (or with another's) gets one derived from its place and source: nbformat would draw a random
    one, and the file would change at every refresh.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    seen: set[str] = set()
    for position, cell in enumerate(content["cells"]):
        if cell.get("id") in seen | {None}:
            cell["id"] = hashlib.sha256(f"{position}\n{''.join(cell['source'])}".encode()).hexdigest()[:8]
        seen.add(cell["id"])
    content["nbformat_minor"] = 5  # the first version in which cells have ids
    notebook = nbformat.reads(json.dumps(content), as_version=4)
    if address := repository():
        open_in_colab(notebook, path.name, address)
    return notebook


def repository(project: Path = FOLDER.parent / "pyproject.toml") -> str | None:
    """Return where this repository is published, from the project's URLs; None where it is not said."""
    if not project.is_file():  # the lessons may have been copied to another repository
        return None
    urls = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("urls", {})
    return urls.get("Repository", "").removesuffix("/").removesuffix(".git") or None


def open_in_colab(notebook: nbformat.NotebookNode, name: str, address: str) -> None:
    """Put a badge above the title and a set-up cell below it, where they are not there already.

    Args:
        name: the file's name.
        address: of the repository on GitHub, ``https://github.com/owner/name``.
    """
    first, setup = notebook.cells[0], COLAB_SETUP.format(address=address)
    link = f"https://colab.research.google.com/github/{address.split('github.com/')[-1]}/blob/main/notebooks/{name}"
    text = re.sub(r"^\[!\[Open in Colab\].*\n\n", "", first.source)
    first.source = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})\n\n{text}"
    if notebook.cells[1].cell_type == "code" and notebook.cells[1].source.startswith(COLAB_SETUP.split("\n")[0]):
        notebook.cells[1].source = setup
    else:
        notebook.cells.insert(1, nbformat.v4.new_code_cell(setup, id="colab", metadata={"tags": ["setup"]}))


def render(notebook: nbformat.NotebookNode) -> str:
    """Return the text of the file: keys sorted, one line per source line, as JupyterLab writes it too."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Put `notebook` at `path` in one step: a reader, or a crash, sees the old file or the new one."""
    from distillkit.io.storage import save_text

    save_text(path, render(notebook))


def visible(notebook: nbformat.NotebookNode) -> list:
    """Return what `--check` compares: each code cell's source and outputs, pictures by their presence only."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            outputs = json.loads(json.dumps(cell.outputs))
            for output in outputs:
                output.pop("execution_count", None)
                for mime in INCOMPARABLE:
                    if mime in output.get("data", {}):
                        output["data"][mime] = "a picture"
            cells.append((cell.source, outputs))
    return cells


def refresh(path: Path, variables: dict[str, str], *, into: Path | None = None, check: bool = False) -> str | None:
    """Execute the notebook at `path`; return None, or what went wrong, in which case nothing was written.

    `into`: write `into`/name instead of the file itself. `check`: write nothing, and compare with the stored outputs.
    """
    notebook = read(path)
    stored = visible(notebook)
    try:
        execute(notebook, variables, path.parent)
    except FAILURES as error:
        return f"a cell failed, nothing written\n{error}"
    normalise(notebook)
    if not check:
        write(notebook, (into or path.parent) / path.name)
        return None
    stale = [n for n, (old, new) in enumerate(zip(stored, visible(notebook), strict=True), start=1) if old != new]
    return f"stored outputs are stale in code cells {stale}: run notebooks/refresh.py {path.stem}" if stale else None


def find(names: Iterable[str], folder: Path = FOLDER) -> list[Path]:
    """Return the notebooks of that name (with or without folder and .ipynb), or all of them in order."""
    every = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    wanted = [Path(name).name.removesuffix(".ipynb") for name in names] or list(every)
    unknown = [name for name in wanted if name not in every]
    if unknown:
        raise SystemExit(f"no notebook named {', '.join(unknown)}; there are: {', '.join(every) or 'none'}")
    return [every[name] for name in wanted]


def tier() -> str:
    """Return the nbval option this environment can keep, and say on stderr why."""
    different = drift()
    if not different:
        print("notebooks: strict (installed versions are those of constraints.txt)", file=sys.stderr)
        return "--nbval"
    print(f"notebooks: lax (outputs not compared: {'; '.join(different)})", file=sys.stderr)
    return "--nbval-lax"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks to execute (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the stored outputs and write nothing")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="settings to run with (default: cpu)")
    parser.add_argument(
        "--reduced", action="store_true", help="budgets cut to the minimum; lessons' claims not asserted"
    )
    parser.add_argument("--into", type=Path, metavar="DIR", help="write the executed notebooks there")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=argparse.SUPPRESS)  # another folder, for the tests
    parser.add_argument(
        "--tier", action="store_true", help="print the nbval option that fits this environment, and stop"
    )
    options = parser.parse_args(arguments)
    if (options.scale != "cpu" or options.reduced) and not options.into:
        parser.error("the stored outputs are those of the full cpu scale: --scale gpu and --reduced need --into DIR")
    if options.check and options.into:
        parser.error("--check compares with the stored outputs and writes nothing: it does not go with --into")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.tier:
        print(tier())
        return 0
    different = drift()
    if different:
        print(f"note: not the pinned environment: {'; '.join(different)}", file=sys.stderr)
    variables = environment(options.scale, options.reduced)
    failed = 0
    for path in find(options.names, options.folder):
        print(f"{path.stem:32s}", end=" ", flush=True)
        start = time.perf_counter()
        problem = refresh(path, variables, into=options.into, check=options.check)
        print(f"{time.perf_counter() - start:6.1f} s  {'ok' if problem is None else 'FAILED: ' + problem}", flush=True)
        failed += problem is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
