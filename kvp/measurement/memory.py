"""Peak memory of a process that serves a model, split into weights, cache and the rest.

On a GPU the peak is what torch's allocator handed out (the CUDA context is not in it). On a CPU it is
the kernel's record of the resident set, VmHWM, so it belongs to a process of its own: see `child`.
Both are set back once the model is loaded, since loading may hold the weights twice.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from kvp.cost import reset_resident_peak, resident_bytes, resident_peak_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Parts of a peak, in bytes.

    Attributes:
        peak_bytes: Highest use from the end of loading to the last token, baseline included.
        weights_bytes: Parameters and buffers; tied ones once.
        cache_bytes: Keys and values at the last token.
        baseline_bytes: In use before loading: interpreter and libraries ("rss"), usually 0 ("cuda").
        method: "cuda" (allocator) or "rss" (resident set).
    """

    peak_bytes: int
    weights_bytes: int
    cache_bytes: int
    baseline_bytes: int
    method: str

    @property
    def rest_bytes(self) -> int:
        """Bytes of activations, workspaces and free blocks: the peak less everything named, at least 0."""
        return max(0, self.peak_bytes - self.baseline_bytes - self.weights_bytes - self.cache_bytes)

    def summary(self) -> dict[str, Any]:
        """Return all parts, `rest_bytes` among them."""
        return {**asdict(self), "rest_bytes": self.rest_bytes}


def weights_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of parameters and buffers, each shared tensor once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return `model` with all weights resident on `device`.

    `from_pretrained` leaves CPU weights mapped to the file: pages that were not read yet would not
    count, and those that were could be evicted. A copy is in memory once and for good, made tensor
    by tensor so that the model is never held twice.
    """
    if device.type == "cpu":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.to(device)  # type: ignore[arg-type]


def available_bytes(device: torch.device) -> int:
    """Return the bytes that this process could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min(psutil.virtual_memory().available, *_limits()))


def _limits() -> Iterator[int]:
    """Yield what a container and the shell (ulimit -v) leave this process, where they set a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft - psutil.Process().memory_info().vms
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        yield limit - used + int(stat["file"])  # cached files make way
    yield sys.maxsize


def bytes_in_use(device: torch.device) -> int:
    """Return the bytes held now: by torch's allocator on a GPU, by this process on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """Return the highest `bytes_in_use` since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak_bytes()


def begin(device: torch.device) -> int:
    """Collect garbage, forget earlier peaks, and return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
    return bytes_in_use(device)


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks; on a CPU, first hand back what loading freed, which would hide activations."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # glibc, as every Linux build of torch
        reset_resident_peak()
