"""One runner for every experiment: scores are computed one by one, written as they come, and never computed twice.

An experiment yields cells.  A :class:`Cell` has a corpus, a student and the sets learned or selected for them; a kind of
experiment is a subclass that says how a row is scored (:meth:`Cell.score`) and how a set is made (:meth:`Cell.create`).  A
grid has many cells, every other kind has one.  :class:`Run` does the rest for all of them: which scores are missing, the
result that grows, several processes that share it, selections that need no second training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller, digest, distil_together
from distillkit.core.estimate import announce
from distillkit.core.loading import load_student
from distillkit.core.objectives import BPTT
from distillkit.core.student import Student
from distillkit.data.corpus import CorpusError
from distillkit.data.instruction import InstructionTask
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.recipes import Until
from distillkit.evaluation.selection import ALL_METHODS, select
from distillkit.experiments.building import load_corpus, recipe_of, start_of, strategy, unroll_of
from distillkit.experiments.results import (
    REPLACE,
    SCORES,
    as_config,
    check_same_settings,
    corpus_of,
    new_cell,
    now,
    processor,
    read,
    rows_of,
    settings_hash,
    take_up,
    write,
)
from distillkit.experiments.settings import Data, Grid, Scoring, names
from distillkit.io.checkpoint import first_difference
from distillkit.io.checks import check_choice
from distillkit.io.deadline import NEVER, Deadline
from distillkit.io.escaping import one_line, say
from distillkit.io.progress import progress
from distillkit.io.storage import Claim
from distillkit.text.projection import NeighborLoss, project

CONFIGS = Path(__file__).parent / "configs"
Scores = tuple[list[dict], dict]  # a row of the table for each student, and the note beside them


class Cell:
    """A corpus, a student, and the sets and scores of one experiment or of one cell of a grid.

    Args:
        job: the settings.
        work: where experts, checkpoints and sets go.
        results: the folder of results that committed rows are taken from.
        task, student: by default what the settings name.

    Raises:
        ValueError: a question of validation or test has no choices, so there is no accuracy.
    """

    job: Any
    texts: ClassVar[Sequence[str]] = ()  # sets whose text goes into the notes
    selections: ClassVar[Sequence[str]] = ()  # methods whose equal sets are scored once
    projected: ClassVar[Mapping[str, str]] = {}  # method of nearest tokens: the set that they are nearest to
    deadline: Deadline = NEVER  # when to end with TimeUp; a set that is being learned is gone on with by the next run
    siblings: Callable[[], list[Cell]] = list  # the cells of the grid that differ from this one in their seed alone

    def __init__(self, job, work: Path, results: Path, task: Task | None = None, student: Student | None = None):
        self.job, self.work, self.results = job, work, results
        self.task = load_corpus(job) if task is None else task
        if isinstance(self.task, InstructionTask):
            for split in ("validation", "test"):
                self.task.check_choices(split)
        self.student = load_student(job.student, self.task, trainable=job.trainable) if student is None else student
        self.notes: dict[str, Any] = {}
        self.set_of = functools.cache(self._set_of)

    # What a kind of experiment says

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        """Train and score the students of one row and set seed."""
        if method == "full":
            return self.evaluated(None, recipe, getattr(self.job, "full_seeds", None) or (seed,))
        return self.evaluated(self.set_of(method, seed), recipe)

    def create(self, method: str, seed: int) -> DistilledSet:
        """Make a set that is no selection of real rows: by default by BPTT, or the nearest tokens of another set."""
        if method in self.projected:
            return project(self.set_of(self.projected[method], seed), self.student)
        return self.distil(method, seed, self.start(seed), self.objective())

    def selector(self, method: str) -> Student:
        """The student that a selection of real rows asks."""
        return self.student

    def columns(self, method: str, recipe: str) -> dict:
        """What the table says of the students of a row besides their scores."""
        has_set = method not in ("full", "zero-shot", "none", "bytes")
        return {"source": self.job.student if has_set else None, "target": self.job.student, "method": method, "recipe": recipe,
                **(size_columns(self.job) if has_set else {})}

    # What they share

    def evaluated(self, distilled: DistilledSet | None, recipe, seeds: Sequence[int] | None = None, *, task: Task | None = None,
                  student: Student | None = None, also: Sequence[Task] = ()) -> Scores:
        """Scores of fresh students, by default those of the settings; see :func:`~distillkit.evaluation.evaluate.evaluate`."""
        seeds = self.job.eval_seeds if seeds is None else seeds
        recipe = recipe_of(self.job, recipe)
        if math.isfinite(self.deadline.left()):
            recipe = Until(recipe, self.deadline)
        score = evaluate(distilled, task or self.task, student or self.student, seeds=seeds, recipe=recipe, also=also)
        return rows_of(score, seeds)

    def _set_of(self, method: str, seed: int) -> DistilledSet:
        """The set of a method and a seed: selected, read from ``work``, or made."""
        if method in ALL_METHODS:
            return select(self.task, self.selector(method), method, **self.job.size(seed))
        return self.saved(method, seed, lambda: self.create(method, seed))

    def saved(self, name: str, seed: int, make: Callable[[], DistilledSet]) -> DistilledSet:
        """A set that is read from ``work`` if an earlier run with the same settings has made it, else made.

        Where its losses are not in the notes, they are read from its checkpoint.

        Raises:
            ValueError: the sets in ``work`` were made with other settings.
        """
        path, current = self.work / "settings.json", as_config(self.job)
        if path.is_file():
            scores = {key: current[key] for key in SCORES if key in current}
            check_same_settings(self.work, read(path)["config"] | scores, self.job)
        else:
            write(path, {"config": current})
        set_path, key = self.work / _file(name, seed), f"{name} {seed}"
        if not set_path.exists() or (key not in self.notes and self.checkpoint(name, seed).exists()):
            make().save(set_path)
        distilled = DistilledSet.load(set_path)
        if name in self.texts:
            self.notes[key] = self.notes.get(key, {}) | {"text": distilled.to_text().to_list()}
        return distilled

    def distil(
        self, name: str, seed: int, start: DistilledSet, objective, *, steps: int | None = None, **options
    ) -> DistilledSet:
        """Learn a set from ``start`` by the outer loop of the settings; ``options`` are the distiller's."""
        distiller = self.distiller(name, seed, start, objective, **options)
        if not self.notes and not distiller.step:  # the first set that this experiment distils
            announce(start, objective, steps or self.job.outer_steps)
        with closing(distiller.run(steps or self.job.outer_steps)) as learning:  # closed early, it saves its last step
            for record in learning:
                if record.step < (steps or self.job.outer_steps):
                    self.deadline.check(record.seconds)
        records = distiller.records
        terms = {term: [round(r.terms[term], 5) for r in records] for term in records[0].terms}
        self.note(name, seed, [r.loss for r in records], sum(r.seconds for r in records),
                  **({"terms": terms} if len(terms) > 1 else {}))
        return distiller.distilled

    def distiller(self, name: str, seed: int, start: DistilledSet, objective, **options) -> Distiller:
        """What learns a set, with the rates of the settings; it goes on from the set's checkpoint."""
        options = {"clip": self.job.clip, **self.job.rates(), **options}
        return Distiller(start, objective, seed=seed, checkpoint=self.checkpoint(name, seed), **options)

    def learn_with_siblings(self, name: str, seed: int) -> None:
        """Bring the checkpoints of a set, and of the same set of all :attr:`siblings`, to their last step."""
        seeds, steps = {seed: self, **{cell.job.seed: cell for cell in self.siblings()}}, self.job.outer_steps
        distillers = [cell.distiller(name, of, cell.start(of), cell.objective()) for of, cell in seeds.items()]
        with closing(distil_together(distillers, steps)) as learning:  # closed early, each saves its last step
            for records in learning:
                if records[0].step < steps:
                    self.deadline.check(sum(record.seconds for record in records))

    def start(self, seed: int, task: Task | None = None, student: Student | None = None) -> DistilledSet:
        """The examples that distilling starts from."""
        return start_of(self.job, task or self.task, student or self.student, seed)

    def objective(self, task: Task | None = None, student: Student | None = None, **unroll) -> BPTT:
        """The loss on real data after the inner loop; ``unroll`` is as :func:`.building.unroll_of` takes it."""
        return BPTT(task or self.task, student or self.student, unroll_of(self.job, **unroll),
                    metagrad=strategy(self.job.metagrad), batch_size=self.job.outer_batch)

    def neighbor_terms(self) -> tuple[NeighborLoss, ...]:
        """The neighbour term, which grows linearly to the weight of the settings; none for 0."""
        weight = self.job.neighbor_weight
        return (NeighborLoss(self.student, weight=lambda progress: weight * progress),) if weight else ()

    def note(self, name: str, seed: int, losses: Sequence[float], seconds: float, **more) -> None:
        """Keep beside the scores how a set was made."""
        self.notes[f"{name} {seed}"] = {
            "steps": len(losses), "seconds": round(seconds, 1), "losses": [round(loss, 4) for loss in losses], **more,
        }

    def checkpoint(self, name: str, seed: int) -> Path:
        """Where an interrupted making of a set goes on."""
        return self.work / f"checkpoint-{_file(name, seed)}"

    def training_hash(self, method: str, recipe: str, seed: int) -> str | None:
        """Hash of a selection of real rows and of how students train on it; None for sets that are not selections.

        Equal hashes mean equal scores, as of herding and k-centre at one example per class, or of cells of a grid that differ
        in distilling only.
        """
        if method not in self.selections:
            return None
        return self.hash_of(digest(self.set_of(method, seed)), recipe)

    def hash_of(self, data, recipe: str) -> str:
        """Hash of what students train on and of how they do."""
        config = as_config(self.job)
        by_grid = {name: config[name] for name in names(Data, Scoring)}
        scoring = by_grid if recipe in ("tuned", "standard") else settings_hash(self.job)
        return hashlib.sha256(json.dumps([data, recipe, scoring], sort_keys=True).encode()).hexdigest()[:16]


