"""Methods that cache latents of keys and values, from a low rank of their projections.

`kvp.strategies.signals.low_rank` has the factors, which are best for a given rank. Methods differ in how many heads
share a latent, and in how the ranks are divided among layers, keys and values.

Keys are expanded before their norm and rotation on every step, so bytes are saved and work is added
(`kvp.models.latent_attention`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.estimate.passes import FLOAT32, with_total
from kvp.models.family import family_of
from kvp.models.latents import with_latents, with_latents_config
from kvp.models.linears import Linear, linears, named_linears
from kvp.models.shapes import dense_shapes, layer_shapes
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator
from kvp.strategies.allocation.ranks import Proportional
from kvp.strategies.signals.fisher import mean_root_fisher
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.low_rank import Factors, Part, edits_of, factored, input_moments_of, rows_of
from kvp.strategies.signals.moments import TINY, Moments
from kvp.strategies.signals.outputs import visits_of_heads
from kvp.strategies.signals.walk import Visit, found_edits
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PARTS: dict[Part, Kind] = {"k": "k_latent", "v": "v_latent"}


@options
class LatentStrategy(ScoreStrategy):
    """Replace keys and values by latents and cut the channels of these.

    Leaves say how many heads share a latent and which allocator divides the ranks.

    Attributes:
        key_heads: KV heads that share a latent of keys; None: all of a layer. Where it does not divide them, the next
            smaller number that does.
        value_heads: The same for values.
        damping: Added to the diagonal of C, relative to its mean.
    """

    searches: ClassVar[bool] = True

    key_heads: int | None = Field(default=4, ge=1, description="KV heads per latent; null: all of a layer")
    value_heads: int | None = Field(default=4, ge=1, description="KV heads per latent; null: all of a layer")
    damping: float = Field(default=0.0, ge=0, description="relative to the mean of the diagonal")

    def __post_init__(self) -> None:
        if self.compensation is not None:
            raise ValueError(
                "strategy.compensation makes up for columns of o_proj that go, and latents leave them all: leave it out"
            )

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("k_latent", "v_latent")

    @property
    @override
    def recasts(self) -> Mapping[str, Any]:
        return {"key_heads": self.key_heads, "value_heads": self.value_heads}

    @override
    def recast_config(self, config: PretrainedConfig) -> PretrainedConfig:
        return with_latents_config(config, self.key_heads, self.value_heads)

    @override
    def recast(self, model: PreTrainedModel) -> PreTrainedModel:
        return with_latents(model, self.key_heads, self.value_heads)

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Check the model with latents.

        Raises:
            ValueError: The budget is not of the cache, the model is pruned already, or no ranks meet the budget.
        """
        if budget.of != "kv_cache":
            raise ValueError(
                f"{type(self).__name__} makes the cache smaller by latents and adds parameters, so it goes with "
                f"ratio=kv_cache only; got ratio.of={budget.of}"
            )
        dense, *others = (
            replace(each, intermediate_size=0, experts=0)
            for each in (dense_shapes(config)[0], *layer_shapes(config))
        )
        if any(each != dense for each in others):
            raise ValueError(
                "latents start from dense attention, and that of this model is pruned: give the model that it was "
                "made from"
            )
        super().check(self.recast_config(config), budget)

    @override
    def rewritten(self, config: PretrainedConfig) -> list[Linear]:
        """Return the matrices that read latents, and those that expand them."""
        family, found = family_of(config), list[Linear]()
        for layer, shape in enumerate(layer_shapes(config)):
            for part, name, latents in ((1, family.k_up, shape.k_latents), (2, family.v_up, shape.v_latents)):
                if latents:
                    read, (count, width) = linears(config, layer)[0][part], latents
                    module = f"{read.module.rpartition('.')[0]}.{name}"
                    found += [read, Linear(module, width, count * width)]
        return found

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return (latents, channels) what a channel adds to the projection's output: squares summed over tokens."""
        spaces = {(space.layer, space.kind): space for space in self.spaces(target.config)}
        scores: dict[Space, Tensor] = {}
        for visit in visits_of_heads(target):
            moments = input_moments_of(visit)
            for part, kind in PARTS.items():
                energies = self.factors(visit, part, moments).energies * moments.count
                require_finite(energies.sum(), f"the {kind} of layer {visit.layer}")
                scores[spaces[visit.layer, kind]] = energies.float().cpu()
        return scores

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        plan = self.plan(target.config, scores, budget, profile)
        return replace(plan, edits=found_edits(visits_of_heads(target), self.edits, directory))

    def edits(self, visit: Visit) -> dict[str, Tensor]:
        """Return the parameters of the layer visited, its latents by rank: the same function."""
        moments, edits = input_moments_of(visit), dict[str, Tensor]()
        for part in PARTS:
            found = self.factors(visit, part, moments)
            edits |= edits_of(visit, part, found.reads, found.expands)
        return edits

    def factors(self, visit: Visit, part: Part, moments: Moments) -> Factors:
        """Return the factors of a projection of the layer visited.

        Args:
            visit: The layer, with expansions that are the identity.
            part: "k" or "v".
            moments: Of what enters the projection, with a last channel of 1 if it has a bias.
        """
        return factored(rows_of(visit, part), moments.gram / moments.count, self.damping)


@options
class FisherLatentStrategy(LatentStrategy):
    """Share out the ranks by the Fisher information of k_proj and v_proj, as Palu does.

    Attributes:
        gradient_checkpointing: Trade time for activation memory in the backward pass.
    """

    late: ClassVar[tuple[str, ...]] = (*LatentStrategy.late, "gradient_checkpointing")

    allocator: Allocator = Proportional(max_ratio=0.95)
    gradient_checkpointing: bool = False

    @override
    def backward(self) -> Mapping[str, Collection[str]] | None:
        return {"gradients": ("attention",)}

    @override
    def peak_bytes(self, config: PretrainedConfig, **sizes: Any) -> dict[str, int]:
        squares = FLOAT32 * sum(linear.rows * linear.columns for linear in named_linears(config, "k", "v"))
        parts = super().peak_bytes(config, **sizes)
        return with_total({**parts, "fisher": squares})

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return the squares as shares: those of a projection sum to the mean root of its Fisher information."""
        squares, family = super().score(target), family_of(target.config)
        parts = {"k_latent": family.k, "v_latent": family.v}
        names = {
            space: f"{family.layers}.{space.layer}.{family.attention}.{parts[space.kind]}"
            for space in squares
        }
        fisher = mean_root_fisher(
            target.model,
            [*names.values()],
            target.batches,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return {
            space: score * (fisher[names[space]] / score.sum().clamp(min=TINY))
            for space, score in squares.items()
        }
