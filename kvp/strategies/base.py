"""What a strategy is: from a model and calibration data to a plan.

A strategy works in two steps, because the first is expensive and the second cheap: `score` looks at
the model and does not know the budget; `plan` turns scores and a budget into indices. A sweep over
ratios therefore scores once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvp.models.masks import masked, without
from kvp.models.shapes import CHANNELS_PER_PAIR, layer_shapes
from kvp.models.spaces import find_spaces
from kvp.strategies.allocation.allocate import Allocator, Sensitivity
from kvp.strategies.allocation.pools import Part, Pool
from kvp.strategies.compensation.compensate import Compensation
from kvp.strategies.signals.losses import losses_without
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Scores = Mapping[Space, Tensor]
CHANNELS_PER_UNIT: dict[Kind, int] = {"qk": CHANNELS_PER_PAIR, "vo": 1, "ffn": 1}


@dataclass(frozen=True)
class Target:
    """What a strategy may look at.

    Attributes:
        model: The model to prune, in eval mode.
        calibration: (num_samples, length) token ids; None for strategies that need none.
        batch_size: Samples per pass.
        seed: For everything that is drawn.
    """

    model: PreTrainedModel
    calibration: Tensor | None
    batch_size: int
    seed: int

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    @cached_property
    def batches(self) -> tuple[Tensor, ...]:
        """The calibration ids in batches."""
        return self.batches_of(self.batch_size)

    def batches_of(self, batch_size: int) -> tuple[Tensor, ...]:
        """The calibration ids in batches of `batch_size`."""
        assert self.calibration is not None, "this strategy needs calibration data"
        return self.calibration.split(batch_size)


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Base of all structural methods: abstract; its leaves are final, and their fields are their YAML.

    Class attributes:
        late: Fields that do not change the scores; they are left out of the score stage's fingerprint.
        prunes: Whether it removes anything; false: the dense baseline.

    Attributes:
        compensation: What the kept weights do for those that were cut; None: nothing.
    """

    late: ClassVar[tuple[str, ...]] = ("compensation",)
    prunes: ClassVar[bool] = True

    compensation: Compensation | None = None

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"strategy.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether `score` or `sensitivity` reads calibration data."""
        return True

    @property
    def probes(self) -> bool:
        """Whether `plan` wants the profile that `sensitivity` measures."""
        return False

    @property
    def sparsifies(self) -> bool:
        """Whether its plan leaves single weights at zero, in matrices of the same shape."""
        return False

    @property
    def slices(self) -> bool:
        """Whether its plan cuts the residual stream, after which nothing else can be pruned."""
        return False

    @property
    def joins(self) -> int | None:
        """How many KV heads an attention has before it is cut; None: as many as the model's."""
        return None

    @property
    def then(self) -> tuple[Budget, ...]:
        """The budgets of what it does after the first, if it does several things."""
        return ()

    @abstractmethod
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Refuse, before any weight is read, a space or a budget that this model cannot offer.

        Raises:
            ValueError: Names the spaces there are, or the nearest reachable ratio.
        """

    @abstractmethod
    def score(self, target: Target) -> dict[Space, Tensor]:
        """A score for every index of every space, of the space's shape; higher = kept."""

    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        """(layers,) how much the loss rises, in nats per token, without each layer's part."""
        raise AssertionError(f"{type(self).__name__} asks for no sensitivity profile")

    @property
    def probes_by_score(self) -> bool:
        """Whether `sensitivity` reads the scores."""
        return False

    def probe_inputs(self) -> dict[str, Any]:
        """Return what decides the profile, besides model, calibration and scores."""
        raise AssertionError(f"{type(self).__name__} asks for no sensitivity profile")

    @abstractmethod
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """The indices that stay under `budget`.

        Args:
            config: Of the model the scores belong to.
            scores: What `score` returned.
            budget: How much to remove, of what.
            profile: (layers,) what `sensitivity` returned, zeros if the strategy does not probe.
        """

    @property
    def searches(self) -> bool:
        """Whether the plan is found by looking at the model again, under the budget: by `search`."""
        return False

    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        """What `plan` does, for strategies whose plan depends on the model as well as on scores.

        Args:
            target: The model, and all that is drawn: the same seed, the same plan.
            scores: As for `plan`, with `budget` and `profile`.
            directory: Keeps the files of a killed search for the next attempt (`kvp.strategies.search.trials`).
        """
        raise AssertionError(f"{type(self).__name__} plans from its scores alone")


