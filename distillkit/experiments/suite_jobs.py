"""What the suite does, in order of value: :data:`JOBS`.  A further experiment is one more entry there.

Each job has a dry run, ``tiny()``: the same work with small models and a handful of steps, under a name of its own.  So the
whole suite can be tried in minutes on a CPU before a GPU is used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from distillkit.data.corpus import CorpusError
from distillkit.data.load import load_task
from distillkit.evaluation.selection import ALL_METHODS
from distillkit.experiments.instruction import InstructionJob
from distillkit.experiments.kinds import KINDS
from distillkit.experiments.notebooks import Notebooks
from distillkit.experiments.results import read, take_up, write
from distillkit.experiments.runner import CONFIGS, Run
from distillkit.experiments.settings import Data, Grid, kind_of
from distillkit.experiments.suite import Unit
from distillkit.io.deadline import Deadline

SCRIPT = Path(__file__).resolve().parents[2] / "tests" / "benchmarks" / "metagrad.py"
UNLEARNED = ("full", "zero-shot", *ALL_METHODS)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment of the kinds of :mod:`distillkit.experiments.kinds`: a unit is the score of a row and set seed in a cell.

    Args:
        name: of the result.
        config: name of the shipped settings.
        guesses: seconds that a unit of a method takes on one GPU; ``""``: of any other method.
        small: settings that a dry run has instead; None: another job of its kind has one.
        changes: settings in place of the file's.
        load: seconds that loading a corpus and a student takes.
    """

    name: str
    config: str
    guesses: Mapping[str, float]
    small: Mapping[str, Any] | None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load: float = 15.0
    measures_time: ClassVar[bool] = False

    def tiny(self) -> Experiment | None:
        """The dry run, if it has one."""
        return self.small and dataclasses.replace(self, name=f"{self.name}_tiny", guesses={"": 1.0}, load=1.0,
                                                  changes=self.small)

    def settings(self):
        """The settings, and what runs them."""
        path = CONFIGS / f"{self.config}.yaml"
        job_class, run_class, _ = KINDS[kind_of(path)]
        return job_class.from_yaml(path, name=self.name, **self.changes), run_class

    def cells(self) -> dict[str, Any]:
        """The settings of each cell by its name."""
        job, _ = self.settings()
        return job.cells() if isinstance(job, Grid) else {job.name: job}

    def needs(self) -> list[Any]:
        """The settings of the cells, and of the further corpora that their students answer."""
        cells = [*self.cells().values()]
        return cells + [data for cell in cells if isinstance(cell, InstructionJob) for data in cell.further_data()]

    def units(self, out: Path, deadline: Deadline, command: str) -> list[Unit]:
        """Every score, cell by cell, set by set.

        Raises:
            ValueError: the result in ``out`` was made with other settings.
        """
        job, run_class = self.settings()
        cells, path = self.cells(), out / "results" / f"{job.name}.json"
        result, unusable = take_up(path, job, cells), {}
        done = {(score["cell"], score["row"], score["set_seed"]) for score in result["scores"]}

        @functools.cache
        def run() -> Run:
            if not path.is_file():
                write(path, result | {"command": command})
            return run_class(job, path.parent, out / "work", deadline=deadline)

        def score(key: str, row: str, seed: int) -> None:
            world = cells[key].corpus, cells[key].student
            if world in unusable:
                raise unusable[world]
            try:
                run().score(key, row, seed)
            except (CorpusError, FileNotFoundError) as error:  # what is missing for a cell is missing for its like
                unusable[world] = error
                raise

        places = [(key, row, seed) for key, cell in cells.items() for seed in cell.seeds for row in job.rows
                  if seed in cell.seeds_of(row)]
        return [self.unit(cells[place[0]], place, place in done, functools.partial(score, *place)) for place in places]

    def unit(self, cell, place: tuple[str, str, int], done: bool, score) -> Unit:
        """The unit of a place in the table."""
        key, row, seed = place
        method = row.split("/")[0]
        kinds = (f"{row}, {cell.student}, {cell.corpus}, T = {cell.unroll_steps}", f"{row}, {cell.student}", row)
        return Unit(f"{key}: {row}, set {seed}", kinds, self.guesses.get(method, self.guesses[""]), score, done,
                    method not in UNLEARNED, f"{cell.corpus}, {cell.student}", self.load,
                    # What has the same first word is made from the same set: "nacd", "nacd text".
                    f"{key}, set {seed}, {method.split()[0]}")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a meta-gradient costs, for one student: a unit is a contender at one T.

    Args:
        name: of the result.
        student, trainable, steps, repeats: as ``tests/benchmarks/metagrad.py`` takes them.
        small: the student of a dry run.
        guess, load: seconds of a unit on one GPU, and of loading the student twice.
    """

    name: str
    student: str
    trainable: str
    small: str
    repeats: int = 3
    steps: tuple[int, ...] = (2, 8)
    guess: float = 8.0
    load: float = 20.0
    measures_time: ClassVar[bool] = True

    def tiny(self) -> Benchmark:
        """The dry run."""
        return dataclasses.replace(self, name=f"{self.name}_tiny", student=self.small, repeats=1, steps=(1, 2), guess=1.0,
                                   load=1.0)

    def needs(self) -> list[Data]:
        """The corpus, and MiniLM: a student of random weights has its tokenizer."""
        return [Data(name=self.name, corpus="docstrings", student="offline:minilm", max_length=32)]

    def units(self, out: Path, deadline: Deadline, command: str) -> list[Unit]:
        """Every contender at every T.

        Raises:
            FileNotFoundError: outside a checkout there is no benchmark.
        """
        script, path = _script(), out / "results" / f"{self.name}.json"
        flags = ["--students", self.student, "--trainable", self.trainable, "--repeats", str(self.repeats), "--steps"]
        settings = script.settings_of(script.parser().parse_args([*flags, *map(str, self.steps)]))
        fresh = script.fresh_result("cost", settings) | {"command": command}
        entries = read(path)["entries"] if path.is_file() else []

        @functools.cache
        def begun():
            result = script.taken_up(path, fresh) if path.is_file() else fresh
            run = script.Run(result, path, load_task(settings["corpus"], max_length=settings["length"]), [self.student], None)
            loaded = next(run.entries(), None)
            if loaded is None:
                raise FileNotFoundError(run.entry(self.student, self.trainable)["failed"])
            return run, loaded[0], script.begun(run, *loaded, deadline)

        def measure(contender, steps: int) -> None:
            run, entry, bench = begun()
            script.add_row(run, entry, bench, contender, steps)

        done = {(row["steps"], row["contender"]) for entry in entries for row in entry["rows"]}
        return [Unit(f"{contender.name}, T = {t}", (f"{contender.name}, T = {t}", f"T = {t}"), self.guess,
                     functools.partial(measure, contender, t), (t, contender.name) in done, world=self.student, load=self.load)
                for t in self.steps for contender in script.CONTENDERS]


def _script() -> ModuleType:
    """The benchmark, which is a script of the checkout."""
    if not SCRIPT.is_file():
        raise FileNotFoundError(f"no {SCRIPT}; run the suite from a checkout")
    spec = importlib.util.spec_from_file_location("distillkit_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_SMALL = {"limit": 24, "max_length": 12, "length": 8, "step_size": 0.2, "outer_steps": 4, "outer_batch": 6,
          "eval_seeds": [0, 1], "standard_steps": 2, "tuned_grid": {"step_size": [0.001], "steps": [1, 2]}}
_INSTRUCTION = {"corpus": "docstrings_qa:library", "student": "offline:tiny-opt", "limit": 40, "max_length": 48,
                "fraction": 0.1, "seeds": [0, 1], "expert_epochs": 1, "expert_batch": 8, "snapshots_per_epoch": 1,
                "match_epochs": 1, "unroll_steps": 2, "inner_batch": 2, "outer_steps": 3, "outer_batch": 4, "standard_steps": 2,
                "tuned_grid": {"step_size": [0.001], "steps": [1, 2]}}
_MPNET = {"full": 60.0, "embeddings": 40.0, "": 20.0}  # guesses of seconds
_SMALL_GRID = _SMALL | {"full_seeds": None, "per_class": 1}

JOBS = (
    Benchmark("metagrad_gpu_minilm", "offline:minilm", "full", "random:bert-tiny"),
    Benchmark("metagrad_gpu_bert", "random:bert-base", "full", "random:bert-tiny"),
    Benchmark("metagrad_gpu_opt", "random:opt-1.3b", "lora", "random:opt-tiny", repeats=2, load=60.0),
    Experiment("instruction_arc_easy_smollm2", "instruction_arc_easy_smollm2", {
        "full": 40.0, "less": 90.0, "nacd": 150.0, "bptt": 150.0, "chosen": 60.0, "": 40.0}, _INSTRUCTION | {
        "also": [], "trainable": "full", "rows": ["zero-shot/none", "random/tuned", "bptt/own"]}),
    Experiment("evidence_ag_news_mpnet_large_rates", "evidence_ag_news_mpnet_large_rates", _MPNET, {
        "base": {**_SMALL, "corpus": "docstrings", "student": "offline:small-bert", "seeds": [0], "full_seeds": [0]},
        "rows": ["keywords/tuned", "embeddings/own"]}),
    *(Experiment(f"evidence_{corpus}_mpnet", f"evidence_{corpus}_mpnet", _MPNET, None)
      for corpus in ("imdb", "sst2", "rotten_tomatoes")),
    Experiment("gpu_slides", "gpu_slides", {"full": 60.0, "embeddings": 400.0, "": 30.0}, {
        "product": {"seed": [0, 1], "unroll_steps": [1, 2], "student": ["offline:small-bert"], "corpus": ["docstrings"]},
        "base": {**_SMALL_GRID, "together": True}}),
    Experiment("gpu_instruction_library", "instruction_library", {"full": 60.0, "less": 60.0, "nacd": 120.0, "bptt": 120.0,
                                                                  "": 20.0}, _INSTRUCTION | {
        "rows": ["random/standard", "nacd/own", "bptt/own", "bptt text/standard"]}),
    Experiment("gpu_scaling", "scaling_docstrings", {"": 30.0}, {
        "base": {**_SMALL_GRID, "corpus": "docstrings", "student": "offline:small-bert", "unroll_steps": 1},
        "around": {"unroll_steps": [1, 2]}}),
    Notebooks(),
)


def dry() -> tuple:
    """The dry run of every job that has one."""
    return tuple(small for job in JOBS if (small := job.tiny()))

