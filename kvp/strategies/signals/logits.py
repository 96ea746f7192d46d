"""Queries and keys as they meet: what each rope pair adds to the attention logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvp.models.family import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pair_interactions(query: Tensor, key: Tensor) -> Tensor:
    """Return (groups, pairs) the mean square of each pair's term in a logit, summed over a group's query heads.

    Args:
        query: (batch, heads, queries, head_dim), rotated.
        key: (batch, groups, keys, head_dim), rotated.
    """

    def gram(states: Tensor) -> Tensor:
        """Return (batch, heads, pairs, 2, 2) products of the two channels of a pair, mean over tokens."""
        halves = states.float().unflatten(-1, (2, -1))
        return torch.einsum("bhtip,bhtjp->bhpij", halves, halves) / states.shape[2]

    queries = gram(query).unflatten(1, (key.shape[1], -1)).sum(2)
    return (queries * gram(key)).sum(dim=(-2, -1)).mean(0)


@contextmanager
def observed_attention(
    model: PreTrainedModel, observe: Callable[[nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `observe(attention module, query, key)`, after rotation, in the passes of a `with`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    family = family_of(model.config)
    plain = family.eager_attention if family.sinks else sdpa_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get(name, plain)  # "eager" has no entry

    def observing(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        observe(module, query, key)
        return attend(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = observing
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS.get(name, plain) is not attend:  # an entry of the user's own
            ALL_ATTENTION_FUNCTIONS[name] = attend
