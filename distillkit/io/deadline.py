"""A point in time by which work has to end, for work that is split into parts or saves its progress.

Work asks :meth:`Deadline.check` before each part, and ends with :class:`TimeUp` where the next one would come too late.  What
was saved by then is gone on with later.
"""

from __future__ import annotations

import math
import time


class TimeUp(Exception):
    """The time is up; what was saved is gone on with by the next call."""


class Deadline:
    """The end of a span of time that begins now.

    Args:
        seconds: its length; infinite by default.
    """

    def __init__(self, seconds: float = math.inf):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left; negative once they are over."""
        return self._end - time.monotonic()

    def check(self, expected: float = 0.0) -> None:
        """Raise TimeUp where work of ``expected`` seconds would not end in time."""
        if self.left() <= expected:
            raise TimeUp(f"the next part takes about {expected:.1f} s, and {max(0.0, self.left()):.1f} s are left")


NEVER = Deadline()
