"""Provenance of a number: code, versions, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kvp.cost import device_kind, device_name

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "safetensors", "wandb")


def provenance(device: str) -> dict[str, Any]:
    """Return the checkout's commit, package versions, Python, device and command line.

    `device` is the kind of device: results other than speed agree between CPUs of one architecture, and reports
    footnote devices that differ. The measurements of speed name the CPU model themselves.
    """
    import kvp

    return {
        "kvp": kvp.__version__,
        **_commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_kind(device),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m kvp", *sys.argv[1:]]),
    }


def hardware(device: str) -> dict[str, Any]:
    """Return what speed depends on: the name of the GPU or CPU model, and the number of threads."""
    return {"device": device_name(device), "threads": torch.get_num_threads()}


def _commit() -> dict[str, Any]:
    """Return the git commit of the code, None outside a checkout: an installed wheel has its version."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", "__init__.py")
        return (
            {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
            if tracked
            else {}
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
