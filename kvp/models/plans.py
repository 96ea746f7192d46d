"""Plans and scores on disk: JSON for indices, safetensors for numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvp.types import Plan, Space

EDITS, BASES = "edits", "bases"
SUBLAYERS = ("attention", "mlp")


def kept_blocks(plan: Plan, num_layers: int) -> list[int]:
    """Return the blocks of the given model that the plan keeps."""
    kept = [keep.tolist() for space, keep in plan.keep.items() if space.kind == "block"]
    return kept[0] if kept else list(range(num_layers))


def write_scores(path: Path, scores: Mapping[Space, Tensor]) -> None:
    """Write one tensor per space, named by its key."""
    save_file({space.key: score.contiguous() for space, score in scores.items()}, path)


def read_scores(path: Path) -> dict[Space, Tensor]:
    """Return the scores that `write_scores` wrote."""
    return {space_of(key, tuple(score.shape)): score for key, score in sorted(load_file(path).items())}


def write_plan(directory: Path, plan: Plan) -> None:
    """Write `plan.json`: the indices kept per space, the widths of a sliced stream, and the first folded pair.

    Rewritten parameters and bases stand in the checkpoint or in files beside it.
    """
    spaces = {s.key: {"shape": s.shape, "keep": keep.tolist()} for s, keep in sorted(plan.keep.items())}
    node: dict[str, Any] = {"spaces": spaces}
    if plan.bases:
        node["stream"] = [basis.shape[1] for basis in plan.bases]
    if plan.folded is not None:
        node["folded"] = plan.folded
    (directory / "plan.json").write_text(json.dumps(node))


def read_plan(directory: Path) -> Plan:
    """Return the plan that `write_plan` wrote, with the parameters and bases that a search wrote layer by layer."""
    plan = json.loads((directory / "plan.json").read_text())
    spaces = plan["spaces"].items()
    keep = {
        space_of(key, tuple(node["shape"])): torch.tensor(node["keep"], dtype=torch.long)
        for key, node in spaces
    }
    sliced = sorted((directory / BASES).glob("*.safetensors"), key=lambda file: int(file.stem))
    bases = [load_file(file)[part] for file in sliced for part in SUBLAYERS]
    return Plan(keep, read_edits(directory), bases, plan.get("folded"))


def read_edits(directory: Path) -> dict[str, Tensor]:
    """Return the rewritten parameters that a search or a refit left layer by layer."""
    files = (directory / EDITS).glob("*.safetensors")
    return {name: edit for file in files for name, edit in load_file(file).items()}


def edits_file(directory: Path, layer: int) -> Path:
    """Return the safetensors file for the parameters of a layer that a search has rewritten."""
    (directory / EDITS).mkdir(parents=True, exist_ok=True)
    return directory / EDITS / f"{layer}.safetensors"


def bases_file(directory: Path, layer: int) -> Path:
    """Return the safetensors file for the bases before the sublayers of a layer."""
    (directory / BASES).mkdir(exist_ok=True)
    return directory / BASES / f"{layer}.safetensors"


def found_or_made(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file, after making it if it is missing; a killed search resumes at its next file."""
    if not file.exists():
        partial = file.with_suffix(".partial")
        save_file(make(), partial)
        os.replace(partial, file)
    return load_file(file)


def space_of(key: str, shape: tuple[int, ...]) -> Space:
    """Return the space of a key such as "qk.3" or "block"."""
    kind, _, layer = key.partition(".")
    return Space(kind, int(layer) if layer else None, shape)  # type: ignore[arg-type]
