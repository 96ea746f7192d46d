"""Attention heads in a basis of their own, which sorts what the cache holds by what it is worth.

Two changes of basis leave the function of a KV group and its query heads as it is. In the new basis, no channels are
better to drop than the last ones:

* Values, by rank. With S the second moment of what attention makes of the group's values, averaged over its query
  heads, and O_h their columns of o_proj, the SVD U E W^T of S^(1/2) [O_1^T ... O_n^T] gives v' = U^T S^(-1/2) v and
  O_h' = O_h S^(1/2) U: of all r directions the first r of v' keep the most of the output, and E_j^2 is the mean
  square that direction j adds to it. (ASVD and SVD-LLM whiten so; here per KV group, as the cache needs.) One factor
  per layer then gives v' the mean square of v. Without it, whitened values put the steps that LoRA takes in v_proj
  and o_proj ten to a hundred times apart.
* Slow keys, by rank. A rope pair whose angle stays small over the context barely turns. All such pairs get the
  slowest frequency, and among their channels any basis is allowed: with S_q and S_k the second moments
  of queries and (centred) keys there, before rotation, the SVD U E V^T of S_q^(1/2) S_k^(1/2) gives
  k' = V^T S_k^(-1/2) k and q' = V^T S_k^(1/2) q; E_j^2 is the mean square that direction j adds to a logit. Softmax
  ignores a constant that a query adds to all logits: hence the centring, over the keys of a sample.

Pairs that do turn are worth the mean square of their term in the logits (ThinK's, with centred keys). Where heads are
joined (`kvp.models.joined`), several pairs of a group have one frequency. Read as complex numbers (first channel + i
second) they turn by one factor, so among them too any basis is allowed, a complex one: the same SVD, of Hermitian
moments. A direction is then a pair, worth E_j^2 / 2: a logit is the real part, and the phases are spread out. (To mix
pairs of one frequency across heads is TransMLA's idea, RoRoPE, arXiv 2502.07864; the formula is ours.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvp.models.family import family_of
from kvp.models.shapes import CHANNELS_PER_PAIR, layer_shapes
from kvp.strategies.signals.head_moments import Heads, Statistics, output_columns, rope_gains, statistics
from kvp.strategies.signals.moments import TINY
from kvp.strategies.signals.walk import Visit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 1e-9  # of the largest eigenvalue: less is rounding


@dataclass(frozen=True)
class Turned:
    """The heads of a layer in their new basis.

    Attributes:
        edits: The rewritten parameters by name: the same function but for the frequencies of folded pairs.
        qk: (groups, pairs) mean square that a pair adds to the logits of the group, summed over its query heads.
        vo: (groups, v_head_dim) mean square that a value channel adds to the attention's output (summed over it).
    """

    edits: dict[str, Tensor]
    qk: Tensor
    vo: Tensor


def first_folded(model: PreTrainedModel, context: int | None, angle: float) -> int | None:
    """Return the first slow rope pair of a model, see `slow_pair`; None if no context is given."""
    if context is None:
        return None
    return slow_pair(
        model.get_submodule(family_of(model.config).rotary).get_buffer("inv_freq"), context, angle
    )


def slow_pair(frequencies: Tensor, context: int | None, angle: float) -> int | None:
    """Return the first rope pair that turns less than `angle` radians against the slowest within `context` tokens.

    None: not even two do, or no context is given.

    Args:
        frequencies: (pairs,) radians per token, descending.
        context: Tokens.
        angle: Radians.
    """
    if context is None:
        return None
    frequencies = frequencies.double()
    slow = ((frequencies - frequencies[-1]) * context <= angle).nonzero().flatten()
    return int(slow[0]) if len(slow) > 1 else None


def turn(visit: Visit, *, values: bool, folded: int | None) -> Turned:
    """Return the heads of the layer visited, with values by rank if `values`, and with pairs from `folded` on by rank.

    Raises:
        FloatingPointError: A query, key or value is not finite.
    """
    found, heads, columns = statistics(visit), Heads(visit), output_columns(visit)
    qk = found.pairs.clone()
    edits: dict[str, Tensor] = {}
    if alike := list(_alike(visit, folded)):
        query, key = heads.rows("q"), heads.rows("k")
        for group, slots, turns in alike:
            qk[group, slots] = (_mix_turning if turns else _mix_still)(
                found, group, slots, query[group], key[group]
            ) * (1.0 if turns else rope_gains(visit, slots).square())
        edits |= heads.edits("q", query) | heads.edits("k", key)
    mixed = found.values / columns.shape[1]  # S: the mean over the query heads of a group
    if not values:
        return Turned(edits, qk, mixed.diagonal(dim1=1, dim2=2) * columns.square().sum((1, 2)))
    value, vo = heads.rows("v"), []
    scale = mixed.diagonal(dim1=1, dim2=2).mean().clamp(min=TINY).sqrt()
    for group, moment in enumerate(mixed):
        root, inverse = roots(moment)  # S^(1/2), S^(-1/2)
        outputs = columns[group].flatten(0, 1)  # O_h of all query heads, stacked
        # The eigenvectors of S^(1/2) O^T O S^(1/2), largest first, are the U of the SVD; the eigenvalues E^2.
        energies, basis = (best.flip(-1) for best in torch.linalg.eigh(root @ (outputs.T @ outputs) @ root))
        value[group] = scale * basis.T @ inverse @ value[group]  # v' = U^T S^(-1/2) v
        columns[group] = columns[group] @ root @ basis / scale  # O_h' = O_h S^(1/2) U
        vo.append(energies.clamp(min=0))
    edits |= heads.edits("v", value) | {
        f"{heads.name('o')}.weight": heads.stored(columns.permute(2, 0, 1, 3).flatten(1))
    }
    return Turned(edits, qk, torch.stack(vo))


def _mix_still(found: Statistics, group: int, slots: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Turn pairs that barely rotate into directions by rank, in place; return what each pair is worth."""
    channels = torch.cat([slots, slots + found.pairs.shape[1]])
    moments = (moment[group][channels][:, channels] for moment in (found.queries, found.keys))
    query_map, key_map, energies = by_rank(*moments)
    query[:, channels] = query_map @ query[:, channels]
    key[:, channels] = key_map @ key[:, channels]
    return energies.view(2, -1).sum(0)


