"""Answer for a checkpoint with vLLM and without kvp; a file to run, not to import.

python -I engine_vllm.py DIRECTORY WORK: reads WORK/ask.json and writes WORK/answer.safetensors.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import vllm
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform


def main() -> None:
    """Write log-probabilities of the asked tokens and the greedy tokens after them, in float32 where vLLM has it."""
    directory, work = sys.argv[1:]
    with open(f"{work}/ask.json") as file:
        ask = json.load(file)
    ids = ask["ids"]
    model = opened(
        directory,
        max_model_len=len(ids) + ask["new_tokens"],
        kv_cache_memory_bytes=ask["cache_bytes"],
        enforce_eager=True,
        trust_remote_code=ask["own_code"],
        **ask["options"],
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=ask["new_tokens"], ignore_eos=True, prompt_logprobs=1, detokenize=False
    )
    answer = model.generate({"prompt_token_ids": ids}, sampling)[0]
    positions = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
    settings = model.llm_engine.vllm_config
    cache = settings.cache_config
    facts = {
        "version": vllm.__version__,
        "dtype": str(settings.model_config.dtype).removeprefix("torch."),
        "cache_bytes": ask["cache_bytes"],
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "block_size": cache.block_size,
    }
    save_file(
        {
            "logprobs": torch.tensor([known[token].logprob for token, known in positions]),
            "greedy": torch.tensor(list(answer.outputs[0].token_ids)),
        },
        f"{work}/answer.safetensors",
        {"facts": json.dumps(facts)},
    )


def opened(directory: str, **options: Any) -> LLM:
    """Return the engine in float32, or in the checkpoint's dtype where a GPU's kernels have no float32."""
    try:
        return LLM(model=directory, dtype="float32", **options)
    except Exception:
        if current_platform.is_cpu():
            raise
        return LLM(model=directory, dtype="auto", **options)


if __name__ == "__main__":
    main()
