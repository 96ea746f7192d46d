"""Divide a budget of bits among the directions of a cut model: more where a direction is worth more.

A direction of worth w nats, stored in b bits, is taken to lose w e(b). Here e(b) is the mean square error of a uniform
quantiser between the extremes of `group` numbers, relative to their variance, for a normal distribution: their range
is 4.1 standard deviations for 32 numbers, and e(b) = (range / (2^b - 1))^2 / 12. A direction that is not stored loses
e(0) = 1. As e is convex in what a direction takes, the best division buys the step of most nats per bit first.

This is reverse water-filling with whole bits. One bit is left out: between two extremes alone it loses more than it
keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.directions import Directions, stored_bits
from kvp.models.shapes import CHANNELS_PER_PAIR, layer_shapes
from kvp.strategies.target import Scores
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FEWEST = 2  # bits of a direction that is stored
HALVINGS = 16  # of the interval of budgets


def divided(cache: Directions, dense: PretrainedConfig, plan: Plan, scores: Scores) -> Directions:
    """Return the format with the bits of every channel that the plan keeps.

    Codes fill whole bytes, and a last group may be small. What that takes is taken from the budget, by bisection.

    Args:
        cache: The format, which has the budget.
        dense: The config of the dense model, whose channels the budget counts.
        plan: What stays.
        scores: Nats per direction; a pair of channels has one score.

    Raises:
        ValueError: What stays cannot take as many bits, or takes more.
    """
    asked = float(cache.bits * sum(shape.kv_width for shape in layer_shapes(dense)))
    parts = list(_worths(plan, scores))

    def within(budget: float) -> Directions | None:
        digits = divide([worth for _, worth in parts], budget, cache.most, cache.group)
        texts: dict[str, list[str]] = {"qk": [], "vo": []}
        for (kind, _), given in zip(parts, digits, strict=True):
            texts[kind].append("".join(map(str, given.flatten().tolist())))
        found = replace(cache, keys=tuple(texts["qk"]), values=tuple(texts["vo"]))
        return found if _bits(found) <= asked else None

    least, most = float(stored_bits(FEWEST, cache.group) * len(parts)), asked
    best = within(most)
    for _ in range(0 if best else HALVINGS):
        middle = (least + most) / 2
        if found := within(middle):
            best, least = found, middle
        else:
            most = middle
    if best is None:
        raise ValueError(
            f"cache.bits={cache.bits:g} is too few to store one direction per layer: raise cache.bits"
        )
    return best


def _bits(cache: Directions) -> Fraction:
    """Return the bits of one packed token, over all layers."""
    pairs = zip(cache.keys, cache.values, strict=True)
    codecs = (cache.codecs(len(keys), len(values), n) for n, (keys, values) in enumerate(pairs))
    return 8 * sum((codec.bytes_per_token(1) for both in codecs for codec in both), Fraction(0))


def _worths(plan: Plan, scores: Scores) -> Iterator[tuple[str, Tensor]]:
    """Yield, layer by layer, "qk" or "vo" and what each channel that stays is worth, (groups, width)."""
    for space in sorted(scores, key=lambda space: (space.layer or 0, space.kind)):
        worth = scores[space].double()
        if space in plan.keep:
            worth = worth.gather(1, plan.keep[space])
        yield (
            space.kind,
            worth if space.kind == "vo" else (worth / CHANNELS_PER_PAIR).repeat(1, CHANNELS_PER_PAIR),
        )


def divide(worths: Sequence[Tensor], budget: float, most: int, group: int) -> list[Tensor]:
    """Return bits of the shapes of `worths`, which take at most `budget` bits and lose the fewest nats.

    Every part stores its best direction.

    Args:
        worths: What each direction is worth; higher = more bits.
        budget: Bits of one token, scales counted.
        most: Bits of a direction at most.
        group: Numbers that share a scale.

    Raises:
        ValueError: All directions with `most` bits take less than the budget, or one per part takes more.
    """
    choices = (0, *range(FEWEST, most + 1))
    taken, lost = [stored_bits(bits, group) for bits in choices], errors(choices, group)
    worth = torch.cat([part.flatten() for part in worths])
    first = torch.cat([torch.arange(part.numel()) == part.argmax() for part in worths])
    if budget > taken[-1] * len(worth) or budget < taken[1] * len(worths):
        raise ValueError(
            f"cache.bits asks for {budget:.0f} bits per token, but the {len(worth)} channels that stay take "
            f"{float(taken[1] * len(worths)):.0f} to {float(taken[-1] * len(worth)):.0f}: change cache.bits, raise "
            "cache.most, or cut less"
        )
    gains, costs = [], []
    for step in range(1, len(choices)):
        cost = taken[step] - taken[step - 1]
        gain = worth * (lost[step - 1] - lost[step]) / float(cost)
        gains.append(gain.masked_fill(first, torch.inf) if step == 1 else gain)
        costs.append(torch.full_like(worth, float(cost)))
    order = torch.cat(gains).argsort(descending=True, stable=True)
    within = torch.cat(costs)[order].cumsum(0) <= budget + 1e-6
    bought = torch.zeros(len(order), dtype=torch.bool)
    bought[order[within]] = True
    bits = torch.tensor(choices)[bought.view(len(choices) - 1, -1).sum(0)]
    return [
        part.view_as(worth)
        for part, worth in zip(bits.split([w.numel() for w in worths]), worths, strict=True)
    ]


def errors(choices: Sequence[int], group: int) -> list[float]:
    """Return e(b) for every number of bits: the mean square error, relative to the variance."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    largest = torch.special.ndtr(x) ** group  # the distribution of the largest of `group` normal numbers
    span = 2 * float(torch.trapezoid(x[1:] * largest.diff() / x.diff(), x[1:]))
    return [1.0 if not bits else min((span / (2**bits - 1)) ** 2 / 12, 1.0) for bits in choices]
