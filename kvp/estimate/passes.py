"""Bytes of a forward pass without gradients: the layer at work, the logits, and their negative log-likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvp.models.nll import ROWS, WORDS
from kvp.models.shapes import active_width, layer_shapes, size, stream
from kvp.types import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT32 = 4  # bytes
Parts = dict[str, int]  # bytes by what they hold; "total" is their sum


def with_total(parts: Parts) -> Parts:
    """Return parts with their "total", in place of one that they have."""
    parts = {part: taken for part, taken in parts.items() if part != "total"}
    return {**parts, "total": sum(parts.values())}


def weights_bytes(config: PretrainedConfig, width: int) -> int:
    """Return the bytes of the parameters, each shared one once."""
    return width * size(config, layer_shapes(config)).params


def expanded_channels(shape: LayerShape) -> int:
    """Return the channels per token that a layer makes of its latents for attention, with the keys' rotation."""
    if shape.v_latents is None:
        return 0
    values = max(shape.v_head_dim, shape.v_latents[1])  # a single query reads latents
    return shape.num_key_value_heads * (4 * shape.qk_head_dim + values)


def working_bytes(config: PretrainedConfig, *, tokens: int, width: int) -> int:
    """Return the largest sum of what one layer holds at a time, with the states around it.

    | moment   | holds, per token                                                                  |
    | -------- | --------------------------------------------------------------------------------- |
    | norm     | states and result; below float32 three float32 copies                             |
    | rotation | states, norm's result, queries, keys, values, and three temporaries of the queries |
    | MLP      | states, norm's result, and three temporaries of the intermediate size             |
    """
    most = 0
    for shape in layer_shapes(config):
        hidden = max(stream(config, shape))
        queries = shape.num_attention_heads * shape.query_head_dim
        norm = 2 * width * hidden + FLOAT32 * hidden * (1 if width == FLOAT32 else 3)
        rotation = width * (2 * hidden + 4 * queries + shape.kv_width + expanded_channels(shape))
        mlp = width * (2 * hidden + 3 * active_width(config, shape))
        most = max(most, norm, rotation, mlp)
    return tokens * most


def nll_bytes(config: PretrainedConfig, *, tokens: int, width: int) -> int:
    """Return the bytes of all logits of a pass and of their NLL, which takes `ROWS` tokens at a time."""
    copies = 1 if width == FLOAT32 else 2
    return config.vocab_size * (tokens * width + min(tokens, ROWS) * copies * FLOAT32)


def slice_bytes(config: PretrainedConfig, *, tokens: int, width: int) -> int:
    """Return the bytes of the logits of `ROWS` tokens and `WORDS` words, and of their copy in float32."""
    stored = 0 if width == FLOAT32 else width
    return (stored + FLOAT32) * min(tokens, ROWS) * min(config.vocab_size, WORDS)


def loss_bytes(config: PretrainedConfig, *, tokens: int, width: int) -> int:
    """Return the bytes of a slice of the logits, and of the gradient of all hidden states that is made with it."""
    made = 2 * FLOAT32 * min(tokens, ROWS)
    return slice_bytes(config, tokens=tokens, width=width) + config.hidden_size * (made + tokens * width)


def evaluation_bytes(config: PretrainedConfig, *, tokens: int, width: int, logits: int) -> Parts:
    """Return the peak of a pass over `tokens` whose logits take `logits` bytes: weights, activations, total."""
    layer = working_bytes(config, tokens=tokens, width=width)
    head = logits + tokens * config.hidden_size * width
    return with_total({"weights": weights_bytes(config, width), "activations": max(layer, head)})
