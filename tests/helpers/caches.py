"""A sparse cache by naive zeroing, and decoding token by token."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvp.models.caches import cache_format
from kvp.models.mustafar import Mustafar, kept
from kvp.models.shapes import layer_shapes


class Naive(DynamicLayer):
    """Everything dense; what has left the window is zeroed, vector by vector, before the next tokens come."""

    def __init__(self, options: Mustafar) -> None:
        super().__init__()
        self.options = options

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized:
            old = max(0, self.keys.shape[-2] - self.options.window)
            for states, sparsity in (
                (self.keys, self.options.key_sparsity),
                (self.values, self.options.value_sparsity),
            ):
                for b, group, token in product(*map(range, (*states.shape[:2], old))):
                    sizes = [abs(x) for x in states[b, group, token].tolist()]
                    order = sorted(range(len(sizes)), key=sizes.__getitem__)
                    states[b, group, token, order[: len(sizes) - kept(len(sizes), sparsity)]] = 0
        return super().update(key_states, value_states)


def naive(config) -> Cache:
    return Cache(layers=[Naive(cache_format(config)) for _ in layer_shapes(config)])


@torch.no_grad()
def stepwise(model, tokens: Tensor, cache: Cache, prompt: int) -> Tensor:
    """Logits of a prompt, and then of token after token."""
    sizes = [prompt, *[1] * (tokens.shape[1] - prompt)]
    return torch.cat(
        [model(part, past_key_values=cache).logits for part in tokens.split(sizes, dim=1)], dim=1
    )
