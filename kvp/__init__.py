"""kvp: structural pruning of large language models that really shrinks the KV cache.

Importing it registers the pruned model classes, so that `AutoModelForCausalLM.from_pretrained` opens
every checkpoint that kvp writes.
"""

from kvp.models import pruned as _pruned  # noqa: F401  (registers the classes)

__version__ = "0.1.0"
