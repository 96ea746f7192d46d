"""Origin of a number: code, versions, machine."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kvp.assets import DATA
from kvp.code import commit
from kvp.cost import device_kind, device_name

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "lm-eval",
    "safetensors",
    "wandb",
    DATA,
)


def provenance(device: str, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the checkout's commit and its edits, package versions, Python, device and command line.

    `device` is the kind of device: results other than speed agree between CPUs of one architecture, and reports
    footnote devices that differ. `device_name` is the model of the CPU or GPU. `overrides` are the words of a job;
    without them the command line of this process is named.
    """
    import kvp

    return {
        "kvp": kvp.__version__,
        **commit(),
        "versions": dict(_versions()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_kind(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "command": command(overrides),
    }


@cache
def _versions() -> dict[str, str]:
    """Return the versions of packages; each is read from its metadata, and every stage asks."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # the packaged data can be left out
            found[name] = version(name)
    return found


def command(overrides: Sequence[str] | None) -> str:
    """Return the command line of a job's words; without them that of this process."""
    return shlex.join(["python", "-m", "kvp", *(sys.argv[1:] if overrides is None else overrides)])


def hardware(device: str) -> dict[str, Any]:
    """Return what speed depends on: the name of the GPU or CPU model, and the number of threads."""
    return {"device": device_name(device), "threads": torch.get_num_threads()}
