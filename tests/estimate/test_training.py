"""A step of LoRA takes what is estimated, and no logits of a whole batch."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvp.estimate.kept import Adapter
from kvp.estimate.training import training_bytes
from kvp.recovery.batches import lose_without_logits
from kvp.recovery.lora import PROJECTIONS
from tests.helpers.live import Live

BATCH, LENGTH = 4, 256


def step(config, vocabulary, checkpointing, modules=PROJECTIONS):
    """Return the peak of a forward and a backward pass beside the weights, and its estimate."""
    model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tuned = peft.LoraConfig(r=2, target_modules=list(modules), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, tuned).train()
    lose_without_logits(model.get_base_model())
    ids = torch.randint(vocabulary, (BATCH, LENGTH))
    with Live(model) as live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    adapter = Adapter(rank=2, modules=modules)
    parts = training_bytes(
        config, batch_size=BATCH, length=LENGTH, width=4, adapter=adapter, checkpointing=checkpointing
    )
    return live.peak, parts["activations"] + parts["logits"]


def llama(vocabulary, layers):
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [2, 6])
def test_a_step_takes_what_is_estimated_whatever_the_vocabulary(layers, checkpointing):
    peaks = []
    for vocabulary in (4_096, 60_000):
        peak, estimate = step(llama(vocabulary, layers), vocabulary, checkpointing)
        assert peak == pytest.approx(estimate, rel=0.2 if checkpointing else 0.1)
        peaks.append(peak)
    assert peaks[1] < 1.01 * peaks[0]


def test_a_head_that_is_tuned_holds_its_logits():
    peak, estimate = step(llama(20_000, 2), 20_000, False, ("q_proj", "lm_head"))
    assert peak == pytest.approx(estimate, rel=0.1)
