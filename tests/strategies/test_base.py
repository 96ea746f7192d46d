"""The page for a method author: its example works, and `late` names options."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import ClassVar

import pytest
from pydantic import Field
from typing_extensions import override

from kvp.models.spaces import fold, members
from kvp.options import options
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.base import Strategy
from kvp.strategies.target import Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget, Kind, Space
from tests.conftest import tiny_model
from tests.strategies.cases import CASES, make_plan, strategy


def test_the_worked_example_prunes():
    block = Strategy.__doc__.split("output weights::\n")[1].split("\n    Add ")[0]
    names = {
        "ClassVar": ClassVar, "Field": Field, "Kind": Kind, "ScoreStrategy": ScoreStrategy, "Space": Space,
        "Target": Target, "fold": fold, "members": members, "options": options, "override": override,
    }  # fmt: skip
    exec(textwrap.dedent(block), names)
    method, model = names["OutputNorm"](allocator=Uniform(multiple_of=1)), tiny_model("llama", "gqa")
    plan = make_plan(method, model, Budget(value=0.3, of="block_params", tolerance=0.2))
    assert {space.kind for space in plan.keep} == {"kv_group", "ffn"}
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().square().sum(0)
    kept = plan.keep[Space("ffn", 0, (40,))]
    assert len(kept) < 40 and set(kept.tolist()) == set(weight.topk(len(kept)).indices.tolist())
    with pytest.raises(ValueError, match=r"strategy\.power must be > 0, got 0: p of"):
        names["OutputNorm"](allocator=Uniform(), power=0)


@pytest.mark.parametrize("name", CASES)
def test_late_names_options(name):
    method = strategy(name)
    assert set(method.late) <= {field.name for field in fields(method)}
