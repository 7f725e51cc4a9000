"""Random numbers with an address.

Every random draw in the kit belongs to a *purpose* ("distil-init", "evaluate-init", ...), a user's seed and usually a
step.  The three are hashed together with SHA-256 into one 63-bit seed, so that

* two purposes never share a stream: no score is ever taken on an initialisation that a set was distilled on, and none
  of those two on one that a baseline was tuned on;
* step 700 of a resumed run draws what step 700 of an uninterrupted run would have drawn, without replaying the first
  699 steps.

Nothing in the package touches the global random state.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(purpose: str, *parts: int | str) -> int:
    """A 63-bit seed for the stream ``purpose`` at the address ``parts`` (any integers or strings)."""
    if not isinstance(purpose, str):
        raise TypeError(f"purpose must be a string, not {purpose!r}")
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"a seed must be a whole number (or a string), not {part!r}")
    address = "|".join([purpose, *(f"{type(p).__name__}:{p}" for p in parts)])
    return int.from_bytes(hashlib.sha256(address.encode()).digest()[:8], "big") >> 1


def generator(purpose: str, *parts: int | str) -> torch.Generator:
    """A CPU ``torch.Generator`` at the start of that stream."""
    return torch.Generator().manual_seed(derive_seed(purpose, *parts))
