"""The config of a model, wherever it is: in kvp, in a directory, on the hub; its weights are never read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from kvp.models.family import family_of
from kvp.models.gguf import is_gguf
from kvp.models.load import load_config
from kvp.models.sources import HubModel, ModelSource
from kvp.nearest import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "dtype": "float16",
}
PUBLISHED: dict[str, dict[str, Any]] = {  # what their config.json says of shape, so that no network is needed
    "baffo32/decapoda-research-llama-7B-hf": LLAMA,
    "lmsys/vicuna-7b-v1.3": LLAMA,
    "meta-llama/Llama-2-7b-hf": {**LLAMA, "max_position_embeddings": 4096},
    "meta-llama/Llama-2-13b-hf": {
        **LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
    },
    "meta-llama/Meta-Llama-3-8B": {
        **LLAMA,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "dtype": "float32",
    },
    "mistralai/Mistral-7B-v0.1": {
        **LLAMA,
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "dtype": "bfloat16",
    },
    "Qwen/Qwen2-7B": {
        **LLAMA,
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    },
    "Qwen/Qwen3-8B": {
        **LLAMA,
        "model_type": "qwen3",
        "vocab_size": 151936,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "dtype": "bfloat16",
    },
}


def config_of(source: ModelSource) -> tuple[PretrainedConfig, str]:
    """Return a model's config and where it comes from.

    Raises:
        FileNotFoundError: The hub is out of reach, or the model is not there.
        ValueError: The family is not supported.
    """
    config, origin = _found(source)
    family_of(config)
    return config, origin


def _found(source: ModelSource) -> tuple[PretrainedConfig, str]:
    if not isinstance(source, HubModel) or is_gguf(source.path):
        return source.expected(), "its config"
    if Path(source.path).is_dir():
        return load_config(Path(source.path)), "its config.json"
    if source.path in PUBLISHED:
        return transformers.AutoConfig.for_model(**PUBLISHED[source.path]), "its published shape"
    return _downloaded(source), "config.json of the hub, nothing else was downloaded"


def _downloaded(source: HubModel) -> PretrainedConfig:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(source.path, "config.json", revision=source.revision)
        return transformers.AutoConfig.from_pretrained(Path(file).parent, trust_remote_code=False)
    except Exception as error:
        hint = did_you_mean(source.path, PUBLISHED, cutoff=0.4)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{source.path} is no directory, and its config.json is out of reach on the hub ({first}).{hint} Ways "
            "out: model.path=DIRECTORY with a config.json, or a shape that needs no network, such as "
            "model=llama3_8b or model=llama_7b_shape"
        ) from error
