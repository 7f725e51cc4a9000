"""Lens without a kernel: one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from distillkit.io.storage import absolute, replacing

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>:root {{ color-scheme: light dark }}
body {{ margin: 12px auto; padding: 0 12px; max-width: 1280px; background: Canvas; color: CanvasText }}
{style}</style></head>
<body><main id="lens"></main><script type="application/json" id="stored">{stored}</script>
<script type="module">
{script}
</script></body></html>
"""


def page(title: str, state: dict, answers: dict[str, tuple[dict, list[bytes]]], script: str, style: str) -> str:
    """A page that shows the widget's ``state`` and gives the stored ``answers``; it fetches nothing."""
    stored = {
        "state": state | {"binary": _text(state["binary"])},
        "answers": {key: {"reply": reply, "buffers": [*map(_text, parts)]} for key, (reply, parts) in answers.items()},
    }
    # In JSON a "<" stands only within strings, where it may be written so; then no text can end the script.
    inside = json.dumps(stored, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.format(title=html.escape(title), style=style, stored=inside, script=script)


def save(path: str | Path, text: str) -> Path:
    """Write a page, all or nothing; returns where it is."""
    path = absolute(path)
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
    return path


def _text(part: bytes) -> str:
    return base64.b64encode(part).decode("ascii")
