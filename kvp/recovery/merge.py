"""Merge an adapter into its checkpoint, and check that only rounding lies between the two forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from kvp.models.load import load_config, load_model
from kvp.recovery.batches import collate
from kvp.recovery.examples import Example

PROBE = (1, 32)  # sequences and tokens on which the merged model must agree with the adapter
ADAPTER = "adapter_model.safetensors"
MERGE_TOLERANCE = 1e-3  # of the norm of the logits


def merge(
    checkpoint: Path, adapter: Path, probe: Tensor, *, keep_zeros: bool = False
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Add an adapter to a checkpoint's weights in float32, then round once to the checkpoint's dtype.

    The weights come from disk, because training may have rounded its copy.

    Args:
        checkpoint: The model the adapter was trained on.
        adapter: Directory of the adapter.
        probe: Token ids of shape (sequences, tokens) on which the two forms are compared.
        keep_zeros: Whether zero weights of the checkpoint become zero again, after the comparison.

    Returns:
        The model, on the CPU, and the largest difference of a logit between the two in float32.

    Raises:
        ArithmeticError: The two forms differ by more than rounding explains.
        RuntimeError: The adapter belongs to other modules than those of the checkpoint.
    """
    stored = load_config(checkpoint).dtype
    base = load_model(checkpoint, dtype=torch.float32, device="cpu")
    zeros = {name: weight == 0 for name, weight in base.named_parameters()} if keep_zeros else {}
    updated = PeftModel.from_pretrained(base, adapter)
    if odd := load_file(adapter / ADAPTER).keys() ^ get_peft_model_state_dict(updated).keys():
        raise RuntimeError(
            f"{adapter} and {checkpoint} do not belong together: {min(odd)} is in one of them alone"
        )
    expected = _logits(updated, probe)
    merged = updated.merge_and_unload()
    difference = _logits(merged, probe) - expected
    relative = (difference.norm() / expected.norm()).item()
    if not relative <= MERGE_TOLERANCE:
        raise ArithmeticError(
            f"The merged model's logits differ from the adapter's by {relative:.2%} of their norm, rounding "
            f"explains {MERGE_TOLERANCE:.2%}: lower recovery.learning_rate or recovery.alpha, the "
            "update is too large"
        )
    with torch.no_grad():
        for name, zero in zeros.items():
            merged.get_parameter(name).masked_fill_(zero, 0)
    return merged.to(stored), {"merge_max_diff": difference.abs().max().item()}


def probe_of(examples: Sequence[Example]) -> Tensor:
    """Return the beginnings of the first examples, token ids of shape (sequences, tokens)."""
    sequences, tokens = PROBE
    shortened = [{key: ids[:tokens] for key, ids in example.items()} for example in examples[:sequences]]
    return collate(shortened)["input_ids"]


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()
