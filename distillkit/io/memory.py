"""How much memory a computation holds: the bytes of its live tensors, counted exactly.

The size of a process says little: allocators keep freed memory, libraries load, and two runs of the same code differ.  The
bytes of the tensors that are alive at once can be counted.  Every operation of PyTorch passes through a dispatch mode;
:class:`LiveBytes` is one that notes each new *storage* among the results, and a finaliser tells it when that storage dies.  A
view shares its storage and adds nothing.  What autograd saves for the backward pass counts until the graph is freed, although
no Python variable names it: whatever holds the storage in C++ keeps its Python object alive too.

The same computation gives the same count on every machine.  Scratch memory inside a kernel is not seen; on a GPU
``torch.cuda.max_memory_allocated`` includes it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclasses.dataclass
class Tally:
    """Bytes held ``now``, and the most held at once, ``peak``."""

    now: int = 0
    peak: int = 0

    def add(self, count: int) -> None:
        """Count ``count`` more bytes, or fewer where it is negative."""
        self.now += count
        self.peak = max(self.peak, self.now)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that the code inside creates, while they live::

        with LiveBytes() as live:
            loss = model(batch)
        live.total.peak   # the most bytes held at once; live.total.now: those still held

    Tensors created before the block do not count.  ``now`` goes on falling after the block, as its tensors die.

    Args:
        apart: shapes to count separately, such as those of a model's parameters: ``live.apart`` for tensors of these shapes,
            in any order of their axes, and ``live.rest`` for all others.  Each has a peak of its own.
    """

    def __init__(self, apart: Iterable[Iterable[int]] = ()):
        super().__init__()
        self.total, self.apart, self.rest = Tally(), Tally(), Tally()
        self._shapes = {tuple(sorted(shape)) for shape in apart}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        # torch.tensor creates its storage unseen and hands it to lift_fresh; any other input existed before.
        inputs = () if func is torch.ops.aten.lift_fresh.default else tree_leaves((args, kwargs))
        existing = {tensor.untyped_storage()._cdata for tensor in inputs if isinstance(tensor, Tensor)}
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in existing and storage._cdata not in self._alive:
                group = self.apart if tuple(sorted(tensor.shape)) in self._shapes else self.rest
                self._alive.add(storage._cdata)
                self._add(group, storage.nbytes())
                weakref.finalize(storage, self._release, storage._cdata, group, storage.nbytes())
        return output

    def _add(self, group: Tally, count: int) -> None:
        self.total.add(count)
        group.add(count)

    def _release(self, address: int, group: Tally, count: int) -> None:
        self._alive.remove(address)
        self._add(group, -count)
