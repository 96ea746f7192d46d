"""Estimates of the memory that a method takes: layer by layer, or by gradients of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from kvp.estimate.kept import until_backward
from kvp.estimate.passes import (
    FLOAT32,
    loss_bytes,
    slice_bytes,
    weights_bytes,
    with_total,
    working_bytes,
)
from kvp.models.linears import Linear, all_linears, linears
from kvp.models.shapes import active_width, itemsize, layer_shapes, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT64 = 8
TOKENS_PER_PASS = 4096  # go through a layer at once: more gain nothing, and fall out of a CPU's cache
SUBLAYERS = ("attention", "mlp")


def layerwise_bytes(
    config: PretrainedConfig,
    *,
    tokens: int,
    batch: int,
    covariance: bool,
    workspace: Callable[[int, int], int],
    on_cpu: bool = False,
) -> dict[str, int]:
    """Estimate the peak on the device, in bytes: weights, states, statistics, work, total.

    | part | holds |
    |---|---|
    | weights | one layer as it was and as it is pruned; on a CPU the model, and all that is pruned if states pass it |
    | states | the hidden states before and after a layer |
    | statistics | `signals.moments` of every input of a layer, and the copies that adding a batch makes |
    | work | the larger of a batch's pass through a layer and of `workspace` for one matrix |

    Args:
        config: The config of the model.
        tokens: Tokens of all calibration data.
        batch: Tokens per pass.
        covariance: Whether channels are set against each other.
        workspace: Bytes that a matrix of (rows, columns) takes to prune.
        on_cpu: Whether the device is the CPU.
    """
    shapes, width, hidden = layer_shapes(config), itemsize(config), config.hidden_size
    matrices = all_linears(config)
    widest = max(linear.columns for linear in matrices)
    square = 2 if covariance else 1
    layers = range(len(shapes))
    statistics = max(sum(group[0].columns ** square for group in linears(config, n)) for n in layers)
    through = max(
        width
        * (
            8 * hidden
            + 5 * shape.num_attention_heads * max(shape.query_head_dim, shape.v_head_dim)
            + 4 * shape.num_key_value_heads * (shape.query_head_dim + shape.v_head_dim)
            + 4 * active_width(config, shape)
        )
        + 4 * 4 * hidden
        for shape in shapes
    )
    per_layer = [sum(m.rows * m.columns for group in linears(config, n) for m in group) for n in layers]
    # what no state passes stays in its file
    pruned = sum(per_layer) if on_cpu and tokens else 2 * max(per_layer)
    parts = {
        "weights": width * (on_cpu * size(config, shapes).params + pruned),
        "states": 2 * tokens * hidden * width,
        "statistics": FLOAT64 * (statistics + 3 * widest**square + 3 * batch * widest) if tokens else 0,
        "work": max(batch * through, *(workspace(linear.rows, linear.columns) for linear in matrices)),
    }
    return with_total(parts)


def pass_bytes(
    config: PretrainedConfig, *, samples: int, tokens: int, length: int, variants: int
) -> dict[str, int]:
    """Estimate the peak of passes without gradients, in bytes: weights, states, activations, total.

    Args:
        config: The config of the model.
        samples: Windows whose hidden states a walk through the layers holds, before and after a layer.
        tokens: Tokens of a batch.
        length: Tokens of a window.
        variants: Removals that go through the model together, as a sensitivity analysis has them.
    """
    width = itemsize(config)
    states = max(samples * length, tokens * (1 + variants) * bool(variants))
    at_once = min(tokens * (1 + variants), max(length, TOKENS_PER_PASS)) if tokens else 0
    parts = {
        "weights": weights_bytes(config, width),
        "states": 2 * states * config.hidden_size * width,
        "activations": working_bytes(config, tokens=at_once, width=width)
        + slice_bytes(config, tokens=tokens, width=width),
    }
    return with_total(parts)


def rewriting_bytes(
    config: PretrainedConfig, *, rewritten: Sequence[Linear], refitted: Sequence[Linear], states: int
) -> dict[str, int]:
    """Estimate the peak on a CPU of a plan that rewrites matrices, in bytes: weights, states, edits, work, total.

    | part | holds |
    |---|---|
    | edits | every matrix that is rewritten, in the dtype of the model |
    | work | in float64 what a least-squares fit of the largest holds: products of inputs twice, of outputs thrice |

    Args:
        config: The config of the model.
        rewritten: The matrices of the plan's edits.
        refitted: Those that are fitted to outputs.
        states: Bytes of the hidden states that a walk through the layers holds.
    """
    width = itemsize(config)
    parts = {
        "weights": weights_bytes(config, width),
        "states": states,
        "edits": width * sum(linear.rows * linear.columns for linear in {*rewritten, *refitted}),
        "work": FLOAT64
        * max((linear.columns * (2 * linear.columns + 3 * linear.rows) for linear in refitted), default=0),
    }
    return with_total(parts)


def scoring_bytes(
    config: PretrainedConfig,
    *,
    batch_size: int,
    length: int,
    gradient_checkpointing: bool = False,
    gradients: Collection[str] = SUBLAYERS,
    watched: Collection[str] = (),
) -> dict[str, int]:
    """Estimate the peak memory of a gradient criterion, in bytes: weights, activations, logits, constant, total.

    | part | holds |
    |---|---|
    | activations | what autograd keeps of all layers (`kvp.estimate.kept`) |
    | logits | a slice of them, and the gradient of the hidden states that is made with it |
    | constant | the largest gradient with its float32 copies |

    Args:
        config: The config of the model.
        batch_size: Sequences per pass.
        length: Tokens of a sequence.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        gradients: Sublayers whose weights get gradients.
        watched: Sublayers whose channels a hook holds, as for gates.
    """
    shapes, width = layer_shapes(config), itemsize(config)
    tokens = batch_size * length
    channels = sum(
        s.kv_width * ("attention" in watched) + active_width(config, s) * ("mlp" in watched) for s in shapes
    )
    largest = config.hidden_size * max(
        max(
            s.num_attention_heads * max(s.query_head_dim, s.v_head_dim) * ("attention" in gradients),
            s.intermediate_size * ("mlp" in gradients),
        )
        for s in shapes
    )
    parts = {
        "weights": weights_bytes(config, width),
        **until_backward(
            config,
            tokens=tokens,
            width=width,
            checkpointing=gradient_checkpointing,
            loss=loss_bytes(config, tokens=tokens, width=width),
            held=tokens * width * channels,
            gradients=gradients,
            watched=watched,
        ),
        "constant": largest * (2 * width + 3 * FLOAT32),
    }
    return with_total(parts)
