"""Sets for any recipe: the inner loop is drawn afresh in each outer step.

A set that is learned through three steps of SGD is worth less when it is trained on with AdamW: it was fitted to one training
run.  :class:`Mixture` takes the place of an :class:`~distillkit.core.inner.Unroll` in an objective and draws the optimiser, its
step size, the number of steps and the order of the examples for each outer step, so that the set has to serve them all.
("Utility Boundary of Dataset Distillation", arXiv 2512.05817, studies how large a set must be to serve many recipes.)

The meta-gradients of the draws differ in norm by factors of thousands, so give the
:class:`~distillkit.core.distiller.Distiller` of a mixture ``normalize=True``.

One recipe is *central*.  It is the one that the set carries, and the only one whose step sizes are learned; the other draws
train with constant step sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from distillkit.core.inner import Unroll
from distillkit.core.optimizers import SGD, AdamW, Momentum
from distillkit.io.checks import check_is, check_number, check_whole, require
from distillkit.io.seeds import generator


@dataclasses.dataclass(frozen=True)
class CommonRecipes:
    """A sampler of what people train with: SGD, momentum or AdamW, with equal chances.

    The number of steps is drawn log-uniformly, and so is the distance of the run, number of steps × step size, over a decade
    and a half around :data:`DISTANCE`.  Real sentences train an encoder over these distances.  Two independent draws, of
    steps and of step size, would often give a few small steps, which train nothing.  Step sizes are at most :data:`LARGEST`,
    above which many runs diverge.

    Args:
        central: the recipe that the set carries.
        least_steps, most_steps: range of the number of steps.
    """

    central: Unroll = Unroll(10, optimizer=AdamW(3e-4, eps_root=1e-8))
    least_steps: int = 3
    most_steps: int = 60

    def __post_init__(self):
        check_is("central", self.central, Unroll)
        check_whole("most_steps", self.most_steps)
        check_whole("least_steps", self.least_steps, most=self.most_steps)

    def __call__(self, draw: torch.Generator) -> Unroll:
        """A recipe; AdamW's has an ``eps_root``, without which its derivative at a gradient of 0 is infinite."""
        kind, distance, length = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
        name = [*DISTANCE][int(kind * len(DISTANCE))]
        steps = round(self.least_steps * (self.most_steps / self.least_steps) ** length)
        step_size = min(DISTANCE[name] * 10 ** (DECADES * (distance - 0.5)) / steps, LARGEST[name])
        optimizer = {"SGD": SGD(step_size), "Momentum": Momentum(step_size), "AdamW": AdamW(step_size, eps_root=1e-8)}[name]
        return Unroll(steps, optimizer=optimizer)


DISTANCE = {"SGD": 1.0, "Momentum": 0.2, "AdamW": 3e-3}  # for encoders
DECADES = 1.5
LARGEST = {"SGD": 0.3, "Momentum": 0.05, "AdamW": 1e-3}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An inner loop that is drawn afresh in each outer step; what it does not define is the central recipe's.

    Args:
        sampler: a function of a generator that returns an :class:`~distillkit.core.inner.Unroll`, such as
            :class:`CommonRecipes`.
        central: the recipe that the set carries; default: ``sampler.central``, or the sampler's first draw.
        share: of the outer steps that take the central recipe, in (0, 1].
        micro_batch: as for :class:`~distillkit.core.inner.Unroll`, for all draws; default: what each draw says.
    """

    sampler: Callable[[torch.Generator], Unroll]
    _: dataclasses.KW_ONLY
    central: Unroll | None = None
    share: float = 0.25
    micro_batch: int | None = None

    def __post_init__(self):
        require(callable(self.sampler), f"sampler must be a function of a generator, such as CommonRecipes(), not "
                f"{self.sampler!r}", TypeError)
        check_number("share", self.share, most=1, without="least")
        if self.micro_batch is not None:
            check_whole("micro_batch", self.micro_batch)
        if self.central is None:
            central = getattr(self.sampler, "central", None) or self.sampler(generator("mixture-central", 0))
            object.__setattr__(self, "central", central)
        check_is("central", self.central, Unroll)

    def __getattr__(self, name: str):
        if name == "central":  # not set yet, as in a copy
            raise AttributeError(name)
        return getattr(self.central, name)

    def draw(self, seed: int) -> tuple[Unroll, bool]:
        """The recipe of an outer step, and whether it is the central one.

        Raises:
            TypeError: the sampler returned something else.
        """
        draw = generator("mixture", seed)
        is_central = bool(torch.rand((), generator=draw, dtype=torch.float64) < self.share)
        unroll = self.central if is_central else self.sampler(draw)
        check_is("what the sampler returns", unroll, Unroll)
        return (unroll if self.micro_batch is None else dataclasses.replace(unroll, micro_batch=self.micro_batch)), is_central

    def recipe(self) -> dict:
        """The central recipe, and what it was mixed with in words."""
        return self.central.recipe() | {"mixture": f"{self.sampler!r}, central in {self.share:g} of the outer steps"}
