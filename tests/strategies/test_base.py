"""The page for a method author: its example works, and `late` names options."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.flap import FLAP
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.steps import Asked, Refit
from kvp.types import Budget, Space
from tests.conftest import tiny_model
from tests.strategies.cases import CASES, make_plan, strategy

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "method.md"


def test_null_is_a_choice_where_the_class_has_another_default():
    """Whoever leaves the option out gets that default, so both cannot share a fingerprint."""
    asked = Asked(
        {"class": "KVPrunerPlus", "context": None, "num_key_value_heads": None}, {}, None, "torch.float32", 0
    )
    assert asked.strategy(KVPrunerPlus()) == {"class": "KVPrunerPlus", "context": None}
    older = replace(asked, options={"class": "KVPrunerPlus"})
    assert older.strategy(KVPrunerPlus()) == {"class": "KVPrunerPlus"}


def test_a_compensation_that_only_the_class_names_decides_a_refit():
    asked = Asked({"class": "FLAP"}, {}, None, "torch.float32", 0)
    assert Refit().inputs(FLAP(allocator=Uniform()), asked)["compensation"] == {"class": "Bias"}


def test_the_worked_example_prunes():
    python, node = re.search(
        r"```python\n(.*?)```\n\n```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL
    ).groups()
    names: dict[str, Any] = {}
    exec(python, names)
    given = yaml.safe_load(node)
    assert given.pop("_target_").endswith(".OutputNorm")
    assert given.pop("defaults")[0] == {"allocator": "uniform"}
    method, model = names["OutputNorm"](allocator=Uniform(multiple_of=1), **given), tiny_model("llama", "gqa")
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
