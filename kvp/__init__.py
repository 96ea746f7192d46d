"""kvp: structural pruning of large language models that really shrinks the KV cache.

Importing it registers the pruned model classes, so that `AutoModelForCausalLM.from_pretrained` opens
every checkpoint that kvp writes.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

DOORS = ("bench", "check", "export", "report", "schema", "status", "store")
LIGHT_COMMANDS = ("kvp", *(f"kvp.{door}" for door in DOORS))


def _is_light_command() -> bool:
    """Whether Python is starting a command that registers the classes itself, when its options are known
    to be right, or never: modelling code takes seconds to import.
    """
    if sys.argv[:1] == ["-m"]:  # what argv[0] is while Python looks for the module to run
        return sys.orig_argv[sys.orig_argv.index("-m") + 1] in LIGHT_COMMANDS
    return bool(sys.argv) and Path(sys.argv[0]).name == "kvp"


if not _is_light_command():
    from kvp.models import pruned as _pruned  # noqa: F401  (registers the classes)
