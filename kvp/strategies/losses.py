"""The calibration loss, of the whole model and without a part of it.

All passes run the model's own forward with hooks; none calls a decoder layer by hand, so that a
change in its arguments cannot silently change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvp.models.family import family_of

TOKENS_PER_CHUNK = 512  # logits of this many tokens are held in float32 at once


def next_token_nll(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """(batch, seq_len - 1) negative log-likelihoods in nats; logits are never held whole.

    Pass `labels` (batch, seq_len) and either `input_ids` or `inputs_embeds`.
    """
    labels = inputs.pop("labels")
    hidden = model.base_model(use_cache=False, **inputs).last_hidden_state[:, :-1]
    targets, head = labels[:, 1:].flatten(), model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    pieces = [
        F.cross_entropy(head(rows).float(), chunk, reduction="none")
        for rows, chunk in zip(
            hidden.flatten(0, 1).split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True
        )
    ]
    return torch.cat(pieces).view(labels.shape[0], -1)


@torch.inference_mode()
def losses_without(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    removals: Sequence[tuple[int, Callable[[], AbstractContextManager[None]]]],
) -> tuple[float, Tensor]:
    """The mean loss of the whole model, and with each removal: `(layer, context that removes)`.

    A removal in layer n leaves every hidden state before n as it was, so only the suffix is run, from
    the stored input of layer n: the same numbers as the naive pass in about half its time.

    Returns:
        Base NLL, and (removals,) NLLs, in nats per token.
    """
    base, losses, weights = 0.0, torch.zeros(len(removals), dtype=torch.float64), 0
    progress = tqdm(total=len(batches) * len(removals), desc="sensitivity", unit="probe")
    for ids in batches:
        ids = ids.to(model.device)
        with _layer_inputs(model) as inputs:
            base += next_token_nll(model, input_ids=ids, labels=ids).double().sum().item()
        for number, (layer, removal) in enumerate(removals):
            with removal(), suffix(model, layer):
                nll = next_token_nll(model, inputs_embeds=inputs[layer], labels=ids)
            losses[number] += nll.double().sum().cpu()
            progress.update()
        weights += ids.shape[0] * (ids.shape[1] - 1)
    progress.close()
    return base / weights, losses / weights


@contextmanager
def _layer_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The hidden states (batch, seq_len, hidden_size) that enter each layer in the passes inside."""
    inputs: list[Tensor] = []
    with ExitStack() as stack:
        for layer in model.get_submodule(family_of(model.config).layers).children():
            handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            stack.callback(handle.remove)
        yield inputs


@contextmanager
def suffix(model: PreTrainedModel, start: int) -> Iterator[None]:
    """The model without its first `start` layers: feed it `inputs_embeds`."""
    parent, _, name = family_of(model.config).layers.rpartition(".")
    owner, layers = model.get_submodule(parent), model.get_submodule(f"{parent}.{name}")
    types = getattr(model.config, "layer_types", None)
    assert isinstance(layers, nn.ModuleList)
    setattr(owner, name, layers[start:])
    if types:
        model.config.layer_types = types[start:]
    try:
        yield
    finally:
        setattr(owner, name, layers)
        if types:
            model.config.layer_types = types
