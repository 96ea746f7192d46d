"""The cache that a model decodes with: transformers' own, or a packed one if the config asks for it.

The tokens of a forward pass attend as they are to one another, and to the cache as it was. A prompt is thus read whole.
Afterwards the tokens that leave the window are packed. A decode step reads Mustafar's channels as they are stored
(`kvp.models.sparse_attention`). It expands any other cache, one layer at a time, and attends with the ordinary kernels.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from typing_extensions import override

from kvp.models.cache_formats import CacheFormat
from kvp.models.caches import cache_format
from kvp.models.configs import PRUNED_CONFIGS
from kvp.models.packed_states import PackedStates
from kvp.models.shapes import layer_shapes


def cache_for(config: PretrainedConfig, *, expanded: bool = False) -> Cache:
    """Return an empty cache of the kind that a checkpoint's config asks for.

    Args:
        config: The config of a model.
        expanded: Whether every step expands what it reads, even where a kernel reads it as it is stored.

    Raises:
        ValueError: The options are out of bounds, or the model's cache cannot be stored so.
    """
    options = cache_format(config)
    if options is None:
        return DynamicCache(config=config)
    options.check(config)
    twin = isinstance(config, tuple(PRUNED_CONFIGS.values()))  # whose attention takes more than tensors
    shapes = [shape for shape in layer_shapes(config) if shape.num_key_value_heads]
    layers = [
        PackedLayer(options, number, as_stored=twin and not expanded and not shape.latent)
        for number, shape in enumerate(shapes)
    ]
    return Cache(layers=list(layers))


class PackedDecoding:
    """Mixin in front of a Hugging Face model class, whose `generate` then uses the cache that the config asks for."""

    config: Any

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Replace the default cache; a cache, a kind of cache, or none, that the caller chose stays."""
        default = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if default and model_kwargs.get("past_key_values") is None and cache_format(self.config):
            model_kwargs["past_key_values"] = cache_for(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]


class PackedLayer(DynamicLayer):
    """The keys and values of one attention of the model under a `CacheFormat`.

    Attributes:
        as_stored: Whether the model's attention may get them as they are stored, where a kernel reads that.
    """

    is_croppable = False

    def __init__(self, options: CacheFormat, attention: int, *, as_stored: bool) -> None:
        super().__init__()
        self.options, self.attention, self.as_stored = options, attention, as_stored
        self.states: tuple[PackedStates, ...] = ()  # keys, values

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        codecs = self.options.codecs(key_states.shape[-1], value_states.shape[-1], self.attention)
        self.states = tuple(map(PackedStates, (key_states, value_states), codecs))
        self.is_initialized = True

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store the keys and values of a pass; return what it attends to, as tensors or as `Stored`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.states
        read = keys.append(key_states), values.append(value_states)
        if self.as_stored and key_states.shape[-2] == 1 and all(states.as_channels for states in read):
            return read
        return read[0].whole(), read[1].whole()

    @override
    def get_seq_length(self) -> int:
        return self.states[0].tokens if self.states else 0

    def tensors(self) -> list[Tensor]:
        """Return every stored tensor."""
        return [tensor for states in self.states for tensor in states.tensors()]

    def bytes_per_token(self) -> Fraction:
        """Return the bytes of a token of one sequence that has left the window; 0 if none has."""
        return sum((states.bytes_per_token() for states in self.states), Fraction(0))

    @override
    def reset(self) -> None:
        self.states, self.is_initialized = (), False

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        for states in self.states:
            states.select(torch.arange(len(states.recent)).repeat_interleave(repeats))

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        for states in self.states:
            states.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Raise, because packed tokens cannot become whole again."""
        raise NotImplementedError(
            "a packed cache cannot take tokens back (assisted decoding, crop): those that left its window are "
            "no longer whole. Decode without an assistant, or with past_key_values=DynamicCache(config=config)"
        )
