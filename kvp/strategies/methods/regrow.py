"""Regrow: prune deeper than asked, then grow back what the pruned model misses most (arXiv:2106.10404).

GraNet's step, for structured units. GraNet (NeurIPS 2021; VITA-Group/GraNet) removes a part of the connections that are
left, by magnitude, and regrows as many by the magnitude of their gradient. That raises pruning plasticity: what
continued training wins back.

Formula
-------
1. `first` plans a cut that leaves 1 - `growth` of what the budget leaves. It is any strategy that plans from its
   scores; magnitude with `norm=l1` ranks units as Li et al. (arXiv:1608.08710) rank filters, by sum |w|.
2. Every unit has a gate on the activations that carry it (keys, values, up_proj's outputs): 1 if it was kept, 0 if
   not. A unit of zeros would have no gradient, so a unit keeps its weights, and comes back with them.
3. `first` plans the asked budget by other scores. The units kept rank above all others, as they did; those gone
   rank by their gates. The allocator of `first` decides where units grow back, as it decides where they are cut.

A unit that is gone is worth, in the model so cut, with L a sample's loss in nats per token:

    mean over samples |dL/dgate|

Faithful or interpreted
-----------------------
Ours, after GraNet's step. There it happens again and again in the course of training, to single weights. Here it
happens once, before recovery, to rope pairs, value channels, KV groups or neurons.

Cost
----
The scores of `first`, and one forward and backward pass of the masked model. Weights, the activations of a batch and
their gradients are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from kvp.models.spaces import Member, fold, keep_mask, members, tokens_first
from kvp.options import options
from kvp.strategies.signals.gradients import backward_by_sample
from kvp.strategies.signals.importance import announce_memory
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.strategies.templates.wrapper import Wrapper
from kvp.types import Budget, Kind, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REGROWN: dict[Kind, int] = {"qk": 1, "vo": 0, "kv_group": 2, "ffn": 1}  # which member: k, v, v, up
ABOVE = 1e6  # times the largest score of what is gone: also per parameter, whatever the units weigh
FLAT = 1e-30  # where all scores are equal
CHOOSE = (
    "it must plan from its scores, which regrowth changes: choose kvpruner, magnitude, llm_pruner, flap, "
    "or wanda_sp with sequential=false"
)


@options
class Regrow(Wrapper):
    """Correct a strategy by the gradients of what it removed.

    Attributes:
        first: The strategy that prunes.
        growth: Part of what is left in the end that is cut before and grown back, in [0, 1).
    """

    late: ClassVar[tuple[str, ...]] = (*Wrapper.late, "growth")

    first: ScoreStrategy = Field(description=CHOOSE)
    growth: float = Field(default=0.5, ge=0, lt=1, description="part of what is left in the end")

    def __post_init__(self) -> None:
        name = type(self.first).__name__
        if self.first.searches:
            raise ValueError(f"strategy.first={name} searches for its plan: {CHOOSE}")
        if unknown := set(self.first.kinds()) - set(REGROWN):
            raise ValueError(
                f"strategy.first must cut {', '.join(REGROWN)}, which have activations to gate; {name} cuts "
                f"{', '.join(sorted(unknown))}"
            )
        if self.first.compensation is not None:
            raise ValueError(
                "strategy.compensation comes after regrowth: set strategy.first.compensation=null and "
                "strategy/compensation"
            )

    def kinds(self) -> tuple[Kind, ...]:
        """Return the kinds of spaces that `first` cuts."""
        return self.first.kinds()

    def deeper(self, budget: Budget) -> Budget:
        """Return the budget of the cut before anything grows back."""
        return replace(budget, value=1 - (1 - budget.value) * (1 - self.growth))

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        self.first.check(config, budget)
        try:
            self.first.check(config, self.deeper(budget))
        except ValueError as error:
            raise ValueError(
                f"strategy.growth={self.growth} cuts {self.deeper(budget).value:.4f} before it grows back to "
                f"{budget.value}, lower it: {error}"
            ) from error

    @override
    def backward(self) -> Mapping[str, Collection[str]]:
        return {"gradients": ()}

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        pruned = self.first.plan(target.config, scores, self.deeper(budget), profile)
        regrown = corrected(scores, pruned, gated_worth(target, pruned))
        return self.first.plan(target.config, regrown, budget, profile)


def corrected(scores: Scores, plan: Plan, worth: Scores) -> dict[Space, Tensor]:
    """Return `scores` of what the plan keeps, moved to [ABOVE, 2 ABOVE], and `worth` of what it removes, to [0, 1]."""
    low, high = _extremes(scores)
    _, most = _extremes(worth)
    return {
        space: torch.where(
            keep_mask(space, plan.keep[space]).view(space.shape),
            ABOVE * (1 + (score.double() - low) / max(high - low, FLAT)),
            worth[space] / max(most, FLAT),
        )
        for space, score in scores.items()
    }


def _extremes(scores: Scores) -> tuple[float, float]:
    low, high = torch.cat([score.double().flatten() for score in scores.values()]).aminmax()
    return low.item(), high.item()


def gated_worth(target: Target, plan: Plan) -> dict[Space, Tensor]:
    """Return the mean over samples of |dL/dgate| of every unit of the plan's spaces, in the model the plan leaves.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    assert target.calibration is not None
    announce_memory(target, "regrowth", gradient_checkpointing=False)
    model, samples = target.model, len(target.calibration)
    worth = {space: torch.zeros(space.shape, dtype=torch.float64) for space in plan.keep}

    def gate(space: Space, member: Member) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        gone = ~keep_mask(space, plan.keep[space])[member.index].to(model.device)

        def collect(output: Tensor, gradient: Tensor) -> None:
            moved = tokens_first(target.config, output.float() * gradient.float())
            for sample in moved.sum(1).flatten(1).cpu():
                worth[space] += fold(sample, member, space).abs() / samples

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            states = tokens_first(target.config, output)
            gated = tokens_first(target.config, states.masked_fill(gone.view(states.shape[2:]), 0))
            gated.register_hook(partial(collect, output.detach()))
            return gated

        return hook

    with ExitStack() as stack:
        for space in plan.keep:
            member = members(target.config, space)[REGROWN[space.kind]]
            handle = model.get_submodule(member.output).register_forward_hook(gate(space, member))
            stack.callback(handle.remove)
        backward_by_sample(model, [], target.batches, "regrowth")
    return worth
