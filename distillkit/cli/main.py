"""Command line: ``python -m distillkit demo``, ``run CONFIG``, the single steps ``distil``, ``evaluate``, ..., and ``doctor``.

``demo`` is ``run`` with the quickstart configuration, and draws its figure.  A run that was interrupted goes on when the
same command is given again; ``--fresh`` starts over.  ``demo`` keeps its result and its figure beside its checkpoints and
starts over once it was finished; the committed result of it is made by ``run quickstart --fresh``, the committed figures
by ``figures``.  The steps are in :mod:`distillkit.cli.steps`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from distillkit.cli import steps
from distillkit.io.escaping import one_line, say, visible_warnings
from distillkit.io.signals import Ended, ending_signals

RESULTS, WORK = Path("figures/results"), Path("runs")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m distillkit", description=(__doc__ or "").split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distil the offline corpus, print the table, draw runs/quickstart.png")
    run = commands.add_parser("run", help="run an experiment from a YAML file of settings")
    run.add_argument("config", type=Path, help="a file of settings, or the name of one in distillkit/experiments/configs")
    run.add_argument("--rows", nargs="+", default=(), metavar="METHOD/RECIPE",
                     help="only these rows for now; the same command without it makes the others")
    run.add_argument("--seeds", nargs="+", type=int, default=(),
                     help="of an experiment whose scores belong to seeds: only these for now; other processes may make others")
    show = commands.add_parser("table", help="print the table of a committed result")
    show.add_argument("name", help="of a result in --results")
    show.add_argument("--figure", type=Path, help="draw it too, into this file")
    figures = commands.add_parser("figures", help="draw every figure of the committed results into the folder above them")
    readme = commands.add_parser("readme", help="write the tables of README.md and RESULTS.md from the committed results")
    readme.add_argument("--file", type=Path, nargs="+", default=[Path("README.md"), Path("figures/RESULTS.md")])
    for command in (demo, run, show, figures, readme):
        command.add_argument("--results", type=Path, default=RESULTS, help=f"folder of results (default {RESULTS})")
    for command in (demo, run):
        command.add_argument("--work", type=Path, default=WORK, help=f"folder of checkpoints and sets (default {WORK})")
        command.add_argument("--fresh", action="store_true", help=steps.FRESH)
    steps.add_commands(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0; 1 where ``verify`` finds damage; 2 for bad input, or a disk that takes no more;
    130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP, after which the same command goes on."""
    args = parser().parse_args(argv)
    own = {"demo": _demo, "run": _run, "table": _table, "figures": _figures, "readme": _readme}
    again = "give the same command again" + (", without --fresh," if getattr(args, "fresh", False) else "") + " to go on"
    with visible_warnings(), ending_signals():
        try:
            return own.get(args.command, steps.run)(args)
        except (ValueError, OSError, FloatingPointError) as error:
            code, said = 2, f"error: {one_line(error)}"
        except RecursionError:
            code, said = 2, "error: what was to be read is nested too deeply"
        except KeyboardInterrupt:
            code, said = 130, f"\ninterrupted; {again}"
        except Ended as ended:
            code, said = 128 + ended.signal, f"\nended by {ended.signal.name}; {again}"
    say(said, error=True)
    return code


def _config_path(name: Path) -> Path:
    from distillkit.experiments.runner import CONFIGS

    for candidate in (name, CONFIGS / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(f"no configuration {str(name)!r}: neither a file nor one of {shipped}")


def _result(path: Path, args, folder: Path) -> dict:
    from distillkit.experiments.kinds import KINDS
    from distillkit.experiments.settings import kind_of, read, renamed
    from distillkit.io.checks import check_choice
    from distillkit.io.restart import started

    kind = kind_of(path)
    check_choice(f"{path}: kind", kind, KINDS)
    job_class, run_class, _ = KINDS[kind]
    job, begun = job_class.from_yaml(path), time.perf_counter()
    rows, seeds = tuple(getattr(args, "rows", ())), tuple(getattr(args, "seeds", ()))
    try:
        run = run_class(job, folder, args.work, fresh=args.fresh, committed=args.results)
        say(run.headline())
        with started(run.claim, run.path, run.work, fresh=args.fresh):
            result = run(rows, seeds)
    except (ValueError, FloatingPointError) as error:
        names = {key: f"{path}: {key}" for key in read(path)} | {"rows": "--rows", "seeds": "--seeds"}
        raise ValueError(renamed(error, names)) from error
    say(draw(result))
    say(f"{time.perf_counter() - begun:.0f} s; written to {run.path}")
    return result


def _run(args) -> int:
    _result(_config_path(args.config), args, args.results)
    return 0


def _demo(args) -> int:
    from distillkit.view import figures as plots

    folder = args.work / "results"
    args.fresh = args.fresh or _done_with(folder / "quickstart.json")
    result = _result(_config_path(Path("quickstart")), args, folder)
    say(f"figure: {plots.save(plots.quickstart(result), args.work / 'quickstart.png')}")
    say(f"the rows marked committed were made by: python -m distillkit run {result['config']['committed']} --fresh")
    return 0


def _done_with(path: Path) -> bool:
    """Whether a demo begins anew: there is nothing left to make of its last result, or it cannot be read."""
    from distillkit.experiments.results import read
    from distillkit.io.storage import StorageError

    if not path.is_file():
        return False
    try:
        result = read(path)
    except StorageError:
        return True
    return {score["row"] for score in result.get("scores", ())} >= {*result["config"]["rows"]}


def draw(result: dict) -> str:
    """A result of any kind as Markdown."""
    from distillkit.experiments.kinds import KINDS

    *_, table = KINDS[result["config"].get("kind", "classification")]
    return table(result)


def _table(args) -> int:
    from distillkit.experiments.results import read

    path = args.results / f"{args.name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no result {path}")
    result = read(path)
    try:
        say(draw(result))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no result that this distillkit can show ({error!r}); make it again") from error
    if args.figure:
        from distillkit.view import figures as plots

        plots.save(plots.quickstart(result), args.figure)
    return 0


def _figures(args) -> int:
    from distillkit.view.gallery import regenerate

    for line in regenerate(args.results, args.results.parent):
        say(line)
    return 0


def _readme(args) -> int:
    from distillkit.experiments.results import with_tables
    from distillkit.io.storage import save_text

    for file in args.file:
        text = file.read_text(encoding="utf-8")
        save_text(file, with_tables(text, args.results, marker="table", draw=draw))
    return 0

