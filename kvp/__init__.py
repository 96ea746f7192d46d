"""kvp: structural pruning of large language models that really shrinks the KV cache.

    import kvp

    model, tokenizer = kvp.load("smollm2_135m")
    pruned = kvp.prune(model, tokenizer, "kvpruner", ratio=0.25)

Importing it registers the pruned model classes, so that `AutoModelForCausalLM.from_pretrained` opens every checkpoint
that kvp writes. `__all__` is the API; everything else may change.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvp.threads import briefly

if TYPE_CHECKING:
    from kvp.api import *

__version__ = "0.1.0"
__all__ = [
    "ALPS",
    "CARE",
    "CLOVER",
    "FLAP",
    "LLMBIP",
    "MHA2MLA",
    "NIRVANA",
    "SLEB",
    "AdaPruner",
    "Bias",
    "Budget",
    "Chain",
    "Evaluation",
    "Evolution",
    "Global",
    "KVPruner",
    "KVPrunerPlus",
    "KVPrunerPlusMLA",
    "LLMPruner",
    "LeastSquares",
    "Magnitude",
    "MagnitudeSparse",
    "Mosaic",
    "NoPruning",
    "Numerical",
    "Olica",
    "Palu",
    "Pruned",
    "Random",
    "ReCalKV",
    "Recovered",
    "Regrow",
    "SVDLLMv2",
    "SearchLLM",
    "Sensitivity",
    "Sequential",
    "ShortGPT",
    "ShortenedLLM",
    "SliceGPT",
    "SparseGPT",
    "ThinK",
    "Tied",
    "TransMLA",
    "Uniform",
    "Wanda",
    "WandaSP",
    "evaluate",
    "export",
    "load",
    "measure",
    "methods",
    "prune",
    "recover",
]  # of kvp.api, which is imported when the first of them is used


def __getattr__(name: str) -> Any:
    """Return a name of the API; the first use imports it, which takes seconds."""
    if name in __all__:
        return getattr(import_module("kvp.api"), name)
    raise AttributeError(f"module 'kvp' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that completion offers."""
    return [*__all__, "__version__"]


def _is_command() -> bool:
    """Whether Python is starting a command of kvp, which registers the classes itself when its options are known to
    be right, or never: modelling code takes seconds to import.
    """
    if sys.argv[:1] == ["-m"]:  # what argv[0] is while Python looks for the module to run
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        return module.partition(".")[0] == "kvp" and module.count(".") < 2
    return bool(sys.argv) and Path(sys.argv[0]).name in ("kvp", "kvp.exe")


if _is_command():
    os.environ.update(briefly(os.environ))  # before torch is imported
else:
    from kvp.models import pruned as _pruned  # noqa: F401  (registers the classes)
