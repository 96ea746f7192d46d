"""A LoRA update merged into a sparse model: dense by itself, sparse if it is asked to be."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from kvp.recovery.merge import merge
from tests.conftest import tiny_model


def test_zeros_stay_and_everything_else_is_the_dense_merge(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter[:, ::2] = 0
    model.save_pretrained(tmp_path / "sparse")
    stored = load_file(tmp_path / "sparse" / "model.safetensors")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    probe = torch.arange(3, 35)[None]
    dense, _ = merge(tmp_path / "sparse", tmp_path / "adapter", probe)
    kept, _ = merge(tmp_path / "sparse", tmp_path / "adapter", probe, keep_zeros=True)
    changed = 0
    for name, weight in kept.named_parameters():
        zero, whole = stored[name] == 0, dense.get_parameter(name)
        assert (weight[zero] == 0).all()
        assert torch.equal(weight[~zero], whole[~zero])
        changed += int((whole[zero] != 0).sum())
    assert changed > 1000