@dataclass(frozen=True, kw_only=True)
class ScoreStrategy(Strategy):
    """A strategy whose plan is: allocate the budget to pools, keep the best units of each.

    Leaves write `kinds` and `score`, and `pools` where units compete otherwise than index by index.
    """

    late: ClassVar[tuple[str, ...]] = ("compensation", "allocator")

    allocator: Allocator

    @property
    def probes(self) -> bool:
        """The allocator decides."""
        return isinstance(self.allocator, Sensitivity)

    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of spaces this strategy cuts."""

    def spaces(self, config: PretrainedConfig) -> list[Space]:
        """The spaces it cuts: those kinds in every layer."""
        return find_spaces(config, self.kinds())

    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
        """Which units compete with each other: by default the indices of each space, row by row."""
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
        """Units that make `allocator.multiple_of` channels; whole groups and sublayers have no such width."""
        channels = CHANNELS_PER_UNIT.get(kind)
        return max(1, self.allocator.multiple_of // channels) if channels else 1

    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Plan with scores of zero: the budget and the spaces are the same."""
        scores = {space: torch.zeros(space.shape) for space in self.spaces(config)}
        self.plan(config, scores, budget, torch.zeros(len(layer_shapes(config))))

    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """Allocate, then keep the best units of every pool."""
        pools = self.pools(config, scores)
        units = self.allocator.allocate(config, pools, budget, profile)
        return Plan(
            {s: keep for pool, k in zip(pools, units, strict=True) for s, keep in pool.keep(k).items()}
        )

    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        """(layers,) nats per token that the loss rises without each layer's attention, or a part of it.

        Phase A of KVPruner (arXiv 2409.11057, figure 3: the change after removing the KV of a block).
        """
        allocator = self.allocator
        assert isinstance(allocator, Sensitivity)
        model, layers = target.model, range(len(layer_shapes(target.config)))
        if allocator.probe == "attention":
            removals = [(n, partial(without, model, n, "attention")) for n in layers]
        else:
            plans = self._partial_plans(target.config, scores, allocator.probe_ratio)
            removals = [(n, partial(masked, model, plan)) for n, plan in plans.items()]
        assert target.calibration is not None
        batches = target.calibration[: allocator.probe_samples].split(target.batch_size)
        base, losses = losses_without(model, batches, removals)
        profile = torch.zeros(len(layers), dtype=torch.float64)
        profile[[n for n, _ in removals]] = losses - base
        return profile

    @property
    def probes_by_score(self) -> bool:
        """Only the partial probe: removing the whole attention depends on no score."""
        return isinstance(self.allocator, Sensitivity) and self.allocator.probe == "partial"

    def probe_inputs(self) -> dict[str, Any]:
        """Return the options of the probe, and for the partial one those that bind units together."""
        allocator = self.allocator
        assert isinstance(allocator, Sensitivity)
        if not self.probes_by_score:
            return {"probe": "attention", "samples": allocator.probe_samples}
        late = {name: getattr(self, name) for name in self.late if name not in ScoreStrategy.late}
        return {
            "probe": "partial",
            "ratio": allocator.probe_ratio,
            "samples": allocator.probe_samples,
            **late,
        }

    def _partial_plans(self, config: PretrainedConfig, scores: Scores, ratio: float) -> dict[int, Plan]:
        """Per layer, the plan that removes `ratio` of its units and touches no other layer."""
        keep = {
            space: indices
            for pool in self.pools(config, scores)
            for space, indices in pool.keep(max(1, round(pool.units * (1 - ratio)))).items()
        }
        layers = sorted({space.layer for space in keep if space.layer is not None})
        return {n: Plan({s: indices for s, indices in keep.items() if s.layer == n}) for n in layers}
