"""Local importance of the indices of any space: what is lost with a channel, a rope pair, a group.

Every score is a sum over the rows and columns that the index cuts (`kvp.models.spaces.members`); GQA
groups therefore collect their own query heads. Higher = kept. w is a weight, g the gradient of the
mean calibration loss of a batch, in nats per token.

* `random`: uniform noise. `l1`: sum |w|. `l2`: sum w^2.
* `taylor_gate`: mean over *samples* of |dL/dgate|, for a gate that scales what the index carries (the
  key channels of a pair, a value channel, a group's values, an FFN activation); dL/dgate is the sum
  over tokens of activation times its gradient (Michel et al., arXiv 1905.10650, on heads). Scaling the
  keys is scaling the queries, scaling v is scaling o, so one gate speaks for all coupled matrices.
* `taylor_group`: |sum w g| over everything the index cuts: twice |dL/dgate| of the mean loss, whose
  samples cancel each other near an optimum.
* `taylor_vector`: sum over rows and columns of |sum w g|. `taylor_element`: sum |w g| (LLM-Pruner,
  arXiv 2305.11627, "Vector" and "Element1").
* `second_order`: sum w^2 F with F = mean of squared per-sample gradients, the diagonal Fisher
  ("Element2"; the 1/2 is dropped there as here). `mixed`: sum |w g - w^2 F / 2|.
* `activation`: per rope pair sum over its query heads of |q_i| |k_i|, per value channel |v_j| times
  the norm of its o_proj columns; |.| is the L2 norm over calibration tokens.

Scores that read weights (all but `taylor_gate` and `activation`) leave out biases and the norms of queries and keys:
where a model has them, prefer `taylor_gate`.

Absolute values of elements (`taylor_element`, `mixed`) are taken per batch: with one batch they are
LLM-Pruner's; with several, they need no second copy of the gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvp.models.spaces import Member, axis_sums, fold, members
from kvp.strategies.signals.estimate import SUBLAYERS, scoring_bytes
from kvp.strategies.signals.fisher import FisherReduce, fisher_sums
from kvp.strategies.signals.gradients import (
    Reduce,
    gate_derivatives,
    gradient_sums,
    output_square_sums,
    require_finite,
)
from kvp.strategies.target import Target
from kvp.types import Kind, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

Importance = Literal[
    "random",
    "l1",
    "l2",
    "taylor_gate",
    "taylor_group",
    "taylor_vector",
    "taylor_element",
    "second_order",
    "mixed",
    "activation",
]

WEIGHT: dict[str, int] = {"l1": 1, "l2": 2}
GRADIENT: dict[str, Reduce] = {
    "taylor_group": lambda w, g: w * g,
    "taylor_vector": lambda w, g: w * g,
    "taylor_element": lambda w, g: (w * g).abs(),
}
FISHER: dict[str, FisherReduce] = {
    "second_order": lambda w, g, f: w.pow(2) * f,
    "mixed": lambda w, g, f: (w * g - w.pow(2) * f / 2).abs(),
}
GATES: dict[Kind, int] = {"qk": 1, "vo": 0, "kv_group": 2, "ffn": 2}  # which member carries the gate
DEFINED: dict[str, Collection[Kind]] = {
    "taylor_gate": GATES,
    "activation": ("qk", "vo"),
}  # the others: everywhere


def score_spaces(
    target: Target, spaces: Sequence[Space], importance: Importance, gradient_checkpointing: bool = False
) -> dict[Space, Tensor]:
    """Return a score for every index of every space, of the space's shape, float32; higher = kept.

    Raises:
        ValueError: The importance is not defined for a kind of space.
        FloatingPointError: The loss or a score is not finite.
    """
    if importance == "random":
        generator = torch.Generator().manual_seed(target.seed)
        return {space: torch.rand(space.shape, generator=generator) for space in spaces}
    if importance == "activation":
        return _activation_scores(target, spaces)
    if importance == "taylor_gate":
        return _gate_scores(target, spaces, gradient_checkpointing)
    every = [member for space in spaces for member in members(target.config, space)]
    sums = row_sums(target, every, importance, gradient_checkpointing)
    return {space: total.abs() for space, total in sum_members(target.config, spaces, sums).items()}


def sum_members(
    config: PretrainedConfig, spaces: Sequence[Space], sums: Mapping[tuple[str, int], Tensor]
) -> dict[Space, Tensor]:
    """Return, per index of each space, the sum over all the rows (axis 0) and columns (axis 1) that it cuts."""
    return {
        space: torch.stack([fold(sums[m.name, m.axis], m, space) for m in members(config, space)]).sum(0)
        for space in spaces
    }


def row_sums(
    target: Target, members: Sequence[Member], importance: Importance, gradient_checkpointing: bool = False
) -> dict[tuple[str, int], Tensor]:
    """Return what an importance that is a sum adds up, per row (axis 0) or column (axis 1) of each member.

    Only `taylor_group`, whose absolute value comes last, is signed.
    """
    if importance in WEIGHT:
        return {(m.name, m.axis): _weight_sums(target, m, WEIGHT[importance]) for m in members}
    announce_memory(target, importance, gradient_checkpointing)
    arguments = target.model, members, target.batches
    if importance in FISHER:
        return fisher_sums(*arguments, FISHER[importance], gradient_checkpointing=gradient_checkpointing)
    sums = gradient_sums(*arguments, GRADIENT[importance], gradient_checkpointing=gradient_checkpointing)
    return {key: row.abs() for key, row in sums.items()} if importance == "taylor_vector" else sums


def announce_memory(target: Target, importance: str, gradient_checkpointing: bool) -> None:
    """Log what a gradient criterion will need, before it begins."""
    batch_size, length = target.batches[0].shape
    gates = importance in ("taylor_gate", "output", "regrowth")  # no weight gets a gradient
    estimate = scoring_bytes(
        target.config,
        batch_size=batch_size,
        length=length,
        gradient_checkpointing=gradient_checkpointing,
        gradients=() if gates else SUBLAYERS,
        watched=("attention",) if importance == "taylor_gate" else (),
    )
    parts = ", ".join(f"{part} {count / 2**30:.2f} GiB" for part, count in estimate.items())
    log.info("scoring by %s needs about %s", importance, parts)


def _weight_sums(target: Target, member: Member, power: int) -> Tensor:
    weight = target.model.get_parameter(f"{member.name}.weight").detach().float()
    return axis_sums(weight.abs().pow(power), member.axis).cpu()


def _gate_scores(
    target: Target, spaces: Sequence[Space], gradient_checkpointing: bool
) -> dict[Space, Tensor]:
    require_defined("taylor_gate", [space.kind for space in spaces])
    announce_memory(target, "taylor_gate", gradient_checkpointing)
    of = {space: members(target.config, space)[GATES[space.kind]] for space in spaces}
    gates = gate_derivatives(
        target.model, list(of.values()), target.batches, gradient_checkpointing=gradient_checkpointing
    )
    return {
        space: torch.stack([fold(sample, m, space).abs() for sample in gates[m.name, m.axis]]).mean(0)
        for space, m in of.items()
    }


def require_defined(importance: Importance, kinds: Collection[Kind]) -> None:
    """Raise ValueError unless an importance scores spaces of these kinds."""
    known = DEFINED.get(importance, kinds)
    if unknown := set(kinds) - set(known):
        raise ValueError(
            f"importance={importance} is defined for {', '.join(known)}, not for {', '.join(sorted(unknown))}; "
            "choose another strategy.importance or strategy.grouping"
        )


def _activation_scores(target: Target, spaces: Sequence[Space]) -> dict[Space, Tensor]:
    require_defined("activation", [space.kind for space in spaces])
    outputs = [m.output for space in spaces for m in members(target.config, space) if m.axis == 0]
    squares = output_square_sums(target.model, outputs, target.batches)
    for name, total in squares.items():
        require_finite(total.sum(), f"the activation of {name}")
    return {space: _activation_score(target, space, squares) for space in spaces}


def _activation_score(target: Target, space: Space, squares: dict[str, Tensor]) -> Tensor:
    first, second = members(target.config, space)
    if space.kind == "vo":
        columns = target.model.get_parameter(f"{second.name}.weight").detach().float().pow(2).sum(0).cpu()
        return (fold(squares[first.output], first, space) * fold(columns, second, space)).sqrt()
    key = fold(squares[second.output], second, space)
    query = (
        squares[first.output].view(space.shape[0], -1, 2, space.shape[1]).sum(2).sqrt()
    )  # (groups, heads, pairs)
    return query.sum(1) * key.sqrt()