def _mix_turning(found: Statistics, group: int, slots: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Turn pairs that rotate alike into directions by rank, as complex numbers; return what each pair is worth."""
    second = slots + found.pairs.shape[1]
    moments = (moment[group][slots][:, slots] for moment in (found.turning_queries, found.turning_keys))
    query_map, key_map, energies = by_rank(*moments)
    for rows, mapping in ((query, query_map), (key, key_map)):
        mixed = mapping @ torch.complex(rows[:, slots], rows[:, second])
        rows[:, slots], rows[:, second] = mixed.real, mixed.imag
    return energies / 2


def by_rank(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps of queries and keys, and the mean square of each direction's term in a logit.

    Real directions come in rope order: the best two are the channels of the first pair, and so on. Complex ones, each
    a pair, come best first.

    Args:
        queries: (width, width) second moment, summed over the query heads; Hermitian if complex.
        keys: (width, width) second moment.
    """
    root, inverse = roots(keys)
    energies, basis = torch.linalg.eigh(root @ queries @ root)
    best_first = torch.arange(len(keys)).flip(0)
    if not keys.is_complex():  # a real pair takes two directions, slot i and slot i + pairs
        best_first = best_first.view(-1, 2).T.flatten()
    basis = basis[:, best_first]
    return basis.mH @ root, basis.mH @ inverse, energies[best_first].clamp(min=0)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Hermitian square root of a second moment, and its inverse; directions of no variance stay tiny."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp(min=SMALLEST * values[-1].clamp(min=TINY)).sqrt()
    return vectors * root @ vectors.mH, vectors / root @ vectors.mH


def _alike(visit: Visit, folded: int | None) -> Iterator[tuple[int, Tensor, bool]]:
    """Yield pairs that may be mixed with each other: their KV group, their slots in it, and whether they rotate.

    Those from `folded` on are one set per group, and do not; joined heads have others of one frequency.
    """
    shape = layer_shapes(visit.model.config)[visit.layer]
    pairs = shape.qk_head_dim // CHANNELS_PER_PAIR
    for group, row in enumerate(shape.rope_pairs or (tuple(range(pairs)),) * shape.num_key_value_heads):
        sets: dict[int, list[int]] = defaultdict(list)
        for slot, pair in enumerate(row):
            sets[pair if folded is None else min(pair, folded)].append(slot)
        for pair, slots in sets.items():
            if pair == folded or len(slots) > 1:
                yield group, torch.tensor(slots), pair != folded
