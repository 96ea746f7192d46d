"""An MLA model as a GGUF for llama.cpp, whose graph for DeepSeek models caches the latent alone.

The graph multiplies queries by the latent's way to the keys, so `kv_b_proj` stands in the file as two tensors per head.
All layers are dense, so fields of experts hold nothing. The graph reads no rope factors.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel

from kvp.serving.gguf_file import FILE, TYPES
from kvp.serving.gguf_tokens import add_tokens

ARCHITECTURE = gguf.MODEL_ARCH.DEEPSEEK2


def write_mla_gguf(mla: PreTrainedModel, tokenizer_directory: Path, directory: Path) -> None:
    """Write `directory`/model.gguf in the dtype of the model; vectors are float32, as llama.cpp wants them.

    Raises:
        ValueError: llama.cpp has not its tokenizer.
    """
    config: Any = mla.config
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(directory / FILE, gguf.MODEL_ARCH_NAMES[ARCHITECTURE], use_temp_file=True)
    kind, file_type = TYPES[mla.dtype]
    writer.add_file_type(file_type)
    _add_config(writer, config)
    add_tokens(writer, tokenizer_directory, config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURE, config.num_hidden_layers)
    for ours, tensor in mla.state_dict().items():
        for name, part in _parts(ours, tensor, config).items():
            theirs = names.get_name(name, try_suffixes=(".weight",))
            assert theirs is not None, name
            as_it_is = kind if part.dim() > 1 else GGMLQuantizationType.F32
            data = gguf.quants.quantize(part.float().contiguous().numpy(), as_it_is)
            writer.add_tensor(theirs, data, raw_dtype=as_it_is)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the tensor by its name, or `kv_b_proj` as its keys (heads, rank, nope) and values (heads, v, rank)."""
    if not name.endswith("kv_b_proj.weight"):
        return {name: tensor}
    by_head = tensor.unflatten(0, (config.num_attention_heads, -1))
    keys, values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return {name.replace("kv_b", "k_b"): keys.mT, name.replace("kv_b", "v_b"): values}


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name(str(config.name_or_path or config.model_type).rstrip("/").rpartition("/")[2])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(0)
