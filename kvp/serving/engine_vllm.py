"""Answer for a checkpoint with vLLM and without kvp; a file to run, not to import. It was never run.

python -I engine_vllm.py DIRECTORY WORK: reads WORK/ask.json and writes WORK/answer.safetensors.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams


def main() -> None:
    """Write log-probabilities of the asked tokens and the greedy tokens after them, in the dtype that vLLM chooses."""
    directory, work = sys.argv[1:]
    with open(f"{work}/ask.json") as file:
        ask = json.load(file)
    ids = ask["ids"]
    model = LLM(
        model=directory,
        max_model_len=len(ids) + ask["new_tokens"],
        enforce_eager=True,
        trust_remote_code=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=ask["new_tokens"], ignore_eos=True, prompt_logprobs=1, detokenize=False
    )
    answer = model.generate({"prompt_token_ids": ids}, sampling)[0]
    positions = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
    save_file(
        {
            "logprobs": torch.tensor([known[token].logprob for token, known in positions]),
            "greedy": torch.tensor(list(answer.outputs[0].token_ids)),
        },
        f"{work}/answer.safetensors",
    )


if __name__ == "__main__":
    main()
