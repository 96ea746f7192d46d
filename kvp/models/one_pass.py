"""One forward pass that reads what a decoder with a packed cache reads: the same losses as token after token, faster.

A decoder's token reads itself and the tokens of the window whole, and older ones as they are unpacked. Which token is
packed for which reader depends on their positions alone. So every layer attends to its keys and values several times
over: whole, unpacked, and mixed where keys are packed earlier than values. A mask shows each reader one form of each
token. The softmax over all forms is then that of the decoder.

The argument is an induction over the layers: a layer that gets a decoder's hidden states writes a decoder's keys and
values, because a codec packs tokens by themselves or in blocks that end before their readers.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from typing_extensions import override

from kvp.models.cache_formats import CacheFormat
from kvp.models.caches import cache_format
from kvp.models.codecs import Codec
from kvp.models.shapes import layer_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Form = tuple[bool, bool]  # whether a token's key and its value are unpacked ones
FORMS: tuple[Form, ...] = tuple(product((False, True), (False, True)))


def as_decoded(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """Return the options of a forward pass over sequences of `tokens` whose logits are those of a decoder.

    Raises:
        ValueError: The model's cache is no packed one, or cannot be stored so.
    """
    options = cache_format(model.config)
    if options is None:
        raise ValueError("the config has no kvp_cache: one forward pass reads what a decoder reads")
    options.check(model.config)
    seen = visible(options, tokens)
    forms = [form for form in FORMS if seen[form].any()]
    attentions = sum(shape.num_key_value_heads > 0 for shape in layer_shapes(model.config))
    cache = Cache(layers=[EveryForm(options, number, forms) for number in range(attentions)])
    shown = torch.cat([seen[form] for form in forms], dim=-1).to(model.device)
    mask = torch.zeros(shown.shape, dtype=model.dtype, device=model.device).masked_fill_(
        ~shown, torch.finfo(model.dtype).min
    )
    return {"past_key_values": cache, "attention_mask": mask[None, None], "use_cache": True}


def visible(options: CacheFormat, tokens: int) -> dict[Form, Tensor]:
    """Return for every form of a token which readers see it so: (readers, tokens) booleans."""
    keys, values = (_packed(codec, tokens) for codec in options.codecs(8, 8))
    before = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return {form: before & (keys == form[0]) & (values == form[1]) for form in FORMS}


def _packed(codec: Codec, tokens: int) -> Tensor:
    """Return which tokens are packed when the reader at each position comes, (readers, tokens)."""
    gone = torch.tensor([codec.packed(position) for position in range(tokens)])
    return torch.arange(tokens) < gone[:, None]


class EveryForm(DynamicLayer):
    """The keys and values of one layer and one forward pass, in every form that some reader sees."""

    def __init__(self, options: CacheFormat, attention: int, forms: list[Form]) -> None:
        super().__init__()
        self.options, self.attention, self.forms = options, attention, forms

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        codecs = self.options.codecs(key_states.shape[-1], value_states.shape[-1], self.attention)
        keys, values = (
            (states, _unpacked(states, codec))
            for states, codec in zip((key_states, value_states), codecs, strict=True)
        )
        return (
            torch.cat([keys[key] for key, _ in self.forms], dim=-2),
            torch.cat([values[value] for _, value in self.forms], dim=-2),
        )


def _unpacked(states: Tensor, codec: Codec) -> Tensor:
    """Return states as they are read once packed; the newest, which stay whole, as they are."""
    older = codec.packed(states.shape[-2])
    packed = codec.unpack(codec.pack(states[..., :older, :])).to(states.dtype)
    return torch.cat([packed, states[..., older:, :]], dim=-2)
