"""``suite``: a list of jobs for a machine that is at hand for some minutes, and what becomes of their results."""

from __future__ import annotations

import argparse
import subprocess
import sys

from distillkit.io.deadline import Deadline
from distillkit.io.escaping import say


def suite(args: argparse.Namespace) -> int:
    """``python -m distillkit suite``; returns 1 where one of several processes failed.

    Raises:
        ValueError: no job of that name, or no minutes.
    """
    deadline = Deadline(60 * args.minutes)  # before torch is imported: that takes a while on a fresh machine
    from distillkit.experiments import suite as scheduler
    from distillkit.experiments import suite_jobs
    from distillkit.experiments.union import merge
    from distillkit.io.checks import require

    require(args.minutes > 0, f"--minutes must be above 0, not {args.minutes}")
    require(args.processes > 0, f"--processes must be above 0, not {args.processes}")
    if args.merge:
        for line in merge(args.merge / "results", args.into):
            say(line)
        return 0
    tiny, asked = " --tiny" * args.tiny, f" --processes {args.processes}" * (args.processes > 1)
    asked += f" --jobs {' '.join(args.jobs)}" * bool(args.jobs)
    jobs = scheduler.named(suite_jobs.dry() if args.tiny else suite_jobs.JOBS, args.jobs)
    if args.list:
        for line in scheduler.listed(jobs, args.out):
            say(line)
    elif args.prepare:
        from distillkit.experiments.prepared import corpora_and_students, prepare

        prepare(args.prepare, *corpora_and_students(settings for job in jobs for settings in job.needs()),
                rounded=args.float16, command=f"suite{tiny} --minutes {args.minutes:g} --out {args.out}{asked}")
    elif args.processes > 1:
        return _in_processes(args, deadline)
    else:
        share = scheduler.Share(*args.share or ())
        command = f"python -m distillkit suite{tiny} --minutes {args.minutes:g} --out FOLDER"
        scheduler.run(jobs, args.out, deadline, command, share)
    return 0


def _in_processes(args: argparse.Namespace, deadline: Deadline) -> int:
    """The same command in several processes, each with its share; returns 1 where one fails.  They end where this one does."""
    command = [sys.executable, "-m", "distillkit", "suite", "--minutes", f"{deadline.left() / 60:.4f}", "--out", str(args.out),
               *["--tiny"] * args.tiny, *(["--jobs", *args.jobs] if args.jobs else [])]
    children = []
    try:
        for number in range(args.processes):
            children.append(subprocess.Popen([*command, "--share", str(number), str(args.processes)]))
        failed = sum(child.wait() != 0 for child in children)
    finally:
        for child in children:
            child.terminate()
    if failed:
        say(f"{failed} of {args.processes} processes failed, for the reasons above; what was done is in {args.out}, and the "
            "same command goes on", error=True)
    return int(failed > 0)
