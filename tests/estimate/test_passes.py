"""Bytes of a pass without gradients are those that its tensors take at a time."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kvp.estimate.passes import evaluation_bytes, slice_bytes
from kvp.evaluation.perplexity import window_nll

BATCH, LENGTH = 8, 128


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("inner", "vocabulary"), [(64, 49_000), (64, 9_000), (4_096, 300)])
def test_perplexity_holds_a_slice_of_the_logits_or_a_layer(inner, vocabulary, dtype):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.inference_mode(), Live(model) as live:
        window_nll(model, torch.randint(vocabulary, (BATCH, LENGTH + 1)), LENGTH)
    size = {"tokens": BATCH * LENGTH, "width": dtype.itemsize}
    found = evaluation_bytes(config, **size, logits=slice_bytes(config, **size))
    assert live.peak == pytest.approx(found["activations"], rel=0.1)
