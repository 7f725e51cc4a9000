"""Converts the results of distillkit 0.1 (nested rows and cells) to one tidy table of scores per file.

    python figures/convert_results.py figures/results

Fields that the old results do not hold are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distillkit.experiments.kinds import KINDS
from distillkit.experiments.results import as_config, read, settings_hash, write
from distillkit.experiments.runner import _ordered, size_columns
from distillkit.experiments.settings import tupled
from distillkit.experiments.transfer import parsed

NESTED = {"mean", "std", "scores", "groups", "recipe", "text", "method", "normalized", "calibrated", "dropped", "context", "k",
          "rows", "retokenized", "factors", "settings", "accuracy"}


def columns_of(job, kind, row):
    if kind == "transfer":
        source, target, method = parsed(row)
        columns = {"target": job.by_name[target], "method": method, "recipe": job.recipe if source else "standard"}
        return columns | ({"source": job.by_name[source], **size_columns(job.making(source))} if source else {})
    method, recipe = row.split("/")
    if kind == "prompting":
        return {"source": job.student, "target": job.student, "method": method, "shots": int(recipe),
                **(size_columns(job) if int(recipe) else {})}
    has_set = method not in ("full", "zero-shot", "none")
    columns = {"source": job.student if has_set else None, "target": job.student, "method": method, "recipe": recipe,
               **(size_columns(job) if has_set and method != "bytes" else {})}
    return columns | ({"target": job.target} if recipe == "transfer" else {})


def inits(job, kind, row, seed):
    method = row.split("/")[-1 if kind == "transfer" else 0]
    if kind == "classification":
        return job.full_seeds if method == "full" else job.eval_seeds
    return (seed,) if kind == "instruction" or method == "full" else job.eval_seeds


def rows_of(score, job, kind, row, seed):
    """Rows of the table, and the note, of what was a dictionary."""
    shared = {key: value for key, value in score.items() if key not in NESTED and value is not None}
    note = {key: score[key] for key in ("groups", "recipe", "retokenized", "factors", "settings", "accuracy") if key in score}
    if kind == "prompting":
        columns = {"accuracy": score["scores"], "normalized": score["normalized"], "calibrated": score["calibrated"],
                   "dropped": score["dropped"], "context": score["context"]}
        return [{"order": order, "questions": score["rows"], **dict(zip(columns, values, strict=True))}
                for order, values in enumerate(zip(*columns.values(), strict=True))], note
    if row == "alone/own":
        return [{"task": task, "accuracy": value} for task, value in score["groups"].items()], {}
    if "scores" not in score:  # a stream, of which the mean over initialisations was kept; or a model that nothing is drawn of
        init = {"init_seed": seed} if kind == "instruction" else {}
        normalized = {"normalized": score["normalized"][0]} if "normalized" in score else {}
        return [init | {"accuracy": score["mean"]} | shared | normalized], note
    rows = [{"init_seed": init, "accuracy": value, **shared}
            for init, value in zip(inits(job, kind, row, seed), score["scores"], strict=True)]
    for number, value in enumerate(score.get("normalized", ())):
        rows[number]["normalized"] = value
    return rows, note


def renamed_notes(distilling, job, kind):
    """Notes of sets: with the seed in their names, and the labels' under their row's method."""
    if kind != "classification":
        return distilling
    names = {"labels": "real + learned labels"}
    return {f"{names.get(name, name)} {job.seed}": note for name, note in distilling.items()}


def cell_of(old, key, job, kind, experiment):
    """A cell of the new form and its rows of the table."""
    notes, table = renamed_notes(old["distilling"], job, kind), []
    if "text" in old:
        notes[f"projected {job.seed}"] = {"text": old["text"]}
    for row, seeds in old["rows"].items():
        for seed, score in ({str(job.seed): seeds} if kind == "classification" else seeds).items():
            rows, note = rows_of(score, job, kind, row, int(seed))
            if "text" in score:
                name = f"{row.split('/')[0]}{' relabelled' if row.endswith('/relabelled') else ''} {seed}"
                notes[name] = notes.get(name, {}) | {"text": score["text"]}
            if note:
                notes[f"{row} {seed}"] = note
            place = {"experiment": experiment, "cell": key, "row": row, "set_seed": int(seed)}
            columns = {"corpus": old["corpus"]["name"], "split": "test", **columns_of(job, kind, row)}
            if "committed" not in score:  # those were made by another run, perhaps elsewhere
                columns |= {"settings_hash": settings_hash(job), "machine": old["machine"]["processor"]}
            table += [_ordered(columns | values | place) for values in rows]
    header = {part: old[part] for part in ("corpus", "machine", "versions", "date")}
    return {"config": as_config(job), **header, "notes": notes}, table


def convert(old):
    """A result of distillkit 0.1 in the form of now."""
    kind = old["config"].get("kind", "classification")
    job = KINDS[kind][0](**tupled(old["config"]))
    if "cells" in old:
        cell_kind = {"text_grid": "text"}.get(kind, "classification")
        jobs, olds = job.cells(), old["cells"]
    else:
        cell_kind, jobs, olds = kind, {job.name: job}, {job.name: old}
    result = {"config": as_config(job), "cells": {}, "scores": []}
    for key, cell in olds.items():
        result["cells"][key], table = cell_of(cell, key, jobs[key], cell_kind, job.name)
        result["scores"] += table
    cells, rows = [*jobs], job.rows
    result["scores"].sort(key=lambda score: (cells.index(score["cell"]), rows.index(score["row"]), score["set_seed"]))
    return result


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        old = read(path)
        if "config" in old and "scores" not in old:
            write(path, convert(old))
