"""Strategies that score units, give every pool of units its part of the budget, and keep the best of each."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.linears import Linear, all_linears
from kvp.models.masks import masked, without
from kvp.models.shapes import CHANNELS_PER_PAIR, cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Sensitivity, Uniform
from kvp.strategies.allocation.pools import Part, Pool
from kvp.strategies.base import PlannedStrategy
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.losses import losses_without
from kvp.strategies.target import Scores, Target
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHANNELS_PER_UNIT: dict[Kind, int] = {
    "qk": CHANNELS_PER_PAIR,
    "vo": 1,
    "k_latent": 1,
    "v_latent": 1,
    "ffn": 1,
}
LAYER_PARTS: set[Kind] = {"block", "attention", "mlp"}  # they compete across layers, by their scores alone


@options
class ScoreStrategy(PlannedStrategy):
    """A strategy whose plan is: allocate the budget to pools, keep the best units of each.

    Leaves write `kinds` and `score`, and `pools` where units compete otherwise than index by index.

    Attributes:
        allocator: How the budget is divided among the pools.
    """

    late: ClassVar[tuple[str, ...]] = ("compensation", "allocator")

    allocator: Allocator = Uniform()

    @property
    @override
    def probes(self) -> bool:
        return isinstance(self.allocator, Sensitivity) and not self._cuts_layers

    @property
    def _cuts_layers(self) -> bool:
        return set(self.kinds()) <= LAYER_PARTS

    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """Return the kinds of spaces this strategy cuts."""

    def spaces(self, config: PretrainedConfig) -> list[Space]:
        """Return the spaces it cuts: those kinds in every layer."""
        return find_spaces(config, self.kinds())

    @override
    def refitted(self, config: PretrainedConfig) -> list[Linear]:
        """Return o_proj and down_proj of every layer, as far as their inputs are cut."""
        if self.compensation is None:
            return []
        kinds, family = set(self.kinds()), family_of(config)
        cut = {family.o: kinds & {"vo", "kv_group"}, family.down: kinds & {"ffn"}}
        return [each for each in all_linears(config) if cut.get(each.module.rpartition(".")[2])]

    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
        """Return which units compete with each other: by default the indices of each space, row by row."""
        return [
            Pool(
                parts=(Part(space, score.view(-1, space.shape[-1])),),
                units=space.shape[-1],
                step=self._step(space.kind),
                layer=space.layer,
            )
            for space, score in scores.items()
        ]

    def _step(self, kind: Kind) -> int:
        """Return the units that make `allocator.multiple_of` channels; 1 for whole groups and sublayers."""
        channels = CHANNELS_PER_UNIT.get(kind)
        return max(1, self.allocator.multiple_of // channels) if channels else 1

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        # Scores of zero meet the same budget in the same spaces.
        scores = {space: torch.zeros(space.shape) for space in self.spaces(config)}
        plan = self._plan if self._cuts_layers else self.plan  # which layers fall, only their scores will say
        plan(config, scores, budget, torch.zeros(len(layer_shapes(config))))

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        plan = self._plan(config, scores, budget, profile)
        if self._cuts_layers:  # whose cost is the average of layers that may differ
            _require_reached(config, plan, budget)
        return plan

    def _plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        pools = self.pools(config, scores)
        units = self.allocator.allocate(config, pools, budget, profile)
        return Plan(
            {s: keep for pool, k in zip(pools, units, strict=True) for s, keep in pool.keep(k).items()}
        )

    @override
    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        """Return (layers,) nats per token that the loss rises without each layer's attention, or a part of it.

        Where neurons alone are cut, it is the MLP that is left out.

        This is phase A of KVPruner (arXiv 2409.11057, figure 3: the change after removing the KV of a block).
        """
        allocator = self.allocator
        assert isinstance(allocator, Sensitivity)
        model, layers = target.model, range(len(layer_shapes(target.config)))
        if allocator.probe == "attention":
            removals = [(n, partial(without, model, n, self._probed)) for n in layers]
        else:
            plans = self._partial_plans(target.config, scores, allocator.probe_ratio)
            removals = [(n, partial(masked, model, plan)) for n, plan in plans.items()]
        assert target.calibration is not None
        batches = target.calibration[: allocator.probe_samples].split(target.batch_size)
        base, losses = losses_without(model, batches, removals)
        require_finite(losses.sum() + base, "a calibration loss without one layer")
        profile = torch.zeros(len(layers), dtype=torch.float64)
        profile[[n for n, _ in removals]] = losses - base
        return profile

    @property
    @override
    def probes_by_score(self) -> bool:
        # without its whole attention a block is the same, whatever the scores
        return isinstance(self.allocator, Sensitivity) and self.allocator.probe == "partial"

    @override
    def probe_inputs(self) -> dict[str, Any]:
        allocator = self.allocator
        assert isinstance(allocator, Sensitivity)
        if not self.probes_by_score:
            return {"probe": self._probed, "samples": allocator.probe_samples}
        late = {name: getattr(self, name) for name in self.late if name not in ScoreStrategy.late}
        return {
            "probe": "partial",
            "ratio": allocator.probe_ratio,
            "samples": allocator.probe_samples,
            **late,
        }

    @property
    def _probed(self) -> Literal["attention", "mlp"]:
        return "mlp" if self.kinds() == ("ffn",) else "attention"

    def _partial_plans(self, config: PretrainedConfig, scores: Scores, ratio: float) -> dict[int, Plan]:
        """Return, per layer, the plan that removes `ratio` of its units and touches no other layer."""
        keep = {
            space: indices
            for pool in self.pools(config, scores)
            for space, indices in pool.keep(max(1, round(pool.units * (1 - ratio)))).items()
        }
        layers = sorted({space.layer for space in keep if space.layer is not None})
        return {n: Plan({s: indices for s, indices in keep.items() if s.layer == n}) for n in layers}


def _require_reached(config: PretrainedConfig, plan: Plan, budget: Budget) -> None:
    """Raise ValueError unless a plan removes what the budget asks, within its tolerance."""
    shapes = layer_shapes(config)
    kept = size(config, cut(shapes, plan)).count(budget.of) / size(config, shapes).count(budget.of)
    if abs(1 - kept - budget.value) > budget.tolerance + 1e-9:
        raise ValueError(
            f"ratio.value={budget.value} of {budget.of} is not reached by this model's layers, which differ in size: "
            f"those of the lowest scores are {1 - kept:.4f} of it; ask for that, raise ratio.tolerance, or choose a "
            "strategy.grouping of channels"
        )