def size_columns(job) -> dict:
    """The size of a set, for the table."""
    size = {"fraction": job.fraction} if job.fraction else {"per_class": job.per_class}
    return size | {"length": job.length or job.max_length}


def _file(name: str, seed: int) -> str:
    return f"{name.replace(' ', '_')}-{seed}"


class Run:
    """An experiment under way; every score is written to ``folder/<name>.json`` as soon as it is computed.

    Args:
        cell_class: what computes the scores of a cell.
        job: the settings.
        folder: where the result goes; a result that is there already is gone on with.
        work: experts, checkpoints and sets go to ``work/<name>``.
        fresh: do not look at the result in ``folder``, which is about to be set aside.
        committed: the folder of results that settings may take committed rows from; default ``folder``.
        deadline: when to end with :class:`~distillkit.io.deadline.TimeUp`; the next run goes on.

    Raises:
        ValueError: the result in ``folder`` was made with other settings or another corpus.
    """

    def __init__(self, cell_class: Callable[..., Cell], job, folder: str | Path, work: str | Path, *, fresh: bool = False,
                 committed: str | Path | None = None, deadline: Deadline = NEVER):
        self.cell_class, self.job, self.work, self.deadline = cell_class, job, Path(work) / job.name, deadline
        self._worlds: dict[str, tuple[Task, Student]] = {}  # by the settings that name them: cells of a grid share them
        self.path, self.committed = Path(folder) / f"{job.name}.json", Path(committed or folder)
        self.claim = Claim(self.work, wait=True, shared=True)
        self.skipped: list[str] = []  # cells that could not be run here
        self.cells: dict[str, Any] = job.cells() if isinstance(job, Grid) else {job.name: job}
        self.result = take_up(None if fresh else self.path, job, self.cells)
        self.cell = None if isinstance(job, Grid) else self._load(job.name)

    def headline(self) -> str:
        """What is about to be run, in a line."""
        if self.cell is None:
            return f"{self.job.name}: {len(self.cells)} cells"
        sizes = " / ".join(str(len(self.cell.task.split(split))) for split in ("train", "validation", "test"))
        return f"{self.cell.task.name}: {sizes} rows; student {self.cell.student.name}"

    def __call__(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> dict:
        """Compute every score that is missing; returns the result.

        Processes with the same folder of results may work on different cells, rows or seeds at the same time.

        Args:
            only: names of rows, of cells, or both: these for now.
            seeds: set seeds: these for now.
        """
        for name in only:
            check_choice("rows", name, (*self.cells, *self.job.rows))
        known = {seed for cell in self.cells.values() for seed in cell.seeds}
        if unknown := [seed for seed in seeds if seed not in known]:
            raise ValueError(f"seeds: no seed {unknown[0]!r} in this job; it has {', '.join(map(str, sorted(known)))}")
        rows = [row for row in self.job.rows if row in only or not {*only} & {*self.job.rows}]
        with self.claim:
            for key in self.cells:
                if key in only or not {*only} & {*self.cells}:
                    self._compute(key, rows, seeds)
        return self.result

    def score(self, key: str, row: str, seed: int) -> None:
        """Compute one score, of the cell ``key``, whether it is there already or not, and write it.

        Raises:
            TimeUp: the deadline came first; a set that was being learned is gone on with by the next call.
            CorpusError, FileNotFoundError, FloatingPointError: the cell cannot be run here.
        """
        with self.claim:
            self._add(key, self.cell or self._load(key), row, seed)

    def _compute(self, key: str, rows: Sequence[str], seeds: Sequence[int]) -> None:
        """Compute the missing scores of a cell; a cell of a grid that cannot be run is skipped, with the reason printed."""
        scored = {(row["row"], row["set_seed"]) for row in self.result["scores"] if row["cell"] == key}
        chosen = [seed for seed in self.cells[key].seeds if not seeds or seed in seeds]
        seeds_of = self.cells[key].seeds_of
        missing = [(row, seed) for seed in chosen for row in rows if seed in seeds_of(row) and (row, seed) not in scored]
        if not missing:
            return
        try:
            cell = self.cell or self._load(key)
            for row, seed in progress(missing, desc=key, unit="score"):
                self._add(key, cell, row, seed)
        except (CorpusError, FileNotFoundError, FloatingPointError) as error:
            if self.cell:
                raise
            self.skipped.append(key)
            say(f"{key}: skipped: {one_line(error)}")

    def _load(self, key: str) -> Cell:
        job = self.cells[key]
        config = as_config(job)
        world = json.dumps({name: config.get(name) for name in names(Data)})
        cell = self.cell_class(job, self.work / job.name if isinstance(self.job, Grid) else self.work, self.committed,
                               *self._worlds.get(world, ()))
        self._worlds[world], cell.deadline = (cell.task, cell.student), self.deadline
        cell.siblings = functools.partial(self._siblings, key)
        if stored := self.result["cells"].get(key):
            if difference := first_difference(stored["corpus"], corpus_of(cell.task)):
                raise ValueError(f"{self.path} is the result of a run with another corpus: {difference}; {REPLACE}")
            cell.notes |= stored["notes"]
        return cell

    def _siblings(self, key: str) -> list[Cell]:
        """The cells that differ from the cell ``key`` in their seed alone."""
        alike = {other: as_config(job) | {"name": "", "seed": 0} for other, job in self.cells.items()}
        return [self._load(other) for other in alike if other != key and alike[other] == alike[key]]

    def _add(self, key: str, cell: Cell, row: str, seed: int) -> None:
        """Score a row and write it, beside what other processes have written meanwhile."""
        method, recipe = row.split("/")
        training = cell.training_hash(method, recipe, seed)
        scores, note = self._twin(training) or cell.score(method, recipe, seed)
        place = {"experiment": self.job.name, "cell": key, "row": row, "set_seed": seed}
        columns = place | {"corpus": cell.task.name, **cell.columns(method, recipe), "split": "test", "training_hash": training,
                           "settings_hash": settings_hash(cell.job), "machine": processor()}
        rows = [columns | score | place for score in scores]
        notes = cell.notes | {f"{row} {seed}": note | {"made": now()}}
        if self.cell is None:  # curves of losses of dozens of cells would bury the scores
            notes = {name: {k: v for k, v in values.items() if k != "losses"} for name, values in notes.items()}
        with Claim(self.path, wait=True):  # beside the result, which other work folders may share
            self.result = take_up(self.path, self.job, self.cells)
            self.result["cells"].setdefault(key, new_cell(cell.job, cell.task))["notes"] |= notes
            others = [score for score in self.result["scores"] if _place(score) != (key, row, seed)]
            added = [{k: v for k, v in score.items() if v is not None} for score in rows]
            self.result["scores"] = sorted(others + added, key=_place)
            write(self.path, self.result)

    def _twin(self, training: str | None) -> Scores | None:
        """The scores of students that trained on the very same sentences in the same way."""
        scores = self.result["scores"]
        first = next((score for score in scores if training and score.get("training_hash") == training), None)
        if first is None:
            return None
        cell, row, seed = _place(first)
        mark = {"same_set_as": f"{cell}: {row}, set {seed}"}
        same = [{k: v for k, v in score.items() if k not in ("method", "recipe")} | mark
                for score in scores if _place(score) == (cell, row, seed)]
        return same, self.result["cells"][cell]["notes"].get(f"{row} {seed}", {})


def _place(score: Mapping) -> tuple[str, str, int]:
    return score["cell"], score["row"], score["set_seed"]
