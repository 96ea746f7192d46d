"""Strategies that hold another one, `first`, and go on from the scores of that one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from typing_extensions import override

from kvp.models.linears import Linear
from kvp.options import options
from kvp.strategies.base import Strategy
from kvp.strategies.target import Scores, Target
from kvp.types import Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@options
class Wrapper(Strategy):
    """Score and probe as `first` does, then look for the plan with the model at hand.

    Attributes:
        first: The strategy whose scores this one goes on from.
    """

    searches: ClassVar[bool] = True  # looks at the model that the first leaves

    first: Strategy

    @property
    @override
    def probes(self) -> bool:
        return self.first.probes

    @property
    @override
    def recasts(self) -> Mapping[str, Any]:
        return self.first.recasts

    @override
    def recast_config(self, config: PretrainedConfig) -> PretrainedConfig:
        return self.first.recast_config(config)

    @override
    def recast(self, model: PreTrainedModel) -> PreTrainedModel:
        return self.first.recast(model)

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        return self.first.score(target)

    @override
    def refitted(self, config: PretrainedConfig) -> list[Linear]:
        return replace(self.first, compensation=self.compensation).refitted(config)

    @override
    def peak_bytes(self, config: PretrainedConfig, **sizes: Any) -> dict[str, int]:
        peaks = (self.first.peak_bytes(config, **sizes), super().peak_bytes(config, **sizes))
        return max(peaks, key=lambda parts: parts["total"])

    @override
    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        return self.first.sensitivity(target, scores)

    @property
    @override
    def probes_by_score(self) -> bool:
        return self.first.probes_by_score

    @override
    def probe_inputs(self) -> dict[str, Any]:
        return self.first.probe_inputs()
