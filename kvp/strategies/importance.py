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
  ("Element2"; the 1/2 is dropped there as here). `mixed`: sum |w g - w^2 g^2 / 2|.
* `activation`: per rope pair sum over its query heads of |q_i| |k_i|, per value channel |v_j| times
  the norm of its o_proj columns; |.| is the L2 norm over calibration tokens.

Absolute values of elements (`taylor_element`, `mixed`) are taken per batch: with one batch they are
LLM-Pruner's; with several, they need no second copy of the gradients. `second_order` and `mixed` go
sample by sample.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from kvp.models.spaces import Member, fold, members
from kvp.strategies.base import Target
from kvp.strategies.signals import Reduce, gate_derivatives, gradient_sums, output_square_sums, scoring_bytes
from kvp.types import Kind, Space

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
    "second_order": lambda w, g: (w * g).pow(2),
    "mixed": lambda w, g: (w * g - (w * g).pow(2) / 2).abs(),
}
PER_SAMPLE = ("second_order", "mixed")
GATED: dict[Kind, int] = {"qk": 1, "vo": 0, "kv_group": 2, "ffn": 2}  # which member carries the gate


def score_spaces(
    target: Target, spaces: Sequence[Space], importance: Importance, gradient_checkpointing: bool = False
) -> dict[Space, Tensor]:
    """A score for every index of every space, of the space's shape, float32; higher = kept.

    Raises:
        ValueError: The importance is not defined for a kind of space.
        FloatingPointError: The loss or a score is not finite.
    """
    if importance == "random":
        generator = torch.Generator().manual_seed(target.seed)
        return {space: torch.rand(space.shape, generator=generator) for space in spaces}
    if importance in WEIGHT:
        return {space: _weight_score(target, space, WEIGHT[importance]) for space in spaces}
    if importance == "activation":
        return _activation_scores(target, spaces)
    _announce_memory(target, importance, gradient_checkpointing)
    if importance == "taylor_gate":
        return _gate_scores(target, spaces, gradient_checkpointing)
    return _gradient_scores(target, spaces, importance, gradient_checkpointing)


def _announce_memory(target: Target, importance: str, gradient_checkpointing: bool) -> None:
    batch_size, length = target.batches_of(1 if importance in PER_SAMPLE else target.batch_size)[0].shape
    estimate = scoring_bytes(
        target.config, batch_size=batch_size, length=length, gradient_checkpointing=gradient_checkpointing
    )
    parts = ", ".join(f"{part} {count / 2**30:.2f} GiB" for part, count in estimate.items())
    log.info("scoring by %s needs about %s", importance, parts)


def _weight_score(target: Target, space: Space, power: int) -> Tensor:
    score = torch.zeros(space.shape)
    for member in members(target.config, space):
        weight = target.model.get_parameter(f"{member.name}.weight").detach().float()
        score += fold(weight.abs().pow(power).sum(1 - member.axis).cpu(), member, space)
    return score


def _gradient_scores(
    target: Target, spaces: Sequence[Space], importance: str, gradient_checkpointing: bool
) -> dict[Space, Tensor]:
    batches = target.batches_of(1) if importance in PER_SAMPLE else target.batches
    of = {space: members(target.config, space) for space in spaces}
    sums = gradient_sums(
        target.model,
        [member for group in of.values() for member in group],
        batches,
        GRADIENT[importance],
        gradient_checkpointing=gradient_checkpointing,
    )

    def score(space: Space, member: Member) -> Tensor:
        values = sums[member.name, member.axis]
        return fold(values.abs() if importance == "taylor_vector" else values, member, space)

    scores = {space: torch.stack([score(space, m) for m in group]).sum(0) for space, group in of.items()}
    return {space: total.abs() for space, total in scores.items()}


def _gate_scores(
    target: Target, spaces: Sequence[Space], gradient_checkpointing: bool
) -> dict[Space, Tensor]:
    _require_kinds("taylor_gate", spaces, GATED)
    of = {space: members(target.config, space)[GATED[space.kind]] for space in spaces}
    gates = gate_derivatives(
        target.model, list(of.values()), target.batches, gradient_checkpointing=gradient_checkpointing
    )
    return {
        space: torch.stack([fold(sample, m, space).abs() for sample in gates[m.name, m.axis]]).mean(0)
        for space, m in of.items()
    }


def _require_kinds(importance: str, spaces: Sequence[Space], kinds: Collection[Kind]) -> None:
    unknown = {space.kind for space in spaces} - set(kinds)
    if unknown:
        raise ValueError(
            f"importance={importance} is defined for {', '.join(kinds)}, not for {', '.join(sorted(unknown))}; "
            "choose another strategy.importance or strategy.grouping"
        )


def _activation_scores(target: Target, spaces: Sequence[Space]) -> dict[Space, Tensor]:
    _require_kinds("activation", spaces, ("qk", "vo"))
    outputs = [m.name for space in spaces for m in members(target.config, space) if m.axis == 0]
    squares = output_square_sums(target.model, outputs, target.batches)
    return {space: _activation_score(target, space, squares) for space in spaces}


def _activation_score(target: Target, space: Space, squares: dict[str, Tensor]) -> Tensor:
    first, second = members(target.config, space)
    if space.kind == "vo":
        columns = target.model.get_parameter(f"{second.name}.weight").detach().float().pow(2).sum(0).cpu()
        return (fold(squares[first.name], first, space) * fold(columns, second, space)).sqrt()
    key = fold(squares[second.name], second, space)
    query = (
        squares[first.name].view(space.shape[0], -1, 2, space.shape[1]).sum(2).sqrt()
    )  # (groups, heads, pairs)
    return query.sum(1) * key.sqrt()
