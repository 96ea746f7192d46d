"""Palu, CARE, SVD-LLM v2 and ReCalKV: their formulas, naively, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

from kvp.models.masks import edited
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.methods.care import CARE
from kvp.strategies.methods.palu import Palu
from kvp.strategies.methods.recalkv import ReCalKV, grouped
from kvp.strategies.methods.svd_llm_v2 import SVDLLMv2
from kvp.strategies.signals.low_rank import input_moments_of
from kvp.strategies.signals.walk import caught_inputs, walk
from kvp.strategies.target import Target
from kvp.types import Budget, Plan
from tests.conftest import tiny_model

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
HALF = Budget(value=0.5, of="kv_cache", tolerance=0.1)
PLAIN = {"attention_bias": False, "mlp_bias": False}
UNIFORM = Uniform(multiple_of=2)


def whole(method, heads="mha", **changes):
    return method.recast(tiny_model("llama", heads, dtype=torch.float64, **{**PLAIN, **changes}))


def planned(method, model, path, budget=HALF):
    target = Target(model, IDS, batch_size=3, seed=0)
    path.mkdir(exist_ok=True)
    return method.search(target, method.score(target), budget, torch.zeros(3), path)


def inputs_of(model, layer=0):
    name = f"model.layers.{layer}.self_attn.k_proj"
    with torch.no_grad(), caught_inputs(model, [name]) as caught:
        model(IDS)
    return caught[name].flatten(0, 1)


@pytest.mark.parametrize("method", [Palu(), CARE(), SVDLLMv2(), ReCalKV()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.65])
def test_budgets_are_met_and_the_rest_serves(method, ratio, tmp_path):
    method = replace(method, allocator=replace(method.allocator, multiple_of=1, max_ratio=0.95))
    model = whole(method)
    plan = planned(method, model, tmp_path, Budget(value=ratio, of="kv_cache", tolerance=0.02))
    shapes = layer_shapes(model.config)
    dense, left = (size(model.config, s).kv_bytes_per_token for s in (shapes, cut(shapes, plan)))
    assert 1 - left / dense == pytest.approx(ratio, abs=0.02)
    assert torch.isfinite(apply(model, plan)(IDS).logits).all()


def test_palu_is_a_whitened_svd_per_group(tmp_path):
    """Rebuild k_proj and v_proj as the authors do: Cholesky, SVD of each group's rows, the first ranks."""
    method = Palu(key_heads=2, value_heads=2, allocator=UNIFORM)
    dense = tiny_model("llama", "mha", dtype=torch.float64, **PLAIN)
    x = inputs_of(dense)
    root = torch.linalg.cholesky(x.T @ x)
    model = method.recast(dense)
    pruned = apply(model, planned(method, model, tmp_path)).model.layers[0].self_attn
    for part in ("k", "v"):
        weight = dense.get_parameter(f"model.layers.0.self_attn.{part}_proj.weight").detach()
        reads = getattr(pruned, f"{part}_proj").weight.chunk(2)
        expands = getattr(pruned, f"{part}_up_proj").weight.chunk(2, 1)
        for rows, read, expand in zip(weight.chunk(2), reads, expands, strict=True):
            left, singular, right = torch.linalg.svd(rows @ root, full_matrices=False)
            theirs = left[:, :8] * singular[:8] @ right[:8] @ torch.linalg.inv(root)
            torch.testing.assert_close(expand @ read, theirs)


def test_palu_shares_ranks_by_fisher_information():
    method = Palu()
    model = whole(method)
    scores = method.score(Target(model, IDS, batch_size=3, seed=0))
    sums = {space: score.sum().item() for space, score in scores.items()}
    squares = dict.fromkeys(sums, 0.0)
    for sample in IDS:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(sample[None]).logits[0, :-1], sample[1:])
        loss.backward()
        for space in sums:
            name = f"model.layers.{space.layer}.self_attn.{space.kind[0]}_proj.weight"
            squares[space] = squares[space] + model.get_parameter(name).grad ** 2 / len(IDS)
    for space, total in sums.items():
        assert total == pytest.approx(squares[space].sqrt().mean().item(), rel=1e-3)


def test_care_is_an_svd_under_the_damped_root(tmp_path):
    method = CARE(allocator=UNIFORM)
    dense = tiny_model("llama", "gqa", dtype=torch.float64, **PLAIN)
    x = inputs_of(dense)
    moment = x.T @ x
    moment += 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.T
    model = method.recast(dense)
    pruned = apply(model, planned(method, model, tmp_path)).model.layers[0].self_attn
    weight = dense.model.layers[0].self_attn.k_proj.weight.detach()
    left, singular, right = torch.linalg.svd(root @ weight.T, full_matrices=False)  # the authors' orientation
    theirs = torch.linalg.inv(root) @ left[:, :8] * singular[:8] @ right[:8]
    torch.testing.assert_close(pruned.k_up_proj.weight @ pruned.k_proj.weight, theirs.T)


