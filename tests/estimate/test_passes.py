"""Bytes of a pass without gradients are those that its tensors take at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvp.estimate.passes import evaluation_bytes, slice_bytes
from kvp.evaluation.perplexity import window_nll
from tests.helpers.live import Live

BATCH, LENGTH = 8, 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("inner", "vocabulary"), [(64, 49_000), (64, 9_000), (4_096, 300)])
def test_perplexity_holds_a_slice_of_the_logits_or_a_layer(inner, vocabulary, dtype):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
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
