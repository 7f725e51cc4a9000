"""One set distilled by BPTT, scored beside every honest baseline of its size.

The rows, all scored on the same test split with the same fresh seeds:

* ``random``, ``k_center``, ``herding``: real sentences with hard labels, recipe tuned on the validation split.
* ``real + learned labels``: random real sentences left as they are; only soft labels and step sizes were learned.  What
  it gains over ``random`` is the labels' doing and must not be mistaken for learned inputs.
* ``embeddings``: the distilled set, under its own recipe and, if asked for, under the others.
* ``projected``: its nearest-token text.
* ``full``: the whole training split, standard fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from distillkit.core.distilled import DistilledSet
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import METHODS
from distillkit.experiments.results import as_json, markdown, read, write
from distillkit.experiments.runner import Run
from distillkit.experiments.settings import Data, Experiment, Inner, Outer, Scoring, SetSeed, Size, option, settings, whole
from distillkit.text.projection import project

ROWS = (
    *((m, "tuned") for m in METHODS),
    ("real + learned labels", "own"),
    *(("embeddings", r) for r in ("own", "standard", "tuned")),
    *(("projected", r) for r in ("own", "standard", "tuned")),
    ("full", "standard"),
)
ROW_NAMES = tuple(f"{m}/{r}" for m, r in ROWS)


@settings(kind="classification", rows=ROW_NAMES, metagrad="forward_difference")
class ClassificationJob(Experiment, Data, Size, Inner, Outer, SetSeed, Scoring):
    """Settings of one experiment."""

    label_steps: int | None = whole(None, "outer steps of the row 'real + learned labels' (default: outer_steps)")
    full_seeds: tuple[int, ...] = option((0, 1, 2), "fresh initialisations that are trained on the full data, the longest work")
    committed: str | None = option(None, "name of a committed result that committed_rows are taken from, not computed")
    committed_rows: tuple[str, ...] = option((), "which rows are taken from there")

    def __post_init__(self):
        super().__post_init__()
        if unknown := [row for row in self.committed_rows if row not in ROW_NAMES]:
            raise ValueError(f"unknown row {unknown[0]!r} in committed_rows; there are {', '.join(ROW_NAMES)}")
        if bool(self.committed) != bool(self.committed_rows):
            raise ValueError("committed and committed_rows belong together: the name of a result, and rows to take from it")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the sets: one."""
        return (self.seed,)


class ClassificationRun(Run):
    """An experiment on classification under way; see :class:`~distillkit.experiments.runner.Run`.

    Args:
        committed: folder of the result that ``job.committed`` names; default: ``folder``.
    """

    job: ClassificationJob
    by_seed = False

    def __init__(self, job: ClassificationJob, folder: str | Path, work: str | Path, committed: str | Path | None = None):
        super().__init__(job, folder, work)
        self.committed = Path(folder if committed is None else committed)
        for name in job.committed_rows:
            self._committed(name)  # said now if it is missing, not after all other rows

    def score(self, method: str, recipe: str, seed: int) -> dict:
        if (row := f"{method}/{recipe}") in self.job.committed_rows:
            return self._committed(row)
        if score := self.twin(method, recipe, seed):
            return score | {"method": method}
        set_, seeds = (None, self.job.full_seeds) if method == "full" else (self.set_of(method, seed), self.job.eval_seeds)
        return {"method": method, **as_json(evaluate(set_, self.task, self.student, seeds=seeds, recipe=recipe))}

    def create(self, method: str, seed: int) -> DistilledSet:
        job = self.job
        if method == "projected":
            return project(self.set_of("embeddings", seed), self.student)
        if method == "labels":
            start = self.set_of("random", seed).soften()
            steps = job.label_steps or job.outer_steps
            return self.distil("labels", seed, start, self.objective(), steps=steps, learn=("targets", "step_sizes"))
        start = DistilledSet.from_real(self.task, self.student, **job.size(seed))
        return self.distil("embeddings", seed, start, self.objective())

    def set_of(self, method: str, seed: int) -> DistilledSet:
        return super().set_of("labels" if method == "real + learned labels" else method, seed)

    def saved(self, name: str, seed: int, make: Callable[[], DistilledSet]) -> DistilledSet:
        """The set; the losses of an earlier run, which the figure shows, are read from its checkpoint."""
        if name not in self.result["distilling"] and self.checkpoint(name, seed).exists():
            self._check_work()
            make().save(self.work / self._file(name, seed))
        return super().saved(name, seed, make)

    def finish(self) -> None:
        """Keep the text of the projected set with the scores."""
        # Asked of the rows, not of the sets at hand: an interrupted run may have made those rows in an earlier process.
        if "text" not in self.result and any(r.startswith(("embeddings/", "projected/")) for r in self.result["rows"]):
            self.result["text"] = self.set_of("projected", self.job.seed).to_text().to_list()
            write(self.path, self.result)

    def _committed(self, row: str) -> dict:
        path = self.committed / f"{self.job.committed}.json"
        if not path.is_file():
            raise FileNotFoundError(f"committed={self.job.committed!r}, but there is no result {path}; make it first")
        result = read(path)
        if (score := result["rows"].get(row)) is None:
            raise ValueError(f"committed={self.job.committed!r}, but {path} has no row {row}; finish it first")
        # The docstring corpus follows the versions of the installed libraries.
        same = result["corpus"]["sha256"] == self.task.fingerprint
        return {**score, "committed": "same corpus" if same else "another version of the corpus"}


def table(result: Mapping) -> str:
    """The result as a Markdown table."""
    lines = []
    for name in result["config"]["rows"]:
        method, recipe = name.split("/")
        if not (row := result["rows"].get(name)):
            lines.append([method, recipe, None, None, "not run", None, None])
            continue
        mark = f" (committed, {row['committed']})" if "committed" in row else ""
        deviation = "" if row["std"] is None else f" ± {row['std']:.3f}"
        lines.append([f"{row['method']}{mark}", row["recipe"]["name"], f"{row['examples']:,}", f"{row['nbytes']:,}",
                      f"{row['mean']:.3f}{deviation}", str(len(row["scores"])), f"{row['seconds']:.1f}"])
    heads = ["method", "recipe", "examples", "bytes", "accuracy (mean ± sd)", "seeds", "seconds to train"]
    return "\n".join(markdown(heads, lines, "ll"))
