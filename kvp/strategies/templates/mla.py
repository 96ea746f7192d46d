"""Methods that leave multi-head latent attention: one latent for values and still keys, and rotated keys beside it.

All KV heads become one (`kvp.models.joined`). Its values are the latent, which queries read as keys, too. Methods
differ in which keys go on turning, and in the directions of the latent.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.joined import joined_config
from kvp.models.linears import Linear, named_linears
from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, layer_shapes
from kvp.options import options
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.head_moments import Heads
from kvp.strategies.signals.latents import Principal, principal
from kvp.strategies.signals.walk import Visit, found_edits, walk
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, LayerShape, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class MLAStrategy(ScoreStrategy):
    """Join all KV heads, and cut their pairs and the latent to one width each.

    Attributes:
        allocator: The widths are multiples of its `multiple_of`.
        kv_lora_rank: Channels of the latent; None: what the budget leaves.
        qk_rope_head_dim: Rotated channels beside it; None: the method's choice.
    """

    late: ClassVar[tuple[str, ...]] = (*ScoreStrategy.late, "kv_lora_rank")
    searches: ClassVar[bool] = True
    joins: ClassVar[int] = 1
    latent: ClassVar[bool] = True

    allocator: Uniform = Uniform()
    kv_lora_rank: int | None = Field(default=None, ge=1, description="null: what the budget leaves")
    qk_rope_head_dim: int | None = Field(
        default=None, ge=2, multiple_of=2, description="null: the method's choice"
    )

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("qk", "vo")

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Check the model as joined.

        Raises:
            ValueError: The budget is not of the cache, the model is pruned already, it norms queries and keys, or no
                widths meet the budget.
        """
        name = type(self).__name__
        if budget.of != "kv_cache":
            raise ValueError(
                f"{name} cuts what is cached, so it goes with ratio=kv_cache only; got ratio.of={budget.of}"
            )
        if layer_shapes(config) != dense_shapes(config):
            raise ValueError(
                f"{name} starts from a dense model, and this one is pruned: give it the model that this was made from"
            )
        if family_of(config).qk_norm:
            raise ValueError(
                f"{config.model_type} norms queries and keys, so its heads cannot share one latent: choose "
                "strategy=kvpruner, which cuts keys after the norm"
            )
        super().check(joined_config(config, self.joins, self.latent), budget)

    @override
    def rewritten(self, config: PretrainedConfig) -> list[Linear]:
        """Return every matrix of the attentions."""
        return named_linears(config, "q", "k", "v", "q_latent", "o")

    def widths(
        self, shape: LayerShape, turning: int, budget: Budget, turned: Iterable[int] | None = None
    ) -> list[tuple[int, int]]:
        """Return widths of latent and rotated keys, as near to the budget as they come; given ones stay.

        Args:
            shape: A joined layer.
            turning: The most channels that may turn.
            budget: How much of the cache to remove.
            turned: Widths of rotated keys to choose from; None: `qk_rope_head_dim`, or all multiples.

        Raises:
            ValueError: None is near enough; the message names the nearest.
        """
        step, dense = self.allocator.multiple_of, shape.kv_width
        even = step if step % CHANNELS_PER_PAIR == 0 else CHANNELS_PER_PAIR * step
        ranks = range(step, shape.v_head_dim + 1, step)
        if self.kv_lora_rank:
            ranks = range(self.kv_lora_rank, min(self.kv_lora_rank, shape.v_head_dim) + 1)
        if turned is None and self.qk_rope_head_dim:
            turned = range(self.qk_rope_head_dim, min(self.qk_rope_head_dim, turning) + 1)
        elif turned is None:
            turned = range(even, turning + 1, even)
        widths = {both: abs(1 - sum(both) / dense - budget.value) for both in product(ranks, turned)}
        nearest = min(widths.values(), default=math.inf)
        found = [both for both, off in widths.items() if off == nearest]
        if nearest > budget.tolerance:
            ask = (
                f"the nearest is {1 - sum(found[0]) / dense:.4f}: ask for that"
                if found
                else "there is none: widen them"
            )
            given = f"multiple_of={step}, kv_lora_rank={self.kv_lora_rank}, qk_rope_head_dim={self.qk_rope_head_dim}"
            raise ValueError(
                f"ratio.value={budget.value} of {dense} channels per layer cannot be reached by a latent of at most "
                f"{shape.v_head_dim} and {turning} rotated channels ({given}); {ask}"
            )
        return found


