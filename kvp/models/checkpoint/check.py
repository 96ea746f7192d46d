"""The one check of a checkpoint directory; it takes seconds, runs no forward pass and no code of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvp.models.caches import cache_format
from kvp.models.checkpoint.experts import as_stored
from kvp.models.checkpoint.fields import check_fields
from kvp.models.checkpoint.files import CONFIG, read_json, require_directory, weight_files
from kvp.models.checkpoint.tensors import (
    Header,
    check_layers,
    check_tensors,
    parameters,
    read_headers,
    stored_dtype,
)
from kvp.models.checkpoint.tokens import check_generation, check_tokenizer, open_tokenizer
from kvp.models.family import family_of
from kvp.models.linears import linear_names
from kvp.models.shapes import layer_shapes, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Weights:
    """The facts of a checkpoint's config and tensors.

    Attributes:
        path: The directory.
        config: Its config; `dtype` is that of the tensors.
        dtype: The one dtype of the tensors.
        linears: Names of the linear modules, such as "model.layers.3.self_attn.q_proj".
        params: Number of parameters; a shared head counts once.
    """

    path: Path
    config: PretrainedConfig
    dtype: torch.dtype
    linears: tuple[str, ...]
    params: int

    @property
    def positions(self) -> int:
        """Return the longest sequence that the config allows."""
        return self.config.max_position_embeddings


@dataclass(frozen=True)
class Checked(Weights):
    """The facts of a whole checkpoint.

    Attributes:
        vocabulary: How many tokens the tokenizer names; at most the rows of the embedding.
    """

    vocabulary: int


def check_checkpoint(path: Path) -> Checked:
    """Check a checkpoint directory: config, tensors, tokenizer and what else lies there.

    Returns:
        What options can be held against.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: Two of them disagree, or one cannot be read; the message names the file, both values, the way out.
    """
    weights = check_weights(path)
    tokenizer = open_tokenizer(weights.path)
    vocabulary = check_tokenizer(weights.path, tokenizer, weights.config.vocab_size)
    return Checked(**vars(weights), vocabulary=vocabulary)


def check_weights(path: Path) -> Weights:
    """Check the config and the tensors of a directory, which may have no tokenizer.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: Two of them disagree, or one cannot be read.
    """
    path = Path(path)
    config, headers = read_config(path)
    family = family_of(config)
    model = _without_weights(path, config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = config.tie_word_embeddings
    stored = as_stored(expected, headers, family)
    check_tensors(path, headers, stored, f"{family.embedding}.weight" if tied else None)
    _check_size(path, config, count := parameters(expected, tied))
    check_generation(path, config.vocab_size)
    linears, dtype = linear_names(config, model), stored_dtype(path, headers)
    return Weights(path=path, config=config, dtype=dtype, linears=linears, params=count)


def read_config(path: Path) -> tuple[PretrainedConfig, dict[str, Header]]:
    """Return the config, in the dtype of the tensors, and the tensors' headers; no modelling code is imported.

    Raises:
        FileNotFoundError: A file is missing; the message names it.
        ValueError: One cannot be read, the tensors have no one dtype, or the config has another depth.
    """
    path = Path(path)
    require_directory(path)
    given = check_fields(path / CONFIG, read_json(path / CONFIG))
    headers = read_headers(weight_files(path))
    config = _config(path)
    check_layers(path, headers, family_of(config).layers, given.num_hidden_layers)
    config.dtype = stored_dtype(path, headers)
    return config, headers


def _config(path: Path) -> PretrainedConfig:
    import transformers

    import kvp.models.configs  # noqa: F401  (registers those of pruned models)

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if (cache := cache_format(config)) is not None:
            cache.check(config)
    except Exception as error:
        raise ValueError(f"{path / CONFIG}: {_said(error)}") from error
    return config


def _without_weights(path: Path, config: PretrainedConfig) -> nn.Module:
    import transformers

    import kvp.models.pruned  # noqa: F401  (registers the pruned classes)

    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path / CONFIG}: transformers makes no model of it, {_said(error)}") from error


def _said(error: Exception) -> str:
    """Return what an error of another library says, on one line, with its type where it says little."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"


def _check_size(path: Path, config: PretrainedConfig, count: int) -> None:
    """Refuse a model whose parameters kvp would count wrongly."""
    counted = size(config, layer_shapes(config)).params
    if counted != count:
        raise ValueError(
            f"{path / CONFIG}: kvp counts {counted} parameters, the model has {count}: a field asks for parts that "
            f"{config.model_type} models have not; remove it"
        )
