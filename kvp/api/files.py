"""Load a model, and write one for other engines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.api.chosen import experiment
from kvp.api.memory import check_in_memory, check_tokenizer
from kvp.choices import choices
from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.load import check_device, load_model, load_tokenizer, save
from kvp.nearest import did_you_mean
from kvp.serving.write import export as write_export


def load(
    path: str | Path = "smollm2_135m",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in eval mode and its tokenizer; no code of a checkpoint runs.

        model, tokenizer = kvp.load("smollm2_135m")

    Args:
        path: An option of conf/model, a directory (dense, or pruned by kvp), or owner/name on the hub.
        dtype: bfloat16, float16 or float32, by name or as torch has it; auto is bfloat16 where the device
            computes it in hardware, else float32.
        device: cpu, cuda or auto.

    Raises:
        FileNotFoundError: The model is neither here nor within reach; the message names the ways out.
        ValueError: A file of it is damaged or does not fit the others; `dtype` or `device` cannot be had here.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(f"path must be a model's name, a directory or owner/name on the hub, got {path!r}")
    named = str(path) in choices("model") and not Path(path).is_dir()
    if not named and not Path(path).exists() and (near := did_you_mean(path, choices("model"))):
        raise FileNotFoundError(f"there is no model {str(path)!r}.{near} kvp run --help model lists all")
    values = {} if named else {"model.path": str(path)}
    x = experiment(
        None,
        [f"model={path}" if named else "model=local", "strategy=none"],
        {**values, "model.dtype": str(dtype).removeprefix("torch."), "device": str(device)},
    )
    check_device(x.device)
    with tempfile.TemporaryDirectory(prefix="kvp-load-") as directory:
        place = x.source.locate()
        if place is None:
            place = Path(directory)
            x.source.write(place)
        check_checkpoint(place)
        return load_model(place, dtype=x.dtype, device=x.device), load_tokenizer(place)


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path, to: str = "stock"
) -> dict[str, Any]:
    """Write a directory that other engines open, prove it by an answer, and return what its serving.json says.

        kvp.export(pruned.model, tokenizer, "served", to="stock")

    Args:
        model: A Hugging Face decoder, pruned or not.
        tokenizer: The model's.
        out: The directory to write; must not exist.
        to: stock, stock_arithmetic, gguf, custom, remote_code or padded (see `kvp export --help`), or your own
            as "mypkg.forms:half".

    Raises:
        FileExistsError: `out` is there already.
        ValueError: The shapes have no such form; nothing was written.
        ArithmeticError: The export does not give the answer of the model; it was removed.
    """
    check_in_memory(model)
    check_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory(prefix="kvp-export-") as directory:
        save(model, tokenizer, Path(directory))
        return write_export(Path(directory), Path(out), to)
