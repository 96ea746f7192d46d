"""Where a number comes from: code, versions, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "safetensors", "wandb")


def provenance(device: str) -> dict[str, Any]:
    """Commit and dirtiness of the checkout, package versions, python, device, command line."""
    import kvp

    return {
        "kvp": kvp.__version__,
        **_commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        **hardware(device),
        "command": " ".join(["python -m kvp", *sys.argv[1:]]),
    }


def hardware(device: str) -> dict[str, Any]:
    """What speed depends on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu ({platform.machine()})"
    return {"device": name, "threads": torch.get_num_threads()}


def _commit() -> dict[str, Any]:
    """The git commit of the code, None outside a checkout (an installed wheel has its version)."""

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
