"""The weight matrices of the decoder blocks, grouped by the input that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from kvp.models.family import family_of
from kvp.models.shapes import layer_shapes, projections

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Linear:
    """One matrix, of shape (rows, columns): outputs and inputs.

    Attributes:
        module: Name of the module, such as "model.layers.3.self_attn.q_proj".
    """

    module: str
    rows: int
    columns: int

    @property
    def weight(self) -> str:
        """Return the name of the matrix among the model's parameters."""
        return f"{self.module}.weight"


def linears(config: PretrainedConfig, layer: int) -> list[tuple[Linear, ...]]:
    """Return the matrices of one layer in the order of the forward pass; the members of a tuple share their input.

    The tuples are (q, k, v), (o,), (gate, up), (down,); a latent layer has (q, k, v, q_latent). An absent sublayer has
    none, and neither have experts, whose matrices are one tensor.
    """
    family, shape, hidden = family_of(config), layer_shapes(config)[layer], config.hidden_size
    attention, mlp = (f"{family.layers}.{layer}.{part}" for part in (family.attention, family.mlp))
    heads, groups, inner = shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size
    found: list[tuple[Linear, ...]] = []
    if groups:
        queries, keys, values = projections(config, shape)
        q = Linear(f"{attention}.{family.q}", queries, hidden)
        k = Linear(f"{attention}.{family.k}", keys, hidden)
        v = Linear(f"{attention}.{family.v}", values, hidden)
        still = Linear(f"{attention}.{family.q_latent}", heads * shape.v_head_dim, hidden)
        found += [
            (q, k, v, *[still] * shape.latent),
            (Linear(f"{attention}.{family.o}", hidden, heads * shape.v_head_dim),),
        ]
    if inner and not shape.experts:
        gate, up = (Linear(f"{mlp}.{name}", inner, hidden) for name in (family.gate, family.up))
        found += [(gate, up), (Linear(f"{mlp}.{family.down}", hidden, inner),)]
    return found


def linear_names(config: PretrainedConfig, model: nn.Module) -> tuple[str, ...]:
    """Return the names of linear modules that can be tuned; of a model whose class fuses matrices, those of its twin.

    A head that shares its matrix with the embeddings is not among them: its update would change both once merged.
    """
    if family_of(config).fused:
        names = [*(linear.module for linear in all_linears(config)), "lm_head"]
    else:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(name for name in names if name != "lm_head" or not config.tie_word_embeddings)


def named_linears(config: PretrainedConfig, *parts: Literal["q", "k", "v", "q_latent", "o"]) -> list[Linear]:
    """Return the projections of these parts of all attentions, in order."""
    names = {getattr(family_of(config), part) for part in parts}
    return [linear for linear in all_linears(config) if linear.module.rpartition(".")[2] in names]


def all_linears(config: PretrainedConfig) -> list[Linear]:
    """Return the matrices of all layers, in order."""
    layers = range(len(layer_shapes(config)))
    return [linear for layer in layers for group in linears(config, layer) for linear in group]
