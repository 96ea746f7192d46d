"""What every strategy must do on every family it claims."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvp.models.family import family_of
from kvp.models.plans import read_plan, read_scores, write_plan, write_scores
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from kvp.strategies import methods
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.none import NoPruning
from kvp.strategies.methods.random import Random
from kvp.strategies.signals.estimate import scoring_bytes
from kvp.strategies.templates.mla import MLAStrategy
from kvp.types import Budget
from tests.conftest import tiny_config, tiny_model
from tests.helpers.masks import mask
from tests.helpers.published import LLAMA_7B
from tests.strategies.cases import BUDGET, CASES, CUTS, OPTIONS, ZEROS, make_plan, strategy, whole
from tests.strategies.golden import assert_golden, zero_rows

READ_MLPS = (
    "llm_bip",
    "shortened_llm_magnitude",
    "shortened_llm_taylor",
)  # as matrices, which experts have not


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_a_case(option):
    tested = {words.split()[0] for words in CASES.values()}
    assert option in tested, (
        f"conf/strategy/{option}.yaml is not tested: add it to CUTS of tests/strategies/cases.py"
    )


def test_every_method_is_an_option():
    made = [strategy(name) for name in CASES]
    made += [getattr(one, part) for one in made for part in ("first", "second") if hasattr(one, part)]
    reached = {Path(inspect.getfile(type(one))) for one in made}
    for path in sorted(Path(methods.__file__).parent.glob("[!_]*.py")):
        assert path in reached, f"no conf/strategy/*.yaml makes a class of {path.name}: add one, and its case"


@pytest.mark.parametrize("name", CUTS)
def test_contract(name, family, heads, tokens):
    method, model = strategy(name), tiny_model(family, heads, dtype=torch.float64)
    if isinstance(method, MLAStrategy) and family_of(model.config).qk_norm:
        with pytest.raises(ValueError, match=r"cannot share one latent: choose strategy=kvpruner"):
            method.check(model.config, BUDGET)
        return
    made = {"k_latent", "v_latent"}  # by a recast
    lacks = {*method.kinds()} - made - {*available_kinds(model.config)}
    if family_of(model.config).experts and (lacks or name in READ_MLPS):
        with pytest.raises(ValueError, match=r"has experts|MLPs are experts behind a router"):
            method.check(model.config, BUDGET)
        return
    mixes = getattr(method, "context", None) and "qk" in method.kinds()
    if mixes and family_of(model.config).qk_norm:
        with pytest.raises(ValueError, match=r"norms queries and keys, .*: set strategy.context=null"):
            method.check(model.config, BUDGET)
        method = replace(method, context=None, num_key_value_heads=None)  # the way out
    if heads == "mqa" and "kv_group" in method.kinds():
        with pytest.raises(ValueError, match="cannot be reached"):  # the only group of a layer stays
            method.check(model.config, BUDGET)
        return
    method.check(model.config, BUDGET)
    model = whole(method, model)
    plan = make_plan(method, model)
    again = make_plan(method, model)
    assert all(torch.equal(keep, again.keep[space]) for space, keep in plan.keep.items())
    counted = {linear.weight: (linear.rows, linear.columns) for linear in method.rewritten(model.config)}
    edited = {name: tuple(edit.shape) for name, edit in plan.edits.items() if name.endswith("weight")}
    assert edited.items() <= counted.items()
    if not (isinstance(method, MLAStrategy) and heads == "mqa"):  # one head without folds stays as it is
        assert edited == counted
    dense, left = (
        size(model.config, shapes).kv_bytes_per_token
        for shapes in (layer_shapes(model.config), cut(layer_shapes(model.config), plan))
    )
    assert abs(1 - left / dense - 0.25) <= 0.15
    with torch.no_grad():
        sliced, zeroed = apply(model, plan)(tokens).logits, mask(model, plan)(tokens).logits
    assert (sliced - zeroed).abs().max() < 1e-6


def test_ratio_zero_keeps_everything(family):
    method, model = Random(allocator=Uniform(), grouping="vo"), tiny_model(family)
    plan = make_plan(method, model, Budget(value=0, of="kv_cache"))
    assert all(keep.shape == space.shape for space, keep in plan.keep.items())


def test_none_prunes_nothing(family):
    assert make_plan(NoPruning(), tiny_model(family)).keep == {}


def test_scopes_share_what_they_say(tokens):
    model = tiny_model("llama", "gqa", head_dim=16)
    for scope in ("layer", "model"):
        for grouping in ("coupled", "separate"):
            method = KVPruner(allocator=Uniform(multiple_of=4), scope=scope, grouping=grouping)
            plan = make_plan(method, model)
            for kind in ("qk", "vo"):
                rows = [keep for space, keep in plan.keep.items() if space.kind == kind]
                assert all((row == row[0]).all() for row in rows)
                if scope == "model":
                    assert all(torch.equal(row, rows[0]) for row in rows)


def test_coupled_groups_keep_one_channel_set_for_q_k_v_and_o():
    plan = make_plan(strategy("kvpruner_coupled"), tiny_model("llama", "gqa"))
    by_layer = {(space.kind, space.layer): keep for space, keep in plan.keep.items()}
    for layer in range(3):
        pairs = by_layer["qk", layer]
        assert torch.equal(by_layer["vo", layer], torch.cat([pairs, pairs + 4], dim=-1))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ZEROS and name != "slicegpt"])
def test_golden_plans(name):
    method = strategy(name)
    plan = make_plan(method, whole(method, tiny_model("llama", "gqa", dtype=torch.float64)))
    kept = {space.key: keep.tolist() for space, keep in plan.keep.items()}
    assert_golden(name, "golden.json", kept | (zero_rows(plan) if method.sparsifies else {}))


def test_plans_and_scores_survive_the_disk(tmp_path):
    model = tiny_model()
    plan = make_plan(strategy("kvpruner"), model)
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
        assert estimate["total"] == sum(
            estimate[part] for part in ("weights", "activations", "logits", "constant")
        )
    assert tiny_config().dtype == torch.float32
