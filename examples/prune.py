"""Prune a quarter of a model's KV cache, tune the result by LoRA, and compare with the dense model tuned alike.

python examples/prune.py                          # the packaged model, about five minutes on two CPU cores
python examples/prune.py --model DIR --out pruned  # your own: a directory, or owner/name on the hub
"""

import argparse

import kvp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="smollm2_135m", help="an option of conf/model, a directory, owner/name"
)
parser.add_argument("--strategy", default="kvpruner", help="one of kvp.methods()")
parser.add_argument("--ratio", type=float, default=0.25, help="the fraction of the KV cache to remove")
parser.add_argument("--steps", type=int, default=60, help="LoRA steps")
parser.add_argument("--out", help="the directory of the recovered model")
asked = parser.parse_args()

model, tokenizer = kvp.load(asked.model)
pruned = kvp.prune(model, tokenizer, asked.strategy, asked.ratio)
recovered = kvp.recover(pruned.model, tokenizer, max_steps=asked.steps)
control = kvp.recover(model, tokenizer, max_steps=asked.steps)  # tuning on text lowers perplexity by itself

print(pruned)
for name, each in {
    "dense": model,
    "dense, tuned alike": control.model,
    "pruned": pruned.model,
    "pruned, tuned": recovered.model,
}.items():
    print(f"{name:>18}: {kvp.evaluate(each, tokenizer, tasks=[])}")
if asked.out:
    print(f"written: {recovered.save(asked.out, tokenizer)}")
