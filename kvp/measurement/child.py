"""The process that measures one checkpoint: a JSON spec as its argument, one JSON line as its last output.

Alone in its process the model meets no memory, threads or garbage of the experiment around it:

    python -m kvp.measurement.child '{"checkpoint": "outputs/...", "device": "cpu", "dtype": "bfloat16",
                                      "protocol": {"batch_size": 1}}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import kvp  # noqa: F401  (registers the pruned classes)
from kvp.bars import only_on_terminals
from kvp.cost import device_name
from kvp.measurement import memory
from kvp.measurement.count import cache_bytes, cache_bytes_per_token, macs
from kvp.measurement.measure import Measure
from kvp.measurement.speed import time_model
from kvp.models.load import load_config
from kvp.models.shapes import layer_shapes


def measure(checkpoint: str, device: torch.device, dtype: str, protocol: Measure) -> dict[str, Any]:
    """Speed, memory and counts of the model at `checkpoint`; keys as `Measure.measure` documents."""
    config = load_config(Path(checkpoint))
    protocol.check_positions(config.max_position_embeddings)
    with torch.device("meta"):  # imports what loading will need, so that it counts as baseline
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    baseline = memory.bytes_in_use(device)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=False)
    model = memory.place(model, device).eval()
    prompt = protocol.prompt(config.vocab_size).to(device)
    memory.reset_peak(device)
    prefill, decode, cache = time_model(
        model, prompt, new_tokens=protocol.new_tokens, warmup=protocol.warmup, runs=protocol.runs
    )
    parts = memory.Memory(
        peak_bytes=memory.peak_bytes(device),
        weights_bytes=memory.weights_bytes(model),
        cache_bytes=cache_bytes(cache),
        baseline_bytes=baseline,
        method="cuda" if device.type == "cuda" else "rss",
    )
    rate = decode.summary()
    milliseconds = 1000 * protocol.batch_size / rate["tokens_per_second"]
    return {
        "prefill": prefill.summary(),
        "decode": {**rate, "milliseconds_per_step": milliseconds},
        "memory": parts.summary(),
        "kv_bytes_per_token": cache_bytes_per_token(cache),
        "macs": macs(config, layer_shapes(config), prompt_length=protocol.prompt_length),
        "device": device_name(str(device)),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "attention": model.config._attn_implementation,
    }


def main() -> None:
    """Measure what the spec in argv[1] names, and print the result."""
    only_on_terminals()
    spec = json.loads(sys.argv[1])
    protocol = Measure(**spec["protocol"])
    result = measure(spec["checkpoint"], torch.device(spec["device"]), spec["dtype"], protocol)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
