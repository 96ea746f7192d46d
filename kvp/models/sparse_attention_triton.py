"""The GPU's kernel of `kvp.models.sparse_attention`, in Triton, over the same layout.

A program reads `SPLIT` tokens of one sequence and KV group in blocks, with a running softmax. Where a channel's value
lies among those that stay is the number of bits before it. The newest tokens are a segment of which every channel
stays. Parts of a softmax are joined at the end: each brings its largest score, the sum of its exponentials and what it
has read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # tokens that are expanded at a time
SPLIT = 512  # tokens of a program
SMALLEST = 16  # rows and columns of a matrix that the tensor cores multiply

Segment = tuple[Tensor, ...]


@triton.jit
def _expanded(kept, bits, rows, there, WIDTH: tl.constexpr, PADDED: tl.constexpr, KEPT: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, PADDED)
    stored = there[:, None] & (channel < WIDTH)[None, :]
    words = tl.load(bits + rows[:, None] * (WIDTH // 8) + (channel // 8)[None, :], mask=stored, other=0)
    stays = (words.to(tl.int32) >> (channel % 8)[None, :]) & 1
    place = tl.cumsum(stays, axis=1) - stays
    return tl.load(kept + rows[:, None] * KEPT + place, mask=stays == 1, other=0.0).to(tl.float32)


# numbers that change from step to step, each value of which would be compiled anew
@triton.jit(do_not_specialize=["tokens", "before", "part", "parts", "mask_stride"])
def _read(  # type: ignore[no-untyped-def]
    queries,
    keys,
    key_bits,
    values,
    value_bits,
    mask,
    largest,
    sums,
    output,
    tokens,
    before,
    part,
    parts,
    groups,
    mask_stride,
    scaling,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    PADDED_KEY: tl.constexpr,
    KEPT_KEYS: tl.constexpr,
    VALUE: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    KEPT_VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, key, value = tl.arange(0, PADDED_HEADS), tl.arange(0, PADDED_KEY), tl.arange(0, PADDED_VALUE)
    ours = head < HEADS
    query = tl.load(
        queries + (row * HEADS + head)[:, None] * KEY + key[None, :],
        mask=ours[:, None] & (key < KEY)[None, :],
        other=0.0,
    )
    most = tl.full((PADDED_HEADS,), float("-inf"), tl.float32)
    sum = tl.zeros((PADDED_HEADS,), tl.float32)
    read = tl.zeros((PADDED_HEADS, PADDED_VALUE), tl.float32)
    for block in range(0, SPLIT, BLOCK):
        token = split * SPLIT + block + tl.arange(0, BLOCK)
        there = token < tokens
        rows = row * tokens + token
        k = _expanded(keys, key_bits, rows, there, KEY, PADDED_KEY, KEPT_KEYS)
        score = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scaling
        if MASKED:
            score += tl.load(mask + (row // groups) * mask_stride + before + token, mask=there, other=0.0)[
                None, :
            ]
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        fade = tl.exp(most - base)
        v = _expanded(values, value_bits, rows, there, VALUE, PADDED_VALUE, KEPT_VALUES)
        sum = sum * fade + tl.sum(weight, axis=1)
        read = read * fade[:, None] + tl.dot(weight, v, input_precision=PRECISION)
        most = higher
    at = (row * parts + part + split) * HEADS + head
    tl.store(largest + at, most, mask=ours)
    tl.store(sums + at, sum, mask=ours)
    tl.store(
        output + at[:, None] * VALUE + value[None, :], read, mask=ours[:, None] & (value < VALUE)[None, :]
    )


def attend_on_gpu(
    query: Tensor,
    segments: Sequence[Segment],
    recent_keys: Tensor,
    recent_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Return what the heads of one token read; arguments as those of `kvp.models.sparse_attention.attend`."""
    batch, groups, _, key_width = recent_keys.shape
    value_width, heads = recent_values.shape[-1], query.shape[1] // groups
    newest = (recent_keys, _every_bit(recent_keys), recent_values, _every_bit(recent_values))
    pieces = [tuple(part.contiguous() for part in piece) for piece in (*segments, newest)]
    splits = [triton.cdiv(piece[0].shape[2], SPLIT) for piece in pieces]
    shape = (batch * groups, sum(splits), heads)
    largest, sums = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    output = query.new_empty((*shape, value_width), dtype=torch.float32)
    queries, before, part = query.float().contiguous(), 0, 0
    added = largest if mask is None else mask.float().contiguous()
    for (keys, key_bits, values, value_bits), count in zip(pieces, splits, strict=True):
        _read[batch * groups, count](
            *(queries, keys, key_bits, values, value_bits, added, largest, sums, output),
            keys.shape[2],
            before,
            part,
            shape[1],
            groups,
            0 if len(added) == 1 else added.shape[-1],
            scaling,
            HEADS=heads,
            PADDED_HEADS=_padded(heads),
            KEY=key_width,
            PADDED_KEY=_padded(key_width),
            KEPT_KEYS=keys.shape[-1],
            VALUE=value_width,
            PADDED_VALUE=_padded(value_width),
            KEPT_VALUES=values.shape[-1],
            MASKED=mask is not None,
            PRECISION="ieee" if recent_keys.dtype == torch.float32 else "tf32",  # which holds 16 bits exactly
            BLOCK=BLOCK,
            SPLIT=SPLIT,
        )
        before, part = before + keys.shape[2], part + count
    weights = torch.exp(largest - largest.amax(1, keepdim=True))
    joined = (weights[..., None] * output).sum(1) / (weights * sums).sum(1)[..., None]
    return joined.view(batch, groups * heads, value_width).to(query.dtype)


def _every_bit(states: Tensor) -> Tensor:
    """Return the bitmap of vectors of which every channel stays."""
    return states.new_full((*states.shape[:-1], states.shape[-1] // 8), 255, dtype=torch.uint8)


def _padded(number: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(number))
