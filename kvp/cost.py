"""Costs of work: seconds, peak memory, and the name of the device that did it."""

from __future__ import annotations

import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # man 5 proc: sets VmHWM to the current resident size
CPU_INFO = Path("/proc/cpuinfo")


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Fill in the `seconds` and `peak_bytes` of a block once it is over; blocks must not nest.

    The peak is the sum over the GPUs that this process uses. Without a GPU it is the resident memory: since the
    block began on Linux, since the process began elsewhere.
    """
    cost: dict[str, Any] = {}
    with suppress(OSError):
        reset_resident_peak()
    if cuda := _cuda():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    yield cost
    cost["seconds"] = time.perf_counter() - started
    cuda = _cuda()
    cost["peak_bytes"] = (
        sum(map(cuda.max_memory_allocated, range(cuda.device_count()))) if cuda else resident_peak_bytes()
    )


def resident_bytes() -> int:
    """Return the bytes that this process has in memory now.

    Raises:
        OSError: The system is not Linux.
    """
    return _status("VmRSS")


def resident_peak_bytes() -> int:
    """Return the largest `resident_bytes` since `reset_resident_peak`; outside Linux, since the process began."""
    with suppress(OSError):
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_resident_peak() -> None:
    """Forget earlier peaks of this process.

    Raises:
        OSError: The system is not Linux, or forbids it.
    """
    CLEAR_REFS.write_text(RESET_PEAK)


def device_name(device: str) -> str:
    """Return the name of the GPU or the CPU model; the CPU's architecture where the system names no model."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+?)\s*$", CPU_INFO.read_text(), re.MULTILINE):
            return found[1]
    return platform.machine()


def device_kind(device: str) -> str:
    """Return the name of the GPU, or "cpu (ARCHITECTURE)": the same for all CPUs that run the same binaries."""
    return device_name(device) if device.startswith("cuda") else f"cpu ({platform.machine()})"


def _cuda() -> Any:
    """Return `torch.cuda` if this process uses it, otherwise None; imports nothing."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch and torch.cuda.is_initialized() else None


def _status(field: str) -> int:
    """Return a size in bytes from /proc/self/status, which says kB and means KiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{STATUS} has no {field}")
    return int(found[1]) * 1024
