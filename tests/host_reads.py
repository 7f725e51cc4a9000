"""Counts how often the code inside a block waits for the device to read a value from it.

A GPU works through a queue.  Reading a tensor's value on the host (``.item()``, ``float(…)``, ``if tensor:``, ``.tolist()``,
``.cpu()``, picking by a mask of bools) waits until the queue is empty, and the device then idles until new work arrives.  The
calls are the same on a CPU, where they cost nothing, so a test can count them there.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SCALAR = torch.ops.aten._local_scalar_dense.default  # what item, float, int and bool of a tensor come to
UNSIZED = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.equal.default}
WHOLE = {torch.Tensor.tolist, torch.Tensor.cpu}


class HostReads(TorchDispatchMode):
    """``count`` reads so far::

        with HostReads() as reads:
            strategy(problem)
        reads.count
    """

    def __init__(self):
        super().__init__()
        self.count, self._calls = 0, _Calls(self)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += func is SCALAR or func in UNSIZED or by_mask
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Notes the calls that read a whole tensor, which no operation of their own stands for on a CPU."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.reads.count += func in WHOLE
        return func(*args, **(kwargs or {}))
