"""Models that a serving benchmark serves: where they lie, what their cache is, and how much of it a memory holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvp.models.checkpoint.files import read_json
from kvp.models.family import PRUNED_PREFIX
from kvp.models.load import load_config
from kvp.models.shapes import layer_shapes
from kvp.serving.forms import engines_of
from kvp.types import DTYPES

BLOCK = 32  # tokens; vLLM hands out caches in such blocks, and its CPU kernels want a multiple of 32
SPARE = 1  # blocks that vLLM keeps for itself
UNITS = {"MiB": 2**20, "GiB": 2**30}
ENGINES_OWN = "auto"  # the cache has the dtype of the weights


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as one server offers it.

    Attributes:
        name: Name of its rows.
        directory: An export, or an ordinary checkpoint.
        cache_dtype: The engine's word for the dtype of keys and values.
        token_bytes: Bytes of cache per token of one sequence.
        refusable: Whether the engine may refuse it: then its row says why, and the others go on.
    """

    name: str
    directory: Path
    cache_dtype: str = ENGINES_OWN
    token_bytes: int
    refusable: bool = False

    def tokens_in(self, memory: int) -> int:
        """Return how many tokens a cache of `memory` bytes holds, at most: whole blocks, without the engine's own."""
        return max(memory // (self.token_bytes * BLOCK) - SPARE, 0) * BLOCK

    def bytes_for(self, tokens: int, sequences: int = 1) -> int:
        """Return the bytes of the smallest cache that holds `sequences` of `tokens` each."""
        return (sequences * -(-tokens // BLOCK) + SPARE) * BLOCK * self.token_bytes

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, for fingerprints: a changed file is another model."""
        files = sorted(path for path in self.directory.iterdir() if path.suffix in (".json", ".safetensors"))
        kept = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {"name": self.name, "cache_dtype": self.cache_dtype, "files": kept}


def find_served(directories: Sequence[Path], dtype: torch.dtype, cache_dtypes: Sequence[str]) -> list[Served]:
    """Return the models in their order, and the first one again with each of `cache_dtypes`.

    Raises:
        ValueError: One is nothing that vLLM opens, or two have one name.
    """
    found: dict[str, Served] = {}
    for directory in directories:
        name = directory.name or directory.resolve().name
        if name in found:
            raise ValueError(
                f"two models are called {name}, and a row is known by its name: rename a directory"
            )
        numbers = _numbers_per_token(directory)
        found[name] = Served(name=name, directory=directory, token_bytes=numbers * dtype.itemsize)
    first = next(iter(found.values()))
    for cache_dtype in cache_dtypes:
        found[f"{first.name} + {cache_dtype}"] = Served(
            name=f"{first.name} + {cache_dtype}",
            directory=first.directory,
            cache_dtype=cache_dtype,
            token_bytes=first.token_bytes // dtype.itemsize,  # fp8: a byte a number
            refusable=True,
        )
    return list(found.values())


def _numbers_per_token(directory: Path) -> int:
    """Return how many numbers of cache a token takes: as the export says, else from the config's shapes."""
    serving = read_json(directory / "serving.json") if (directory / "serving.json").is_file() else {}
    form = serving.get("form")
    if form is not None and "vllm" not in engines_of(form):
        raise ValueError(
            f"{directory} is an export of form {form}, which opens in {' and '.join(engines_of(form))}, not in vllm"
        )
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} is no model: give what kvp export wrote, or a checkpoint with a config.json"
        )
    if form is not None and "kv_bytes_per_token" in serving and serving.get("dtype") in DTYPES:
        return int(serving["kv_bytes_per_token"]["export"] // getattr(torch, serving["dtype"]).itemsize)
    config = load_config(directory)
    if config.model_type.startswith(PRUNED_PREFIX):
        raise ValueError(
            f"{directory} is a checkpoint that only kvp opens: export it first, kvp export {directory} --out DIR"
        )
    return sum(shape.kv_width for shape in layer_shapes(config))


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as 64MiB or 1.5GiB.

    Raises:
        ValueError: The text is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)", text)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no size: give it as 64MiB or 1.5GiB")
    return int(float(found[1]) * UNITS[found[2]])
