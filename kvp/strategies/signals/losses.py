"""The calibration loss, of the whole model and without a part of it, and how far predictions move.

All passes run the model's own forward, over some of its layers; none calls a decoder layer by hand, so
that a change in its arguments cannot silently change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from kvp.models.nll import ROWS, next_token_nll
from kvp.models.shapes import layer_shapes
from kvp.strategies.signals.estimate import TOKENS_PER_PASS
from kvp.strategies.signals.walk import hidden_states, window

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def losses_without(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    removals: Sequence[tuple[int, Callable[[], AbstractContextManager[None]]]],
    desc: str = "sensitivity",
) -> tuple[float, Tensor]:
    """Return the mean loss of the whole model, and that with each removal: `(layer, context that removes)`.

    A removal in layer n leaves every hidden state before n as it was. So all variants go through the
    model together, layer by layer, in a batch that grows by those that begin in the layer: the numbers
    of the naive pass with half its work in the layers. The output head is not shared: every variant passes
    it once. Held at once: hidden states of `batch_size * (1 + removals)` samples, and one layer's
    activations of `TOKENS_PER_PASS`.

    Returns:
        Base NLL, and (removals,) NLLs, in nats per token.
    """
    num_layers = len(layer_shapes(model.config))
    total, predictions = torch.zeros(1 + len(removals), dtype=torch.float64), 0
    progress = tqdm(total=len(batches) * num_layers, desc=desc, unit="layer", leave=None)
    for ids in batches:
        ids = ids.to(model.device)
        states, variants = hidden_states(model, 0, 0, input_ids=ids), [0]  # variant 0 is the whole model
        for layer in range(num_layers):
            whole, changed = states[: len(ids)], []
            for variant, (where, removal) in enumerate(removals, start=1):
                if where == layer:
                    with removal():
                        changed.append(hidden_states(model, layer, layer + 1, inputs_embeds=whole))
                    variants.append(variant)
            pieces = states.split(max(1, TOKENS_PER_PASS // ids.shape[1]))
            after = [hidden_states(model, layer, layer + 1, inputs_embeds=piece) for piece in pieces]
            states = torch.cat([*after, *changed])
            progress.update()
        with window(model, num_layers, num_layers):  # the final norm and the head
            losses = next_token_nll(model, inputs_embeds=states, labels=ids.repeat(len(variants), 1))
        total[variants] += losses.double().view(len(variants), -1).sum(dim=1).cpu()
        predictions += ids.shape[0] * (ids.shape[1] - 1)
    progress.close()
    return total[0].item() / predictions, total[1:] / predictions


@torch.inference_mode()
def divergences(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    removals: Sequence[Callable[[], AbstractContextManager[None]]],
    desc: str,
) -> Tensor:
    """Return (removals,) KL(whole model || with the removal) in nats, mean over tokens; logits are never held whole."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def states(ids: Tensor) -> tuple[Tensor, ...]:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).split(ROWS)

    total, tokens = torch.zeros(len(removals), dtype=torch.float64), 0
    for ids in tqdm(batches, desc=desc, unit="batch", leave=None):
        ids = ids.to(model.device)
        whole, changed = states(ids), []
        for removal in removals:
            with removal():
                changed.append(states(ids))
        for p_rows, *q_rows in zip(whole, *changed, strict=True):
            p = F.log_softmax(head(p_rows).float(), dim=-1)
            for number, rows in enumerate(q_rows):
                q = F.log_softmax(head(rows).float(), dim=-1)
                total[number] += F.kl_div(q, p, log_target=True, reduction="sum").double().cpu()
        tokens += ids.numel()
    return total / tokens
