"""Open and write checkpoints; every file is checked first, and no code of a checkpoint runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kvp.models.checkpoint.check import check_weights, read_config
from kvp.models.checkpoint.files import CONFIG
from kvp.models.checkpoint.tokens import open_tokenizer
from kvp.models.half import in_hardware, widened
from kvp.models.unfused import unfused
from kvp.types import DTYPES

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes, with <pad>, <bos>, <eos> as 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    alphabet = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """Write an ordinary checkpoint: safetensors, config, generation config, tokenizer if there is one."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def dress(source: Path, directory: Path, **fields: Any) -> None:
    """Write a checkpoint with more fields in its config; all other files are links to those of `source`.

    A link and its file are one: neither is ever written in place. Where the disk has no links, files are copied.
    """
    directory.mkdir()
    for file in source.iterdir():
        if file.name != CONFIG:
            try:
                (directory / file.name).hardlink_to(file)
            except OSError:
                shutil.copy2(file, directory / file.name)
    config = json.loads((source / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields, indent=2) + "\n")


def load_config(path: Path) -> PretrainedConfig:
    """Return the config of a checkpoint, in the dtype of its weights; no modelling code is imported.

    Raises:
        FileNotFoundError: It is no checkpoint.
        ValueError: A file cannot be read, or the weights have no one dtype.
    """
    return read_config(path)[0]


def load_model(path: Path, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return the model of a checkpoint, in eval mode; the twin, if its own class fuses q, k and v (Phi-3).

    Linear layers of 16 bits multiply in float32 on a CPU that has no arithmetic for them (`kvp.models.half`).

    Raises:
        FileNotFoundError: It is no checkpoint.
        ValueError: Config and weights disagree, as `check_weights` says, or a weight is not finite.
    """
    check_weights(path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    model: PreTrainedModel = loaded.eval().to(torch.device(device))
    check_finite(model, str(path))
    return widened(unfused(model))


def check_finite(model: PreTrainedModel, where: str) -> None:
    """Refuse weights that are no numbers.

    Raises:
        ValueError: The message names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all():
            raise ValueError(
                f"{where} holds {name} with values that are not finite in {parameter.dtype}: copy it again, or choose "
                "model.dtype=float32 if it overflows"
            )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint.

    Raises:
        FileNotFoundError: It has none.
        ValueError: A file of it cannot be read, or asks for code.
    """
    return open_tokenizer(Path(path))


def resolve_device(device: str) -> str:
    """Return the device that an option names; "auto" is cuda if there is one, else cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_device(device: str) -> None:
    """Refuse a GPU that this machine does not offer.

    Raises:
        ValueError: The message says what is missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        why = "sees no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ValueError(f"device must be cpu or auto here, got 'cuda': torch {torch.__version__} {why}")


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype that an option names.

    "auto" is bfloat16 where the device computes it in hardware, else float32, because emulation is slower.

    Raises:
        ValueError: There is no such dtype.
    """
    if dtype not in (known := ("auto", *DTYPES)):
        raise ValueError(f"model.dtype must be one of {', '.join(known)}, got {dtype!r}")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if in_hardware(torch.bfloat16) else torch.float32
