"""Kill a process at every stage of what it does to a folder, and look at what it left."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

# What the interpreter tells of before it happens; safetensors and pyarrow write between two of these.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def forked(run: Callable[[], object], folder: Path, stage: int | None = None) -> int:
    """Call ``run`` in a child, which is killed before its ``stage``-th access to something below ``folder``; its status."""
    pid = os.fork()
    if pid == 0:
        _die_at(folder, stage)
        leave(run)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def leave(run: Callable[[], object], stderr: Path | None = None) -> None:
    """Call ``run`` in a child and end it, whatever happens, by the status of a process; ``stderr`` may go to a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        run()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _die_at(folder: Path, stage: int | None) -> None:
    count = 0

    def hook(event, args):
        nonlocal count
        if stage and event in EVENTS and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(str(folder)):
            count += 1
            if count == stage:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def at_every_stage(run: Callable[[], object], folder: Path, step: int = 1) -> Iterator[int]:
    """Yield after each kill, its stage counted from 1, until ``run`` comes to its end; every ``step``-th stage only."""
    stage = 1
    while (status := forked(run, folder, stage)) != 0:
        assert status == -signal.SIGKILL, f"it failed at stage {stage}"
        yield stage
        stage += step


def leftovers(folder: Path) -> list[str]:
    """Names below ``folder`` of what a write, or a run that started over, has left unfinished."""
    return sorted(path.name for path in folder.rglob(".*") if path.suffix in (".new", ".aside"))
