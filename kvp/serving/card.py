"""The README.md of a checkpoint: what it is, what it costs, and how to open it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import kvp
from kvp.models.family import PRUNED_PREFIX
from kvp.models.shapes import layer_shapes, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPEN = """```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""
GGUF = """```bash
llama-server -m model.gguf
```
"""


def card(config: PretrainedConfig, removed: str = "", *, gguf: bool = False) -> str:
    """Return the model card of a checkpoint in Markdown, with the header that the hub reads.

    Args:
        config: The checkpoint's.
        removed: What was asked for and achieved, in words.
        gguf: Whether it is a GGUF for llama.cpp.
    """
    shapes, own = layer_shapes(config), config.model_type.startswith(PRUNED_PREFIX)
    counted = size(config, shapes)
    head = ["library_name: gguf" if gguf else "library_name: transformers", "tags: [kvp, pruned]"]
    base = str(getattr(config, "_name_or_path", ""))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base):
        head.append(f"base_model: {base}")
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# A pruned {config.model_type.removeprefix(PRUNED_PREFIX)} model",
        "",
        f"kvp {kvp.__version__} made this checkpoint{f': {removed}' if removed else ''}.",
        "",
        "| of this checkpoint | |",
        "|---|---|",
        f"| parameters | {counted.params:,} |",
        f"| KV cache per token | {counted.kv_bytes_per_token:,} bytes ({str(config.dtype).removeprefix('torch.')}) |",
        f"| layers | {counted.blocks} |",
        "",
        GGUF if gguf else OPEN.format(first="import kvp  # registers its class\n" if own else ""),
        "The licence of the model that was pruned holds for this one, too.",
        "",
    ]
    return "\n".join(lines)