@dataclass(frozen=True)
class Turned:
    """The keys of a joined layer in the basis of which some pairs go on turning.

    Attributes:
        query: (heads, channels, in) a bias as the last column.
        key: (channels, in)
        worth: (pairs,) higher = goes on turning.
        moment: (in, in) second moment of the inputs under which the latent has principal components.
    """

    query: Tensor
    key: Tensor
    worth: Tensor
    moment: Tensor


@options
class PrincipalLatentStrategy(MLAStrategy):
    """Read values and still keys from their joint principal components.

    Leaves turn the keys (`turned`) and name the pairs that go on turning (`turning`).

    Class attributes:
        balanced: Whether still keys are brought to the size of values first.
    """

    balanced: ClassVar[bool] = False

    @abstractmethod
    def turned(self, visit: Visit) -> Turned:
        """Return keys and queries of the layer visited, such that the function stays."""

    @abstractmethod
    def turning(self, config: PretrainedConfig, worth: Tensor) -> Tensor:
        """Return the pairs of a joined layer that go on turning, ascending: as many for any worth."""

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return (1, pairs) the method's worth of turning, and (1, v_head_dim) energies of the latent's directions."""
        spaces = {(space.layer, space.kind): space for space in self.spaces(target.config)}
        scores: dict[Space, Tensor] = {}
        for visit in self._visits(target):
            keys, latent = self._found(visit)
            for kind, score in zip(self.kinds(), (keys.worth, latent.energies), strict=True):
                require_finite(score.sum(), f"the {kind} of layer {visit.layer}")
                scores[spaces[visit.layer, kind]] = score[None].float().cpu()
        return scores

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        keep = {
            space: self.turning(config, score[0])[None]
            for space, score in scores.items()
            if space.kind == "qk"
        }
        shape = next(each for each in layer_shapes(config) if each.num_key_value_heads)
        turned = CHANNELS_PER_PAIR * next(iter(keep.values())).shape[1]
        rank = self.widths(shape, turned, budget, [turned])[0][0]
        return Plan(keep | {space: torch.arange(rank)[None] for space in scores if space.kind == "vo"})

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        plan = self.plan(target.config, scores, budget, profile)
        ranks = {space.layer: keep.shape[1] for space, keep in plan.keep.items() if space.kind == "vo"}

        def make(visit: Visit) -> dict[str, Tensor]:
            return self._edits(visit, ranks[visit.layer])

        return replace(plan, edits=found_edits(self._visits(target), make, directory))

    def _visits(self, target: Target) -> Iterator[Visit]:
        shapes, batches = layer_shapes(target.config), target.batches if self.needs_calibration else ()
        visits = walk(target.model, batches, type(self).__name__, offload=True)
        return (visit for visit in visits if shapes[visit.layer].num_key_value_heads)

    def _found(self, visit: Visit) -> tuple[Turned, Principal]:
        keys, config = self.turned(visit), visit.model.config
        still = torch.ones(len(keys.worth), dtype=torch.bool)
        still[self.turning(config, keys.worth.float())] = False
        latent = principal(visit, keys.query, keys.key, still.nonzero().flatten(), keys.moment, self.balanced)
        return keys, latent

    def _edits(self, visit: Visit, rank: int) -> dict[str, Tensor]:
        heads, (keys, latent) = Heads(visit), self._found(visit)
        turned = heads.edits("q", keys.query[None]) | heads.edits("k", keys.key[None, None])
        return turned | latent.edits(rank)
