"""A stock model as a GGUF for llama.cpp, whatever its rotary frequencies are.

llama.cpp divides the frequencies of default RoPE by a tensor `rope_freqs.weight`, one factor per pair, if the file
has one; this is how its own converter writes llama3 scaling. Any kept set of pairs, and any scaling, fits in. (It has
"longrope" too, but for Llama its converter drops the factors and its loader does not miss them.) Only its "llama"
graph reads that tensor, which Mistral and Qwen2 fit in too: biases are optional in it.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from kvp.models.family import Family, family_of
from kvp.models.shapes import dense_shapes, turning_pairs
from kvp.serving.gguf_tokens import add_tokens
from kvp.serving.rope import interleaved

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FILE = "model.gguf"
TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
ROPES = ("default", "linear", "llama3", "yarn", "longrope")  # whose frequencies do not depend on the length
UNSCALED = 1e-5  # relative: factors this near to 1 are rounding


def write_gguf(stock: PreTrainedModel, tokenizer_directory: Path, directory: Path) -> None:
    """Write `directory`/model.gguf in the dtype of the model; vectors are float32, as llama.cpp wants them.

    Raises:
        ValueError: llama.cpp computes something else than this model, or has not its tokenizer.
    """
    config, family = stock.config, family_of(stock.config)
    check_gguf(config)
    factors, scaling = _rope(stock, family)
    scaled = bool((factors - 1).abs().max() > UNSCALED) or scaling != 1
    if family.qk_norm and scaled:
        raise ValueError(f"llama.cpp's {family.name} reads no rope factors: only default RoPE can be written")
    name = family.name if family.qk_norm else "llama"
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(directory / FILE, name, use_temp_file=True)
    kind, file_type = TYPES[stock.dtype]
    writer.add_file_type(file_type)
    _add_config(writer, config)
    add_tokens(writer, tokenizer_directory, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    if scaled:
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
    for ours, tensor in stock.state_dict().items():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, ours
        module = ours.split(".")[-2]
        if module == family.q:
            tensor = (tensor.double() * scaling**2).to(tensor.dtype)  # of the cosines and sines: yarn's
        if module in (family.q, family.k) and name == "llama":
            heads = config.num_attention_heads if module == family.q else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        as_it_is = kind if tensor.dim() > 1 else GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), as_it_is)
        writer.add_tensor(theirs, data, raw_dtype=as_it_is)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(config: PretrainedConfig) -> None:
    """Refuse what llama.cpp's graphs of these families do not compute; no weights are read.

    Raises:
        ValueError: Names the property and the way out.
    """
    family = family_of(config)
    if family.post_norms or family.layer_fields or family.experts:
        raise ValueError(
            f"kvp writes no GGUF of {config.model_type}, whose graph in llama.cpp is another: use --to stock, and "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if family.fused and turning_pairs(config) != dense_shapes(config)[0].qk_head_dim // 2:
        raise ValueError(
            f"some channels of {family.name} never turn, and llama.cpp's Llama turns all: use --to stock"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"llama.cpp's Llama has silu, this model {config.hidden_act}")
    window, positions = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < positions:
        raise ValueError(
            f"llama.cpp's graph has no sliding window, this model one of {window} in {positions} positions: use --to "
            f"stock. For texts of up to {window} tokens set sliding_window=null and max_position_embeddings={window} "
            "in config.json, which computes the same"
        )


def matrix_types(file: Path) -> dict[str, int]:
    """Return how many matrices of a GGUF have each type, the most frequent first."""
    tensors = gguf.GGUFReader(file).tensors
    return dict(Counter(each.tensor_type.name for each in tensors if len(each.shape) > 1).most_common())


def _add_config(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_name(str(config.name_or_path or config.model_type).rstrip("/").rpartition("/")[2])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _rope(stock: PreTrainedModel, family: Family) -> tuple[Tensor, float]:
    """Return what default frequencies are divided by (head_dim / 2,), and what cosines and sines are multiplied by."""
    config = stock.config
    rope: dict[str, Any] = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPES or rope.get("short_factor") != rope.get("long_factor"):
        raise ValueError(f"frequencies of RoPE type {kind!r} change with the length: no GGUF for them")
    rotary = stock.get_submodule(family.rotary)
    inv_freq: Tensor = rotary.inv_freq  # type: ignore[assignment]
    exponent = torch.arange(0, config.head_dim, 2).double() / config.head_dim
    default = float(rope["rope_theta"]) ** -exponent
    return default / inv_freq.double(), rotary.attention_scaling  # type: ignore[return-value]
