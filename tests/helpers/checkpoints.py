"""Small whole checkpoints of every family, dense and pruned, in one file and in shards; and a few of other types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from kvp.models.load import byte_tokenizer, save
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from kvp.models.unfused import unfused
from tests.conftest import random_plan, tiny_model
from tests.helpers.stock import ROPES, fused

VOCABULARY = 259
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WINDOW = {"sliding_window": 16}
MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "use_sliding_window": True}

PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

DENSE = {
    "llama": ("llama", {}),
    "llama-plain": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "llama-yarn": ("llama", {"rope_parameters": ROPES["yarn"] | {"rope_theta": 1e3}}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", WINDOW),
    "mistral-linear": ("mistral", {"rope_parameters": ROPES["linear"] | {"rope_theta": 1e4}}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed": ("qwen2", {**MIXED, **WINDOW}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-tied": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 16}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", PARTIAL),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", WINDOW),
    "gpt_oss": ("gpt_oss", {"sliding_window": 16}),
    "qwen3-llama3": ("qwen3", {"rope_parameters": ROPES["llama3"] | {"rope_theta": 1e4}}),
}
PRUNED = (
    "llama",
    "llama-tied",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma3-tied",
    "olmo2",
    "qwen3_moe",
    "gpt_oss",
    "phi3-partial",
)
SHARDED = ("llama-plain", "qwen2-mixed", "qwen3_moe")
TYPES = {  # that kvp does not know
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64},
    "gemma": {"head_dim": 8},
    "olmo": {},
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(directory: Path, name: str) -> Path:
    """Write the checkpoint of a name: of DENSE, "pruned-" or "sharded-" and such a name, or of TYPES."""
    kind, _, dense = name.partition("-")
    if name in TYPES:
        config = transformers.AutoConfig.for_model(name, **({} if name == "gpt2" else SHAPE), **TYPES[name])
        save(transformers.AutoModelForCausalLM.from_config(config), byte_tokenizer(), directory)
    elif kind in ("pruned", "sharded"):
        model = _dense(dense)
        if kind == "pruned":
            kinds = [
                kind for kind in ("kv_group", "qk", "vo", "ffn") if kind in available_kinds(model.config)
            ]
            model = apply(unfused(model), random_plan(model, kinds))
        save(model, byte_tokenizer(), directory)
        if kind == "sharded":
            shard(directory)
    else:
        save(_dense(name), byte_tokenizer(), directory)
    return directory


def _dense(name):
    family, changes = DENSE[name]
    model = tiny_model(family, "gqa", vocab_size=VOCABULARY, **changes)
    return fused(model) if family == "phi3" else model


def shard(directory: Path) -> None:
    """Spread the weights of a checkpoint over two files and an index."""
    weights = load_file(directory / WEIGHTS)
    names, places = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (directory / WEIGHTS).unlink()
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit_config(directory: Path, file: str = "config.json", **changes) -> None:
    """Change fields of a JSON file; `...` removes one."""
    fields = json.loads((directory / file).read_text()) | changes
    kept = {name: value for name, value in fields.items() if value is not ...}
    (directory / file).write_text(json.dumps(kept))


def edit_weights(directory: Path, change, file: str = WEIGHTS) -> None:
    """Write what `change` makes of the tensors of a file, a dictionary by name."""
    weights = change(load_file(directory / file))
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, directory / file, {"format": "pt"}
    )


class Library:
    """Checkpoints that are made once, and copied for whoever damages them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def original(self, name: str) -> Path:
        """Return the checkpoint of a name, which nobody may change."""
        if not (self.root / name).exists():
            write(self.root / name, name)
        return self.root / name

    def copy(self, name: str, to: Path) -> Path:
        """Return a copy that may be damaged."""
        return Path(shutil.copytree(self.original(name), to))


def tokens_of(vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Return ids that are longer than the windows and the original lengths of the models here."""
    return torch.randint(3, vocabulary, (1, 40), generator=torch.Generator().manual_seed(1))
