"""The cache that a model decodes with: transformers' own, or a sparse one if the config asks for it.

The tokens of a forward pass attend densely to one another and to the cache as it was, so a prompt is read densely.
Afterwards the tokens that leave the window are packed. A decode step expands one layer at a time and attends with the
ordinary kernels. It is exact over the kept channels, but no faster than a dense cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from typing_extensions import override

from kvp.models.mustafar import Mustafar, kept, pack, unpack
from kvp.models.shapes import layer_shapes


def cache_for(config: PretrainedConfig) -> Cache:
    """Return an empty cache of the kind that a checkpoint's config asks for.

    Raises:
        ValueError: The options are out of bounds, or the model's widths cannot be packed.
    """
    options = Mustafar.of(config)
    if options is None:
        return DynamicCache(config=config)
    options.check(config)
    attentions = sum(shape.num_key_value_heads > 0 for shape in layer_shapes(config))
    return Cache(layers=[SparseLayer(options) for _ in range(attentions)])


class SparseDecoding:
    """Mixin in front of a Hugging Face model class, whose `generate` then uses the cache that the config asks for."""

    config: Any

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Replace the default cache; a cache, a kind of cache, or none, that the caller chose stays."""
        default = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if default and model_kwargs.get("past_key_values") is None and Mustafar.of(self.config):
            model_kwargs["past_key_values"] = cache_for(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]


class SparseStates:
    """The keys or the values of a layer, with the newest tokens whole and older ones packed.

    Attributes:
        recent: (batch, groups, up to `window`, width).
        values: (batch, groups, older tokens, kept).
        bitmap: (batch, groups, older tokens, width / 8), bytes.
    """

    def __init__(self, states: Tensor, sparsity: float, window: int) -> None:
        self.window, self.kept = window, kept(states.shape[-1], sparsity)
        self.recent = states[..., :0, :]
        self.values, self.bitmap = pack(self.recent, self.kept)

    @property
    def tokens(self) -> int:
        """Return the number of tokens stored."""
        return self.values.shape[-2] + self.recent.shape[-2]

    def append(self, new: Tensor) -> Tensor:
        """Store new tokens; return all tokens as they are attended to, with the new and the recent ones whole."""
        recent = torch.cat([self.recent, new], dim=-2)
        attended = torch.cat([unpack(self.values, self.bitmap), recent], dim=-2)
        if (leaving := recent.shape[-2] - self.window) > 0:
            values, bitmap = pack(recent[..., :leaving, :], self.kept)
            self.values = torch.cat([self.values, values], dim=-2)
            self.bitmap = torch.cat([self.bitmap, bitmap], dim=-2)
            recent = recent[..., leaving:, :].clone()  # a view would keep the whole tensor in memory
        self.recent = recent
        return attended

    def select(self, sequences: Tensor) -> None:
        """Make the sequences of these indices the batch."""
        sequences = sequences.to(self.recent.device)
        self.recent, self.values, self.bitmap = (x[sequences] for x in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return every stored tensor."""
        return self.recent, self.values, self.bitmap


class SparseLayer(DynamicLayer):
    """The keys and values of one layer under `Mustafar`."""

    is_croppable = False

    def __init__(self, options: Mustafar) -> None:
        super().__init__()
        self.options = options
        self.states: tuple[SparseStates, ...] = ()  # keys, values

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        options = self.options
        self.dtype, self.device = key_states.dtype, key_states.device
        self.states = (
            SparseStates(key_states, options.key_sparsity, options.window),
            SparseStates(value_states, options.value_sparsity, options.window),
        )
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

    def packed(self) -> list[Tensor]:
        """Return the stored tensors of the tokens that have left the window."""
        return [tensor for states in self.states for tensor in (states.values, states.bitmap)]

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
            "a sparse cache cannot take tokens back (assisted decoding, crop): those that left its window are "
            "no longer whole. Decode without an assistant, or with past_key_values=DynamicCache(config=config)"
        )
