"""SIGTERM and SIGHUP end a run as Ctrl-C does: by an exception, so that its last whole step is saved on the way out.

Schedulers send SIGTERM before they kill, and a closed terminal sends SIGHUP; by default either ends a process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGTERM, signal.SIGHUP)

_blocks = 0
_ending = False


class Ended(SystemExit):
    """A signal has asked the process to end; unless caught it does, with 128 + its number: 143 (SIGTERM) or 129 (SIGHUP)."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Within the block the first SIGTERM or SIGHUP raises :class:`Ended` in the main thread; later ones change nothing.

    Blocks may be nested, and may end in any order: what a signal did before comes back after the last one.  A signal for
    which there is a handler already, or that is ignored (as under ``nohup``), is left alone, and so are all of them where
    the block does not run in the main thread.
    """
    global _blocks, _ending
    main = threading.current_thread() is threading.main_thread()
    _blocks += main
    if main and _blocks == 1:
        _ending = False
        _replace(signal.SIG_DFL, _raise)
    try:
        yield
    finally:
        _blocks -= main
        if main and not _blocks and threading.current_thread() is threading.main_thread():
            _replace(_raise, signal.SIG_DFL)


def _replace(old, new) -> None:
    for number in ENDING:
        if signal.getsignal(number) is old:
            signal.signal(number, new)


def _raise(number: int, frame) -> None:
    global _ending
    if not _blocks:  # the last block ended in another thread, which cannot set handlers
        _replace(_raise, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif not _ending:  # a second one must not end the saving that the first began
        _ending = True
        raise Ended(number)
