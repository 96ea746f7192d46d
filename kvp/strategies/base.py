"""Strategies: from a model and calibration data to a plan.

Scoring is expensive and does not know the budget; planning is cheap and does. A sweep over ratios scores once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from typing_extensions import override

from kvp.models.joined import joined, joined_config
from kvp.models.shapes import layer_shapes
from kvp.options import options
from kvp.strategies.compensation.compensate import Compensation
from kvp.strategies.signals.estimate import SUBLAYERS, pass_bytes, rewriting_bytes, scoring_bytes
from kvp.strategies.target import Scores, Target
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from kvp.models.linears import Linear


@options
class Strategy(ABC):
    """Base of all methods. A leaf is one file in `methods`, and its fields are the options of its YAML.

    A run calls, in this order:

    1. `check(config, budget)`, before any weight is read: ValueError for a budget that this model cannot meet. Then
       `recast(model)`, if `recasts`: the same function in other matrices. All that follows sees that model.
    2. `score(target)`: per `Space` a tensor of the space's shape. Higher = kept. The unit is the method's own, but
       one method's scores compare across spaces wherever its allocator compares them.
    3. `sensitivity(target, scores)`, if `probes`: (layers,) float64, nats per token that the loss rises without a
       layer's part. Higher = the layer loses less.
    4. `search(target, scores, budget, profile, directory)`, if `searches`: the plan, found with the model at hand.
       Otherwise `plan(config, scores, budget, profile)` of a `PlannedStrategy`: the same without the model.
    5. `compensation.refit(...)`, if there is one: the plan, with the kept weights rewritten.

    A plan holds the indices that *stay*, sorted, per space, and the weights that are rewritten before the cut. Nothing
    in a method cuts: `kvp.models.surgery` does.

    Most methods derive from a template and write one function; docs/extend/method.md has a worked example. Templates
    score units (`scored`), cut rope pairs and channels (`channels`) or score by a walk through the layers
    (`projections`). Others remove blocks (`blocks`), zero single weights (`sparse`) or go on from another strategy
    (`wrapper`).

    Class attributes:
        late: Options that do not change `score`. They are left out of the fingerprint of the scores, so runs that
            differ in nothing else share them. An option that does change the scores and stands here makes a run find
            the *stale* scores of another value, without an error. One that is missing here costs only time.
        sparsifies: Whether the plan zeroes single weights, in matrices of the same shape.
        prunes: Whether it removes anything; false: the dense baseline.
        slices: Whether the plan cuts the residual stream, after which nothing else can be pruned.

    Attributes:
        compensation: What the kept weights do for those that were cut; None: nothing.
    """

    node: ClassVar[str] = "strategy"
    late: ClassVar[tuple[str, ...]] = ("compensation",)
    sparsifies: ClassVar[bool] = False
    slices: ClassVar[bool] = False
    prunes: ClassVar[bool] = True

    compensation: Compensation | None = None

    # Those below are properties, because a few strategies derive them from options. A leaf for which one is
    # constant writes a class attribute: `searches: ClassVar[bool] = True`.

    @property
    def needs_calibration(self) -> bool:
        """Tell whether `score`, `sensitivity` or `search` reads calibration data."""
        return True

    @property
    def probes(self) -> bool:
        """Tell whether the plan depends on the profile that `sensitivity` measures."""
        return False

    @property
    def searches(self) -> bool:
        """Tell whether `search` reads the model, so that calibration, dtype and seed decide the plan, too."""
        return False

    @property
    def prices(self) -> bool:
        """Tell whether scores are nats per token for every channel that is cached; `cache=directions` reads them."""
        return False

    @property
    def joins(self) -> int | None:
        """Return how many KV heads an attention has before it is cut; None: as many as the model's."""
        return None

    @property
    def latent(self) -> bool:
        """Tell whether joined heads have queries that read the values as keys, too."""
        return False

    @property
    def recasts(self) -> Mapping[str, Any]:
        """Return what decides the form in which an attention is cut, if that is not the model's; else nothing."""
        latent = {"latent": True} if self.latent else {}
        return {} if self.joins is None else {"num_key_value_heads": self.joins, **latent}

    def recast_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return the config of the model that `recast` makes.

        Raises:
            ValueError: The model cannot be brought into that form.
        """
        return joined_config(config, self.joins, self.latent)

    def recast(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model in the form in which it is cut, which has the same function."""
        return joined(model, self.joins, self.latent)

    @property
    def then(self) -> tuple[Budget, ...]:
        """Return the budgets of the steps after the first, if the strategy takes several."""
        return ()

    @abstractmethod
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Refuse, before any weight is read, a space or a budget that this model cannot offer.

        Raises:
            ValueError: Names the spaces there are, or the nearest reachable ratio.
        """

    @abstractmethod
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return a score for every index of every space that may be cut, of the space's shape; higher = kept."""

    @abstractmethod
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        """Return the plan under `budget`.

        Args:
            target: The model, and all that is drawn: the same seed, the same plan.
            scores: What `score` returned.
            budget: How much to remove, of what.
            profile: (layers,) what `sensitivity` returned; zeros if the strategy does not probe.
            directory: Keeps the files of a killed search for the next attempt (`kvp.strategies.search.trials`).
        """

    def backward(self) -> Mapping[str, Collection[str]] | None:
        """Return what a backward pass of scoring keeps, as options of `scoring_bytes`; None: there is no such pass."""
        return {"gradients": SUBLAYERS} if hasattr(self, "gradient_checkpointing") else None

    def rewritten(self, config: PretrainedConfig) -> list[Linear]:
        """Return the matrices that a search rewrites, and a plan holds."""
        return []

    def refitted(self, config: PretrainedConfig) -> list[Linear]:
        """Return the matrices that a compensation fits anew, and a plan holds."""
        return []

    def peak_bytes(
        self, config: PretrainedConfig, *, samples: int, batch_size: int, length: int, on_cpu: bool
    ) -> dict[str, int]:
        """Estimate the peak on the device from scoring to the plan, in bytes by part, with the total.

        Args:
            config: The model's config, in the dtype that it computes in.
            samples: Calibration windows.
            batch_size: Windows per pass.
            length: Tokens of a window.
            on_cpu: Whether the device is the CPU.
        """
        reads, backward = self.needs_calibration or self.compensation is not None, self.backward()
        one = pass_bytes(
            config,
            samples=samples if reads and (backward is None or self.compensation is not None) else 0,
            tokens=batch_size * length if reads else 0,
            length=length,
            variants=len(layer_shapes(config)) if self.probes else 0,
        )
        peaks = [one]
        if on_cpu:  # edits lie in main memory, and there beside the model
            edits = {"rewritten": self.rewritten(config), "refitted": self.refitted(config)}
            peaks.append(rewriting_bytes(config, **edits, states=one["states"]))
        if backward is not None:
            again = getattr(self, "gradient_checkpointing", False)
            peaks.append(
                scoring_bytes(
                    config, batch_size=batch_size, length=length, gradient_checkpointing=again, **backward
                )
            )
        return max(peaks, key=lambda parts: parts["total"])

    def sensitivity(self, target: Target, scores: Scores) -> Tensor:
        """Return (layers,) nats per token that the loss rises without each layer's part.

        Raises:
            NotImplementedError: The strategy does not probe.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for no sensitivity profile")

    @property
    def probes_by_score(self) -> bool:
        """Tell whether `sensitivity` reads the scores."""
        return False

    def probe_inputs(self) -> dict[str, Any]:
        """Return what decides the profile, besides model, calibration and scores.

        Raises:
            NotImplementedError: The strategy does not probe.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for no sensitivity profile")


@options
class PlannedStrategy(Strategy):
    """A strategy that can plan from its scores alone; one that `searches` as well overrides `search`."""

    @abstractmethod
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """Return the plan under `budget`, with all that `search` is given but the model.

        Args:
            config: The config of the model that the scores belong to.
            scores: What `score` returned.
            budget: How much to remove, of what.
            profile: (layers,) what `sensitivity` returned; zeros if the strategy does not probe.
        """

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        return self.plan(target.config, scores, budget, profile)
