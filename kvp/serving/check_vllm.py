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
from transformers import AutoConfig

from kvp.models.shapes import layer_shapes
from kvp.serving.engines import caches_latents, needs_backend
from kvp.serving.sample import Sample, token_logprobs
from kvp.serving.verify import CACHE_BYTES, EXACT, KERNELS, Answer, ask, compare, distance, require

ROOM = 4  # a check's cache holds the text so many times at least


def check_vllm(
    directory: Path, serving: Mapping[str, Any], sample: Sample, *, own_code: bool, python: str
) -> dict[str, Any]:
    """Return how vLLM's answer differs from that of transformers, and how many tokens its cache holds.

    Raises:
        ModuleNotFoundError: The interpreter does not have vLLM.
        RuntimeError: One of the two cannot open the export.
        ValueError: The model caches latents.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)  # by kvp's own class
    if caches_latents(config):
        raise ValueError(
            f"{directory} caches latents and expands keys from them, and vLLM has no such cache: leave out --engine"
        )
    require("vllm", python)
    here = partial(ask, directory, sample, "transformers", own_code=own_code)
    exact = here()
    proof = compare(sample, exact, exact=serving["dtype"] == "float32")
    if not proof["passed"]:
        return {**proof, "why": f"already in transformers: {proof['why']}"}
    numbers = cached_numbers(directory, serving, own_code=own_code)
    room = max(CACHE_BYTES, ROOM * (len(sample.ids) + len(sample.greedy)) * numbers * torch.float32.itemsize)
    backend = own_code or needs_backend(config)
    options = {"model_impl": "transformers"} if backend else {}
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
    return {**said.facts, **report, "cache_tokens_predicted": predicted(said, numbers)}


def cached_numbers(directory: Path, serving: Mapping[str, Any], *, own_code: bool) -> int:
    """Return how many numbers vLLM caches per token; 0 for a form that does not say."""
    if own_code:  # of two widths it caches the wider one twice
        shapes = layer_shapes(
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
        )  # by kvp's own class
        return sum(
            2 * shape.num_key_value_heads * max(shape.query_head_dim, shape.v_head_dim) for shape in shapes
        )
    stored = serving.get("kv_bytes_per_token", {"export": 0})["export"]
    return stored // getattr(torch, serving["dtype"]).itemsize


def predicted(said: Answer, numbers: int) -> int | None:
    """Return how many tokens the engine's memory should hold, in whole blocks."""
    facts = said.facts
    per_block = facts["block_size"] * numbers * getattr(torch, facts["dtype"]).itemsize
    return facts["cache_bytes"] // per_block * facts["block_size"] if per_block else None
