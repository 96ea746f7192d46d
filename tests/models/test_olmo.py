"""OLMo 2 and 3: one norm over the queries of all heads, one over the keys, and norms after both sublayers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvp
from kvp.models.load import byte_tokenizer, save
from kvp.models.shapes import cut, layer_shapes, projections, size
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.serving.stock import to_stock
from kvp.serving.write import export
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.signals.head_moments import statistics
from kvp.strategies.signals.walk import walk
from kvp.types import Budget, Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask

WIDTHS = ["kv_group", "qk", "vo", "ffn"]


@pytest.fixture(params=["olmo2", "olmo3"])
def name(request):
    return request.param


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def without_groups(model, plan):
    """A copy whose o_proj reads nothing of the query heads of removed groups: what cutting these groups means."""
    model = copy.deepcopy(model)
    config = model.config
    queries = config.num_attention_heads // config.num_key_value_heads
    for space, keep in plan.keep.items():
        gone = sorted(set(range(space.shape[0])) - set(keep.tolist()))
        with torch.no_grad():
            for head in (group * queries + query for group in gone for query in range(queries)):
                model.model.layers[space.layer].self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
    return model


@pytest.mark.parametrize("heads", ["gqa", "mha"])
def test_groups_are_cut_after_the_norm_of_all_heads(name, heads, tokens):
    model = tiny_model(name, heads, dtype=torch.float64)
    plan = random_plan(model, ["kv_group"])
    pruned = apply(model, plan)
    assert (logits(pruned, tokens) - logits(without_groups(model, plan), tokens)).abs().max() < 1e-9
    assert (logits(pruned, tokens) - logits(model, tokens)).abs().max() > 1e-3


def test_a_cut_before_the_norm_would_be_another_model(name, tokens):
    """The heads that stay are divided by a mean over all heads; zeroed rows of k_proj make that mean smaller."""
    model = tiny_model(name, dtype=torch.float64)
    plan = random_plan(model, ["kv_group"])
    before = without_groups(model, plan)
    with torch.no_grad():
        for space, keep in plan.keep.items():
            gone = sorted(set(range(space.shape[0])) - set(keep.tolist()))
            for group in gone:
                before.model.layers[space.layer].self_attn.k_proj.weight[8 * group : 8 * group + 8] = 0
    assert (logits(apply(model, plan), tokens) - logits(before, tokens)).abs().max() > 1e-4


def test_queries_and_keys_stay_whole_and_the_cache_shrinks(name, tokens):
    model = tiny_model(name)
    plan = random_plan(model, ["kv_group", "qk"])
    pruned = apply(model, plan)
    for before, after, shape in zip(
        model.model.layers, pruned.model.layers, layer_shapes(pruned.config), strict=True
    ):
        for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
            assert torch.equal(*(getattr(layer.self_attn, part).weight for layer in (before, after)))
        assert projections(pruned.config, shape)[:2] == (48, 16)
        assert after.self_attn.v_proj.out_features == 8 * shape.num_key_value_heads
    cache = pruned(tokens, use_cache=True).past_key_values
    held = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
    assert held == [(s.num_key_value_heads, s.qk_head_dim) for s in layer_shapes(pruned.config)]
    assert {groups for groups, _ in held} == {1}
    assert size(model.config, cut(layer_shapes(model.config), plan)).params == sum(
        p.numel() for p in pruned.parameters()
    )


def test_what_can_be_cut_again(name, tokens):
    model = tiny_model(name, "mha", dtype=torch.float64)
    once = apply(model, random_plan(model, ["kv_group"]))
    kinds = available_kinds(once.config)
    assert not {"qk", "kv_group"} & {*kinds} and {"vo", "ffn", "block", "mlp"} <= {*kinds}
    for kind in ("qk", "kv_group"):
        with pytest.raises(ValueError, match=f"has no space '{kind}', because its keys were cut after their"):
            find_spaces(once.config, [kind])
    plan = random_plan(once, ["vo", "ffn"], seed=3)
    assert (logits(apply(once, plan), tokens) - logits(mask(once, plan), tokens)).abs().max() < 1e-9
    pairs = apply(model, random_plan(model, ["qk"]))
    assert "kv_group" not in available_kinds(pairs.config)


def test_heads_that_were_cut_have_values_by_rank(name, tokens):
    """The moments of values need none of the queries and keys, whose rows no longer go with the groups."""
    model = tiny_model(name, "mha", dtype=torch.float64)
    space, *_ = find_spaces(model.config, ["kv_group"])
    pruned = apply(model, Plan({space: torch.tensor([0, 2, 3])}))
    visit = next(walk(pruned, [tokens], "heads"))
    assert statistics(visit).values.shape == (3, 8, 8)


@pytest.mark.parametrize("window", [4, 7])
def test_short_windows_are_kept(window, tokens):
    model = tiny_model("olmo3", dtype=torch.float64, sliding_window=window)
    plan = random_plan(model, ["block", *WIDTHS])
    pruned = apply(model, plan)
    assert (logits(pruned, tokens) - logits(mask(model, plan), tokens)).abs().max() < 1e-6
    wide = tiny_model("olmo3", dtype=torch.float64)
    assert (logits(apply(wide, plan), tokens) - logits(pruned, tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("kinds", [["kv_group", "vo"], ["block", "qk"]], ids="+".join)
def test_generation_past_the_window_is_the_same_with_every_cache(kinds, tokens):
    pruned = tiny_model("olmo3", sliding_window=6)
    pruned = apply(pruned, random_plan(pruned, kinds))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dynamic = pruned.generate(tokens, **options)
    assert torch.equal(dynamic, pruned.generate(tokens, cache_implementation="static", **options))
    assert torch.equal(dynamic, pruned.generate(tokens, use_cache=False, **options))


def test_the_full_layers_keep_a_rope_of_their_own(tokens, tmp_path):
    """OLMo 3 turns full layers by yarn and sliding ones by default RoPE."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 8}
    ropes = {
        "full_attention": yarn,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
    model = tiny_model("olmo3", dtype=torch.float64, rope_parameters=ropes)
    plan = random_plan(model, ["kv_group", "qk"])
    pruned = apply(model, plan)
    assert (logits(pruned, tokens) - logits(mask(model, plan), tokens)).abs().max() < 1e-6
    plain = tiny_model(
        "olmo3", dtype=torch.float64, rope_parameters={**ropes, "full_attention": ropes["sliding_attention"]}
    )
    assert (logits(plain, tokens) - logits(model, tokens)).abs().max() > 1e-4
    pruned = pruned.float()
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(pruned, tokens))


