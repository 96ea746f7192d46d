"""CPU and GPUs: memory, dtype, and the kinds of attention."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from kvp.cost import device_name
from kvp.doctor.finding import GIB, Finding, either
from kvp.measurement.memory import available_bytes
from kvp.models.load import resolve_dtype


def devices() -> Iterator[Finding]:
    """Yield each device with free memory, and the dtype that model.dtype=auto means there."""
    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    for name in ("cpu", *cuda):
        dtype = str(resolve_dtype("auto", name)).removeprefix("torch.")
        note = (
            "" if dtype == "bfloat16" else "bfloat16 is not in this hardware: model.dtype=auto takes float32"
        )
        free = f"{available_bytes(torch.device(name)) / GIB:.1f} GiB free, {dtype}"
        yield Finding("device", name, "ok", f"{device_name(name)}, {free}", note)
    if not cuda:
        why = (
            "nvidia-smi shows the driver"
            if torch.version.cuda
            else "this torch is built for CPUs, see pytorch.org"
        )
        yield Finding("device", "cuda", "missing", "no GPU", f"models of 7B: {why}")


def attention() -> Iterator[Finding]:
    """Yield the kinds of attention; kvp takes sdpa."""
    yield Finding("attention", "sdpa", "ok", "in torch")
    flex = find_spec("torch.nn.attention.flex_attention") is not None
    yield either("attention", "flex", flex, "in torch" if flex else "not in this torch", "not used by kvp")
    flash = find_spec("flash_attn") is not None
    way = "not used by kvp: pip install flash-attn, with a GPU"
    yield either("attention", "flash-attn", flash, "installed" if flash else "not installed", way)
