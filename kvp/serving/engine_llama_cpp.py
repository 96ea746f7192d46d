"""Answer for a GGUF with llama.cpp and without kvp; a file to run, not to import.

python -I engine_llama_cpp.py DIRECTORY WORK: reads WORK/ask.json and writes WORK/answer.safetensors.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np
from safetensors.numpy import save_file


def main() -> None:
    """Write the logits of the asked tokens, the greedy tokens after them, and the text as its tokenizer reads it."""
    directory, work = sys.argv[1:]
    with open(f"{work}/ask.json") as file:
        ask = json.load(file)
    ids = ask["ids"]
    cache = getattr(llama_cpp, f"GGML_TYPE_{ask['cache']}")
    model = llama_cpp.Llama(
        model_path=f"{directory}/model.gguf",
        n_ctx=len(ids) + ask["new_tokens"],
        logits_all=True,
        type_k=cache,
        type_v=cache,
        flash_attn=ask["cache"] != "F32",  # values in fewer bits need it
        verbose=False,
    )
    model.eval(ids)
    logits, greedy = model.scores[: len(ids)].copy(), []
    for _ in range(ask["new_tokens"]):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    read = model.tokenize(ask["text"].encode(), add_bos=True, special=False)
    answer = {"logits": logits, "greedy": np.array(greedy), "ids": np.array(read[: len(ids)])}
    facts = {"version": llama_cpp.__version__, "dtype": "float32"}
    save_file(answer, f"{work}/answer.safetensors", {"facts": json.dumps(facts)})


if __name__ == "__main__":
    main()
