"""ThinK's scores by a loop over heads, and by what a removed pair really changes in the logits."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvp.models.masks import masked
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.compensation.compensate import Bias
from kvp.strategies.methods.think import ThinK
from kvp.strategies.signals.logits import observed_attention
from kvp.strategies.signals.walk import caught_inputs
from kvp.strategies.target import Target
from kvp.types import Budget, Plan
from tests.conftest import random_plan, tiny_config, tiny_model

HALF, WINDOW = 4, 5
STRATEGY = ThinK(allocator=Uniform(multiple_of=2, max_ratio=1.0), window=WINDOW)


def target_of(model, batch_size=2):
    ids = torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size, seed=0)


def naive_score(model, ids, layer):
    """(groups, pairs) mean over samples of ||Q_window[:, p] K[:, p]^T||^2 per entry, summed over query heads."""
    attention = model.model.layers[layer].self_attn
    with torch.no_grad(), caught_inputs(model, [f"model.layers.{layer}.self_attn.q_proj"]) as caught:
        model(ids)
        (states,) = caught.values()
        q, k = (
            projection(states).view(*ids.shape, -1, 2 * HALF).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(states, torch.arange(ids.shape[1])[None]))
    score = torch.zeros(k.shape[1], HALF, dtype=torch.float64)
    for sample in range(len(ids)):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            for pair in range(HALF):
                channels = [pair, pair + HALF]
                logits = q[sample, head, -WINDOW:, channels] @ k[sample, group][:, channels].T
                score[group, pair] += logits.square().mean().item() / len(ids)
    return score


def test_scores_are_the_naive_ones(heads):
    model = tiny_model("llama", heads, num_hidden_layers=2)
    target = target_of(model)
    for space, score in STRATEGY.score(target).items():
        expected = naive_score(model, target.calibration, space.layer).float()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-6)


def logits_of_first_layer(model, ids):
    """(batch, heads, window, keys) products of rotated queries and keys."""
    seen = []
    with torch.no_grad(), observed_attention(model, lambda module, query, key: seen.append((query, key))):
        model(ids)
    query, key = seen[0]
    return query[:, :, -WINDOW:] @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT


def test_a_score_is_what_the_logits_lose_with_the_pair(heads):
    model = tiny_model("llama", heads)
    target = target_of(model)
    space, score = next(iter(STRATEGY.score(target).items()))
    dense = logits_of_first_layer(model, target.calibration)
    for pair in range(HALF):
        keep = torch.tensor([[p for p in range(HALF) if p != pair]] * space.shape[0])
        with masked(model, Plan({space: keep})):
            lost = (dense - logits_of_first_layer(model, target.calibration)).square().mean(dim=(0, 2, 3))
        expected = lost.view(space.shape[0], -1).sum(1)
        torch.testing.assert_close(score[:, pair], expected, rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_batches_and_attention_kernel():
    model = tiny_model("mistral", sliding_window=6)
    expected = STRATEGY.score(target_of(model, batch_size=5))
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        for space, score in STRATEGY.score(target_of(model)).items():
            torch.testing.assert_close(score, expected[space], rtol=1e-4, atol=1e-6)
        assert kernel not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_scores_permute_with_the_kv_groups():
    model = tiny_model("qwen2", "gqa")
    before = STRATEGY.score(target_of(model))
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            for parameter in getattr(attention, name).parameters():
                parameter.copy_(parameter.view(2, -1).flip(0).clone().view_as(parameter))
        o = attention.o_proj.weight
        o.copy_(o.view(len(o), 2, -1).flip(1).clone().flatten(1))
    for space, score in STRATEGY.score(target_of(model)).items():
        expected = before[space].flip(0) if space.layer == 1 else before[space]
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-6)


def test_a_pruned_model_can_be_scored_again():
    model = tiny_model("llama", "gqa")
    plan = random_plan(model, ["qk"])
    before, after = (STRATEGY.score(target_of(m)) for m in (model, apply(model, plan)))
    (dense, score), (left, again) = (next(iter(scores.items())) for scores in (before, after))
    assert left.shape == (2, plan.keep[dense].shape[1])
    torch.testing.assert_close(again, score.gather(1, plan.keep[dense]), rtol=1e-4, atol=1e-6)


def test_the_papers_forty_percent_of_the_keys_are_a_fifth_of_the_cache():
    config = tiny_config("llama", "mha", head_dim=80)
    strategy = ThinK(allocator=Uniform(multiple_of=8, max_ratio=1.0))
    scores = {space: torch.rand(space.shape) for space in find_spaces(config, ["qk"])}
    plan = strategy.plan(config, scores, Budget(value=0.2, of="kv_cache", tolerance=0), torch.zeros(3))
    assert {space.kind for space in plan.keep} == {"qk"}
    for space, keep in plan.keep.items():  # 48 of 80 channels
        expected = scores[space].topk(24).indices.sort().values
        assert torch.equal(keep, expected)


def test_half_of_the_cache_is_the_limit():
    config = tiny_config("llama", "mha", head_dim=64)
    limit = ThinK(allocator=Uniform(multiple_of=2, max_ratio=1.0))
    limit.check(config, Budget(value=31 / 64, of="kv_cache", tolerance=0))
    strategy = ThinK(allocator=Uniform(multiple_of=8, max_ratio=1.0))
    strategy.check(config, Budget(value=0.4375, of="kv_cache", tolerance=0))
    with pytest.raises(ValueError, match=r"ratio.value=0.5 of kv_cache .* nearest is 0.4375"):
        strategy.check(config, Budget(value=0.5, of="kv_cache"))


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match=r"strategy.window must be >= 1, got 0"):
        ThinK(allocator=Uniform(), window=0)
    with pytest.raises(ValueError, match="nothing can compensate"):
        ThinK(allocator=Uniform(), compensation=Bias())


def test_a_broken_model_is_named():
    model = tiny_model()
    model.model.layers[1].self_attn.q_proj.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="a query-key product of layer 1 is not finite"):
        STRATEGY.score(target_of(model))


def test_an_attention_of_the_users_own_is_there_again(monkeypatch):
    calls, plain = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", mine)
    model = tiny_model()
    STRATEGY.score(target_of(model))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    before = len(calls)
    model(torch.tensor([[3, 4]]))
    assert len(calls) > before
