"""The input of a strategy: a model with calibration data, and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from kvp.types import Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Scores = Mapping[Space, Tensor]  # per space a tensor of its shape; higher = kept


@dataclass(frozen=True)
class Target:
    """A model to prune, and the calibration data that a strategy may read.

    Attributes:
        model: The dense model, in eval mode. A strategy leaves it as it was.
        calibration: (num_samples, length) token ids; None for a strategy that needs none.
        batch_size: Samples per pass.
        seed: The seed of everything that is drawn.
    """

    model: PreTrainedModel
    calibration: Tensor | None
    batch_size: int
    seed: int

    @property
    def config(self) -> PretrainedConfig:
        """Return the model's config."""
        return self.model.config

    @cached_property
    def batches(self) -> tuple[Tensor, ...]:
        """Return the calibration ids in batches of `batch_size` samples."""
        assert self.calibration is not None, "this strategy needs calibration data"
        return self.calibration.split(self.batch_size)
