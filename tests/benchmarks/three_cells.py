"""Three cells of an evidence table, drawn at random and made again through the public API alone.

    python tests/benchmarks/three_cells.py                        # of figures/results/evidence_docstrings.json
    python tests/benchmarks/three_cells.py evidence_ag_news --seed 7

A cell is one row of the table with one of its sets.  Nothing of :mod:`distillkit.experiments` is used, so that an error of the
runner would show.  Settings and initialisations are read from the stored result.  A cell holds if the two means differ by at
most one standard deviation, that of a score over initialisations (root mean square over the table's cells).  With the same
processor and versions they are equal.  The exit code is 1 if a cell does not hold.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import statistics
import sys
from pathlib import Path

import distillkit as dk

RESULTS = Path(__file__).parents[2] / "figures" / "results"
TEACHER = " + teacher labels"
SELECTED = ("random", "k_center", "herding", "k_means", "keywords")
ROWS = [f"{method}{labels}/tuned" for method in SELECTED for labels in ("", TEACHER)]
ROWS += [f"embeddings/{recipe}" for recipe in ("own", "tuned", "standard")]


def made_again(settings: dict, per_class: int, row: str, set_seed: int, corpus_sha256: str) -> float:
    """Select or distil the set of one cell; returns its mean accuracy."""
    method, recipe = row.split("/")
    task = dk.load_task(settings["corpus"], max_length=settings["max_length"], limit=settings.get("limit"))
    if task.fingerprint != corpus_sha256:
        sys.exit(f"{settings['corpus']} is another corpus here than the table's")
    drawn, student = dk.bootstrap(task, set_seed), dk.load_student(settings["student"], task)
    size = {"per_class": per_class, "length": settings["length"], "seed": set_seed}
    if method == "embeddings":
        unroll = dk.Unroll(settings["unroll_steps"], optimizer=dk.SGD(settings["step_size"]))
        objective = dk.BPTT(drawn, student, unroll, metagrad=dk.ForwardDifference(), batch_size=settings["outer_batch"])
        rates = {rate: settings[rate] for rate in ("lr", "label_lr", "step_size_lr") if rate in settings}
        distiller = dk.Distiller(dk.DistilledSet.from_real(drawn, student, **size), objective, seed=set_seed, **rates)
        for _ in distiller.run(settings["outer_steps"]):
            pass
        distilled = distiller.distilled
    else:
        distilled = dk.select(drawn, student, method.removesuffix(TEACHER), **size)
        if method.endswith(TEACHER):
            distilled = dk.with_teacher_labels(distilled, drawn)
    tuned = dk.Tuned(settings["tuned_grid"], initialisations=settings["tuned_initialisations"], rows=settings["tuned_rows"])
    recipe = tuned if recipe == "tuned" else recipe
    return dk.evaluate(distilled, drawn, student, seeds=settings["eval_seeds"], recipe=recipe).mean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", default="evidence_docstrings", help="name of a committed evidence result")
    parser.add_argument("--seed", type=int, default=0, help="which three cells")
    args = parser.parse_args()
    result = json.loads((RESULTS / f"{args.result}.json").read_text())
    scores = collections.defaultdict(list)
    for score in result["scores"]:
        if score["row"] in ROWS:
            scores[score["cell"], score["row"], score["set_seed"]].append(score["accuracy"])
    one_sd = math.sqrt(statistics.mean(statistics.variance(of_cell) for of_cell in scores.values()))
    holds = []
    for cell, row, set_seed in random.Random(args.seed).sample(sorted(scores), 3):
        table = statistics.mean(scores[cell, row, set_seed])
        again = made_again(result["config"]["base"], int(cell.removeprefix("per_class=")), row, set_seed,
                           result["cells"][cell]["corpus"]["sha256"])
        holds.append(abs(again - table) <= one_sd)
        verdict = "holds" if holds[-1] else "DIFFERS"
        print(f"{cell}, {row}, set {set_seed}: table {table:.3f}, again {again:.3f}; one sd {one_sd:.3f}: {verdict}",
              flush=True)
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
