"""The cache that a model decodes with: transformers' own, or a packed one if the config asks for it.

The tokens of a forward pass attend as they are to one another, and to the cache as it was. A prompt is thus read whole.
Afterwards the tokens that leave the window are packed. A decode step expands one layer at a time and attends with the
ordinary kernels. It saves memory, and is no faster than a dense cache.
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
from kvp.models.codecs import Codec
from kvp.models.shapes import layer_shapes


def cache_for(config: PretrainedConfig) -> Cache:
    """Return an empty cache of the kind that a checkpoint's config asks for.

    Raises:
        ValueError: The options are out of bounds, or the model's cache cannot be stored so.
    """
    options = cache_format(config)
    if options is None:
        return DynamicCache(config=config)
    options.check(config)
    attentions = sum(shape.num_key_value_heads > 0 for shape in layer_shapes(config))
    return Cache(layers=[PackedLayer(options, number) for number in range(attentions)])


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


class PackedStates:
    """The keys or the values of a layer, with the newest tokens whole and older ones packed.

    Attributes:
        recent: (batch, groups, newest tokens, width).
        packed: What the codec stores of the older ones.
        older: How many those are.
    """

    def __init__(self, states: Tensor, codec: Codec) -> None:
        self.codec, self.recent, self.older = codec, states[..., :0, :], 0
        self.packed = codec.pack(self.recent)

    @property
    def tokens(self) -> int:
        """Return the number of tokens stored."""
        return self.older + self.recent.shape[-2]

    def append(self, new: Tensor) -> Tensor:
        """Store new tokens; return all tokens as they are attended to, with the new and the recent ones whole."""
        recent = torch.cat([self.recent, new], dim=-2)
        attended = torch.cat([self.codec.unpack(self.packed).to(new.dtype), recent], dim=-2)
        if leaving := self.codec.packed(attended.shape[-2]) - self.older:
            packed = self.codec.pack(recent[..., :leaving, :])
            self.packed = tuple(torch.cat(both, dim=2) for both in zip(self.packed, packed, strict=True))
            self.older += leaving
            recent = recent[..., leaving:, :].clone()  # a view would keep the whole tensor in memory
        self.recent = recent
        return attended

    def select(self, sequences: Tensor) -> None:
        """Make the sequences of these indices the batch."""
        sequences = sequences.to(self.recent.device)
        self.recent, self.packed = self.recent[sequences], tuple(x[sequences] for x in self.packed)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every stored tensor."""
        return self.recent, *self.packed

    def bytes_per_token(self) -> Fraction:
        """Return the bytes of a packed token of one sequence; 0 if none is packed."""
        return Fraction(sum(x.nbytes for x in self.packed), len(self.recent) * self.older or 1)


class PackedLayer(DynamicLayer):
    """The keys and values of one attention of the model under a `CacheFormat`."""

    is_croppable = False

    def __init__(self, options: CacheFormat, attention: int) -> None:
        super().__init__()
        self.options, self.attention = options, attention
        self.states: tuple[PackedStates, ...] = ()  # keys, values

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        codecs = self.options.codecs(key_states.shape[-1], value_states.shape[-1], self.attention)
        self.states = tuple(map(PackedStates, (key_states, value_states), codecs))
        self.is_initialized = True

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.states
        return keys.append(key_states), values.append(value_states)

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
