"""Opening a checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvp.models.load import load_model
from tests.conftest import tiny_model


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    tiny_model("llama", "gqa").save_pretrained(tmp_path)
    assert not load_model(tmp_path, dtype=torch.float32, device="cpu").training
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights.*k_proj"):
        load_model(tmp_path, dtype=torch.float32, device="cpu")
