"""What a method takes that works layer by layer: an estimate, told before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvp.models.linears import all_linears, linears
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
    """Estimated peak on the device, in bytes: weights, states, statistics, work, total.

    Weights are those of one layer, twice: as they were and as they are pruned; on a CPU the whole model lies
    there too. States are those before and after a layer. Statistics are `kvp.strategies.signals.moments`' of every
    input of a layer, with the copies that adding a batch to one makes. Work is the larger of a batch's pass
    through a layer and of `workspace` for one matrix.

    Args:
        config: Of the model.
        tokens: Of all calibration data.
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
