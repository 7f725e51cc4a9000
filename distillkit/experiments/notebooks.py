"""Time and memory of the notebooks, each run from top to bottom in a process of its own by ``notebooks/refresh.py``."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from distillkit.experiments.results import environment, markdown, now, processor, read, write
from distillkit.experiments.suite import Unit
from distillkit.io.deadline import Deadline

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PACKAGES = ("nbclient", "nbformat", "ipykernel", "matplotlib", "datasets")
POLL = 0.2  # seconds between looks at a notebook's memory


@dataclasses.dataclass(frozen=True)
class Notebooks:
    """The job of running every notebook.

    Args:
        options: of ``refresh.py``, such as the scale.
        names: which; default all.
        guess: seconds that one takes.
    """

    name: str = "notebooks_gpu"
    options: tuple[str, ...] = ("--scale", "gpu")
    names: tuple[str, ...] = ()
    guess: float = 300.0
    folder: Path = FOLDER
    measures_time: ClassVar[bool] = True

    def tiny(self) -> Notebooks:
        """The dry run: the first notebook, its sizes cut."""
        return dataclasses.replace(self, name=f"{self.name}_tiny", options=("--scale", "cpu", "--reduced"),
                                   names=("01_six_examples_for_a_corpus",), guess=60.0)

    def needs(self) -> list:
        """Nothing that is known beforehand: a notebook names its corpora and models itself."""
        return []

    def units(self, out: Path, deadline: Deadline, command: str) -> list[Unit]:
        """One for each notebook.

        Raises:
            ImportError: a package that runs notebooks is missing.
            FileNotFoundError: there are no notebooks, as outside a checkout.
        """
        if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
            raise ImportError(f"not installed: {', '.join(missing)}, which notebooks need")
        names = self.names or tuple(sorted(path.stem for path in self.folder.glob("*.ipynb")))
        if not names:
            raise FileNotFoundError(f"no notebooks in {self.folder}; run the suite from a checkout")
        path = out / "results" / f"{self.name}.json"
        config = {"kind": "notebooks", "name": self.name, "options": list(self.options)}
        empty = {"config": config, "command": command, "cells": {"notebooks": {"config": config, **environment(), "notes": {}}},
                 "scores": []}

        def run(name: str) -> None:
            score = {"cell": "notebooks", "row": name, "set_seed": 0, **self.measured(name, out, deadline)}
            result = read(path) if path.is_file() else empty
            result["scores"] = sorted([*result["scores"], score], key=lambda row: row["row"])
            result["cells"]["notebooks"]["notes"][f"{name} 0"] = {"made": now()}
            write(path, result)

        done = {score["row"] for score in read(path)["scores"]} if path.is_file() else set()
        return [Unit(name, (name,), self.guess, lambda name=name: run(name), name in done) for name in names]

    def measured(self, name: str, out: Path, deadline: Deadline) -> dict:
        """Seconds, and the most memory at once: of the device where there is a GPU, else of the process.

        Raises:
            RuntimeError: a cell failed; the message is the last line that was printed.
        """
        into = out / "work" / self.name
        into.mkdir(parents=True, exist_ok=True)
        log = into / f"{name}.log"
        command = [sys.executable, str(FOLDER / "refresh.py"), name, "--folder", str(self.folder), "--into", str(into)]
        begun, on_gpu, peak = time.monotonic(), torch.cuda.is_available(), 0
        used = (lambda: -torch.cuda.mem_get_info()[0]) if on_gpu else (lambda: 0)
        before = used()
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *self.options], stdout=output, stderr=output, start_new_session=True)
            try:
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                while not ended:
                    deadline.check()
                    time.sleep(POLL)
                    peak = max(peak, used() - before)
                    ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                process.returncode = os.waitstatus_to_exitcode(status)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            raise RuntimeError(next((line for line in reversed(lines) if line.strip()), "the notebook ended without a word"))
        return {"seconds": round(time.monotonic() - begun, 1), "bytes": peak if on_gpu else usage.ru_maxrss * 1024,
                "machine": processor()}


def notebooks_table(result: Mapping) -> str:
    """Time and memory of each notebook as a Markdown table."""
    lines = [[score["row"], f"{score['seconds']:.0f}", f"{score['bytes'] / 1e9:.1f}", score["machine"]]
             for score in result["scores"]]
    return markdown(["notebook", "seconds", "GB at most", "machine"], lines)
