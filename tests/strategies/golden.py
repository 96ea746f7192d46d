"""Golden plans: a line per plan, a digest per space, so that a difference says which plan and which space moved.

If the change is meant, paste the line that the failure prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvp.types import Plan

HERE = Path(__file__).parent


def digest(value: Any) -> str:
    """Six hexadecimal digits of any JSON data."""
    return sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:6]


def line(parts: Mapping[str, Any]) -> str:
    """ "qk.0:1a2b3c vo.0:..." of what a plan holds by space or matrix."""
    return " ".join(f"{key}:{digest(value)}" for key, value in parts.items())


def zero_rows(plan: Plan) -> dict[str, list[str]]:
    """Per matrix, which weights are zero: a hexadecimal number per row. Two matrices of layer 1 stand for all."""
    return {
        name.removeprefix("model.layers.").removesuffix(".weight"): [
            f"{int(''.join(map(str, row)), 2):x}" for row in (edit == 0).int().tolist()
        ]
        for name, edit in plan.edits.items()
        if name.startswith("model.layers.1.") and ("k_proj" in name or "down_proj" in name)
    }


def assert_golden(name: str, file: str, parts: Mapping[str, Any]) -> None:
    golden = json.loads((HERE / file).read_text()).get(name)
    found = line(parts)
    assert found == golden, (
        f'tests/strategies/{file} has another plan of {name}. Found:\n "{name}": "{found}",'
    )
