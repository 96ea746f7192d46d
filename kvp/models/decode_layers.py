"""All layers of a decoder for the next token in one call, so that nothing but kernels runs between two layers.

Threads are started once a step, and not once a kernel, and wait for one another five times a layer. Matrices and
caches, whole or sparse, are read where they lie. The kernel (`decode_layers.cpp`) knows the layer that Llama, Mistral,
Qwen2, Phi-3 and SmolLM3 share: RMSNorm, attention in groups, RoPE, SiLU. Pruned ones may lack sublayers, and keep any
pairs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvp.models.family import family_of
from kvp.models.fixed_sparse import FixedSparse
from kvp.models.native import library
from kvp.models.rope import ROPE_BY_LENGTH, ropes
from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, layer_shapes, turning_pairs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from kvp.types import LayerShape

SOURCE = Path(__file__).with_suffix(".cpp")
FLOAT32 = 4  # bytes
LANES = 8  # channels that attention reads at a time
NORMS = ("input_layernorm", "post_attention_layernorm")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
SPARSE = ("key_bits", "value_bits", "newest_keys", "newest_values")
SIZES = (
    *("heads", "groups", "key_width", "value_width", "neurons", "length", "table_stride"),
    *("kept_keys", "kept_values", "newest"),
)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", *MATRICES)),
        *((f"{name}_bias", ctypes.c_void_p) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "cos", "sin", *SPARSE)),
        *((name, ctypes.c_int64) for name in SIZES),
        ("scaling", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("count", "batch", "width", "position", "threads")),
        ("eps", ctypes.c_double),
    )


def has_layers_of(config: PretrainedConfig) -> bool:
    """Return whether the kernel has the layers of a config.

    Where it has not: families with other norms or experts, or with matrices that are still fused; partial RoPE, or one
    that the length of the text changes; latents and sliced streams; heads whose width is no multiple of `LANES`.
    """
    family, shapes = family_of(config), layer_shapes(config)
    others = family.qk_norm or family.experts or family.layer_norms != NORMS
    fused = family.fused and config.model_type == family.name
    turns = CHANNELS_PER_PAIR * turning_pairs(config) == dense_shapes(config)[0].qk_head_dim
    fixed = all(rope["rope_type"] not in ROPE_BY_LENGTH for rope in ropes(config))
    plain = not others and not fused and turns and fixed and config.hidden_act == "silu"
    return plain and all(map(_plain, shapes))


def serves(model: PreTrainedModel) -> bool:
    """Return whether the kernel has the layers of a model, in float32 on a CPU; builds it at the first call.

    Layers with adapters or hooks, or with parameters that are not contiguous, are left to others.
    """
    if not has_layers_of(model.config):
        return False
    family = family_of(model.config)
    known = {*NORMS, *(getattr(family, name) for name in MATRICES)}
    modules = model.get_submodule(family.layers).named_modules()
    return all(_bare(name, module, known) for name, module in modules) and library(SOURCE) is not None


def _bare(name: str, module: nn.Module, known: set[str]) -> bool:
    """Return whether a module of a layer has no hooks, and only parameters that the kernel reads as they are."""
    hooks, held = module._forward_hooks or module._forward_pre_hooks, list(module.parameters(recurse=False))
    expected = not held or (name.rpartition(".")[2] in known and all(map(_readable, held)))
    return not hooks and expected


def _readable(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32 and parameter.device.type == "cpu" and parameter.is_contiguous()


def _plain(shape: LayerShape) -> bool:
    other = shape.latent or shape.k_latents or shape.v_latents or shape.stream
    return not other and not any(width % LANES for width in (shape.qk_head_dim, shape.v_head_dim))


class DecodeLayers:
    """The layers of a model, over a cache of fixed size.

    Args:
        model: A float32 model on a CPU, which `serves` takes. Its parameters must stay where they are.
        caches: Keys (batch, groups, length, width) and values of every attention, in order, or sparse ones. Steps
            write to them.
    """

    def __init__(
        self, model: PreTrainedModel, caches: Sequence[Sequence[Tensor] | Sequence[FixedSparse]]
    ) -> None:
        family, shapes = family_of(model.config), layer_shapes(model.config)
        layers: Any = model.get_submodule(family.layers)
        self.model, self.caches = model, caches
        self._batch = len(caches[0][0])
        self._layers, turning = (_Layer * len(shapes))(), []
        left, lengths = iter(caches), [2]  # of one position alone some rotary tables are another shape
        for layer, made, shape in zip(layers, self._layers, shapes, strict=True):
            made.input_norm, made.post_norm = (_at(getattr(layer, name).weight) for name in NORMS)
            if shape.num_key_value_heads:
                attention = layer.self_attn
                _matrices(made, attention, {name: getattr(family, name) for name in MATRICES[:4]})
                lengths.append(_hold(made, *next(left)))
                made.heads, made.groups = shape.num_attention_heads, shape.num_key_value_heads
                made.key_width, made.value_width = shape.qk_head_dim, shape.v_head_dim
                made.scaling = attention.scaling
                if getattr(attention, "use_rope", True):
                    turning.append((made, _channels(model.config, shape)))
            if shape.intermediate_size:
                _matrices(made, layer.mlp, {name: getattr(family, name) for name in MATRICES[4:]})
                made.neurons = shape.intermediate_size
        rotary: Any = model.get_submodule(family.rotary)
        tables = rotary(next(model.parameters()), torch.arange(max(lengths))[None])
        self._tables = [table[0] for table in tables]  # cos, sin: (length, head_dim)
        self._place(turning)

    def _place(self, turning: Sequence[tuple[_Layer, list[list[int]]]]) -> None:
        """Give every layer its place among the rotary tables of one position, which each step gathers anew."""
        places: dict[str, int] = {}
        index: list[int] = []
        for _, rows in turning:
            if str(rows) not in places:
                places[str(rows)] = len(index)
                index += [channel for row in rows for channel in row]
        self._index = torch.tensor(index, dtype=torch.long)
        self._gathered = [torch.empty(len(index)) for _ in self._tables]
        for made, rows in turning:
            start = FLOAT32 * places[str(rows)]
            made.cos, made.sin = (table.data_ptr() + start for table in self._gathered)
            made.table_stride = made.key_width if len(rows) > 1 else 0

    def step(self, hidden: Tensor, position: int) -> Tensor:
        """Return what the last layer gives for (batch, 1, hidden_size), a token at `position` of every sequence.

        Keys and values of the token are written, and those before it read.
        """
        assert len(hidden) == self._batch, "as many sequences as the cache has"
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        for table, gathered in zip(self._tables, self._gathered, strict=True):
            torch.index_select(table[position], 0, self._index, out=gathered)
        step = _Step(
            hidden=hidden.data_ptr(),
            layers=self._layers,
            count=len(self._layers),
            batch=hidden.shape[0],
            width=hidden.shape[-1],
            position=position,
            threads=torch.get_num_threads(),
            eps=self.model.config.rms_norm_eps,
        )
        built = library(SOURCE)
        assert built is not None
        built.kvp_decode_layers_float32(ctypes.byref(step))
        return hidden


def _channels(config: PretrainedConfig, shape: LayerShape) -> list[list[int]]:
    """Return the channels of the dense rotary tables that a layer turns by: a row per group, or one for all."""
    half = dense_shapes(config)[0].qk_head_dim // CHANNELS_PER_PAIR
    rows = shape.rope_pairs or (tuple(range(half)),)
    rows = rows if len(set(rows)) > 1 else rows[:1]
    return [[*row, *(pair + half for pair in row)] for row in rows]


def _hold(made: _Layer, keys: Tensor | FixedSparse, values: Tensor | FixedSparse) -> int:
    """Tell the kernel where keys and values lie; return how many tokens they have room for."""
    if isinstance(keys, FixedSparse) and isinstance(values, FixedSparse):
        made.keys, made.key_bits, made.newest_keys = map(_at, keys.tensors())
        made.values, made.value_bits, made.newest_values = map(_at, values.tensors())
        older, made.kept_keys = keys.values.shape[2:]
        made.length, made.newest, made.kept_values = older, keys.newest.shape[2], values.values.shape[3]
        return older + keys.newest.shape[2]
    assert isinstance(keys, Tensor)
    assert isinstance(values, Tensor)
    made.keys, made.values, made.length = _at(keys), _at(values), keys.shape[2]
    return keys.shape[2]


def _matrices(made: _Layer, module: Any, names: dict[str, str]) -> None:
    for name, own in names.items():
        linear = getattr(module, own)
        setattr(made, name, _at(linear.weight))
        setattr(made, f"{name}_bias", None if linear.bias is None else _at(linear.bias))


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
