"""The cache that a model decodes with: transformers' own, or a sparse one if its config asks for it.

The tokens of a forward pass attend to themselves densely and to whatever the cache held before, so a prompt
is read densely; only then are the tokens that leave the window packed. A decode step expands one layer at a
time and attends with the ordinary kernels: exact over what is kept, but no faster than a dense cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvp.models.mustafar import Mustafar, kept, pack, unpack
from kvp.models.shapes import layer_shapes


def cache_for(config: PretrainedConfig) -> Cache:
    """An empty cache of the kind that a checkpoint's config asks for.

    Raises:
        ValueError: Its options are out of range, or the model's widths cannot be stored so.
    """
    options = Mustafar.of(config)
    if options is None:
        return DynamicCache(config=config)
    options.check(config)
    attentions = sum(shape.num_key_value_heads > 0 for shape in layer_shapes(config))
    return Cache(layers=[SparseLayer(options) for _ in range(attentions)])


class SparseDecoding:
    """Mixin in front of a Hugging Face model class: `generate` uses the cache that the config asks for."""

    config: Any

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """In place of the default; a cache, a kind of cache, or none, that the caller chose stays."""
        default = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if default and model_kwargs.get("past_key_values") is None and Mustafar.of(self.config):
            model_kwargs["past_key_values"] = cache_for(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]


class SparseStates:
    """The keys or the values of a layer: the newest tokens whole, older ones packed.

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
        """How many there are."""
        return self.values.shape[-2] + self.recent.shape[-2]

    def append(self, new: Tensor) -> Tensor:
        """Store new tokens; returns all of them as they are attended to: the new and the recent ones whole."""
        recent = torch.cat([self.recent, new], dim=-2)
        attended = torch.cat([unpack(self.values, self.bitmap), recent], dim=-2)
        if (leaving := recent.shape[-2] - self.window) > 0:
            values, bitmap = pack(recent[..., :leaving, :], self.kept)
            self.values = torch.cat([self.values, values], dim=-2)
            self.bitmap = torch.cat([self.bitmap, bitmap], dim=-2)
            recent = recent[..., leaving:, :].clone()  # a view would keep what left alive
        self.recent = recent
        return attended

    def select(self, sequences: Tensor) -> None:
        """Make these indices the batch."""
        sequences = sequences.to(self.recent.device)
        self.recent, self.values, self.bitmap = (x[sequences] for x in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is stored."""
        return self.recent, self.values, self.bitmap


class SparseLayer(DynamicLayer):
    """Keys and values of one layer under `Mustafar`."""

    is_croppable = False

    def __init__(self, options: Mustafar) -> None:
        super().__init__()
        self.options = options
        self.states: tuple[SparseStates, ...] = ()  # keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Widths, dtype and device come with the first tokens."""
        options = self.options
        self.dtype, self.device = key_states.dtype, key_states.device
        self.states = (
            SparseStates(key_states, options.key_sparsity, options.window),
            SparseStates(value_states, options.value_sparsity, options.window),
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store (batch, groups, tokens, width) keys and values; returns those to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.states
        return keys.append(key_states), values.append(value_states)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.states[0].tokens if self.states else 0

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [tensor for states in self.states for tensor in states.tensors()]

    def packed(self) -> list[Tensor]:
        """What is stored of the tokens that have left the window."""
        return [tensor for states in self.states for tensor in (states.values, states.bitmap)]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.is_initialized = (), False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: each sequence goes on from another."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        for states in self.states:
            states.select(torch.arange(len(states.recent)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        for states in self.states:
            states.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what left the window is packed and cannot come back."""
        raise NotImplementedError(
            "a sparse cache cannot take tokens back (assisted decoding, crop): those that left its window are "
            "no longer whole. Decode without an assistant, or with past_key_values=DynamicCache(config=config)"
        )
