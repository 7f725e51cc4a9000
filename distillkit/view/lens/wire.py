"""What goes to the front end: its script and style, and arrays as one buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PARTS = ("draw", "store", "paint", "map", "tokens", "heads", "workbench", "lens")  # in this order one module
FULL = 65_535  # the coordinate of what is absent; the others are below


def style() -> str:
    """The style sheet."""
    return (HERE / "lens.css").read_text(encoding="utf-8")


def script(*more: str) -> str:
    """The front end as one ES module, with further parts."""
    return "\n".join((HERE / "js" / f"{part}.js").read_text(encoding="utf-8") for part in (*PARTS, *more))


def scaled(method: str, background: np.ndarray, points: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Both parts of a map as uint16, on one scale that holds all of them, and the scale; absent points are :data:`FULL`."""
    both = np.concatenate([background, points.reshape(-1, 2)])
    least = np.nanmin(both, axis=0)
    span = float(np.nanmax(both - least)) or 1.0

    def whole(values: np.ndarray) -> np.ndarray:
        return np.nan_to_num((values - least) / span * (FULL - 1), nan=FULL).round().astype("<u2")

    arrays = {f"{method}.background": whole(background), f"{method}.points": whole(points)}
    return arrays, {"least": least.tolist(), "unit": span / (FULL - 1)}


def packed(content: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict, bytes]:
    """``content`` with where each array lies in the buffer beside it; every array begins at a multiple of 4 bytes."""
    buffer, places = bytearray(), {}
    for name, array in arrays.items():
        buffer += b"\0" * (-len(buffer) % 4)
        places[name] = [array.dtype.name, list(array.shape), len(buffer)]
        buffer += array.tobytes()
    return content | {"arrays": places}, bytes(buffer)
