"""``suite``: a list of jobs for a machine that is at hand for some minutes, and what becomes of their results."""

from __future__ import annotations

import argparse

from distillkit.io.deadline import Deadline
from distillkit.io.escaping import say


def suite(args: argparse.Namespace) -> None:
    """``python -m distillkit suite``.

    Raises:
        ValueError: no job of that name, or no minutes.
    """
    deadline = Deadline(60 * args.minutes)  # before torch is imported: that takes a while on a fresh machine
    from distillkit.experiments import suite as scheduler
    from distillkit.experiments import suite_jobs
    from distillkit.experiments.union import merge
    from distillkit.io.checks import require

    require(args.minutes > 0, f"--minutes must be above 0, not {args.minutes}")
    if args.merge:
        for line in merge(args.merge / "results", args.into):
            say(line)
        return
    tiny = " --tiny" * args.tiny
    jobs = scheduler.named(suite_jobs.dry() if args.tiny else suite_jobs.JOBS, args.jobs)
    if args.list:
        for line in scheduler.listed(jobs, args.out):
            say(line)
    elif args.prepare:
        from distillkit.experiments.prepared import corpora_and_students, prepare

        prepare(args.prepare, *corpora_and_students(settings for job in jobs for settings in job.needs()),
                rounded=args.float16, command=f"suite{tiny} --minutes {args.minutes:g} --out {args.out}")
    else:
        scheduler.run(jobs, args.out, deadline, f"python -m distillkit suite{tiny} --minutes {args.minutes:g} --out FOLDER")
