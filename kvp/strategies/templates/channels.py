"""Units of KV channels: how rope pairs, value channels and groups are bound together when they are cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from kvp.models.spaces import find_spaces, members
from kvp.options import options
from kvp.strategies.allocation.pools import Part, Pool
from kvp.strategies.signals.estimate import SUBLAYERS
from kvp.strategies.signals.importance import Importance, require_defined, score_spaces
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ChannelGrouping = Literal[
    "coupled", "separate", "apart", "kv_group", "vo", "ffn", "block", "attention", "mlp"
]
Scope = Literal["head", "layer", "model"]


@options
class ChannelStrategy(ScoreStrategy):
    """Cut units bound together by `grouping`, shared by `scope`.

    | grouping | a unit is |
    |---|---|
    | `coupled` | a rope pair (i, i + head_dim / 2) of Q, K, V and O at once: all four shrink to one width |
    | `separate` | a rope pair of Q and K, or two channels of V and O; equally many of both stay |
    | `apart` | a rope pair of Q and K, or a channel of V and O; each kind has a width of its own |
    | `kv_group` | a KV group with its query heads |
    | `vo` | a channel of V and O |
    | `ffn`, `block`, `attention`, `mlp` | an index of that space |

    Attributes:
        grouping: What is cut together; see the table.
        scope: Which units share one set: those of each KV group ("head"), of all groups of a "layer", or of the whole
            "model", whose layers are then equally wide.
        gradient_checkpointing: Trade time for activation memory in the gradient criteria.
    """

    late: ClassVar[tuple[str, ...]] = (*ScoreStrategy.late, "scope", "gradient_checkpointing")

    grouping: ChannelGrouping = "separate"
    scope: Scope = "head"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.scope != "head" and self.grouping not in ("coupled", "separate", "vo"):
            raise ValueError(
                f"strategy.scope={self.scope} has no meaning for grouping={self.grouping}; use scope=head, or "
                "grouping=separate"
            )

    @override
    def kinds(self) -> tuple[Kind, ...]:
        if self.grouping == "coupled" or self.grouping == "separate" or self.grouping == "apart":
            return ("qk", "vo")
        return (self.grouping,)

    @override
    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
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
    """Cut units of channels, scored by one of `kvp.strategies.signals.importance`."""

    @property
    @abstractmethod
    def criterion(self) -> Importance:
        """Return the importance of `kvp.strategies.signals.importance` that scores."""

    @property
    @override
    def needs_calibration(self) -> bool:
        return self.probes or self.criterion not in ("random", "l1", "l2")

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        if self.grouping in ("block", "mlp") and self.criterion != "random":
            for space in self.spaces(config):
                members(config, space)  # which experts have none of
        require_defined(self.criterion, self.kinds())
        super().check(config, budget)

    @override
    def backward(self) -> Mapping[str, Collection[str]] | None:
        if self.criterion in ("random", "l1", "l2", "activation"):
            return None
        cut = ("mlp",) if self.grouping in ("ffn", "mlp") else ("attention",)
        sublayers = SUBLAYERS if self.grouping == "block" else cut
        gates = self.criterion == "taylor_gate"
        return {"gradients": () if gates else sublayers, "watched": sublayers if gates else ()}

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        spaces = find_spaces(target.config, self.kinds())
        return score_spaces(target, spaces, self.criterion, self.gradient_checkpointing)


def coupled_parts(qk: Space, qk_score: Tensor, vo: Space, vo_score: Tensor) -> tuple[Part, Part]:
    """Return parts with one set of channels per head for Q, K, V and O, in rope pairs (i, i + head_dim / 2)."""
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
