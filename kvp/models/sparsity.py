"""Zeros in a checkpoint's decoder matrices, and the bytes that another storage would take.

A zero in a safetensors file takes as many bytes as any weight, and a dense kernel multiplies by it. The bytes of other
storages are only counted here: nothing is stored that way, and nothing runs faster.

| storage  | bytes                                                                                                  |
| -------- | ------------------------------------------------------------------------------------------------------ |
| "dense"  | every weight, in its dtype                                                                             |
| "2:4"    | 2 of 4 consecutive inputs of a row, and 2 bits for the place of each (NVIDIA's sparse tensor cores)     |
| "bitmap" | the nonzeros, and one bit per weight                                                                   |

"2:4" is None for a matrix with more than 2 nonzeros in some 4 consecutive inputs of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from kvp.models.linears import all_linears
from kvp.models.shapes import itemsize, layer_shapes, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STORAGES = ("dense", "2:4", "bitmap")

Bytes = dict[str, int | None]


def count_zeros(path: Path, config: PretrainedConfig) -> dict[str, Any]:
    """Count a checkpoint's zeros for `run.json`; one matrix is read at a time.

    Returns:
        `weights`, `zeros` and their quotient `fraction` over the linear weights of the decoder blocks. Their `bytes`
        per storage, the `model_bytes` with all other parameters dense, and the counts per matrix.
    """
    names = {linear.weight for linear in all_linears(config)}
    matrices = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(names & set(tensors.keys())):
                matrices[name] = zeros_of(tensors.get_tensor(name))
    weights, zeros = (sum(matrix[key] for matrix in matrices.values()) for key in ("weights", "zeros"))
    stored: Bytes = {key: _total(matrix["bytes"][key] for matrix in matrices.values()) for key in STORAGES}
    rest = itemsize(config) * (size(config, layer_shapes(config)).params - weights)
    return {
        "weights": weights,
        "zeros": zeros,
        "fraction": zeros / weights,
        "bytes": stored,
        "model_bytes": {key: None if taken is None else taken + rest for key, taken in stored.items()},
        "matrices": matrices,
    }


def zeros_of(weight: Tensor) -> dict[str, Any]:
    """Return weights, zeros and bytes per storage of one matrix (out, in)."""
    weights, nonzeros = weight.numel(), int(weight.count_nonzero())
    width = weight.element_size()
    stored: Bytes = {
        "dense": weights * width,
        "2:4": weights // 2 * width + weights // 8 if is_n_of_m(weight, 2, 4) else None,
        "bitmap": -(-weights // 8) + nonzeros * width,
    }
    return {"weights": weights, "zeros": weights - nonzeros, "bytes": stored}


def is_n_of_m(weight: Tensor, n: int, m: int) -> bool:
    """Return whether at most n of every m consecutive inputs of every row are not zero."""
    if weight.shape[1] % m:
        return False
    return bool(((weight != 0).unflatten(1, (-1, m)).sum(-1) <= n).all())


def _total(parts: Iterable[int | None]) -> int | None:
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
