"""Progress bars that can be switched off.

``TQDM_DISABLE=1`` silences tqdm in a terminal, but its notebook form ignores it and leaves a widget among a notebook's
stored outputs.  Everything in the kit that takes more than a few seconds draws its bar through here.
"""

import os

from tqdm.auto import tqdm


def progress(iterable=None, **kwargs) -> tqdm:
    """``tqdm.auto.tqdm``, silent wherever ``TQDM_DISABLE`` is set to anything but 0."""
    return tqdm(iterable, disable=os.environ.get("TQDM_DISABLE", "0") not in ("", "0"), **kwargs)
