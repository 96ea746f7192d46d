"""Exports in vLLM, in the environment of `make serve-env`: it says what transformers says, in a cache as predicted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kvp.models.joined import joined
from kvp.models.load import byte_tokenizer, save
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.serving.check import check
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import tiny_model
from tests.helpers.stock import stock_model

ROOT = Path(__file__).parents[2]
PLAIN = {"attention_bias": False, "mlp_bias": False}
EVERY_OTHER = {head_dim: tuple(range(0, head_dim // 2, 2)) for head_dim in (64, 128)}
MOST = {96: tuple(sorted({*range(0, 64, 4), *range(1, 64, 2)})), 48: tuple(range(8, 32))}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that has vLLM."""
    interpreter = os.environ.get("KVP_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    if not Path(interpreter).exists():
        pytest.skip(f"no vLLM at {interpreter}: `make serve-env`, or KVP_VLLM_PYTHON=INTERPRETER")
    return interpreter


def cut(family: str, kind: str, kept: list[int]):
    """A model of 64 channels per head that keeps these blocks, or these groups in every layer."""
    model = tiny_model(family, "mha", head_dim=64, vocab_size=259, **PLAIN)
    return apply(model, Plan({space: torch.tensor(kept) for space in find_spaces(model.config, [kind])}))


def pairs(family: str, heads: str, head_dim: int, kept: tuple[int, ...]):
    """A model that keeps these rope pairs in every head."""
    return stock_model(family, heads, pairs=kept, head_dim=head_dim, vocab_size=259)


WIDTHS = (
    (64, 64),
    (32, 64),
    (96, 32),
)  # of keys and values in each layer; their maxima are widths of a CPU kernel


def uneven():
    """A model whose layers keep other widths of keys and of values."""
    model = tiny_model("llama", "gqa", head_dim=128, vocab_size=259, **PLAIN)
    keys, values = (find_spaces(model.config, [kind]) for kind in ("qk", "vo"))
    plan, groups = {}, model.config.num_key_value_heads
    for (key_width, value_width), qk, vo in zip(WIDTHS, keys, values, strict=True):
        plan[qk] = torch.arange(key_width // 2).repeat(groups, 1)
        plan[vo] = torch.arange(value_width).repeat(groups, 1)
    return apply(model, Plan(plan))


def checked(model, form: str, python: str, path: Path, *, per_token: int) -> None:
    """Export a model, ask vLLM, and compare the tokens that its cache holds with bytes of keys and values per token."""
    save(model, byte_tokenizer(), path / "pruned")
    export(path / "pruned", path / "out", form)
    report = check(path / "out", "vllm", python)
    assert report["passed"], report["why"]
    assert report["greedy_tokens_equal"]
    assert (report["version"], report["dtype"]) == ("0.32.0", "float32")
    block = report["block_size"]
    assert report["cache_tokens"] == report["cache_bytes"] // (block * per_token) * block
    assert report["cache_tokens"] == report["cache_tokens_predicted"]


@pytest.mark.parametrize(
    ("made", "form", "width"),
    [
        pytest.param(lambda: pairs("llama", "gqa", 64, EVERY_OTHER[64]), "stock", 2 * 32, id="llama-32"),
        pytest.param(lambda: pairs("mistral", "gqa", 64, MOST[48]), "stock", 2 * 48, id="mistral-48"),
        pytest.param(lambda: pairs("qwen2", "gqa", 128, EVERY_OTHER[128]), "stock", 2 * 64, id="qwen2-64"),
        pytest.param(lambda: pairs("llama", "mqa", 128, MOST[96]), "stock", 96, id="one-kv-head-96"),
        pytest.param(
            lambda: pairs("llama", "gqa", 64, EVERY_OTHER[64]), "stock_arithmetic", 2 * 32, id="arithmetic"
        ),
        pytest.param(lambda: pairs("mistral", "gqa", 64, MOST[48]), "padded", 2 * 64, id="padded"),
        pytest.param(lambda: cut("llama", "kv_group", [0, 3]), "stock", 2 * 64, id="fewer-groups"),
    ],
)
def test_it_says_what_transformers_says(made, form, width, python, tmp_path):
    layers, keys_and_values, float32 = 3, 2, 4
    checked(made(), form, python, tmp_path, per_token=layers * keys_and_values * width * float32)


def test_widths_of_single_layers_load_and_are_cached(python, tmp_path):
    groups, float32 = 2, 4
    numbers = sum(2 * groups * max(widths) for widths in WIDTHS)
    checked(uneven(), "remote_code", python, tmp_path, per_token=numbers * float32)


def test_fewer_layers_are_a_smaller_cache(python, tmp_path):
    checked(cut("qwen2", "block", [0, 2]), "stock", python, tmp_path, per_token=2 * 2 * 4 * 64 * 4)


def test_its_own_deepseek_class_runs_mla_of_512_and_64_channels(python, tmp_path):
    """vLLM's operator for default RoPE is wrong on a CPU: the export takes the class for yarn."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    model = joined(tiny_model("llama", "mha", vocab_size=259, **PLAIN, **heads), 1, latent=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_latent_proj.weight.normal_(std=0.05)
    keep = {space: torch.arange(32)[None] for space in find_spaces(model.config, ["qk"])}
    checked(apply(model, Plan(keep)), "mla", python, tmp_path, per_token=3 * 576 * 4)
