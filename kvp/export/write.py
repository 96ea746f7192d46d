"""An export on disk: an ordinary checkpoint, a config for old and new engines, and `serving.json`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvp.export.layout import stock_layout
from kvp.export.stock import Form, to_stock
from kvp.export.verify import verify
from kvp.models.load import load_config, load_model, load_tokenizer, save
from kvp.models.shapes import layer_shapes, require_whole_stream, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH_STEP = 8  # head sizes that flash-attention kernels take


def export(checkpoint: Path, out: Path, form: Form) -> dict[str, Any]:
    """Write `checkpoint` in a stock form, and check it in a process that does not know kvp.

    Returns:
        What `serving.json` says.

    Raises:
        FileNotFoundError: `checkpoint` is not one.
        FileExistsError: `out` is there already.
        ValueError: Its shapes have no such form; nothing was written.
        ArithmeticError: The export does not give the logits of the checkpoint; it was removed.
    """
    if not (checkpoint / "config.json").exists():
        raise FileNotFoundError(
            f"{checkpoint} has no config.json: not a checkpoint. A run's table and run.json name its checkpoints"
        )
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another --out")
    config = load_config(checkpoint)
    require_whole_stream(
        config, "no stock class has its shortcut matrices: serve it by transformers and import kvp"
    )
    if getattr(config, "kvp_cache", None) is not None:
        raise ValueError(
            f"{checkpoint} decodes with a sparse cache, which no stock engine has: export the checkpoint of the "
            "same run with cache=none"
        )
    if form != "padded":
        stock_layout(config)  # refuse before weights are read
    model = load_model(checkpoint, dtype=_stored_dtype(config), device="cpu")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        stock = to_stock(model, form)
        save(stock, load_tokenizer(checkpoint), partial)
        _add_old_keys(partial / "config.json")
        check = verify(checkpoint, partial)
        serving = {
            "form": form,
            **_facts(config, stock.config),
            "engines": _engines(stock.config),
            "check": check,
        }
        (partial / "serving.json").write_text(json.dumps(serving, indent=2))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return serving


def _stored_dtype(config: PretrainedConfig) -> torch.dtype:
    return (
        config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "float32")
    )


def _add_old_keys(path: Path) -> None:
    """transformers 4 and most engines read `rope_theta`, `rope_scaling` and `torch_dtype`; 5 no longer writes them."""
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "original_max_position_embeddings" in rope:
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    config["torch_dtype"] = config.get("dtype")
    path.write_text(json.dumps(config, indent=2))


def _facts(pruned: PretrainedConfig, stock: PretrainedConfig) -> dict[str, Any]:
    before, after = (size(config, layer_shapes(config)) for config in (pruned, stock))
    return {
        "architecture": type(stock).__name__.removesuffix("Config") + "ForCausalLM",
        "head_dim": stock.head_dim,
        "num_key_value_heads": stock.num_key_value_heads,
        "kv_bytes_per_token": {"checkpoint": before.kv_bytes_per_token, "export": after.kv_bytes_per_token},
        "params": {"checkpoint": before.params, "export": after.params},
    }


def _engines(config: PretrainedConfig) -> Mapping[str, str]:
    """Which engine is expected to load it, and why; only transformers has been run."""
    longrope = config.rope_parameters.get("rope_type") == "longrope"
    odd = config.head_dim % FLASH_STEP != 0
    kernels = (
        f"head_dim={config.head_dim} is no multiple of {FLASH_STEP}: flash kernels refuse it"
        if odd
        else "yes"
    )
    gguf = (
        "python -m kvp.gguf appends the factors as rope_freqs.weight; the stock converter drops them silently"
    )
    return {
        "transformers": "yes: verified, see check",
        "vllm": kernels if odd else "expected (not run): vllm serve DIR",
        "sglang": kernels if odd else "expected (not run)",
        "llama.cpp": gguf if longrope else "expected: convert_hf_to_gguf.py reads theta and head_dim",
    }
