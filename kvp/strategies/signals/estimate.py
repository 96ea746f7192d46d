"""Estimates of the memory that a method takes: layer by layer, or by gradients of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvp.models.linears import all_linears, linears
from kvp.models.nll import ROWS
from kvp.models.shapes import itemsize, layer_shapes, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT64 = 8


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
    | weights | one layer twice, as it was and as it is pruned; on a CPU the whole model too |
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
            + 5 * shape.num_attention_heads * max(shape.qk_head_dim, shape.v_head_dim)
            + 4 * shape.num_key_value_heads * (shape.qk_head_dim + shape.v_head_dim)
            + 4 * shape.intermediate_size
        )
        + 4 * 4 * hidden
        for shape in shapes
    )
    per_layer = max(sum(m.rows * m.columns for group in linears(config, n) for m in group) for n in layers)
    parts = {
        "weights": width * (2 * per_layer + on_cpu * size(config, shapes).params),
        "states": 2 * tokens * hidden * width,
        "statistics": FLOAT64 * (statistics + 3 * widest**square + 3 * batch * widest) if tokens else 0,
        "work": max(batch * through, *(workspace(linear.rows, linear.columns) for linear in matrices)),
    }
    return {**parts, "total": sum(parts.values())}


def scoring_bytes(
    config: PretrainedConfig, *, batch_size: int, length: int, gradient_checkpointing: bool = False
) -> dict[str, int]:
    """Estimate the peak memory of a gradient criterion, in bytes: weights, activations, constant, total.

    Activations are what autograd keeps per token and layer, in the model's dtype: residual stream, norms (with float32
    copies), projections and the attention output. With checkpointing they are the layer inputs and one layer at a
    time. Three times one layer is added for gradients and workspace, and the logits. The constant is the largest
    gradient with float32 copies.
    """
    shapes, width = layer_shapes(config), itemsize(config)
    tokens = batch_size * length
    per_layer = [
        width
        * (
            6 * config.hidden_size
            + 3 * shape.num_attention_heads * shape.qk_head_dim
            + 3 * shape.num_key_value_heads * (shape.qk_head_dim + shape.v_head_dim)
            + 2 * shape.num_attention_heads * shape.v_head_dim
            + 4 * shape.intermediate_size
        )
        + 4 * 4 * config.hidden_size
        for shape in shapes
    ]
    kept = (
        len(shapes) * width * config.hidden_size + max(per_layer)
        if gradient_checkpointing
        else sum(per_layer)
    )
    logits = tokens * config.vocab_size * (width + 4) + 4 * min(tokens, ROWS) * config.vocab_size * 4
    largest = max(
        config.hidden_size
        * max(s.num_attention_heads * max(s.qk_head_dim, s.v_head_dim), s.intermediate_size)
        for s in shapes
    )
    parts = {
        "weights": width * size(config, shapes).params,
        "activations": tokens * (kept + 3 * max(per_layer)) + logits,
        "constant": largest * (2 * width + 3 * 4),
    }
    return {**parts, "total": sum(parts.values())}
