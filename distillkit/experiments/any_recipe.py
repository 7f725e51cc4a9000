"""How far a set travels: every set scored under every recipe of a grid, the worst recipe included.

The grid is fixed before any set is scored.  It crosses optimisers, step sizes and numbers of steps.  Real sentences, one per
class, are trained on under each point, and a point stays if they reach a share of their best accuracy on validation.  That
choice is stored in the result (note ``recipes``).  Row ``method/every`` then scores a set on test under every recipe that
stayed.

Sets come from the same bootstraps as those of :mod:`~distillkit.experiments.evidence`.  More are distilled:

* ``embeddings from keywords``, in the three steps of the row ``embeddings``, which starts from random sentences and has the
  larger outer rates of the settings.  Two rows tell start and rates apart: ``embeddings at small rates`` and
  ``embeddings from keywords at large rates``.
* From keywords too, ``longer unroll`` in steps of AdamW, and ``mixture`` in recipes drawn around that one
  (:class:`~distillkit.core.mixture.Mixture`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from distillkit.core.distilled import DistilledSet
from distillkit.core.inner import Unroll
from distillkit.core.mixture import CommonRecipes, Mixture
from distillkit.core.optimizers import OPTIMIZERS, AdamW, Optimizer
from distillkit.evaluation.recipes import grid_scores, tuning_rows, tuning_starts
from distillkit.evaluation.selection import select
from distillkit.experiments.evidence import CHEAP, BootstrapCell, EvidenceCell, EvidenceGrid, EvidenceJob
from distillkit.experiments.results import by_set, corrected, frame, gain, has_interval, markdown, rounded, spread
from distillkit.experiments.runner import Scores
from distillkit.experiments.settings import REQUIRED, filled, option, positive, settings, whole
from distillkit.io.seeds import derive_seed

EVERY, LONGER, MIXTURE, EMBEDDINGS = "every", "longer unroll", "mixture", "embeddings"
FROM_KEYWORDS = "embeddings from keywords"
SMALL_RATES = {"lr": 0.03, "label_lr": 0.2, "step_size_lr": 0.05, "clip": 2}  # as in evidence_docstrings_keywords
START_AND_RATES = {FROM_KEYWORDS: ("keywords", SMALL_RATES), f"{EMBEDDINGS} at small rates": (None, SMALL_RATES),
                   f"{FROM_KEYWORDS} at large rates": ("keywords", {})}  # beside embeddings: (None, {})
LEARNED = (EMBEDDINGS, *START_AND_RATES, LONGER, MIXTURE)
ROWS = (*(f"{method}/{recipe}" for method in LEARNED for recipe in (EVERY, "own", "tuned")),
        *(f"{method}/{EVERY}" for method in CHEAP))


@settings(kind="any_recipe", rows=ROWS)
class AnyRecipeJob(EvidenceJob):
    """Settings of one cell."""

    recipe_grid: dict[Literal["SGD", "Momentum", "AdamW"], tuple[float, ...]] = option(
        REQUIRED, "{optimiser: step sizes} of the recipes", least=1)
    recipe_steps: tuple[int, ...] = filled((5, 10, 30, 60), "numbers of steps of the recipes")
    recipe_share: float = option(0.9, "a recipe stays if real sentences reach this share of their best accuracy", ge=0, le=1)
    central_steps: int = whole(10, "AdamW steps of the rows 'longer unroll' and of the central recipe of 'mixture'")
    central_step_size: float = positive(3e-4, "their step size")
    central_share: float = option(0.5, "of the outer steps of 'mixture' that take the central recipe", gt=0, le=1)
    least_steps: int = whole(3, "fewest steps of a drawn recipe")
    most_steps: int = whole(20, "most steps of a drawn recipe")
    recipe_lr: float = positive(0.05, "outer learning rate of these two rows, that of labels and step sizes in proportion")
    recipe_outer_steps: int | None = whole(None, "outer steps of these two rows (default: outer_steps)")

    def unroll_of(self, method: str) -> Unroll | Mixture:
        """The inner loop that a set is learned through, if it is not the three steps of the row 'embeddings'."""
        central = Unroll(self.central_steps, optimizer=AdamW(self.central_step_size, eps_root=1e-8))
        if method == LONGER:
            return central
        return Mixture(CommonRecipes(central, self.least_steps, self.most_steps), share=self.central_share)


class SetCell(BootstrapCell):
    """The sets of one seed."""

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        if recipe != EVERY:
            return super().score(method, recipe, seed)
        job, distilled = self.job, self.set_of(method, seed)
        starts = [derive_seed("evaluate-init", init) for init in job.eval_seeds]
        scores = grid_scores(distilled, self.task, self.student, self.recipes(), split="test", starts=starts)
        size = {"examples": len(distilled), "nbytes": distilled.nbytes}
        return [{"recipe": recipe_name(*point), "init_seed": init, "accuracy": rounded(accuracy), **size}
                for point, values in scores.items() for init, accuracy in zip(job.eval_seeds, values, strict=True)], {}

    def recipes(self) -> list[tuple[Optimizer, int]]:
        """The recipes of the grid that stay; the validation accuracies that decide it are in the note ``recipes``."""
        job = self.job
        points = {recipe_name(OPTIMIZERS[kind](step_size), steps): (OPTIMIZERS[kind](step_size), steps)
                  for kind, step_sizes in job.recipe_grid.items() for step_size in step_sizes for steps in job.recipe_steps}
        if "recipes" not in self.notes:
            real = select(self.corpus, self.student, "random", per_class=1, length=job.length)
            scores = grid_scores(real, self.corpus, self.student, points.values(), split="validation",
                                 rows=tuning_rows(self.corpus, job.tuned_rows),
                                 starts=tuning_starts(self.student, job.tuned_initialisations))
            validation = {recipe_name(*point): rounded(float(np.mean(values))) for point, values in scores.items()}
            least = job.recipe_share * max(validation.values())
            self.notes["recipes"] = {"chance": 1 / len(self.task.classes), "validation": validation,
                                     "names": [name for name, accuracy in validation.items() if accuracy >= least]}
        return [points[name] for name in self.notes["recipes"]["names"]]

    def create(self, method: str, seed: int) -> DistilledSet:
        if method in START_AND_RATES:
            text, rates = START_AND_RATES[method]
            start = self.set_of(text, seed).soften() if text else self.start(seed)
            return self.distil(method, seed, start, self.objective(), **rates)
        if method not in (LONGER, MIXTURE):
            return super().create(method, seed)
        job, start = self.job, self.set_of("keywords", seed).soften()
        objective = dataclasses.replace(self.objective(), unroll=job.unroll_of(method))
        return self.distil(method, seed, start, objective, steps=job.recipe_outer_steps,
                           lr=job.recipe_lr, label_lr=None, step_size_lr=None, normalize=True)

    def training_hash(self, method: str, recipe: str, seed: int) -> str | None:
        return None if recipe == EVERY else super().training_hash(method, recipe, seed)


class AnyRecipeCell(EvidenceCell):
    """One corpus and size."""

    seed_cell = SetCell


def recipe_name(optimizer: Optimizer, steps: int) -> str:
    """A recipe in words, such as ``AdamW 0.0003 × 30``."""
    return f"{type(optimizer).__name__} {optimizer.step_size:g} × {steps}"


@settings(kind="any_recipe")
class AnyRecipeGrid(EvidenceGrid):
    """Settings of an experiment: one corpus at several sizes."""

    cell_job = AnyRecipeJob


# --- the table -----------------------------------------------------------------------------------------------------------


def any_recipe_table(result: Mapping) -> str:
    """The result as two Markdown tables: the worst recipe of each method, and every recipe.

    Gains of the worst recipe are over the row ``embeddings from keywords``, where a result has it, or ``embeddings``.  They are
    paired by set, and their intervals are corrected for their number in the table (Bonferroni).
    """
    scores, summary, columns, notes = frame(result), [], {}, []
    of_cells = {cell: {method: table for method in methods_of(result)
                       if len(table := under_every_recipe(scores[scores["cell"] == cell], method))} for cell in result["cells"]}
    worst = {cell: pd.DataFrame({method: table.min(axis=1) for method, table in every.items()}).T
             for cell, every in of_cells.items()}
    rival = FROM_KEYWORDS if any(FROM_KEYWORDS in every for every in of_cells.values()) else EMBEDDINGS
    comparisons = max(1, sum(has_interval(worst[cell], method, rival)
                             for cell, every in of_cells.items() for method in every if method != rival))
    for cell, every in of_cells.items():
        if not every:
            continue
        recipes, sets = result["cells"][cell]["notes"]["recipes"], by_set(result, cell=cell)
        for method, table in every.items():
            others = [spread(row) for _, row in sets.reindex([f"{method}/own", f"{method}/tuned"]).iterrows()]
            gained = gain(worst[cell], method, rival, comparisons) if method != rival and rival in every else ""
            summary.append([cell, method, str(len(table)), *others, *described(table, recipes["chance"]), gained])
            columns[f"{method}, {cell}"] = table.apply(spread)
        validation = recipes["validation"]
        notes.append(f"{cell}: {len(recipes['names'])} of {len(validation)} recipes stay; under the best, real sentences "
                     f"reach {max(validation.values()):.3f} on validation.")
    heads = ["cell", "method", "sets", "own", "tuned", "best recipe", "median", "worst recipe", "worst / best above chance",
             f"worst: gain over {rival}"]
    points = pd.DataFrame(columns)
    every_recipe = markdown(["recipe", *points], [[name, *line] for name, line in zip(points.index, points.to_numpy())])
    notes.append(f"Intervals are {corrected(comparisons)}.")
    return f"{markdown(heads, summary, 'll')}\n\n{every_recipe}\n\n{' '.join(notes)}"


def methods_of(result: Mapping) -> list[str]:
    """The methods whose sets are scored under every recipe."""
    return [row.split("/")[0] for row in result["config"]["rows"] if row.endswith(f"/{EVERY}")]


def under_every_recipe(scores: pd.DataFrame, method: str) -> pd.DataFrame:
    """Accuracy of the sets of a method, mean over initialisations: a line for each set seed, a column for each recipe."""
    rows = scores[scores["row"] == f"{method}/{EVERY}"]
    return rows.pivot_table(index="set_seed", columns="recipe", values="accuracy", sort=False)


def described(table: pd.DataFrame, chance: float) -> list[str]:
    """Best, median and worst recipe of each set, as spreads over sets, and the median over sets of worst to best above chance.
    """
    best, worst = table.max(axis=1), table.min(axis=1)
    ratio = ((worst - chance) / (best - chance)).median()
    name = table.mean().idxmin()
    return [spread(best), spread(table.median(axis=1)), f"{spread(worst)} ({name})", f"{ratio:.2f}"]
