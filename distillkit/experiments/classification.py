"""A whole experiment as one object: settings in, a table of scores out, written down as it goes.

A :class:`ClassificationJob` distils a set by BPTT and scores it beside every honest baseline of its size.  Its settings
are a frozen dataclass that comes from a YAML file; its result is a JSON file that holds the settings, the versions, the
corpus by name and hash, and a row for each score.  Rows are written as they are made: a job that was interrupted goes on
with the first row it has not got.

The rows, all scored on the same test split with the same fresh seeds:

* ``random``, ``k_center``, ``herding``: real sentences with hard labels, recipe tuned on the validation split.
* ``real + learned labels``: random real sentences left as they are; only soft labels and step sizes were learned.  What
  it gains over ``random`` is the labels' doing and must not be mistaken for learned inputs.
* ``embeddings``: the distilled set, under its own recipe and, if asked for, under the others.
* ``projected``: its nearest-token text.
* ``full``: the whole training split, standard fine-tuning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller, digest
from distillkit.core.inner import SGD, Unroll
from distillkit.core.metagrad import ForwardDifference, Replay
from distillkit.core.objectives import BPTT
from distillkit.core.students import load_student
from distillkit.data.load import load_task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import METHODS, select
from distillkit.experiments.results import Settings, as_json, read, take_up, write
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.progress import progress
from distillkit.io.storage import Claim
from distillkit.text.projection import project

CONFIGS = Path(__file__).parent / "configs"
ROWS = (
    *((m, "tuned") for m in METHODS),
    ("real + learned labels", "own"),
    *(("embeddings", r) for r in ("own", "standard", "tuned")),
    *(("projected", r) for r in ("own", "standard", "tuned")),
    ("full", "standard"),
)
ROW_NAMES = tuple(f"{m}/{r}" for m, r in ROWS)
STRATEGIES = {"replay": Replay(), "forward_difference": ForwardDifference()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationJob(Settings):
    """Settings of one experiment.

    Args:
        name: of the result file.
        corpus, limit, max_length, student: as ``load_task`` and ``load_student`` take them.
        per_class, length: size of every set: examples of a class, tokens an example.
        unroll_steps, step_size: inner loop: T steps of SGD, the learned step sizes start at ``step_size``.
        metagrad: ``"replay"`` (exact) or ``"forward_difference"`` (about half the time).
        outer_steps, outer_batch, lr: outer loop.
        label_lr, step_size_lr: outer learning rates of labels and step sizes; None: as many times ``lr`` as
            :class:`~distillkit.core.distiller.Distiller` takes.
        label_steps: outer steps of the row ``real + learned labels``; None: as many as ``outer_steps``.
        seed: of the distilled and selected sets.
        eval_seeds: fresh initialisations for each score.
        full_seeds: of them, those that the full data is trained with, which takes longest.
        rows: which rows, as ``method/recipe``.
        committed: name of a committed result to take ``committed_rows`` from instead of computing them.
        committed_rows: which of the rows.
    """

    name: str
    corpus: str
    student: str
    limit: int | None = None
    max_length: int = 32
    per_class: int = 1
    length: int = 32
    unroll_steps: int = 3
    step_size: float = 0.2
    metagrad: str = "forward_difference"
    outer_steps: int = 100
    outer_batch: int = 48
    lr: float = 0.08
    label_lr: float | None = None
    step_size_lr: float | None = None
    label_steps: int | None = None
    seed: int = 0
    eval_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    full_seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[str, ...] = ROW_NAMES
    committed: str | None = None
    committed_rows: tuple[str, ...] = ()

    def __post_init__(self):
        self.check_name()
        unknown = [r for r in (*self.rows, *self.committed_rows) if r not in ROW_NAMES]
        if unknown:
            raise ValueError(f"unknown row {unknown[0]!r}; there are {', '.join(ROW_NAMES)}")
        for key in ("max_length", "per_class", "length", "unroll_steps", "outer_steps", "outer_batch", "label_steps"):
            if getattr(self, key) is None and key == "label_steps":
                continue
            check_whole(key, getattr(self, key))
        self.check_positive("step_size", "lr", "label_lr", "step_size_lr")
        check_choice("metagrad", self.metagrad, STRATEGIES)
        if bool(self.committed) != bool(self.committed_rows):
            raise ValueError("committed and committed_rows belong together: the name of a result, and rows to take from it")


def twin(method: str, scores: Mapping[str, dict | None], set_of: Callable[[str], DistilledSet]) -> dict | None:
    """The score of another method that selected the very same sentences, as herding and k-centre do at one a class.

    Args:
        method: whose score is wanted.
        scores: by method, under the same recipe; of one that has none, no set is made.
        set_of: gives a method's set.
    """
    for other in METHODS if method in METHODS else ():
        score = scores.get(other)
        if other != method and score and digest(set_of(other)) == digest(set_of(method)):
            return {**score, "same_set_as": other}
    return None


class Run:
    """A job under way: loads once what several rows need, and writes each row to ``folder/<name>.json``.

    Args:
        job: the settings.
        folder: where its result goes; one that is there already is gone on with.
        work: where checkpoints and distilled sets go, ``work/<name>``.
        committed: folder of the result that ``job.committed`` names; default: ``folder``.

    Raises:
        ValueError: the result that is there was made with other settings or another corpus.
    """

    def __init__(
        self, job: ClassificationJob, folder: str | Path, work: str | Path, committed: str | Path | None = None
    ):
        self.job, self.work = job, Path(work) / job.name
        self.path = Path(folder) / f"{job.name}.json"
        self.committed = Path(folder if committed is None else committed)
        self.claim = Claim(self.work)
        self.task = load_task(job.corpus, max_length=job.max_length, limit=job.limit)
        self.student = load_student(job.student, self.task)
        for name in job.committed_rows:
            self._committed(name)  # said now if it is missing, not after all other rows
        self.result = take_up(self.path, job, self.task)
        self._sets: dict[str, DistilledSet] = {}

    def __call__(self, only: tuple[str, ...] = ()) -> dict:
        """Make every row that is missing, or those of them that ``only`` names; returns the result.

        Raises:
            ValueError: ``only`` names a row that is none of the job's.
            StorageError: another process makes rows of this job.
        """
        if unknown := [r for r in only if r not in self.job.rows]:
            raise ValueError(f"no row {unknown[0]!r} in this job; it has {', '.join(self.job.rows)}")
        with self.claim:
            return self._completed(only)

    def _completed(self, only: tuple[str, ...]) -> dict:
        missing = [r for r in only or self.job.rows if r not in self.result["rows"]]
        for name in progress(missing, desc="rows", unit="row"):
            method, recipe = name.split("/")
            if name in self.job.committed_rows:
                row = self._committed(name)
            else:
                row = self._twin(method, recipe) or self._scored(method, recipe)
            self.result["rows"][name] = row
            write(self.path, self.result)
        # Asked of the rows, not of the sets at hand: an interrupted run may have made those rows in an earlier process.
        if "text" not in self.result and any(r.startswith(("embeddings/", "projected/")) for r in self.result["rows"]):
            self.result["text"] = self.set_of("projected").to_text().to_list()
            write(self.path, self.result)
        return self.result

    def _scored(self, method: str, recipe: str) -> dict:
        set_ = None if method == "full" else self.set_of(method)
        seeds = self.job.full_seeds if set_ is None else self.job.eval_seeds
        found = evaluate(set_, self.task, self.student, seeds=seeds, recipe=recipe)
        return {"method": method, **as_json(found)}

    def _twin(self, method: str, recipe: str) -> dict | None:
        rows = {other: self.result["rows"].get(f"{other}/{recipe}") for other in METHODS}
        found = twin(method, rows, self.set_of)
        return found and found | {"method": method}

    def set_of(self, method: str) -> DistilledSet:
        """The set that a row's scores are of; distilled or selected at its first use."""
        if method not in self._sets:
            self._sets[method] = self._make(method)
        return self._sets[method]

    def _make(self, method: str) -> DistilledSet:
        job = self.job
        if method == "embeddings":
            start = DistilledSet.from_real(self.task, self.student, **self._size())
            return self._distil("embeddings", start, ("embeds", "targets", "step_sizes"), job.outer_steps)
        if method == "projected":
            return project(self.set_of("embeddings"), self.student)
        if method == "real + learned labels":
            start = select(self.task, self.student, "random", **self._size()).soften()
            return self._distil("labels", start, ("targets", "step_sizes"), job.label_steps or job.outer_steps)
        return select(self.task, self.student, method, **self._size())

    def _size(self) -> dict:
        return {"per_class": self.job.per_class, "length": self.job.length, "seed": self.job.seed}

    def objective(self) -> BPTT:
        """The objective both distillations share."""
        unroll = Unroll(self.job.unroll_steps, optimizer=SGD(self.job.step_size))
        metagrad = STRATEGIES[self.job.metagrad]
        return BPTT(self.task, self.student, unroll, metagrad=metagrad, batch_size=self.job.outer_batch)

    def _distil(self, name: str, start: DistilledSet, learn: tuple[str, ...], steps: int) -> DistilledSet:
        distiller = Distiller(
            start,
            self.objective(),
            lr=self.job.lr,
            label_lr=self.job.label_lr,
            step_size_lr=self.job.step_size_lr,
            learn=learn,
            seed=self.job.seed,
            checkpoint_dir=self.work / f"checkpoint-{name}-{steps}",  # the decay of lr depends on the number of steps
        )
        for _ in distiller.run(steps):
            pass
        distiller.distilled.save(self.work / name)
        self.result["distilling"][name] = {
            "steps": steps,
            "seconds": sum(r.seconds for r in distiller.records),
            "losses": [round(r.loss, 4) for r in distiller.records],
        }
        return distiller.distilled

    def _committed(self, name: str) -> dict:
        path = self.committed / f"{self.job.committed}.json"
        if not path.is_file():
            raise FileNotFoundError(f"committed={self.job.committed!r}, but there is no result {path}; make it first")
        found = read(path)
        row = found["rows"].get(name)
        if row is None:
            raise ValueError(f"committed={self.job.committed!r}, but {path} has no row {name}; finish it first")
        # The docstring corpus follows the versions of the installed libraries.
        same = found["corpus"]["sha256"] == self.task.fingerprint
        return {**row, "committed": "same corpus" if same else "another version of the corpus"}

def table(result: dict) -> str:
    """The result as a Markdown table."""
    lines = [
        "| method | recipe | examples | bytes | accuracy (mean ± sd) | seeds | seconds to train |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in result["config"]["rows"]:
        if name not in result["rows"]:
            lines.append(f"| {name.split('/')[0]} | {name.split('/')[1]} | | | not run | | |")
            continue
        row = result["rows"][name]
        mark = f" (committed, {row['committed']})" if "committed" in row else ""
        spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
        lines.append(
            f"| {row['method']}{mark} | {row['recipe']['name']} | {row['examples']:,} | {row['nbytes']:,} | "
            f"{row['mean']:.3f}{spread} | {len(row['scores'])} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)
