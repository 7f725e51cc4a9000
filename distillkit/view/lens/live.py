"""A distillation that runs in the kernel's own event loop, beside the cells, for Lens to follow.

Cells and clicks get their turn between two steps.  The run is no thread: a cell that uses the same student meanwhile would see
its parameters change.  A second run with the same checkpoint takes it over, so that a cell may be run again; interrupting the
kernel ends the run after its step, with a checkpoint, as the stop button does.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
from collections.abc import Callable, Generator
from pathlib import Path

from distillkit.core.distiller import Distiller, StepRecord
from distillkit.io.checks import require

RUNNING: dict[Path, Run] = {}
TURN = 0.01  # seconds for other messages between two steps; 0 would let one through, and a click is several
RECENT = 10  # steps that the time left is estimated from


class Run:
    """A distillation in the background; ``stopping`` ends it after its step, ``task`` can be awaited.

    Args:
        distiller: with a checkpoint.
        steps: in all.
        records: what makes the steps, such as ``distiller.run(steps)``.
        show: called with a sentence after each step (the flag False) and at the end (True).

    Raises:
        ValueError: a distiller without ``checkpoint``.
        RuntimeError: no event loop is running, as in a script; there ``distiller.run`` does the same.
    """

    def __init__(self, distiller: Distiller, steps: int, records: Generator[StepRecord, None, None],
                 show: Callable[[str, bool], None]):
        path = distiller.checkpoint.path
        require(path, "a distillation that can be stopped needs a checkpoint: give its Distiller a checkpoint")
        assert path is not None
        loop = asyncio.get_running_loop()
        self.distiller, self.steps, self.records, self.show, self.stopping = distiller, steps, records, show, False
        if path in RUNNING:
            RUNNING.pop(path).end("another cell has taken this run over")
        RUNNING[path] = self
        self.task = loop.create_task(self._follow(path))

    def end(self, why: str) -> None:
        """End it between two steps: its last one is saved, and the checkpoint is free."""
        self.records.close()
        self.task.cancel()
        self.show(why, True)

    async def _follow(self, path: Path) -> None:
        before = signal.getsignal(signal.SIGINT)
        try:
            with contextlib.closing(self.records):
                while not self.stopping:
                    # Set for each step anew: the kernel sets its own for each cell.
                    signal.signal(signal.SIGINT, lambda *_: setattr(self, "stopping", True))
                    record = next(self.records, None)
                    if record is None:
                        break
                    self.show(self._status(record), False)
                    await asyncio.sleep(TURN)
            state = "done" if self.distiller.step >= self.steps else "stopped"
            self.show(f"{state} at step {self.distiller.step} of {self.steps}; the checkpoint is saved", True)
        except Exception as error:
            self.show(f"ended by an error: {error}", True)
            raise
        finally:
            signal.signal(signal.SIGINT, before)
            if RUNNING.get(path) is self:
                del RUNNING[path]

    def _status(self, record: StepRecord) -> str:
        seconds = statistics.mean(one.seconds for one in self.distiller.records[-RECENT:])
        left = seconds * (self.steps - record.step)
        time = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        return f"step {record.step} of {self.steps}: loss {record.loss:.3f}, {time} left"
