"""Search for Efficient LLMs: evolve per-head and MLP widths and masks by the loss (arXiv 2409.17372).

The start keeps the most important units at one ratio everywhere. An evolution then searches widths and masks, and the
kept columns are refitted.

Formula
-------
X (tokens, in) are the inputs of a linear layer W (out, in) of the dense model.

    1. importance (section 3.2)    Phi_ij = W_ij^2 / [(2 X^T X)^-1]_jj, summed over rows or columns
    2. search (section 3.3)        evolution of widths and masks, by the loss on a few calibration samples
    3. reformation (section 3.4)   o_proj and down_proj refitted to their dense outputs on the kept columns

A channel of a head is worth its rows of Q, K and V and its column of O. A neuron is worth its rows of up and gate and
its column of down. `kvp.strategies.search.evolution` has the search. The paper's ADMM (30 steps, rho 1) has the least
squares solution as its limit, so step 3 is `compensation`, in closed form and without a bias.

Faithful or interpreted
-----------------------
Interpreted: the authors have not released importance and search. Where this differs, or the paper says nothing we
could read:

* Rope channels are cut in pairs (i, i + head_dim / 2), KV groups with their query heads; the heads of a layer
  keep equally many channels, each its own.
* The paper discards subnets outside its parameter budget. Here random single steps of the widths bring each
  into it, so that the budget is met exactly; under kv_cache the MLP stays whole.
* The paper draws a new mask of N units up to 1000 times until alpha N are common to old and new. A mask that
  keeps less than alpha N can never reach that. Here alpha (`overlap`) is a part of the units that the smaller
  of both keeps, and the draw is made under this condition at once.
* Widths move by `allocator.multiple_of` channels, the paper's by 1 % (attention) and 5 % (MLP). Its ranges
  depend on the budget, see `RANGES`. Depth, which it leaves at 32 of 32 layers up to 20 %, is not searched.
* Crossover takes each mask from either parent, as in the authors' code, which otherwise searches windows of
  contiguous channels and numbers of heads instead of masks. X^T X is damped. The paper prints the mask inverted,
  1 = pruned, and so does its code.

Cost
----
One forward pass scores. The search evaluates generations times population subnets, 5,000 with
`strategy/evolution=paper` and 240 with `quick`, each on `evolution.samples` samples. No gradient.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.shapes import layer_shapes, size
from kvp.models.spaces import fold, members
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform, unit_cost
from kvp.strategies.allocation.pools import Pool
from kvp.strategies.compensation.compensate import Compensation, LeastSquares
from kvp.strategies.search.evolution import Evolution
from kvp.strategies.search.subnets import Subnet, Subnets, name_of
from kvp.strategies.search.trials import Trials, masked_loss
from kvp.strategies.signals.moments import TINY, Moments, input_moments
from kvp.strategies.signals.walk import Visit, walk
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.channels import coupled_parts
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fraction removed: least fraction that stays of a head's channels and of an MLP's neurons (appendix; 0.3 as printed).
RANGES = {0.1: (0.9, 0.6), 0.2: (0.8, 0.4), 0.3: (0.3, 0.2), 0.4: (0.6, 0.1), 0.5: (0.6, 0.1)}


@options
class SearchLLM(ScoreStrategy):
    """Search which channels of heads and neurons of MLPs stay.

    Attributes:
        evolution: Length of the search, and size of the mutations.
        attention_least: Fraction of its channels that every head keeps. None: the paper's for the nearest of
            its budgets; under kv_cache, which it does not have, what allocator.max_ratio leaves.
        mlp_least: Fraction of the neurons that every MLP keeps; None: as for `attention_least`.
        damping: Added to the diagonal of X^T X, relative to the mean of that diagonal.
    """

    late: ClassVar[tuple[str, ...]] = (*ScoreStrategy.late, "evolution", "attention_least", "mlp_least")
    searches: ClassVar[bool] = True

    allocator: Allocator = Uniform(max_ratio=0.9)
    compensation: Compensation | None = LeastSquares(intercept=False)
    evolution: Evolution = Evolution()
    attention_least: float | None = Field(default=None, ge=0, le=1, description="null takes the paper's")
    mlp_least: float | None = Field(default=None, ge=0, le=1, description="null takes the paper's")
    damping: float = Field(default=0.01, gt=0, description="relative to the mean of the diagonal of X^T X")

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("qk", "vo", "ffn")

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        spaces = self.spaces(target.config)
        return {
            space: self._layer_score(visit, space)
            for visit in walk(target.model, target.batches, "importance")
            for space in spaces
            if space.layer == visit.layer
        }

    def _layer_score(self, visit: Visit, space: Space) -> Tensor:
        cut = members(visit.model.config, space)
        moments = input_moments(visit, [member.name for member in cut], covariance=True)
        total = torch.zeros(space.shape, dtype=torch.float64)
        for member in cut:
            weight = visit.model.get_parameter(f"{member.name}.weight").detach().double()
            phi = weight.square() / self._inverse_diagonal(moments[member.name])
            total += fold(phi.sum(1 - member.axis).cpu(), member, space)
        return total

    def _inverse_diagonal(self, inputs: Moments) -> Tensor:
        """Return (in,) the diagonal of (2 X^T X)^-1."""
        hessian = 2 * inputs.gram
        mean = hessian.diagonal().mean().clamp(min=TINY)
        damped = hessian + self.damping * mean * torch.eye(len(hessian)).to(hessian)
        return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()

    @override
    def pools(self, config: PretrainedConfig, scores: Scores) -> list[Pool]:
        of = {kind: [s for s in self.spaces(config) if s.kind == kind] for kind in self.kinds()}
        attention = [
            Pool(coupled_parts(qk, scores[qk], vo, scores[vo]), qk.shape[-1], self._step("qk"), qk.layer)
            for qk, vo in zip(of["qk"], of["vo"], strict=True)
        ]
        return attention + super().pools(config, {space: scores[space] for space in of["ffn"]})

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        subnets, start = self._start(config, scores, budget, profile, seed=0)
        return subnets.plan(start)

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        subnets, start = self._start(target.config, scores, budget, profile, target.seed)
        assert target.calibration is not None
        batches = target.calibration[: self.evolution.samples].split(target.batch_size)
        with closing(Trials(directory / "trials.jsonl", self.evolution.trials)) as trials:

            def loss(subnet: Subnet) -> float:
                return trials.loss(
                    name_of(subnet), lambda: masked_loss(target.model, batches, subnets.plan(subnet))
                )

            return subnets.plan(self.evolution.search(subnets, start, loss))

    def _start(
        self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor, seed: int
    ) -> tuple[Subnets, Subnet]:
        """Return the subnets within the budget, and the one that the allocator and the importance choose."""
        least = self._least(budget)
        pools = [
            replace(pool, least=math.ceil(least[pool.parts[0].space.kind] * pool.units - 1e-9))
            for pool in self.pools(config, scores)
        ]
        try:
            units = self.allocator.allocate(config, pools, budget, profile)
        except ValueError as error:
            bounds = f"strategy.attention_least={least['qk']:g} or strategy.mlp_least={least['ffn']:g}"
            raise ValueError(f"{error}, or {bounds}") from None
        costs = [unit_cost(config, pool, budget) for pool in pools]
        widths = [
            sorted(pool.units - n for n in pool.removable(self.allocator.max_ratio)) if cost else [pool.units]
            for pool, cost in zip(pools, costs, strict=True)
        ]
        total = budget.value * size(config, layer_shapes(config)).count(budget.of)
        subnets = Subnets(pools, costs, widths, total, torch.Generator().manual_seed(seed))
        return subnets, subnets.by_importance(units)

    def _least(self, budget: Budget) -> dict[Kind, float]:
        """Return the fraction that stays at least, of the channels of a head and of the neurons."""
        nearest = min(RANGES, key=lambda removed: abs(removed - budget.value))
        attention, mlp = (0.0, 0.0) if budget.of == "kv_cache" else RANGES[nearest]
        return {
            "qk": attention if self.attention_least is None else self.attention_least,
            "ffn": mlp if self.mlp_least is None else self.mlp_least,
        }
