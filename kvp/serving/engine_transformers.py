"""Answer for a checkpoint with transformers and without kvp; a file to run, not to import.

python -I engine_transformers.py DIRECTORY WORK: reads WORK/ask.json and writes WORK/answer.safetensors.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils


@torch.no_grad()
def main() -> None:
    """Write the logits of the asked tokens, and the greedy tokens after them, computed in the asked dtype."""
    directory, work = sys.argv[1:]
    with open(f"{work}/ask.json") as file:
        ask = json.load(file)
    for name in ask["imports"]:
        import_module(name)
    dynamic_module_utils.HF_MODULES_CACHE = f"{work}/modules"  # no copy of own code outlives this process
    model = AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=getattr(torch, ask["dtype"]), trust_remote_code=ask["own_code"]
    ).eval()
    output = model(torch.tensor([ask["ids"]]), use_cache=True)
    logits, cache, greedy = output.logits[0].float(), output.past_key_values, []
    last = logits[-1]
    for _ in range(ask["new_tokens"]):
        greedy.append(int(last.argmax()))
        step = model(torch.tensor([greedy[-1:]]), past_key_values=cache, use_cache=True)
        cache, last = step.past_key_values, step.logits[0, -1]
    answer = {"logits": logits.contiguous(), "greedy": torch.tensor(greedy)}
    for number, (start, count) in enumerate(ask["passages"]):
        answer[f"passage.{number}"] = logprobs(model, ask["ids"][:count], start)
    assert ask["imports"] or "kvp" not in sys.modules
    facts = {"version": transformers.__version__, "dtype": ask["dtype"]}
    save_file(answer, f"{work}/answer.safetensors", {"facts": json.dumps(facts)})


def logprobs(model: Any, ids: list[int], start: int) -> torch.Tensor:
    """Return the log-probabilities in nats of all tokens but the first, of a text that begins at position `start`."""
    positions = torch.arange(start, start + len(ids))[None]
    logits = model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0].float()
    return logits[:-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


if __name__ == "__main__":
    main()
