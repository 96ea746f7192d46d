"""The truths of surgery: masked = sliced, round trips, caches, LoRA."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvp.models.family import FAMILIES
from kvp.models.masks import masked, without
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.types import Plan, Space
from tests.conftest import random_plan, tiny_model
from tests.helpers.masks import mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_can_be_pickled(family, tokens):
    model = tiny_model(family)
    pruned = apply(model, random_plan(model, ["vo"]))
    copy = pickle.loads(pickle.dumps(pruned))
    with torch.no_grad():
        assert torch.equal(copy(tokens).logits, pruned(tokens).logits)
    assert pickle.loads(pickle.dumps(pruned.config)).to_dict() == pruned.config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_evaluated_can_be_trained(family, tokens):
    """Check that gradients pass through tables that a pass in inference mode made."""
    model = tiny_model(family)
    kinds = [kind for kind in ("qk", "vo") if kind in available_kinds(model.config)]
    pruned = apply(model, random_plan(model, kinds)).train()
    with torch.inference_mode():
        pruned(tokens)
        pruned(tokens[:, :1])
    pruned(tokens, labels=tokens).loss.backward()
    pruned(tokens[:, :1]).logits.sum().backward()


ALL = ["block", "attention", "mlp", "kv_group", "qk", "vo", "ffn"]
WIDTHS = ["kv_group", "qk", "vo", "ffn"]


def offered(model, kinds):
    return [kind for kind in kinds if kind in available_kinds(model.config)]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kinds", [[kind] for kind in ALL] + [WIDTHS, ALL], ids="+".join)
@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_sliced(family, heads, kinds, seed, tokens):
    model = tiny_model(family, heads, dtype=torch.float64, seed=seed)
    if not (kinds := offered(model, kinds)):
        return
    plan = random_plan(model, kinds, seed=seed)
    sliced = logits(apply(model, plan), tokens)
    assert (sliced - logits(mask(model, plan), tokens)).abs().max() < 1e-6
    removes = any(keep.shape[-1] < space.shape[-1] for space, keep in plan.keep.items())
    assert ((sliced - logits(model, tokens)).abs().max() > 1e-3) == removes


def test_identity_plan_changes_nothing(family, heads, tokens):
    model = tiny_model(family, heads, dtype=torch.float64)
    everything = random_plan(model, list(available_kinds(model.config)), keep=1.0)
    plan = Plan({space: torch.arange(space.shape[-1]).expand(space.shape) for space in everything.keep})
    assert torch.equal(logits(apply(model, plan), tokens), logits(model, tokens))


def test_size_from_shapes_counts_the_real_parameters(family, heads):
    model = tiny_model(family, heads)
    plan = random_plan(model, offered(model, ALL))
    pruned = apply(model, plan)
    counted = size(model.config, cut(layer_shapes(model.config), plan))
    assert counted.params == sum(p.numel() for p in pruned.parameters())
    assert counted.block_params == sum(p.numel() for p in pruned.model.layers.parameters())
    assert counted == size(pruned.config, layer_shapes(pruned.config))


def test_saved_model_opens_with_the_same_logits(family, heads, tokens, tmp_path):
    model = tiny_model(family, heads)
    pruned = apply(model, random_plan(model, offered(model, ALL)))
    pruned.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reopened) is type(pruned)
    assert torch.equal(logits(reopened, tokens), logits(pruned, tokens))


@pytest.mark.parametrize("kinds", [["qk", "vo"], ["attention", "kv_group"], ALL], ids="+".join)
def test_generation_is_the_same_with_every_cache(family, kinds, tokens):
    model = tiny_model(family)
    pruned = apply(model, random_plan(model, offered(model, kinds)))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dynamic = pruned.generate(tokens, **options)
    assert torch.equal(dynamic, pruned.generate(tokens, cache_implementation="static", **options))
    assert torch.equal(dynamic, pruned.generate(tokens, use_cache=False, **options))


def test_cache_shrinks_to_the_counted_bytes(family, tokens):
    model = tiny_model(family)
    pruned = apply(model, random_plan(model, offered(model, ["kv_group", "qk", "vo"])))
    cache = pruned(tokens, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    per_token = size(pruned.config, layer_shapes(pruned.config)).kv_bytes_per_token
    assert held == per_token * tokens.numel()
    assert per_token < size(model.config, layer_shapes(model.config)).kv_bytes_per_token


def test_left_padding_is_ignored(family):
    model = tiny_model(family)
    pruned = apply(model, random_plan(model, offered(model, WIDTHS)))
    text = torch.arange(3, 13)[None]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), text], dim=1)
    attention_mask = (padded != 0).long()
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = pruned(padded, attention_mask=attention_mask, position_ids=positions).logits[:, 4:]
    assert (out - logits(pruned, text)).abs().max() < 1e-4


def test_a_pruned_model_can_be_pruned_again(family, tokens):
    model = tiny_model(family, dtype=torch.float64)
    once = apply(model, random_plan(model, offered(model, ALL), keep=0.75))
    plan = random_plan(once, offered(once, WIDTHS), seed=5)
    assert (logits(apply(once, plan), tokens) - logits(mask(once, plan), tokens)).abs().max() < 1e-6


def test_sdpa_and_eager_agree(family, tokens):
    model = tiny_model(family, dtype=torch.float64)
    pruned = apply(model, random_plan(model, offered(model, WIDTHS)))
    sdpa = logits(pruned, tokens)
    pruned.set_attn_implementation("eager")
    assert (sdpa - logits(pruned, tokens)).abs().max() < 1e-5  # eager takes its softmax in float32


def test_layer_types_follow_the_blocks(tokens):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=4)
    space = find_spaces(model.config, ["block"])[0]
    pruned = apply(model, Plan({space: torch.tensor([1, 2])}))
    assert pruned.config.layer_types == ["sliding_attention", "full_attention"]
    assert (
        logits(pruned, tokens) - logits(mask(model, Plan({space: torch.tensor([1, 2])})), tokens)
    ).abs().max() < 1e-5
    with pytest.raises(ValueError, match="has no space 'attention', because it mixes sliding and full"):
        find_spaces(model.config, ["attention"])
    with pytest.raises(ValueError, match="mixes sliding and full"):
        apply(model, Plan({Space("attention", None, (3,)): torch.tensor([0, 2])}))


def test_context_managers_restore_the_model(tokens):
    model = tiny_model()
    before, plan = logits(model, tokens), random_plan(model, ["qk", "vo", "ffn"])
    with masked(model, plan):
        assert torch.equal(logits(model, tokens), logits(mask(model, plan), tokens))
        assert not torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), before)
    with without(model, 1, "attention"):
        assert not torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), before)


def test_wrong_plans_are_refused():
    model = tiny_model()
    attention = find_spaces(model.config, ["attention"])[0]
    with pytest.raises(ValueError, match="at least one layer must keep its attention"):
        apply(model, Plan({attention: torch.tensor([], dtype=torch.long)}))
    with pytest.raises(ValueError, match="made for another model"):
        apply(model, Plan({Space("ffn", 0, (99,)): torch.arange(4)}))
    model = tiny_model("qwen3")
    cut = apply(model, random_plan(model, ["qk"]))
    with pytest.raises(ValueError, match=r"has no space 'qk', because .* after their norm.*; it has: block"):
        find_spaces(cut.config, ["qk"])


def test_lora_attaches_and_trains(family, tokens):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family)
    pruned = get_peft_model(
        apply(model, random_plan(model, offered(model, ALL))),
        LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    optimizer = torch.optim.Adam([p for p in pruned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = pruned(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
