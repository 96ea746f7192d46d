"""Prune, write a GGUF, and let llama.cpp answer: pip install 'kvp[gguf]', python examples/serve_llama_cpp.py OUT.

The GGUF is proved against the pruned model before it counts as written. `llama-server -m OUT/model.gguf` serves it.
"""

import sys

from llama_cpp import Llama

import kvp

out = sys.argv[1] if len(sys.argv) > 1 else "served_gguf"

model, tokenizer = kvp.load("smollm2_135m")
pruned = kvp.prune(model, tokenizer, "kvpruner_plus_stock", ratio=0.25, num_key_value_heads=1)
serving = kvp.export(pruned.model, tokenizer, out, to="gguf")
print(pruned)
print("engines:", serving["engines"])

engine = Llama(f"{out}/model.gguf", n_ctx=256, verbose=False)
answer = engine.create_completion("The capital of France is", max_tokens=16, temperature=0)
print("llama.cpp says:", answer["choices"][0]["text"])
