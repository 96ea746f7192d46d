"""Units of KV channels: how rope pairs, value channels and groups are bound together when they are cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from kvp.models.spaces import find_spaces
from kvp.options import options
from kvp.strategies.allocation.pools import Part, Pool
from kvp.strategies.signals.importance import Importance, score_spaces
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Kind, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Grouping = Literal["coupled", "separate", "apart", "kv_group", "vo", "ffn", "block", "attention", "mlp"]
Scope = Literal["head", "layer", "model"]


@options
class ChannelStrategy(ScoreStrategy):
    """Cut units bound together by `grouping`, shared by `scope`.

    Attributes:
        grouping: "coupled": one set of channels per head for Q, K, V and O, in rope pairs (i,
            i + head_dim / 2), so that all four shrink to one width. "separate": rope pairs for Q and
            K, channels for V and O, equally many of both. "apart": the same, each with a width of its
            own. "kv_group": whole KV groups with their
            query heads. "vo": only value channels (for models with query-key norms). "ffn", "block",
            "attention", "mlp": those spaces.
        scope: "head": each KV group keeps its own set. "layer": one set for all groups of a layer.
            "model": one set for the whole model, all layers equally wide.
        gradient_checkpointing: Trade time for activation memory in the gradient criteria.
    """

    late: ClassVar[tuple[str, ...]] = (*ScoreStrategy.late, "scope", "gradient_checkpointing")

    grouping: Grouping = "separate"
    scope: Scope = "head"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.scope != "head" and self.grouping not in ("coupled", "separate", "vo"):
            raise ValueError(
                f"strategy.scope={self.scope} has no meaning for grouping={self.grouping}; use scope=head, or "
                "grouping=separate"
            )

    def kinds(self) -> tuple[Kind, ...]:
        """Depends on the grouping."""
        if self.grouping == "coupled" or self.grouping == "separate" or self.grouping == "apart":
            return ("qk", "vo")
        return (self.grouping,)

    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
        """One pool per layer whose parts keep one width, or a single pool for the model."""
        if self.grouping not in ("coupled", "separate", "vo"):
            return super().pools(config, scores)
        scores = self._shared(scores)
        layers = sorted({space.layer for space in scores if space.layer is not None})
        parts = {n: self._parts({s: score for s, score in scores.items() if s.layer == n}) for n in layers}
        if self.scope == "model":
            return [self._pool(tuple(part for n in layers for part in parts[n]), None)]
        return [self._pool(parts[n], n) for n in layers]

    def _pool(self, parts: tuple[Part, ...], layer: int | None) -> Pool:
        channels_per_unit = 1 if self.grouping == "vo" else 2
        units = parts[0].scores.shape[-1] // parts[0].per_unit
        return Pool(parts, units, step=max(1, self.allocator.multiple_of // channels_per_unit), layer=layer)

    def _parts(self, scores: Scores) -> tuple[Part, ...]:
        if self.grouping == "vo":
            return tuple(Part(space, score) for space, score in scores.items())
        (qk, qk_score), (vo, vo_score) = sorted(scores.items(), key=lambda item: item[0].kind)
        if self.grouping == "coupled":
            return coupled_parts(qk, qk_score, vo, vo_score)
        _require_equal_widths(qk, vo)
        return Part(qk, qk_score), Part(vo, vo_score, per_unit=2)

    def _shared(self, scores: Scores) -> Scores:
        """Average the scores over what shares one set, so that its members choose alike."""
        if self.scope == "head":
            return scores
        shared = {s: score.mean(0, keepdim=True).expand_as(score) for s, score in scores.items()}
        if self.scope == "layer":
            return shared
        if len({(space.kind, space.shape[-1]) for space in shared}) > len({space.kind for space in shared}):
            raise ValueError(
                "strategy.scope=model needs layers of one width, this model's differ; use scope=layer"
            )
        kinds = {space.kind for space in shared}
        mean = {k: torch.stack([v[0] for s, v in shared.items() if s.kind == k]).mean(0) for k in kinds}
        return {s: mean[s.kind].expand_as(score) for s, score in shared.items()}


@options
class ImportanceStrategy(ChannelStrategy):
    """Such units, scored by one of `kvp.strategies.signals.importance`."""

    @property
    @abstractmethod
    def criterion(self) -> Importance:
        """The importance of `kvp.strategies.signals.importance` that scores."""

    @property
    def needs_calibration(self) -> bool:
        """Only the data-free importances do without, under an allocator that does not probe."""
        return self.probes or self.criterion not in ("random", "l1", "l2")

    def score(self, target: Target) -> dict[Space, Tensor]:
        """Importance of every index of the spaces."""
        spaces = find_spaces(target.config, self.kinds())
        return score_spaces(target, spaces, self.criterion, self.gradient_checkpointing)


def coupled_parts(qk: Space, qk_score: Tensor, vo: Space, vo_score: Tensor) -> tuple[Part, Part]:
    """One set of channels per head for Q, K, V and O, in rope pairs (i, i + head_dim / 2)."""
    _require_equal_widths(qk, vo)
    pairs = qk.shape[-1]
    coupled = qk_score + vo_score.view(-1, 2, pairs).sum(1)
    return Part(qk, coupled), Part(vo, coupled, expand=_both_halves(pairs))


def _require_equal_widths(qk: Space, vo: Space) -> None:
    if vo.shape[-1] != 2 * qk.shape[-1]:
        raise ValueError(
            f"query-key and value channels that are cut together need equal widths, layer {qk.layer} has "
            f"{2 * qk.shape[-1]} and {vo.shape[-1]}; use a strategy with grouping=vo or kv_group"
        )


def _both_halves(pairs: int) -> Callable[[Tensor], Tensor]:
    return lambda indices: torch.cat([indices, indices + pairs], dim=-1)
