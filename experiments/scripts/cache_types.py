"""Measure what llama.cpp's quantised caches and weights do to an exported model's answer.

    python -m experiments.scripts.cache_types GGUF_DIR ...

Each directory is a `kvp export --to gguf`. One JSON line per directory and cache type: how far the log-probabilities of
the sample in serving.json are from those of the checkpoint, or what llama.cpp said when it refused.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from kvp.serving.quantize import distance
from kvp.serving.sample import Sample
from kvp.serving.verify import ask

CACHES = ("F32", "F16", "Q8_0", "Q4_0")
ROTATED = 64  # llama.cpp rotates keys and values before it quantises them if this divides their width


def main() -> None:
    """Print the lines."""
    for directory in map(Path, sys.argv[1:]):
        serving = json.loads((directory / "serving.json").read_text())
        sample = Sample(**serving["sample"])
        for cache in CACHES:
            row = {
                "export": directory.name,
                "head_dim": serving["head_dim"],
                "num_key_value_heads": serving["num_key_value_heads"],
                "weights": serving.get("quantized", {}).get("type", serving["dtype"]),
                "cache": cache,
                "rotated": cache[0] == "Q" and serving["head_dim"] % ROTATED == 0,
                "llama_cpp_python": version("llama-cpp-python"),
            }
            try:
                row |= distance(sample, ask(directory, sample, "llama_cpp", cache=cache))
            except RuntimeError as error:
                row["refused"] = str(error).splitlines()[-1]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
