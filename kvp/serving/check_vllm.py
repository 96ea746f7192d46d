"""vLLM's answer against that of transformers on the same export, with a tolerance that is measured.

The sample of an export is the checkpoint's answer in float32. An export in 16 bits is a little off it, because queries
were rounded once more. So vLLM is compared with transformers on the export itself. Where vLLM computes in 16 bits, the
yardstick is how far transformers is off in that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvp.serving.sample import Sample, token_logprobs
from kvp.serving.verify import CACHE_BYTES, EXACT, KERNELS, Answer, ask, compare, distance

ROOM = 4  # a check's cache holds the text so many times at least


def check_vllm(
    directory: Path, serving: Mapping[str, Any], sample: Sample, *, own_code: bool, python: str
) -> dict[str, Any]:
    """Return how vLLM's answer differs from that of transformers, and how many tokens its cache holds.

    Raises:
        ModuleNotFoundError: The interpreter does not have vLLM.
        RuntimeError: One of the two cannot open the export.
    """
    here = partial(ask, directory, sample, "transformers", own_code=own_code)
    exact = here()
    proof = compare(sample, exact, exact=serving["dtype"] == "float32")
    if not proof["passed"]:
        return {**proof, "why": f"already in transformers: {proof['why']}"}
    tokens, per_token = len(sample.ids) + len(sample.greedy), bytes_per_token(serving, "float32")
    room = max(CACHE_BYTES, ROOM * tokens * per_token)
    options = {"model_impl": "transformers"} if own_code else {}
    said = ask(directory, sample, "vllm", own_code=own_code, python=python, cache_bytes=room, options=options)
    dtype = said.facts["dtype"]
    tolerance = EXACT
    if dtype != "float32":
        tolerance = max(EXACT, KERNELS * distance(here(dtype=dtype), exact, sample))
    reference = replace(
        sample,
        logprobs=token_logprobs(exact["logits"], sample.ids),
        greedy=exact["greedy"].tolist(),
        passages=[],
    )
    report = compare(reference, said, exact=dtype == "float32", tolerance=tolerance)
    return {**said.facts, **report, "cache_tokens_predicted": predicted(said, serving)}


def bytes_per_token(serving: Mapping[str, Any], dtype: str) -> int:
    """Return the bytes of keys and values per token, if the cache has this dtype; 0 for a form that does not say."""
    stored = serving.get("kv_bytes_per_token", {"export": 0})["export"]
    return stored * getattr(torch, dtype).itemsize // getattr(torch, serving["dtype"]).itemsize


def predicted(said: Answer, serving: Mapping[str, Any]) -> int | None:
    """Return how many tokens the export's bytes per token let the engine's memory hold, in whole blocks."""
    per_block = said.facts["block_size"] * bytes_per_token(serving, said.facts["dtype"])
    return said.facts["cache_bytes"] // per_block * said.facts["block_size"] if per_block else None
