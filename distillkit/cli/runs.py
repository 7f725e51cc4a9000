"""Experiments on the command line: ``run`` and ``demo`` make a result; ``table``, ``figures`` and ``readme`` show results."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from distillkit.experiments.evidence import evidence_table
from distillkit.experiments.kinds import KINDS, table_of
from distillkit.experiments.results import read as read_result
from distillkit.experiments.results import with_tables
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import kind_of, read, renamed
from distillkit.io.checks import check_choice, require
from distillkit.io.escaping import say
from distillkit.io.restart import started
from distillkit.io.storage import save_text
from distillkit.io.verify import kind_of as written_by_kit
from distillkit.view import figures as plots
from distillkit.view.gallery import regenerate


def run(args: argparse.Namespace) -> int:
    """``python -m distillkit run``; returns 1 where a cell was skipped."""
    path = args.config if args.config.is_file() else CONFIGS / f"{args.config}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {str(args.config)!r}: neither a file nor one of {shipped}")
    return int(bool(_compute(path, args, args.results, args.rows, args.seeds).skipped))


def demo(args: argparse.Namespace) -> None:
    """``python -m distillkit demo``; it starts over where nothing is left to compute."""
    folder = args.work / "results"
    args.fresh = args.fresh or is_finished(folder / "quickstart.json")
    result = _compute(CONFIGS / "quickstart.yaml", args, folder).result
    say(f"figure: {plots.save(plots.quickstart(result), args.work / 'quickstart.png')}")
    say(f"the rows marked committed were made by: python -m distillkit run {result['config']['committed']} --fresh")


def _compute(path: Path, args: argparse.Namespace, folder: Path, rows=(), seeds=()) -> Run:
    """The run of the settings at ``path`` into ``folder``, after what was missing (of ``rows`` and ``seeds`` only, if any)."""
    kind = kind_of(path)
    check_choice(f"{path}: kind", kind, KINDS)
    job_class, run_class, _ = KINDS[kind]
    job, begun = job_class.from_yaml(path), time.perf_counter()
    try:
        experiment = run_class(job, folder, args.work, fresh=args.fresh, committed=args.results)
        say(experiment.headline())
        files = [path for path in experiment.work.rglob("*") if path.is_file()]
        if files and not any(map(written_by_kit, files)):
            raise ValueError(f"{experiment.work} holds {files[0].name}, which distillkit did not write; give the run another "
                             "name, or another --work")
        with started(experiment.claim, experiment.path, experiment.work, fresh=args.fresh):
            experiment(rows, seeds)
    except (ValueError, FloatingPointError) as error:
        names = {key: f"{path}: {key}" for key in read(path)} | {"rows": "--rows", "seeds": "--seeds"}
        raise ValueError(renamed(error, names)) from error
    say(table_of(experiment.result))
    say(f"{time.perf_counter() - begun:.0f} s; written to {experiment.path}")
    return experiment


def is_finished(path: Path) -> bool:
    """Whether a result has nothing left to compute."""
    if not path.is_file():
        return False
    result = read_result(path)
    return {score["row"] for score in result.get("scores", ())} >= {*result["config"]["rows"]}


def table(args: argparse.Namespace) -> None:
    """``python -m distillkit table``."""
    results = []
    for name in args.name:
        path = args.results / f"{name}.json"
        results.append(read_result(path))
        require({"config", "cells", "scores"} <= results[-1].keys(),
                f"{path} holds no scores of an experiment; name a result that `run` has written")
    for flag in ("against", "figure"):
        require(len(results) == 1 or not getattr(args, flag), f"--{flag} is for one result; name one")
    if args.against:
        kind = results[0]["config"].get("kind")
        require(kind == "evidence", f"--against is for results of kind evidence, and {args.name[0]} is of kind {kind}")
    say(evidence_table(*results, args.against) if args.against else table_of(*results))
    if args.figure:
        plots.save(plots.quickstart(*results), args.figure)


def figures(args: argparse.Namespace) -> None:
    """``python -m distillkit figures``."""
    for line in regenerate(args.results, args.results.parent):
        say(line)


def readme(args: argparse.Namespace) -> None:
    """``python -m distillkit readme``."""
    for file in args.file:
        save_text(file, with_tables(file.read_text(encoding="utf-8"), args.results, marker="table", draw=table_of))
