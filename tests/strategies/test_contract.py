"""What every strategy must do on every family it claims."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from kvp.models.joined import joined
from kvp.models.plans import read_plan, read_scores, write_plan, write_scores
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Global, Sensitivity, Uniform
from kvp.strategies.allocation.tied import Tied
from kvp.strategies.base import Target
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.methods.adapruner import AdaPruner
from kvp.strategies.methods.flap import FLAP
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.llm_bip import LLMBIP
from kvp.strategies.methods.llm_pruner import LLMPruner
from kvp.strategies.methods.magnitude import Magnitude
from kvp.strategies.methods.nirvana import NIRVANA
from kvp.strategies.methods.none import NoPruning
from kvp.strategies.methods.numerical import Numerical
from kvp.strategies.methods.random import Random
from kvp.strategies.methods.regrow import Regrow
from kvp.strategies.methods.search_llm import SearchLLM
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.strategies.methods.shortgpt import ShortGPT
from kvp.strategies.methods.sleb import SLEB
from kvp.strategies.methods.think import ThinK
from kvp.strategies.methods.wanda_sp import WandaSP
from kvp.strategies.search.evolution import Evolution
from kvp.strategies.signals.gradients import scoring_bytes
from kvp.types import Budget
from tests.conftest import tiny_config, tiny_model
from tests.helpers.masks import mask
from tests.helpers.published import LLAMA_7B

BUDGET = Budget(value=0.25, of="kv_cache", tolerance=0.15)
GOLDEN = Path(__file__).parent / "golden.json"

STRATEGIES = {
    "kvpruner": KVPruner(allocator=Sensitivity(multiple_of=2)),
    "kvpruner_attention_probe": KVPruner(allocator=Sensitivity(multiple_of=2, probe="attention")),
    "kvpruner_coupled": KVPruner(allocator=Uniform(multiple_of=2), grouping="coupled"),
    "kvpruner_layer": KVPruner(allocator=Global(multiple_of=2), scope="layer"),
    "kvpruner_model": KVPruner(allocator=Uniform(multiple_of=2), scope="model", importance="second_order"),
    "kvpruner_groups": KVPruner(allocator=Sensitivity(), grouping="kv_group", importance="mixed"),
    "kvpruner_vo": KVPruner(allocator=Uniform(multiple_of=2), grouping="vo", importance="activation"),
    "kvpruner_plus": KVPrunerPlus(
        allocator=Global(multiple_of=2), grouping="apart", context=40, angle=0.9, compensation=Sequential()
    ),
    "kvpruner_plus_stock": KVPrunerPlus(
        allocator=Uniform(multiple_of=2), scope="model", context=40, angle=0.9, importance="taylor_gate"
    ),
    "kvpruner_plus_joined": KVPrunerPlus(
        allocator=Global(multiple_of=2), grouping="apart", context=40, angle=0.9, num_key_value_heads=1
    ),
    "kvpruner_plus_vo": KVPrunerPlus(allocator=Uniform(multiple_of=2), grouping="vo"),
    "random": Random(allocator=Uniform(multiple_of=2)),
    "magnitude": Magnitude(allocator=Uniform(multiple_of=2), norm="l1"),
    "shortened_llm": ShortenedLLM(protect_first=0, protect_last=0),
    "shortened_llm_taylor": ShortenedLLM(protect_first=1, protect_last=0, criterion="taylor"),
    "shortened_llm_magnitude": ShortenedLLM(protect_first=0, protect_last=1, criterion="magnitude"),
    "shortgpt": ShortGPT(),
    "sleb": SLEB(protect_first=0, protect_last=0),
    "flap": FLAP(allocator=Global(multiple_of=1, max_ratio=1.0, per_cost=False)),
    "numerical": Numerical(allocator=Global(multiple_of=1, max_ratio=1.0, per_cost=False)),
    "wanda_sp": WandaSP(allocator=Uniform(multiple_of=1, max_ratio=1.0)),
    "adapruner": AdaPruner(
        allocator=Uniform(multiple_of=1), protect_first=0, protect_last=0, trials=6, parts=2
    ),
    "llm_pruner": LLMPruner(allocator=Uniform(multiple_of=1), protect_first=0, protect_last=1),
    "llm_pruner_threshold": LLMPruner(
        allocator=Global(multiple_of=1, per_cost=False),
        protect_first=0,
        protect_last=0,
        importance="second_order",
        group_reduction="prod",
    ),
    "llm_pruner_steps": LLMPruner(
        allocator=Uniform(multiple_of=1), protect_first=0, protect_last=0, iterative_steps=2
    ),
    "think": ThinK(allocator=Uniform(multiple_of=2, max_ratio=1.0), window=8),
    "llm_bip": LLMBIP(allocator=Uniform(multiple_of=1, max_ratio=1.0)),
    "nirvana": NIRVANA(allocator=Tied(multiple_of=1, max_ratio=1.0), draws=2),
    "regrow": Regrow(first=Magnitude(allocator=Uniform(multiple_of=2), norm="l1"), growth=0.3),
    "search_llm": SearchLLM(
        allocator=Uniform(multiple_of=2),
        evolution=Evolution(generations=2, population=5, parents=2, mutated=2, crossed=2),
    ),
}


def make_plan(strategy, model, budget=BUDGET):
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(6))
    target = Target(model, ids if strategy.needs_calibration else None, batch_size=2, seed=1)
    scores = strategy.score(target)
    profile = strategy.sensitivity(target, scores) if strategy.probes else torch.zeros(3)
    if strategy.searches:
        with TemporaryDirectory() as directory:
            return strategy.search(target, scores, budget, profile, Path(directory))
    return strategy.plan(model.config, scores, budget, profile)


def offers(strategy, config):
    return set(strategy.kinds()) <= set(available_kinds(config))


@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name, family, heads, tokens):
    strategy, model = STRATEGIES[name], tiny_model(family, heads, dtype=torch.float64)
    if not offers(strategy, model.config):
        with pytest.raises(ValueError, match=r"has no space 'qk'|keep the heads apart"):
            strategy.check(model.config, BUDGET)
        return
    if heads == "mqa" and "kv_group" in strategy.kinds():
        with pytest.raises(ValueError, match="cannot be reached"):  # the only group of a layer stays
            strategy.check(model.config, BUDGET)
        return
    strategy.check(model.config, BUDGET)
    model = joined(model, strategy.joins)
    plan = make_plan(strategy, model)
    again = make_plan(strategy, model)
    assert all(torch.equal(keep, again.keep[space]) for space, keep in plan.keep.items())
    dense, left = (
        size(model.config, shapes).kv_bytes_per_token
        for shapes in (layer_shapes(model.config), cut(layer_shapes(model.config), plan))
    )
    assert abs(1 - left / dense - 0.25) <= 0.15
    with torch.no_grad():
        sliced, zeroed = apply(model, plan)(tokens).logits, mask(model, plan)(tokens).logits
    assert (sliced - zeroed).abs().max() < 1e-6


def test_ratio_zero_keeps_everything(family):
    strategy, model = Random(allocator=Uniform(), grouping="vo"), tiny_model(family)
    plan = make_plan(strategy, model, Budget(value=0, of="kv_cache"))
    assert all(keep.shape == space.shape for space, keep in plan.keep.items())


def test_none_prunes_nothing(family):
    assert make_plan(NoPruning(), tiny_model(family)).keep == {}


def test_scopes_share_what_they_say(tokens):
    model = tiny_model("llama", "gqa", head_dim=16)
    for scope in ("layer", "model"):
        for grouping in ("coupled", "separate"):
            strategy = KVPruner(allocator=Uniform(multiple_of=4), scope=scope, grouping=grouping)
            plan = make_plan(strategy, model)
            for kind in ("qk", "vo"):
                rows = [keep for space, keep in plan.keep.items() if space.kind == kind]
                assert all((row == row[0]).all() for row in rows)
                if scope == "model":
                    assert all(torch.equal(row, rows[0]) for row in rows)


def test_coupled_groups_keep_one_channel_set_for_q_k_v_and_o():
    plan = make_plan(STRATEGIES["kvpruner_coupled"], tiny_model("llama", "gqa"))
    by_layer = {(space.kind, space.layer): keep for space, keep in plan.keep.items()}
    for layer in range(3):
        pairs = by_layer["qk", layer]
        assert torch.equal(by_layer["vo", layer], torch.cat([pairs, pairs + 4], dim=-1))


def test_golden_plans(request):
    """Plans of fixed models under fixed seeds; delete golden.json to write it anew after a reasoned change."""
    plans = {
        name: {
            s.key: keep.tolist()
            for s, keep in make_plan(
                strategy, joined(tiny_model("llama", "gqa", dtype=torch.float64), strategy.joins)
            ).keep.items()
        }
        for name, strategy in STRATEGIES.items()
    }
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(plans, indent=0))
    assert plans == json.loads(GOLDEN.read_text())


def test_plans_and_scores_survive_the_disk(tmp_path):
    model, strategy = tiny_model(), STRATEGIES["kvpruner"]
    plan = make_plan(strategy, model)
    write_plan(tmp_path, plan)
    assert all(torch.equal(keep, plan.keep[space]) for space, keep in read_plan(tmp_path).keep.items())
    scores = {space: torch.rand(space.shape) for space in plan.keep}
    write_scores(tmp_path / "scores.safetensors", scores)
    assert all(
        torch.equal(s, scores[space]) for space, s in read_scores(tmp_path / "scores.safetensors").items()
    )


def test_scoring_a_7b_shape_fits_24_gib():
    from transformers import LlamaConfig

    config = LlamaConfig(dtype="bfloat16")
    assert config.num_hidden_layers == LLAMA_7B.num_hidden_layers
    for checkpointing, tokens in ((False, (1, 128)), (True, (8, 128)), (True, (1, 2048))):
        estimate = scoring_bytes(
            config, batch_size=tokens[0], length=tokens[1], gradient_checkpointing=checkpointing
        )
        assert estimate["total"] < 24 * 2**30
        assert estimate["total"] == sum(estimate[part] for part in ("weights", "activations", "constant"))
    assert tiny_config().dtype == torch.float32
