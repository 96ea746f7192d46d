"""Tiny random decoders of every family, MHA, GQA and MQA, built from configs; no network, no files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import kvp  # noqa: F401
from kvp.models.family import FAMILIES, family_of
from kvp.models.spaces import find_spaces
from kvp.models.unfused import unfused
from kvp.strategies.compensation.compensate import Compensation
from kvp.types import Kind, Plan

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3_text": Gemma3TextConfig,
    "smollm3": SmolLM3Config,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
    "phi3": Phi3Config,
    "gpt_oss": GptOssConfig,
}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


EVERY_HEADS = ("llama", "gemma3_text")  # families whose MHA and MQA are tested always: without norms and with
NETWORKS = sorted(name for name, family in FAMILIES.items() if not family.experts)  # of one network per MLP
LATE = (
    "gpt_oss",
    "olmo2",
    "phi3",
    "qwen3_moe",
)  # on which methods, losses, latents and caches are slow tests
SPACES_ALONE = {"strategies", "test_nll.py", "test_packed_cache.py", "test_quantized.py", "test_latents.py"}
ALIKE = ("mixtral", "olmo3")  # families that share their attention with another; what is their own has a file


@pytest.fixture(autouse=True)
def _logging_is_left_on() -> Iterator[None]:
    """Fail a test whose command left logging off, because later tests would not see their messages."""
    before = logging.root.manager.disable
    yield
    assert logging.root.manager.disable == before, "logging.disable was left on"


def tiny_config(family: str = "llama", heads: str = "gqa", **changes):
    num_attention_heads, num_key_value_heads = HEADS[heads]
    fields = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sliding_window": None,
        "dtype": "float32",
    }
    if family == "llama":
        fields |= {"attention_bias": True, "mlp_bias": True}
        fields.pop("sliding_window")
    if family == "smollm3":
        fields |= {"no_rope_layer_interval": 2, "attention_bias": True, "tie_word_embeddings": False}
    if family == "gemma3_text":
        fields |= {"sliding_window": 32, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12}
        fields["tie_word_embeddings"] = False
    if family == "olmo2":
        fields |= {"attention_bias": True}
        fields.pop("sliding_window")
    if family in ("olmo3", "gpt_oss"):
        kinds = ["sliding_attention", "full_attention"] * changes.get("num_hidden_layers", 3)
        fields |= {"sliding_window": 32, "layer_types": kinds[: len(kinds) // 2]}
    if family in ("qwen3_moe", "mixtral", "gpt_oss"):
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        fields |= {"moe_intermediate_size": 24, "mlp_only_layers": [1], "norm_topk_prob": True}
    if family == "gpt_oss":
        fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return CONFIGS[family](**{**fields, **changes})


def tiny_model(
    family: str = "llama", heads: str = "gqa", *, dtype=torch.float32, seed: int = 0, **changes
) -> PreTrainedModel:
    """A random model whose biases and norms are random too, so that no term is silently zero; Phi-3's is its twin."""
    torch.manual_seed(seed)
    config = tiny_config(family, heads, **changes)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the other kernels have no float64
    model = family_of(config).causal_lm(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return unfused(model.to(dtype).eval())


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norms in its own dtype; Hugging Face's compute in float32, also in a float64 model."""

    def forward(norm, states):
        one = type(norm).__name__.startswith("Gemma")
        eps = norm.eps if one else norm.variance_epsilon
        return (norm.weight + one) * states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


def random_plan(model: PreTrainedModel, kinds: list[Kind], *, keep: float = 0.6, seed: int = 0) -> Plan:
    """Random indices, about `keep` of each space and at least one; widths differ between layers."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for space in find_spaces(model.config, kinds):
        n, rows = space.shape[-1], space.shape[:-1]
        kept = max(1, round(keep * n) - (space.layer or 0) % 2)
        scores = torch.rand(*rows, n, generator=generator)
        chosen[space] = scores.topk(kept).indices.sort().values
    return Plan(chosen)


def refitted(compensation: Compensation, model: PreTrainedModel, batches, plan: Plan) -> Plan:
    """The plan after a compensation that starts from nothing."""
    with TemporaryDirectory() as directory:
        return compensation.refit(model, batches, plan, Path(directory))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """MHA and MQA of most families, and families like another, are slow tests; what is their own is not."""
    for item in items:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        family = chosen.get("family", "llama")
        spaces_alone = SPACES_ALONE & {*item.path.parts}
        late = family in LATE and spaces_alone
        if late or family in ALIKE or (family not in EVERY_HEADS and chosen.get("heads", "gqa") != "gqa"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(params=sorted(HEADS))
def heads(request) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))
