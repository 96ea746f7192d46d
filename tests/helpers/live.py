"""The most bytes that tensors hold at a time, counted as torch makes them."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Keeps the most bytes that were held at a time, parameters not counted."""

    def __init__(self, model):
        super().__init__()
        self.peak, self.held = 0, {}
        self.parameters = {StorageWeakRef(each.untyped_storage()).cdata for each in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in (each for each in tree_leaves(result) if isinstance(each, torch.Tensor)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self.parameters:
                self.held[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result