@pytest.mark.slow
def test_blocks_and_neurons_are_stock(name, tmp_path):
    model = tiny_model(name, vocab_size=259)
    block, *ffn = (space for kind in ("block", "ffn") for space in find_spaces(model.config, [kind]))
    pruned = apply(
        model, Plan({block: torch.tensor([0, 2]), **{space: torch.arange(3, 35) for space in ffn}})
    )
    save(pruned, byte_tokenizer(), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "stock")["check"]["passed"]
    opened, _ = kvp.load(tmp_path / "out", dtype="float32")
    assert type(opened).__name__ == f"{name.capitalize()}ForCausalLM"
    ids = torch.arange(3, 60)[None]
    assert (logits(opened, ids) - logits(pruned, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["stock", "padded"])
@pytest.mark.parametrize("kind", ["qk", "kv_group"])
def test_stock_classes_cannot_compute_what_follows_the_norm(form, kind, name):
    model = tiny_model(name)
    with pytest.raises(ValueError, match=r"cut after their norm.*strategy.grouping=vo, ffn or block"):
        to_stock(apply(model, random_plan(model, [kind])), form)


@pytest.mark.parametrize(
    ("form", "reason"), [("gguf", "writes no GGUF of"), ("mla", "normalises queries and keys")]
)
def test_other_forms_are_refused_by_name(form, reason, name, tmp_path):
    save(tiny_model(name, "mqa", vocab_size=259, attention_bias=False), byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(ValueError, match=rf"{name}.*{reason}|{reason}.*{name}"):
        export(tmp_path / "dense", tmp_path / "out", form)


def test_methods_that_do_not_fit_are_refused_by_name(name):
    config, budget = tiny_config(name), Budget(value=0.25, of="kv_cache", tolerance=0.2)
    with pytest.raises(ValueError, match="norms what attention and MLP write"):
        SliceGPT().check(config, Budget(value=0.25, of="params"))
    with pytest.raises(ValueError, match=r"set strategy\.context=null"):
        KVPrunerPlus().check(config, budget)
    with pytest.raises(ValueError, match="norms of queries and keys"):
        KVPrunerPlus(context=None, num_key_value_heads=1).check(config, budget)
