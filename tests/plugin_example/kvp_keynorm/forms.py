"""A form of an export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvp.models.load import save
from kvp.serving.stock import to_stock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def half(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a stock checkpoint with weights in float16."""
    save(to_stock(model, "stock").to(torch.float16), tokenizer, directory)
