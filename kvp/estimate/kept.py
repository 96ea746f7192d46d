"""Bytes that autograd keeps of a forward pass for the backward one, exactly, per token of one decoder layer.

The count follows transformers' layers (norms in float32, SiLU, SDPA) and PEFT's linear layers (float32 adapters).
`tests/estimate` compares it with what autograd really saves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvp.estimate.passes import FLOAT32, working_bytes
from kvp.models.family import family_of
from kvp.models.linears import Linear, linears
from kvp.models.shapes import active_width, layer_shapes, normed_rows, stream

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The part of a LoRA recipe that memory depends on.

    Attributes:
        rank: Width of the update.
        modules: Last names of the linear modules that are updated.
        dropout: Whether inputs of the update are dropped.
        mask_bytes: Bytes of a number's mask: float32 on a CPU, a bool on a GPU.
    """

    rank: int
    modules: Collection[str]
    dropout: bool = False
    mask_bytes: int = FLOAT32

    def tunes(self, linear: Linear) -> bool:
        """Return whether a linear module is updated."""
        return linear.module.rpartition(".")[2] in self.modules

    def params(self, config: PretrainedConfig) -> int:
        """Return how many parameters the update has."""
        layers = range(len(layer_shapes(config)))
        groups = [group for layer in layers for group in linears(config, layer)]
        return sum(
            self.rank * (each.rows + each.columns) for group in groups for each in group if self.tunes(each)
        )


def kept_bytes(
    config: PretrainedConfig,
    layer: int,
    *,
    width: int,
    gradients: Collection[str] = (),
    watched: Collection[str] = (),
    adapter: Adapter | None = None,
) -> int:
    """Return the bytes per token that one layer's forward pass keeps.

    Args:
        config: The config of the model.
        layer: Index of the layer.
        width: Bytes of a number of the model's dtype.
        gradients: Sublayers ("attention", "mlp") whose weights get gradients, so that their inputs are kept.
        watched: Sublayers whose gated channels a hook holds: the keys before their rotation, the product of the MLP.
        adapter: The update that is trained; without one all weights outside `gradients` are frozen.
    """
    shape, family = layer_shapes(config)[layer], family_of(config)
    before, between, _ = stream(config, shape)
    heads, groups, inner = shape.num_attention_heads, shape.num_key_value_heads, active_width(config, shape)
    queries, outputs = heads * shape.query_head_dim, heads * shape.v_head_dim
    keys, values = groups * shape.query_head_dim, groups * shape.v_head_dim
    kept = 0
    norm, post_norm = (
        FLOAT32 * bool(family.layer_norms),
        FLOAT32 * (config.hidden_size + 1) * bool(family.post_norms),
    )
    if groups:
        kept += post_norm
        kept += norm * (before + 1)  # the norm's input and its scale
        kept += width * (queries + keys + values + outputs) + FLOAT32 * heads  # of SDPA, with its log-sum-exp
        kept += width * before * ("attention" in gradients) + width * keys * ("attention" in watched)
        if family.qk_norm:
            kept += FLOAT32 * (sum(normed_rows(config, shape)) + (2 if family.joint_norm else heads + groups))
    if inner:
        kept += post_norm
        kept += norm * (between + 1) + 3 * width * inner
        kept += width * (between + inner) * ("mlp" in gradients) + width * inner * ("mlp" in watched)
    if adapter:
        kept += sum(_adapted(group, adapter, width) for group in linears(config, layer))
    return kept


def _adapted(group: tuple[Linear, ...], adapter: Adapter, width: int) -> int:
    """Return what the updates of linear modules keep that share their input."""
    tuned = [linear for linear in group if adapter.tunes(linear)]
    inputs, narrow = group[0].columns, FLOAT32 * adapter.rank * len(tuned)
    if adapter.dropout:
        return narrow + len(tuned) * inputs * (FLOAT32 + adapter.mask_bytes)
    if width != FLOAT32:
        return narrow + len(tuned) * inputs * FLOAT32  # each has a copy of its own in float32
    of_sdpa = group[0].module.endswith("o_proj")  # SDPA keeps its output already
    return narrow + inputs * FLOAT32 * (bool(tuned) and not of_sdpa)


def all_kept(config: PretrainedConfig, **options: Any) -> list[int]:
    """Return the bytes per token that each layer keeps; the options are those of `kept_bytes`."""
    return [kept_bytes(config, layer, **options) for layer in range(len(layer_shapes(config)))]


def until_backward(
    config: PretrainedConfig,
    *,
    tokens: int,
    width: int,
    checkpointing: bool,
    loss: int,
    held: int = 0,
    **options: Any,
) -> dict[str, int]:
    """Return the bytes of the peak of a forward and a backward pass, beside the weights: activations, logits.

    Without checkpointing the loss goes backward while all layers' tensors are kept. With it only their inputs are;
    the peak is there, or in a layer that is computed again.

    Args:
        config: The config of the model.
        tokens: Tokens of the pass.
        width: Bytes of a number of the model's dtype.
        checkpointing: Whether layers are computed again in the backward pass.
        loss: Bytes of the logits and their gradients when the loss goes backward.
        held: Bytes that hooks hold of a checkpointed forward pass.
        options: Those of `kept_bytes`.
    """
    each = all_kept(config, width=width, **options)
    work = working_bytes(config, tokens=tokens, width=width)
    if not checkpointing:
        return {"activations": tokens * sum(each) + max(0, work - loss), "logits": loss}
    again = tokens * max(each) + work
    inputs = tokens * len(each) * width * config.hidden_size
    return {"activations": inputs + held + max(0, again - loss), "logits": loss}
