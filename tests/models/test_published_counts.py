"""Parameter counts that papers and their code print, from shapes alone.

LLM-Pruner (arXiv 2305.11627 and its logs) and Shortened-LLM (arXiv 2402.02834, committed results).
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.types import Plan
from tests.helpers.published import LLAMA3_8B, LLAMA_7B, TINYLLAMA, params


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LLAMA_7B, 6_738_415_616), (LLAMA3_8B, 8_030_261_248), (TINYLLAMA, 1_100_048_384)],
)
def test_dense(config, expected):
    assert params(config, Plan({})) == expected


@pytest.mark.parametrize(
    ("config", "layers", "groups", "neurons", "expected"),
    [
        (LLAMA_7B, (4, 30), 8, 2752, 5_422_977_024),
        (LLAMA_7B, (3, 31), 19, 6605, 3_350_188_032),
        (LLAMA3_8B, (4, 30), 2, 3584, 6_612_586_496),
        (TINYLLAMA, (4, 18), 1, 1408, 945_907_712),
    ],
)
def test_llm_pruner_recipes(config, layers, groups, neurons, expected):
    cuts = {"kv_group": groups, "ffn": neurons}
    spaces = [s for s in find_spaces(config, cuts) if layers[0] <= s.layer < layers[1]]
    assert params(config, Plan({s: torch.arange(s.shape[0] - cuts[s.kind]) for s in spaces})) == expected


@pytest.mark.parametrize(
    ("removed", "expected"), [(6, 5_524_115_456), (9, 4_916_965_376), (11, 4_512_198_656)]
)
def test_shortened_llm_recipes(removed, expected):
    space = find_spaces(LLAMA_7B, ["block"])[0]
    assert params(LLAMA_7B, Plan({space: torch.arange(32 - removed)})) == expected


@pytest.mark.parametrize(
    ("kept", "expected", "kv_bytes"),
    [(128, 6_738_415_616, 524_288), (96, 6_201_544_704, 393_216), (64, 5_664_673_792, 262_144)],
)
def test_kvpruner_widths(kept, expected, kv_bytes):
    config = LlamaConfig(dtype="float16")
    keep = {"qk": torch.arange(kept // 2).expand(32, -1), "vo": torch.arange(kept).expand(32, -1)}
    plan = Plan({space: keep[space.kind] for space in find_spaces(config, ["qk", "vo"])})
    counted = size(config, cut(layer_shapes(config), plan))
    assert (counted.params, counted.kv_bytes_per_token) == (expected, kv_bytes)
