"""Models in memory: whether they can be cut, and the state in which methods look at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.models.family import family_of
from kvp.models.load import check_finite, save
from kvp.models.pruned import pruned_class
from kvp.serving.card import card
from kvp.serving.whole import whole
from kvp.types import DTYPES

_BUSY: WeakSet[PreTrainedModel] = WeakSet()  # models that a call has changed for its time


def check_in_memory(model: Any, name: str = "model") -> None:
    """Refuse what cannot be cut: no decoder that kvp knows, quantised, sharded, or not loaded; errors call it `name`.

    Raises:
        ValueError: The message says what it is and the way out.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError(f"{name} has an adapter: give {name}.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} must be a transformers PreTrainedModel, got {type(model).__name__}: see kvp.load"
        )
    if not isinstance(model, family_of(model.config).causal_lm | pruned_class(model.config)):
        raise ValueError(
            f"{name} must be a causal language model, got {type(model).__name__}: load it by AutoModelForCausalLM"
        )
    if any(".lora_" in name or ".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError(f"{name} has an adapter inside: merge it first, or load the model without it")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{name} is quantised, and channels of packed weights cannot be cut: prune first, then quantise"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"{name} must lie on one device, got {', '.join(sorted(devices))}: load it without device_map"
        )
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {*DTYPES}:
        raise ValueError(
            f"{name} must have one dtype of {', '.join(DTYPES)}, got {', '.join(sorted(dtypes))}: {name}.float()"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"{name} was loaded in torch.inference_mode(), which forbids gradients: load it outside"
        )
    check_finite(model, name)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer of transformers.

    Raises:
        ValueError: The message says what it is.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}: kvp.load returns a model's"
        )


def weights_digest(model: PreTrainedModel) -> str:
    """Return one sha256 of a model's config and weights."""
    config = {
        k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "dtype")
    }  # saving sets them
    found = sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into the state that loading leaves: eval mode, every parameter differentiable; undo it at the end.

    Raises:
        ValueError: Another call has it at work.
    """
    if model in _BUSY:
        raise ValueError("model is at work in another call of kvp: one at a time, or give each thread a copy")
    _BUSY.add(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(each, each.grad, each.requires_grad) for each in model.parameters()]
    model.eval()
    try:
        for parameter, _, _ in gradients:
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, gradient, learns in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(learns)
        for module, mode in modes:
            module.training = mode
        _BUSY.discard(model)


@contextmanager
def written(
    directory: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    removed: str = "",
) -> Iterator[Path]:
    """Write a checkpoint and its model card, whole or not at all; the block may add files to the directory it is given.

    `removed` says in words what was cut.

    Raises:
        FileExistsError: The directory is there already.
    """
    out = Path(directory)
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another directory")
    with whole(out, "config.json") as partial:
        save(model, tokenizer, partial)
        (partial / "README.md").write_text(card(model.config, removed))
        yield partial
