"""Answer for a checkpoint with transformers and without kvp; a file to run, not to import.

python -I engine_transformers.py DIRECTORY WORK: reads WORK/ask.json and writes WORK/answer.safetensors.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    """Write the logits of the asked tokens, and the greedy tokens after them, in float32."""
    directory, work = sys.argv[1:]
    with open(f"{work}/ask.json") as file:
        ask = json.load(file)
    for name in ask["imports"]:
        import_module(name)
    model = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, trust_remote_code=False
    ).eval()
    output = model(torch.tensor([ask["ids"]]), use_cache=True)
    logits, cache, greedy = output.logits[0], output.past_key_values, []
    last = logits[-1]
    for _ in range(ask["new_tokens"]):
        greedy.append(int(last.argmax()))
        step = model(torch.tensor([greedy[-1:]]), past_key_values=cache, use_cache=True)
        cache, last = step.past_key_values, step.logits[0, -1]
    assert ask["imports"] or "kvp" not in sys.modules
    save_file(
        {"logits": logits.contiguous(), "greedy": torch.tensor(greedy)},
        f"{work}/answer.safetensors",
    )


if __name__ == "__main__":
    main()
