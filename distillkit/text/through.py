"""Learning with the text in sight: through the projection, and labels for a text that stays as it is.

:class:`ThroughProjection` learns embeddings as ever, but trains the student on their nearest tokens; the gradient at the
tokens moves the embeddings behind them (the straight-through estimator of Bengio et al., 2013).  :func:`relabel` learns soft
labels and step sizes for a finished text by the same budget for every text, so that what labels gain is not credited to
the words.
"""

from __future__ import annotations

import dataclasses

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.objectives import Objective, Wrapper, check_objective
from distillkit.io.checks import check_choice, check_is, check_whole
from distillkit.text.projection import METRICS, project


@dataclasses.dataclass(frozen=True, eq=False)
class ThroughProjection(Wrapper):
    """An objective whose students train on the nearest tokens of the embeddings that are learned.

    Use it in the place of the ``objective`` it wraps.  The meta-gradient is that of the projected set; the
    :class:`~distillkit.core.distiller.Distiller` applies it to the embeddings behind, which in time cross into another token's
    cell.  The end is a set to be projected.

    Args:
        objective: such as :class:`~distillkit.core.objectives.BPTT`.
        metric: of :func:`~distillkit.text.projection.project`.
    """

    objective: Objective
    _: dataclasses.KW_ONLY
    metric: str = "l2"

    def __post_init__(self):
        check_objective(self.objective)
        check_choice("metric", self.metric, METRICS)

    def problems(self, distilled: DistilledSet, seed: int):
        """The wrapped objective's problems of the projected set."""
        return self.objective.problems(project(distilled, self.student, metric=self.metric), seed)

    def recipe(self) -> dict:
        """The wrapped objective's recipe, with the projection noted."""
        return {**self.objective.recipe(), "through_projection": self.metric}


def relabel(
    distilled: DistilledSet, objective, *, steps: int, lr: float = 0.08, seed: int = 0, **settings
) -> DistilledSet:
    """Learn soft labels and step sizes for a set whose examples stay as they are.

    Learned labels gain accuracy that the words do not, so a comparison of texts is fair only if all of them get labels.

    Args:
        distilled: hard labels are softened first; its step sizes are dropped.
        objective, steps, lr, seed, settings: as :class:`~distillkit.core.distiller.Distiller` takes them.
    """
    check_is("distilled", distilled, DistilledSet)
    check_whole("steps", steps, least=0)
    start = dataclasses.replace(distilled if distilled.soft else distilled.soften(), step_sizes=None)
    distiller = Distiller(start, objective, lr=lr, learn=("targets", "step_sizes"), seed=seed, **settings)
    for _ in distiller.run(steps):
        pass
    return distiller.distilled
