"""Forms of an export: those of kvp by name, and a user's own as `mypkg.module:function`.

    def half(model, tokenizer, directory):
        save(to_stock(model, "stock").to(torch.float16), tokenizer, directory)

kvp calls it with the pruned model on the CPU, in the dtype of its weights. `directory` is empty. The proof is the same
as for kvp's forms: transformers opens the directory in a process without kvp, and answers the sample. A form that
needs imports there names them: `half.imports = ("kvp",)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from kvp.nearest import did_you_mean
from kvp.trust import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Target = Literal[
    "stock", "stock_arithmetic", "custom", "remote_code", "padded", "gguf", "mla", "mla_longrope", "mla_gguf"
]
Engine = Literal["transformers", "llama_cpp", "vllm"]


@dataclass(frozen=True)
class Form:
    """A form of an export.

    Attributes:
        summary: What it is, in one line.
        engines: Those that open it; the first one proves it.
    """

    summary: str
    engines: tuple[Engine, ...]


FORMS: dict[str, Form] = {
    "stock": Form("one shared set of rope pairs: transformers, vLLM, SGLang", ("transformers", "vllm")),
    "stock_arithmetic": Form("rope of another theta, for pairs at equal distances", ("transformers", "vllm")),
    "gguf": Form("model.gguf for llama.cpp, for any shared set of rope pairs", ("llama_cpp",)),
    "mla": Form("one KV head as DeepseekV3 with default rope", ("transformers", "vllm")),
    "mla_longrope": Form("one KV head as DeepseekV3, any shared set of rope pairs", ("transformers",)),
    "mla_gguf": Form("model.gguf of mla, whose graph caches keys and latent", ("llama_cpp",)),
    "custom": Form("any shape: opens in transformers after `import kvp` only", ("transformers",)),
    "remote_code": Form(
        "any shape with its class, by trust_remote_code; vLLM, too", ("transformers", "vllm")
    ),
    "padded": Form("the dense shapes, zeros where channels were cut: for checks", ("transformers", "vllm")),
}
MLA = ("mla", "mla_longrope", "mla_gguf")
Write = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", Path], None]


def own_form(name: str, trusted: Collection[str] = ()) -> Write | None:
    """Return the function that a user's form names; None for a form of kvp.

    Raises:
        ValueError: There is no such form, or its package is not trusted.
    """
    if name in get_args(Target):
        return None
    module, colon, function = str(name).partition(":")
    if not (colon and module and function):
        raise ValueError(
            f"the form (--to) must be one of {', '.join(get_args(Target))}, or your own such as mypkg.forms:half; "
            f"got {name!r}.{did_you_mean(name, get_args(Target))}"
        )
    return find("form", f"{module}.{function}", trusted, say="--trust {}")


def imports_of(name: str, own: Write | None) -> tuple[str, ...]:
    """Return the modules that transformers needs to open a form."""
    if own is None:
        return ("kvp",) if name == "custom" else ()
    return tuple(getattr(own, "imports", ()))


def engines_of(name: str) -> tuple[Engine, ...]:
    """Return the engines that open a form; the first one proves it. A user's own form opens in transformers."""
    return FORMS[name].engines if name in FORMS else ("transformers",)


def interpreter(engine: Engine) -> str:
    """Return the interpreter that has an engine: vLLM's is that of KVP_VLLM_PYTHON, else of `make serve-env`."""
    return os.environ.get("KVP_VLLM_PYTHON", ".venv-vllm/bin/python") if engine == "vllm" else sys.executable
