"""Experts as files hold them: one by one, where the model has one tensor of all."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from kvp.models.family import Family

Shapes = dict[str, tuple[int, ...]]


def as_stored(expected: Mapping[str, tuple[int, ...]], stored: Collection[str], family: Family) -> Shapes:
    """Return the expected shapes by the names in the files.

    transformers opens both layouts. It stacks experts that files hold one by one, gate above up.

    Args:
        expected: Shapes of what the model has, by name: (experts, rows, columns) of experts.
        stored: Names in the files.
        family: Says how files name what they hold one by one.
    """
    if not family.expert_files or not any(re.search(r"\.experts\.\d+\.", name) for name in stored):
        return dict(expected)
    gate, up, down = family.expert_files
    found: Shapes = {}
    for name, shape in expected.items():
        place = name.replace(f".{family.mlp}.", f".{family.expert_folder}.")
        folder, experts, part = place.rpartition(".experts.")
        if not experts:
            found[place] = shape
            continue
        count, rows, columns = shape
        parts = {gate: rows // 2, up: rows // 2} if part == "gate_up_proj" else {down: rows}
        for number in range(count):
            for each, height in parts.items():
                found[f"{folder}.experts.{number}.{each}.weight"] = (height, columns)
    return found
