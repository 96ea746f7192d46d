"""A GGUF file as a Hugging Face model: its weights are dequantised once, into an ordinary directory.

The directory has the dtype of the file's matrices where they are float32 or float16. Quantised matrices become
bfloat16, whose rounding is far below that of 4 to 8 bits. Dequantising gives back what an engine computes with, not the
published weights, so such a model is a little worse than the published one.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Tokenizer

from kvp.models.family import family_of
from kvp.models.gguf_header import read_header
from kvp.models.gguf_reader import quick_reader
from kvp.models.load import save

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PLAIN = {"F32": torch.float32, "F16": torch.float16}  # types of matrices that are not quantised


def is_gguf(path: str | Path) -> bool:
    """Return whether a path names a GGUF file, by its ending."""
    return Path(path).suffix.lower() == ".gguf"


def gguf_config(file: Path) -> PretrainedConfig:
    """Return the config that a GGUF describes, in the dtype that `write_gguf` stores; no weights are read.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is no whole GGUF, or of a family that kvp or transformers does not know.
    """
    return deepcopy(_config(file, file.stat().st_mtime_ns))


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a GGUF carries; nobody may change it."""
    return _tokenizer(file, file.stat().st_mtime_ns)


def write_gguf(file: Path, directory: Path, origin: str) -> dict[str, Any]:
    """Write the dequantised model and its tokenizer; the weights are float32 in memory meanwhile.

    Args:
        file: The GGUF.
        directory: The Hugging Face directory to make.
        origin: The name of the published model; the written config carries it.

    Returns:
        Facts worth recording.
    """
    config = gguf_config(file)
    with quick_reader():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **_place(file),
            config=config,  # else it is read once more, which takes a second
            dtype=torch.float32,
            trust_remote_code=False,
            quantization_config=transformers.GgufConfig(gguf_file=file.name, dequantize=True),
        )
    model.config._name_or_path = origin
    save(model.to(gguf_config(file).dtype), gguf_tokenizer(file), directory)
    return {"origin": origin, "quantised": f"{read_header(file).kind}, dequantised"}


@cache  # a large vocabulary takes seconds
def _config(file: Path, changed: int) -> PretrainedConfig:
    matrices = read_header(file).matrices
    try:
        with quick_reader():
            config = transformers.AutoConfig.from_pretrained(**_place(file), trust_remote_code=False)
    except (ValueError, KeyError, NotImplementedError, OverflowError) as error:
        raise ValueError(
            f"transformers does not open {file} ({error}): take the model's own checkpoint, a directory of safetensors"
        ) from error
    family_of(config)
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # the GGUF's float32 says 9.999999747e-06
    config.dtype = next((dtype for name, dtype in PLAIN.items() if set(matrices) == {name}), torch.bfloat16)
    return config


@cache
def _tokenizer(file: Path, changed: int) -> PreTrainedTokenizerBase:
    with quick_reader():
        tokenizer = transformers.AutoTokenizer.from_pretrained(**_place(file), trust_remote_code=False)
    return _without_added(tokenizer, _config(file, changed).vocab_size)


def _without_added(tokenizer: Any, vocab_size: int) -> PreTrainedTokenizerBase:
    """Drop the tokens that transformers adds to those of the file, because the embedding has no row for them."""
    added = {str(token) for index, token in tokenizer.added_tokens_decoder.items() if index >= vocab_size}
    if added:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        for name, token in tokenizer.special_tokens_map.items():
            if token in added:
                setattr(tokenizer, name, None)
    return tokenizer


def _place(file: Path) -> dict[str, Any]:
    """Return the arguments by which transformers opens a GGUF."""
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
