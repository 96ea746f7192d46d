"""kvp: structural pruning of large language models that really shrinks the KV cache.

Importing it registers the pruned model classes, so that `AutoModelForCausalLM.from_pretrained` opens
every checkpoint that kvp writes.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether Python is starting a command of kvp, which registers the classes itself when its options are known to
    be right, or never: modelling code takes seconds to import.
    """
    if sys.argv[:1] == ["-m"]:  # what argv[0] is while Python looks for the module to run
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        return module.partition(".")[0] == "kvp" and module.count(".") < 2
    return bool(sys.argv) and Path(sys.argv[0]).stem == "kvp"


if not _is_command():
    from kvp.models import pruned as _pruned  # noqa: F401  (registers the classes)
