"""How much memory a computation holds: bytes of live tensors, counted exactly.

The size of a process says little: allocators keep what was freed, libraries load, and two runs of the same code differ.
What an unroll costs is the number of bytes its tensors hold at once, and that number can be counted.  Every operation of
PyTorch passes through a dispatch mode; :class:`LiveBytes` is one that looks at what comes out, notes each *storage* it has
not seen, and is told by a weak reference when that storage dies.  A view shares its storage and so counts nothing.  What
autograd saves for the backward pass counts until the graph is gone, although no Python variable names it: PyTorch keeps
the Python object of a storage, and with it the weak reference, alive as long as anything in C++ holds the storage.

Counted so, one computation gives the same figure on every CPU.  A kernel's own scratch memory is not seen.  On a GPU the
allocator's own account is read instead, which includes it and rounds every block up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tally:
    """Bytes held ``now``, and the most held at once, ``peak``."""

    def __init__(self):
        self.now = self.peak = 0

    def add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class _Watch(TorchDispatchMode):
    """Tallies storages made while it is on: those of tensors of the shapes ``apart``, and the ``rest``."""

    def __init__(self, apart: Iterable[Iterable[int]]):
        super().__init__()
        self.shapes = {tuple(sorted(shape)) for shape in apart}  # a transposed matrix is the same set
        self.total, self.apart, self.rest = Tally(), Tally(), Tally()
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # torch.tensor makes its storage unseen and hands it to lift_fresh; anything else that comes in was there before.
        before = set() if func is torch.ops.aten.lift_fresh.default else {_address(t) for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if _address(tensor) not in before:
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, count = storage._cdata, storage.nbytes()
        if address in self.alive or not count:
            return
        tallies = self.total, self.apart if tuple(sorted(tensor.shape)) in self.shapes else self.rest
        for tally in tallies:
            tally.add(count)

        def gone(_):
            del self.alive[address]
            for tally in tallies:
                tally.now -= count

        self.alive[address] = weakref.ref(storage, gone)


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class LiveBytes:
    """Count the bytes of the tensors that the code inside makes, while they live::

        with LiveBytes() as live:
            loss = model(batch)
        live.peak   # the most bytes held at once; live.now: those held still

    What was there before does not count, nor does its death.  ``now`` goes on falling after the block, as what was made
    in it dies.

    Args:
        device: of the computation.  On a GPU ``now`` and ``peak`` are the allocator's; its peak counter is set back.
        apart: shapes to tally apart, those of a model's parameters for example: ``live.apart.peak`` for them, in any
            order of their axes, and ``live.rest.peak`` for all others.  Each has its own peak, and the two peaks need not
            come at one time.  On a GPU too these two are counted operation by operation.
    """

    def __init__(self, device: str | torch.device = "cpu", apart: Iterable[Iterable[int]] = ()):
        self.device = torch.device(device)
        self._watch = _Watch(apart)
        self._before, self._peak = 0, 0

    @property
    def apart(self) -> Tally:
        """Tensors of the shapes named, and what shares their storage."""
        return self._watch.apart

    @property
    def rest(self) -> Tally:
        """All other tensors."""
        return self._watch.rest

    @property
    def now(self) -> int:
        """Bytes held now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._before
        return self._watch.total.now

    @property
    def peak(self) -> int:
        """The most bytes held at once inside the block; on a GPU known when the block ends."""
        return self._peak if self.device.type == "cuda" else self._watch.total.peak

    def __enter__(self) -> LiveBytes:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        self._watch.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._watch.__exit__(*error)
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device) - self._before
