"""One runner for every experiment: its scores are made one by one, written as they come, and never made twice.

A :class:`Run` has a table of cells, one for each row (``method/recipe``) and each seed of its settings.  A kind of experiment
is a subclass that says how a cell is scored (:meth:`Run.score`) and how a set is made (:meth:`Run.create`).  All else stands
here: the folder of work and who may use it, the result that is gone on with, the cells that are missing, sets that are kept
and learned, several processes that share one result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller, digest
from distillkit.core.inner import Unroll
from distillkit.core.loading import load_student
from distillkit.core.metagrad import ForwardDifference, Replay
from distillkit.core.objectives import BPTT
from distillkit.core.optimizers import SGD, Optimizer
from distillkit.core.student import Student
from distillkit.data.instruction import InstructionTask
from distillkit.data.load import load_task
from distillkit.data.tasks import Task
from distillkit.evaluation.selection import ALL_METHODS, METHODS, select
from distillkit.experiments.results import as_config, check_same_settings, read, take_up, write
from distillkit.experiments.settings import Data, names
from distillkit.io.checks import check_choice
from distillkit.io.progress import progress
from distillkit.io.storage import Claim
from distillkit.text.projection import NeighborLoss

CONFIGS = Path(__file__).parent / "configs"
# Settings that say which scores a run makes, not how its sets are made.
SCORES = ("name", "rows", "seeds", "eval_seeds", "full_seeds", "committed", "committed_rows")


def load_corpus(settings: Data, *, seed: int = 0) -> Task:
    """The task that settings name."""
    return load_task(settings.corpus, max_length=settings.max_length, limit=settings.limit, seed=seed,
                     text_column=settings.text_column, label_column=settings.label_column)


def strategy(metagrad: str | None):
    """The strategy of meta-gradients that settings name; None, by which an objective takes what suits its student."""
    return {"replay": Replay(), "forward_difference": ForwardDifference()}.get(metagrad or "")


def unroll_of(settings, *, steps: int | None = None, optimizer: Optimizer | None = None, **more) -> Unroll:
    """The inner loop that settings describe, by default of SGD; ``more`` is as :class:`~distillkit.core.inner.Unroll` takes."""
    return Unroll(steps or settings.unroll_steps, optimizer=optimizer or SGD(settings.step_size),
                  batch_size=settings.inner_batch, **more)


def neighbor_terms(student: Student, weight: float) -> tuple[NeighborLoss, ...]:
    """The neighbour term that grows linearly to ``weight``; none for 0."""
    return (NeighborLoss(student, weight=lambda progress: weight * progress),) if weight else ()


class Run:
    """An experiment under way; every score is written to ``folder/<name>.json`` as soon as it is made.

    Args:
        job: the settings.
        folder: where the result goes; a result that is there already is gone on with.
        work: where experts, checkpoints and sets go, ``work/<name>``.
        task, student: what it is about; by default what the settings name.

    Raises:
        ValueError: the result in ``folder`` was made with other settings or another corpus; or a question of validation or test
            has no choices, so there is no accuracy.
    """

    job: Any
    by_seed: ClassVar[bool] = True  # whether every seed has a set and a score of its own

    def __init__(self, job, folder: str | Path, work: str | Path, task: Task | None = None, student: Student | None = None):
        self.job, self.work, self.path = job, Path(work) / job.name, Path(folder) / f"{job.name}.json"
        self.task = load_corpus(job) if task is None else task
        if isinstance(self.task, InstructionTask):
            for split in ("validation", "test"):
                self.task.check_choices(split)
        self.student = load_student(job.student, self.task, trainable=job.trainable) if student is None else student
        self.claim = Claim(self.work, wait=True, shared=True)
        self.result = take_up(self.path, job, self.task)
        self._sets: dict[tuple[str, int], DistilledSet] = {}

    def __call__(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> dict:
        """Make every score that is missing, or those of the rows and seeds that are named; returns the result.

        Processes with the same folder of results may work on different rows or seeds of one result at the same time.
        """
        for row in only:
            check_choice("a row", row, self.job.rows)
        if unknown := [seed for seed in seeds if seed not in self.job.seeds]:
            raise ValueError(f"no seed {unknown[0]!r} in this job; it has {', '.join(map(str, self.job.seeds))}")
        with self.claim:
            for seed, row in progress(self.missing(self.result, self.job, only, seeds), desc="scores", unit="score"):
                self._add(row, seed, self.score(*row.split("/"), seed))
            self.finish()
        return self.result

    @classmethod
    def missing(cls, result: Mapping, job, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[tuple[int, str]]:
        """Seed and row of each score that ``result`` lacks, of those that are named or of all."""
        rows = [row for row in job.rows if not only or row in only]
        return [(seed, row) for seed in seeds or job.seeds for row in rows if cls.stored(result, row, seed) is None]

    @classmethod
    def stored(cls, result: Mapping, row: str, seed: int) -> dict | None:
        """The score of a row and seed in a result; None where it has not been made."""
        scores = result.get("rows", {}).get(row)
        return scores.get(str(seed)) if scores and cls.by_seed else scores

    def _add(self, row: str, seed: int, score: dict) -> None:
        """Write a score, and take over what other processes have written meanwhile."""
        with Claim(self.path, wait=True):  # beside the result, which other work folders may share
            result = take_up(self.path, self.job, self.task)
            result["rows"][row] = result["rows"].get(row, {}) | {str(seed): score} if self.by_seed else score
            result["distilling"] |= self.result["distilling"]
            result["rows"] = {name: result["rows"][name] for name in self.job.rows if name in result["rows"]}
            write(self.path, result)
            self.result = result

    # What a kind of experiment says

    def score(self, method: str, recipe: str, seed: int) -> dict:
        """Train and score the students of one cell."""
        raise NotImplementedError

    def create(self, method: str, seed: int) -> DistilledSet:
        """Make the set of a method that is not a selection of real rows."""
        raise NotImplementedError

    def selector(self, method: str) -> Student:
        """The student that a selection of real rows asks."""
        return self.student

    def finish(self) -> None:
        """What is left to do once every score is there."""

    # What they share

    def headline(self) -> str:
        """What is about to be run, in a line."""
        sizes = " / ".join(str(len(self.task.split(split))) for split in ("train", "validation", "test"))
        return f"{self.task.name}: {sizes} rows; student {self.student.name}"

    def set_of(self, method: str, seed: int) -> DistilledSet:
        """The set of a method and a seed: selected, read from ``work``, or made."""
        if (method, seed) not in self._sets:
            if method in ALL_METHODS:
                found = select(self.task, self.selector(method), method, **self.job.size(seed))
            else:
                found = self.saved(method, seed, lambda: self.create(method, seed))
            self._sets[method, seed] = found
        return self._sets[method, seed]

    def saved(self, name: str, seed: int, make: Callable[[], DistilledSet]) -> DistilledSet:
        """A set that is read from ``work`` if an earlier run has made it there, with the same settings."""
        self._check_work()
        path = self.work / self._file(name, seed)
        if not path.exists():
            make().save(path)
        return DistilledSet.load(path)

    def _check_work(self) -> None:
        """Raise ValueError if the sets in ``work`` were made with other settings; else write the settings down."""
        path, current = self.work / "settings.json", as_config(self.job)
        if path.is_file():
            stored = read(path)["config"]
            check_same_settings(self.work, stored | {key: current[key] for key in SCORES if key in current}, self.job)
        else:
            write(path, {"config": current})

    def distil(
        self, name: str, seed: int, start: DistilledSet, objective, *, steps: int | None = None, **options
    ) -> DistilledSet:
        """Learn a set from ``start`` by the outer loop of the settings; ``options`` are the distiller's."""
        self._check_work()
        distiller = Distiller(start, objective, seed=seed, checkpoint=self.checkpoint(name, seed),
                              **self.job.rates(), **options)
        for _ in distiller.run(steps or self.job.outer_steps):
            pass
        records = distiller.records
        terms = {term: [round(r.terms[term], 5) for r in records] for term in records[0].terms}
        self.note(name, seed, [r.loss for r in records], sum(r.seconds for r in records),
                  **({"terms": terms} if len(terms) > 1 else {}))
        return distiller.distilled

    def objective(self, task: Task | None = None, student: Student | None = None, **unroll) -> BPTT:
        """The loss on real data after the inner loop; ``unroll`` is as :func:`unroll_of` takes it."""
        return BPTT(task or self.task, student or self.student, unroll_of(self.job, **unroll),
                    metagrad=strategy(self.job.metagrad), batch_size=self.job.outer_batch)

    def note(self, name: str, seed: int, losses: Sequence[float], seconds: float, **more) -> None:
        """Keep beside the scores how a set was made."""
        self.result["distilling"][f"{name} {seed}" if self.by_seed else name] = {
            "steps": len(losses), "seconds": round(seconds, 1), "losses": [round(loss, 4) for loss in losses], **more,
        }

    def checkpoint(self, name: str, seed: int) -> Path:
        """The file where the making of a set can be taken up."""
        return self.work / f"checkpoint-{self._file(name, seed)}"

    def _file(self, name: str, seed: int) -> str:
        return name.replace(" ", "_") + (f"-{seed}" if self.by_seed else "")

    def twin(self, method: str, recipe: str, seed: int) -> dict | None:
        """The score of another method that selected the very same sentences, as herding and k-centre do at one per class."""
        for other in METHODS if method in METHODS else ():
            score = None if other == method else self.stored(self.result, f"{other}/{recipe}", seed)
            if score and digest(self.set_of(other, seed)) == digest(self.set_of(method, seed)):
                return {**score, "same_set_as": other}
        return None


# All that the score of a selected set depends on.
SELECTING = (*names(Data), "per_class", "fraction", "length", "seed", "eval_seeds")
