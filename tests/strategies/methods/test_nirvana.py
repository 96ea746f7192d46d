"""NIRVANA's saliency by plain autograd, its two tied rankings, and the draw it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kvp.models.masks import masked
from kvp.models.spaces import find_spaces
from kvp.strategies.allocation.tied import Tied
from kvp.strategies.methods.nirvana import NIRVANA, draw
from kvp.strategies.signals.estimate import scoring_bytes
from kvp.strategies.signals.losses import divergences
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import NETWORKS, random_plan, tiny_config, tiny_model
from tests.helpers.live import Live
from tests.helpers.masks import mask

HEAD_DIM = 8
ALLOCATOR = Tied(multiple_of=1, max_ratio=1.0, gamma=2.0)
WHOLE = NIRVANA(allocator=ALLOCATOR, draws=1, share=1.0)
HALVES = NIRVANA(allocator=ALLOCATOR, draws=3, share=0.5)


@pytest.fixture(params=NETWORKS)
def family(request) -> str:
    return request.param


def target_of(model, batch_size=2):
    ids = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size, seed=4)


def naive_saliencies(model, ids):
    """|w df/dw| of every parameter, f the mean over samples and vocabulary of the largest logit in a row."""
    model.zero_grad()
    logits = model(ids).logits
    torch.stack([logits[b, :, v].max() for b in range(len(ids)) for v in range(96)]).mean().backward()
    found = {name: (p * p.grad).abs().detach() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def naive_unit(model, saliency, space, unit):
    layer = f"model.layers.{space.layer}"
    if space.kind == "ffn":
        rows = sum(saliency[f"{layer}.mlp.{name}.weight"][unit].sum() for name in ("gate_proj", "up_proj"))
        return rows + saliency[f"{layer}.mlp.down_proj.weight"][:, unit].sum()
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    total = torch.zeros((), dtype=torch.float64)
    for channel in range(HEAD_DIM):
        for name in ("k_proj", "v_proj"):
            total += saliency[f"{layer}.self_attn.{name}.weight"][unit * HEAD_DIM + channel].sum()
        for head in range(unit * heads, (unit + 1) * heads):
            total += saliency[f"{layer}.self_attn.q_proj.weight"][head * HEAD_DIM + channel].sum()
            total += saliency[f"{layer}.self_attn.o_proj.weight"][:, head * HEAD_DIM + channel].sum()
    return total


@pytest.mark.parametrize("batch_size", [None, 2])
def test_saliencies_are_the_naive_ones(heads, batch_size):
    model = tiny_model("llama", heads, num_hidden_layers=2)
    target = target_of(model)
    scores = replace(WHOLE, batch_size=batch_size).score(target)
    samples = draw(target, 0, 1.0)  # all of them
    parts = [naive_saliencies(model, ids) for ids in samples.split(batch_size or 6)]
    for space in find_spaces(model.config, ["kv_group", "ffn"]):
        for unit in {0, space.shape[0] - 1}:
            expected = sum(naive_unit(model, part, space, unit).item() for part in parts) / len(parts)
            assert scores[space][unit].item() == pytest.approx(expected, rel=1e-4)


def test_checkpointing_and_passing_through_leave_no_trace():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain, checkpointed = (
        replace(WHOLE, gradient_checkpointing=flag).score(target_of(model)) for flag in (False, True)
    )
    for space, score in plain.items():
        torch.testing.assert_close(checkpointed[space], score, rtol=1e-4, atol=1e-9)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not model.training


def test_saliencies_permute_with_the_units():
    model = tiny_model("qwen2", "gqa")
    before, layer = WHOLE.score(target_of(model)), model.model.layers[1]
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            for parameter in getattr(layer.self_attn, name).parameters():
                parameter.copy_(parameter.view(2, -1).flip(0).clone().view_as(parameter))
        o = layer.self_attn.o_proj.weight
        o.copy_(o.view(len(o), 2, -1).flip(1).clone().flatten(1))
        for projection, axis in ((layer.mlp.gate_proj, 0), (layer.mlp.up_proj, 0), (layer.mlp.down_proj, 1)):
            projection.weight.copy_(projection.weight.flip(axis).clone())
    for space, score in WHOLE.score(target_of(model)).items():
        expected = before[space].flip(0) if space.layer == 1 else before[space]
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-8)


def test_a_broken_model_is_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="of batch 0 is not finite"):
        WHOLE.score(target_of(model))


@pytest.mark.parametrize(("sparsity", "gamma"), [(0.2, 3.36), (0.5, 3.36), (0.5, 3.0)])
def test_llama_3_8b_loses_as_many_units_as_in_the_reference(sparsity, gamma):
    config = LlamaConfig(  # with eight of its 32 layers
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=8,
    )
    generator = torch.Generator().manual_seed(0)
    scores = {
        space: torch.rand(space.shape, generator=generator)
        for space in find_spaces(config, ["kv_group", "ffn"])
    }
    strategy = NIRVANA(allocator=Tied(max_ratio=1.0, gamma=gamma))
    budget = Budget(value=sparsity, of="block_params", tolerance=0.001)
    plan = strategy.plan(config, scores, budget, torch.zeros(8))
    kept = {kind: [s for s in plan.keep if s.kind == kind] for kind in ("kv_group", "ffn")}
    groups, neurons = (sum(s.shape[0] - len(plan.keep[s]) for s in kept[k]) for k in ("kv_group", "ffn"))
    per_group, per_neuron = 2 * 128 * (4 + 1), 3  # rows and columns of a unit
    ratio = 8 / (gamma * 14336)  # of groups to neurons removed
    removed = sparsity * 8 * (8 * per_group + 14336 * per_neuron)
    assert groups == pytest.approx(removed / (per_group + per_neuron / ratio), abs=1)
    assert neurons == pytest.approx(removed / (per_group + per_neuron / ratio) / ratio, abs=200)
    assert all(len(plan.keep[s]) % 8 == 0 for s in kept["ffn"])
    assert min(len(plan.keep[s]) for s in kept["kv_group"]) >= 1
    lowest = torch.cat([scores[s] for s in kept["kv_group"]]).sort().values[groups - 1]
    assert sum(int((scores[s] <= lowest).sum()) for s in kept["kv_group"]) == groups


def test_where_one_side_is_empty_the_other_gives_the_rest():
    config = tiny_config("llama", "mqa")  # its only group stays
    scores = {space: torch.rand(space.shape) for space in find_spaces(config, ["kv_group", "ffn"])}
    budget = Budget(value=0.3, of="block_params")
    plan = WHOLE.plan(config, scores, budget, torch.zeros(3))
    assert all(len(keep) == 1 for space, keep in plan.keep.items() if space.kind == "kv_group")
    config = tiny_config("llama", "mha")  # neurons hold nothing of the cache
    scores = {space: torch.rand(space.shape) for space in find_spaces(config, ["kv_group", "ffn"])}
    plan = WHOLE.plan(config, scores, Budget(value=0.25, of="kv_cache"), torch.zeros(3))
    assert all(len(keep) == 40 for space, keep in plan.keep.items() if space.kind == "ffn")
    assert sum(len(keep) for space, keep in plan.keep.items() if space.kind == "kv_group") == 9


def naive_divergence(dense, pruned, ids):
    with torch.no_grad():
        p, q = (F.log_softmax(model(ids).logits, dim=-1) for model in (dense, pruned))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_divergences_are_the_naive_ones(family):
    model = tiny_model(family)
    plans = [random_plan(model, ["vo", "ffn"], seed=seed) for seed in range(2)]
    target = target_of(model)
    removals = [lambda plan=plan: masked(model, plan) for plan in plans]
    for found, plan in zip(divergences(model, target.batches, removals, "KL"), plans, strict=True):
        expected = naive_divergence(model, mask(model, plan), target.calibration)
        assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_draw_of_the_least_divergence_is_taken(tmp_path):
    model, budget = tiny_model("llama", "gqa"), Budget(value=0.3, of="block_params")
    target, profile = target_of(model), torch.zeros(3)
    scores = HALVES.score(target)
    found = HALVES.search(target, scores, budget, profile, tmp_path)
    plans = []
    for number in range(3):
        drawn = replace(target, calibration=draw(target, number, 0.5))
        plans.append(WHOLE.plan(model.config, WHOLE.score(drawn), budget, profile))
    nats = [naive_divergence(model, mask(model, plan), target.calibration) for plan in plans]
    assert len({round(value, 6) for value in nats}) > 1, "the draws must differ for this to be a test"
    best = plans[nats.index(min(nats))]
    assert all(torch.equal(keep, best.keep[space]) for space, keep in found.keep.items())


def test_draws_are_halves_without_repetition_and_follow_the_seed():
    target = target_of(tiny_model())
    first, second = (draw(target, number, 0.5) for number in (0, 1))
    assert len(first) == 3 == len(first.unique(dim=0))
    assert torch.equal(second, draw(target, 1, 0.5))
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(replace(target, seed=5), 0, 0.5))
    assert len(draw(target, 0, 0.01)) == 1


@pytest.mark.parametrize("draws", [1, 2])
def test_the_logits_of_its_objective_are_estimated(draws):
    config = LlamaConfig(
        vocab_size=50_000,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="float32",
    )
    model, method = LlamaForCausalLM(config).eval(), replace(HALVES, draws=draws)
    ids = torch.randint(50_000, (4, 256), generator=torch.Generator().manual_seed(0))
    target = Target(model, ids, 2, 0)
    with Live(model) as live, TemporaryDirectory() as place:
        scores = method.score(target)
        if draws > 1:
            method.search(
                target,
                scores,
                Budget(value=0.25, of="block_params", tolerance=0.1),
                torch.zeros(2),
                Path(place),
            )
    parts = method.peak_bytes(config, samples=4, batch_size=2, length=256, on_cpu=False)
    assert live.peak == pytest.approx(parts["total"] - parts["weights"], rel=0.25)


def test_one_backward_of_the_papers_sample_fits_24_gib():
    config = LlamaConfig(dtype="bfloat16")  # LLaMA-7B
    estimate = scoring_bytes(config, batch_size=32, length=128, gradient_checkpointing=True)
    assert estimate["total"] < 24 * 2**30


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("draws", 0, r"strategy.draws must be >= 1, got 0"),
        ("share", 0.0, r"strategy.share must be in \(0, 1\], got 0.0"),
        ("share", 1.0, r"makes all draws the same"),
        ("batch_size", 0, r"strategy.batch_size must be >= 1 or null, got 0"),
    ],
)
def test_bad_values_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(HALVES, **{field: value})


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match=r"allocator.gamma must be > 0, got 0"):
        Tied(gamma=0)
