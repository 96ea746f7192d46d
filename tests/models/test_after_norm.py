"""Rope pairs cut after a norm over the head: the cache shrinks, the statistic of the norm stays whole."""

from __future__ import annotations

import pytest
import torch

from kvp.models.masks import masked
from kvp.models.shapes import cut, dense_shapes, layer_shapes, size
from kvp.models.spaces import find_spaces, tokens_first
from kvp.models.surgery import apply
from kvp.serving.stock import to_stock
from kvp.strategies.allocation.allocate import Global, Uniform
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.regrow import gated_worth
from kvp.strategies.methods.think import ThinK
from kvp.strategies.signals.importance import score_spaces
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import exact_norms, random_plan, tiny_config, tiny_model

NORMED = ("gemma3_text", "olmo2", "qwen3")
THINK = ThinK(allocator=Uniform(multiple_of=2, max_ratio=1.0))
IMPORTANCES = ("l1", "l2", "taylor_group", "taylor_element", "taylor_gate", "second_order", "activation")


@pytest.fixture(params=NORMED)
def model(request):
    return tiny_model(request.param)


def target(model, samples=4):
    ids = torch.randint(3, 96, (samples, 12), generator=torch.Generator().manual_seed(2))
    return Target(model=model, calibration=ids, batch_size=2, seed=0)


def losses(model, ids):
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, ids[:, 1:, None])[..., 0].mean(1)


def test_the_matrices_stay_whole_and_the_keys_shrink(model, tokens):
    plan = random_plan(model, ["qk"])
    pruned = apply(model, plan)
    for layer, dense, shape in zip(
        pruned.model.layers, model.model.layers, layer_shapes(pruned.config), strict=True
    ):
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            ours, theirs = (getattr(each.self_attn, name).weight for each in (layer, dense))
            assert torch.equal(ours, theirs)
        assert shape.qk_head_dim < dense_shapes(model.config)[0].qk_head_dim
    counted = size(model.config, cut(layer_shapes(model.config), plan))
    assert counted.params == sum(p.numel() for p in model.parameters())
    assert counted.kv_bytes_per_token < size(model.config, layer_shapes(model.config)).kv_bytes_per_token
    keys = [layer.keys for layer in pruned(tokens, use_cache=True).past_key_values.layers]
    assert [key.shape[-1] for key in keys] == [s.qk_head_dim for s in layer_shapes(pruned.config)]


def test_a_cut_before_the_norm_would_be_another_model(model, tokens):
    """The masked model zeroes what the norm writes; zeroing rows of k_proj changes the channels that stay."""
    plan = random_plan(model, ["qk"])
    with torch.no_grad(), masked(model, plan):
        after = model(tokens).logits
    space, keep = next(iter(plan.keep.items()))
    with torch.no_grad():
        before = model.model.layers[space.layer].self_attn.k_proj.weight
        gone = sorted(set(range(space.shape[1])) - set(keep[0].tolist()))
        before[gone] = 0
        with masked(model, plan):
            assert (model(tokens).logits - after).abs().max() > 1e-4


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_scores_the_pairs(model, importance):
    spaces = find_spaces(model.config, ["qk"])
    for space, score in score_spaces(target(model), spaces, importance).items():
        assert score.shape == space.shape and score.isfinite().all() and (score > 0).all()


def test_a_gate_is_the_derivative_by_what_the_norm_writes(model):
    """Derive the gate by differences: scale both channels of one pair of the normed keys of a group."""
    space, source = find_spaces(model.config, ["qk"])[1], target(exact_norms(model.double()))
    scores, step = score_spaces(source, [space], "taylor_gate")[space], 1e-5
    norm = model.model.layers[space.layer].self_attn.k_norm
    for group, pair in ((0, 1), (space.shape[0] - 1, 3)):

        def scaled(factor, group=group, pair=pair):
            gate = torch.ones(space.shape[0], 2 * space.shape[1], dtype=torch.float64)
            gate[group, [pair, pair + space.shape[1]]] = factor
            norm_shape = (-1,) if model.config.model_type == "olmo2" else gate.shape  # its norm has no heads
            hook = norm.register_forward_hook(
                lambda module, inputs, output: tokens_first(
                    model.config, tokens_first(model.config, output) * gate.view(norm_shape)
                )
            )
            with torch.no_grad():
                found = losses(model, source.calibration)
            hook.remove()
            return found

        derivative = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
        assert scores[group, pair].item() == pytest.approx(derivative.abs().mean().item(), rel=1e-3)


def test_regrowth_reads_what_the_norm_would_write(model):
    plan = random_plan(model, ["qk"])
    for space, worth in gated_worth(target(model), plan).items():
        gone = torch.ones(space.shape).scatter_(1, plan.keep[space], 0).bool()
        assert (worth[gone] > 0).all()


def test_methods_that_mix_pairs_are_refused_and_others_are_not(model):
    budget = Budget(value=0.25, of="kv_cache", tolerance=0.2)
    with pytest.raises(ValueError, match=r"norms queries and keys, .*: set strategy.context=null"):
        KVPrunerPlus().check(model.config, budget)
    KVPrunerPlus(context=None, allocator=Global(multiple_of=1)).check(model.config, budget)
    THINK.check(model.config, budget)


def test_think_prunes_it(model, tokens):
    source, budget = target(model), Budget(value=0.25, of="kv_cache", tolerance=0.2)
    plan = THINK.plan(model.config, THINK.score(source), budget, torch.zeros(3))
    with torch.no_grad(), masked(model, plan):
        expected = model(tokens).logits
    assert (apply(model, plan)(tokens).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["stock", "padded"])
def test_stock_classes_cannot_compute_it(model, form):
    with pytest.raises(ValueError, match=r"cut after their norm.* use --to remote_code or custom"):
        to_stock(apply(model, random_plan(model, ["qk"])), form)


def test_keys_can_be_cut_only_once(model):
    once = apply(model, random_plan(model, ["qk"]))
    with pytest.raises(ValueError, match="has no space 'qk', because its keys were cut after their norm"):
        find_spaces(once.config, ["qk"])
    assert find_spaces(tiny_config("llama"), ["qk"])