def naive_cka(first, second):
    first, second = first - first.mean(0), second - second.mean(0)
    cross = (first.T @ second).norm() ** 2
    return (cross / ((first.T @ first).norm() * (second.T @ second).norm())).item()


def test_recalkv_groups_the_heads_whose_keys_are_most_alike():
    method = ReCalKV(key_heads=2)
    model = whole(method)
    with torch.no_grad():  # heads 0 and 2 give the same keys, turned
        weight = model.model.layers[0].self_attn.k_proj.weight.view(4, 8, -1)
        turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
        weight[2] = turn @ weight[0] * 3
    keys = (inputs_of(model) @ model.model.layers[0].self_attn.k_proj.weight.T).chunk(4, 1)
    alike = {(i, j): naive_cka(keys[i], keys[j]) for i in range(4) for j in range(i)}
    assert max(alike, key=alike.get) == (2, 0)
    visit = next(iter(walk(model, IDS.split(3), "test")))
    edits = method.edits(visit)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().view(4, 8, -1)
    moved = edits["model.layers.0.self_attn.q_proj.weight"].view(4, 8, -1)
    order = [next(h for h in range(4) if torch.equal(before[h], moved[n])) for n in range(4)]
    assert order == [0, 2, 1, 3]
    with torch.no_grad(), edited(model, edits):
        whole_again = model(IDS).logits
    torch.testing.assert_close(whole_again, model(IDS).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "olmo3", "gpt_oss"])
def test_heads_in_another_order_are_the_same_function(family):
    """Norms over all heads, and the sinks of query heads, move with them."""
    method = ReCalKV(key_heads=2)
    model = method.recast(tiny_model(family, "mha", dtype=torch.float64))
    edits, orders = {}, []
    for visit in walk(model, IDS.split(3), "test"):
        edits |= method.edits(visit)
        orders.append(method._order(visit, input_moments_of(visit)).tolist())
    assert any(order != sorted(order) for order in orders)
    with torch.no_grad(), edited(model, edits):
        moved = model(IDS).logits
    torch.testing.assert_close(moved, model(IDS).logits, atol=1e-6, rtol=1e-6)


def test_pairs_join_from_the_most_alike_down():
    alike = torch.zeros(6, 6)
    for i, j, value in ((0, 3, 0.9), (3, 5, 0.8), (0, 1, 0.7), (1, 4, 0.6), (2, 4, 0.5)):
        alike[i, j] = alike[j, i] = value
    assert grouped(alike, 3) == [[0, 3, 5], [1, 4, 2]]
    assert grouped(alike, 2) == [[0, 3], [1, 4], [2, 5]]
    assert grouped(alike, 1) == [[0], [1], [2], [3], [4], [5]]
    assert sorted(chain(*grouped(torch.rand(8, 8), 4))) == [*range(8)]


def test_recalkv_calibrates_values_to_what_arrives(tmp_path):
    """Least squares of the layer's values on inputs of the model whose layers before are compressed."""
    method = ReCalKV(key_heads=2, allocator=UNIFORM, reorder=False, iterations=1)
    plain = replace(method, iterations=0)
    model = whole(method)
    plan, before = (planned(m, model, tmp_path / name) for m, name in ((method, "a"), (plain, "b")))
    rank = next(keep.shape[1] for space, keep in plan.keep.items() if space.kind == "v_latent")
    value, up = (f"model.layers.1.self_attn.{name}.weight" for name in ("v_proj", "v_up_proj"))
    first = {name: edit for name, edit in plan.edits.items() if ".layers.0." in name}
    keep = {space: kept for space, kept in plan.keep.items() if space.layer == 0}
    x = inputs_of(apply(model, Plan(keep, first)), layer=1)  # layer 0 compressed, layer 1 whole
    weight = model.get_parameter(value).detach()
    reads = before.edits[value][:rank]
    solved = torch.linalg.lstsq(x @ reads.T, x @ weight.T).solution.T
    torch.testing.assert_close(plan.edits[up][:, :rank], solved, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(
        plan.edits[value][:rank], torch.linalg.pinv(solved) @ weight, atol=1e-7, rtol=1e-6
    )
    assert (plan.edits[up] - before.edits[up]).abs().max() > 1e-4


@pytest.mark.parametrize("method", [Palu(), ReCalKV()], ids=lambda m: type(m).__name__)
def test_what_latents_refuse(method):
    model = tiny_model("llama", "gqa")
    with pytest.raises(ValueError, match=r"so it goes with ratio=kv_cache only; got ratio\.of=params"):
        method.check(model.config, replace(HALF, of="params"))
    with pytest.raises(ValueError, match="start from dense attention"):
        method.check(method.recast_config(model.config), HALF)
    with pytest.raises(ValueError, match="latents leave them all: leave it out"):
        replace(method, compensation=Sequential())
    with pytest.raises(ValueError, match="cannot be reached"):
        method.check(model.config, replace(HALF, value=0.99))
