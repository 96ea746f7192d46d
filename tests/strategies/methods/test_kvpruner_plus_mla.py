"""KVPruner+ as MLA: its latent against naive sums, its widths, and its export, which loses nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig

from kvp.models.joined import joined, joined_config
from kvp.models.masks import edited
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.serving.mla import to_mla
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.methods.kvpruner_plus_mla import KVPrunerPlusMLA
from kvp.strategies.signals.head_moments import Heads, output_columns
from kvp.strategies.signals.latents import _gains, find_latent, still_channels
from kvp.strategies.signals.walk import caught_inputs, walk
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import refitted, tiny_config, tiny_model
from tests.helpers.stock import ROPES

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
HALF = Budget(value=0.5, of="kv_cache", tolerance=0.05)
PLAIN = {"attention_bias": False, "mlp_bias": False}
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    dtype="bfloat16",
)


def strategy(**options):
    return KVPrunerPlusMLA(**{"allocator": Uniform(multiple_of=2), "context": 40, "angle": 0.9, **options})


def whole(heads="gqa", family="llama", **changes):
    return joined(tiny_model(family, heads, dtype=torch.float64, **{**PLAIN, **changes}), 1, latent=True)


def planned(method, model, path, budget=HALF):
    target = Target(model, IDS, batch_size=2, seed=0)
    path.mkdir(exist_ok=True)
    return method.search(target, method.score(target), budget, torch.zeros(3), path)


def zero_scores(config):
    return {space: torch.zeros(space.shape) for space in find_spaces(config, ("qk", "vo"))}


def first_latent(model, first=2, value_weight=2.0, key_weight=0.5):
    visit = next(iter(walk(model, IDS.split(2), "heads")))
    still = still_channels(visit, first)
    return visit, find_latent(visit, still, value_weight, key_weight)


def naive_moments(model, visit, latent):
    """S and C of values and still keys in one pass: attention by its own weights, token by token."""
    attention, heads = model.model.layers[0].self_attn, model.config.num_attention_heads
    with torch.no_grad(), caught_inputs(model, [name := f"{visit.name}.self_attn.q_proj"]) as caught:
        weights = model(IDS, output_attentions=True).attentions[0]
    given = caught[name] @ torch.cat([attention.v_proj.weight, attention.k_proj.weight[latent.still]]).T
    read = torch.einsum("bhts,bsn->bhtn", weights, given).flatten(0, 2)
    centred = (given - given.mean(1, keepdim=True)).flatten(0, 1)
    assert weights.shape[1] == heads
    return read.T @ read / len(read), centred.T @ centred / len(centred), caught[name]


def test_the_worth_of_the_latent_is_the_naive_loss(heads):
    """Return what the best decoders lose with fewer rows, from the mean squares of outputs and logits themselves."""
    model = whole(heads)
    model.set_attn_implementation("eager")
    visit, latent = first_latent(model)
    attended, centred, x = naive_moments(model, visit, latent)
    torch.testing.assert_close(latent.attended, attended, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(latent.centred, centred, rtol=1e-4, atol=1e-6)
    asked = x.flatten(0, 1) @ Heads(visit).rows("q")[0][:, latent.still].flatten(0, 1).T
    asked = asked.detach().unflatten(1, (model.config.num_attention_heads, -1))
    queries = torch.einsum("thi,thj->ij", asked, asked) / len(asked)
    outputs, values = output_columns(visit)[0].flatten(0, 1), len(latent.encoder)

    def loss(kept):
        total = torch.zeros((), dtype=torch.float64)
        weighed = ((latent.attended, 2.0 * outputs.T @ outputs, 0), (latent.centred, 0.5 * queries, 1))
        for moment, by, part in weighed:
            read = latent.encoder[:kept]
            left = moment - moment @ read.T @ torch.linalg.inv(read @ moment @ read.T) @ read @ moment
            rows = slice(values, None) if part else slice(values)
            total += (by * left[rows, rows]).sum()
        return total

    for kept in (1, values // 2, values - 1):
        torch.testing.assert_close(loss(kept) - loss(kept + 1), latent.worth[kept], rtol=1e-4, atol=1e-9)
    assert latent.worth.min() >= 0


@pytest.mark.parametrize("rope", ["default", "yarn"])
@torch.no_grad()
def test_values_and_still_keys_share_a_latent_where_there_is_room(rope):
    """Values of rank 6 and 24 still channels of keys fit into 32 rows: the logits stay, and k_proj only turns.

    Yarn makes all logits larger; those of keys that stop turning stay so.
    """
    slow = ROPES[rope] | {"rope_theta": 1e24}  # of four pairs, three do not turn
    model = whole("mha", rope_parameters=slow)
    for layer in model.model.layers:
        rows = layer.self_attn.v_proj.weight
        rows[6:] = torch.randn(26, 6, dtype=torch.float64) @ rows[:6]
    expected, edits = model(IDS).logits, {}
    for visit in walk(model, IDS.split(2), "heads"):
        still = still_channels(visit, 1)
        edits |= find_latent(visit, still, 1.0, 1.0).edits(32)
        query = model.get_parameter(f"{visit.name}.self_attn.q_proj.weight").unflatten(0, (4, 32)).clone()
        query[:, still] = 0
        edits[f"{visit.name}.self_attn.q_proj.weight"] = query.flatten(0, 1)
    with edited(model, edits):
        found = model(IDS).logits
    assert (found - expected).abs().max() < 1e-3
    assert (model(IDS).logits - expected).abs().max() == 0


@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa"])
@torch.no_grad()
def test_the_export_is_exact_and_its_matrices_are_no_larger_than_dense_ones(heads, tmp_path):
    model = whole(heads, rms_norm_eps=1e-5)
    method = strategy()
    method.check(tiny_config("llama", heads, **PLAIN), HALF)
    plan = planned(method, model, tmp_path / "plan")
    plan = refitted(method.compensation, model, IDS.split(2), plan)
    pruned = apply(model, plan).float()
    mla = to_mla(pruned, "mla")
    assert (mla(IDS).logits - pruned(IDS).logits).abs().max() < 1e-4
    shape = layer_shapes(pruned.config)[0]
    assert (mla.config.kv_lora_rank, mla.config.qk_rope_head_dim) == (shape.v_head_dim, shape.qk_head_dim)
    assert mla.config.v_head_dim <= 8  # the dense head's
    assert mla.config.qk_nope_head_dim <= 8
    free = refitted(Sequential(), model, IDS.split(2), planned(method, model, tmp_path / "free"))
    assert to_mla(apply(model, free).float(), "mla").config.v_head_dim == shape.v_head_dim


@torch.no_grad()
def test_a_factored_refit_is_the_best_of_its_directions(tmp_path):
    """Against lstsq on the values along those directions; and nearer to the dense output than no refit."""
    model = whole("mha", num_hidden_layers=1)
    method, name = strategy(), "model.layers.0.self_attn.o_proj"
    plan = planned(method, model, tmp_path)
    found = refitted(Sequential(ridge=1e-9, factored=True), model, IDS.split(2), plan)
    (rank,) = {keep.shape[-1] for space, keep in plan.keep.items() if space.kind == "vo"}

    def seen(some):
        with caught_inputs(some, [name]) as caught:
            some(IDS)
        return caught[name].flatten(0, 1)

    cut_model = apply(model, plan)
    prior = cut_model.get_parameter(f"{name}.weight").unflatten(1, (4, rank)).transpose(0, 1)
    read = torch.block_diag(*torch.linalg.svd(prior, full_matrices=False).Vh[:, :8])
    wanted, given = seen(model) @ model.get_parameter(f"{name}.weight").T, seen(cut_model)
    solution = torch.linalg.lstsq(given @ read.T, wanted).solution.T @ read
    weight = apply(model, found).get_parameter(f"{name}.weight")
    torch.testing.assert_close(given @ weight.T, given @ solution.T, rtol=1e-4, atol=1e-5)
    before = given @ cut_model.get_parameter(f"{name}.weight").T
    assert (given @ weight.T - wanted).norm() < (before - wanted).norm()
    assert all(torch.linalg.matrix_rank(part) <= 8 for part in weight.unflatten(1, (4, rank)).transpose(0, 1))


@pytest.mark.parametrize(("rank", "rotated"), [(512, 64), (256, 64), (None, 64)])
def test_deepseek_widths_of_llama_3_8b(rank, rotated):
    """DeepSeek-V2 caches 512 + 64 numbers per token and layer (arXiv:2405.04434)."""
    cached = (rank or 512) + rotated
    method = KVPrunerPlusMLA(kv_lora_rank=rank, qk_rope_head_dim=rotated)
    budget = Budget(value=1 - cached / 2048, of="kv_cache")
    method.check(LLAMA_3_8B, budget)
    config = joined_config(LLAMA_3_8B, 1, latent=True)
    shapes = cut(layer_shapes(config), method.plan(config, zero_scores(config), budget, torch.zeros(32)))
    assert {(shape.v_head_dim, shape.qk_head_dim) for shape in shapes} == {(rank or 512, 64)}
    assert size(config, shapes).kv_bytes_per_token == 32 * cached * 2
    (pairs,) = shapes[0].rope_pairs
    assert len(set(pairs)) == 32
    assert len({after - before for before, after in pairwise(pairs)}) == 1


def test_widths_and_spacing_keep_the_most(tmp_path):
    """Worth in every other frequency takes every other one; worth in the latent alone leaves one pair."""
    config = joined_config(tiny_config("llama", "mha"), 1, latent=True)
    scores = zero_scores(config)
    for space, score in scores.items():
        score += 0.01 if space.kind == "qk" else 1.0
        if space.kind == "qk":
            score[0, :4:2] = 100.0
    budget = replace(HALF, tolerance=0.02)
    plan = strategy(context=None).plan(config, scores, budget, torch.zeros(3))
    assert {tuple(keep[0].tolist()) for space, keep in plan.keep.items() if space.kind == "qk"} == {(0, 2)}
    for space, score in scores.items():
        score[:] = 0.01 if space.kind == "qk" else 1.0
    plan = strategy(context=None).plan(config, scores, budget, torch.zeros(3))
    assert {keep.shape[-1] for space, keep in plan.keep.items() if space.kind == "qk"} == {1}


@pytest.mark.parametrize(
    ("config", "options", "budget", "message"),
    [
        (LLAMA_3_8B, {}, Budget(value=0.5, of="params"), "ratio=kv_cache only; got ratio.of=params"),
        (
            LLAMA_3_8B,
            {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
            HALF,
            r"kv_lora_rank=512, qk_rope_head_dim=64\); the nearest is 0\.7188",
        ),
        (LLAMA_3_8B, {"kv_lora_rank": 2000}, HALF, "a latent of at most 1024 .* there is none"),
        (tiny_config("qwen3"), {}, HALF, "cannot share one latent"),
        (joined_config(tiny_config("llama"), 1), {}, HALF, "starts from a dense model"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(config, options, budget, message):
    with pytest.raises(ValueError, match=message):
        KVPrunerPlusMLA(**options).check(config, budget)


def test_directions_that_no_token_takes_are_worth_nothing():
    tokens = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worth = _gains(
        tokens.T @ tokens, torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), slice(8)
    )
    assert worth[:3].min() > 1e-3 and worth[3:].abs().max() < 1e-4
    zeros = torch.zeros(8, 8, dtype=torch.float64)
    assert not _gains(
        zeros, torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), slice(8)
    ).any()
