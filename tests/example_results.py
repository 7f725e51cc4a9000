"""Results by hand, for tables and figures."""

import math


def result_of(rows, cells=None, groups=(), **config):
    """A result of ``rows``, {row: accuracy of each set seed}, nan where it has not run; in ``cells``, {cell: such rows}.

    ``groups``: the classes that its notes name.
    """
    scores = [
        {"cell": cell, "row": row, "method": row.split("/")[0], "recipe": row.split("/")[-1], "set_seed": seed,
         "accuracy": accuracy, "normalized": accuracy, "examples": 4}
        for cell, of_cell in (cells or {"example": rows}).items()
        for row, accuracies in of_cell.items() for seed, accuracy in enumerate(accuracies) if not math.isnan(accuracy)
    ]
    of_cells = {"example": {"notes": {"example 0": {"groups": [*groups]}}}} if groups else {}
    return {"config": {"rows": [*rows], **config}, "cells": of_cells, "scores": scores}
