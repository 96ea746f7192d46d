"""A cut, then zeros: the same as both by hand, with two budgets that are both kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvp.models.linears import all_linears
from kvp.models.masks import edited
from kvp.models.plans import read_plan, write_plan
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.models.uncut import uncut
from kvp.pipeline.summary import print_summary
from kvp.record import RunRecord
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.compensation.compensate import LeastSquares
from kvp.strategies.methods.chain import Chain
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.methods.magnitude_sparse import MagnitudeSparse
from kvp.strategies.methods.shortgpt import ShortGPT
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.methods.sparsegpt import SparseGPT
from kvp.strategies.methods.wanda import Wanda
from kvp.strategies.methods.wanda_sp import WandaSP
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import NETWORKS, random_plan, refitted, tiny_config, tiny_model
from tests.helpers.masks import mask
from tests.helpers.runs import run_here

HALF = Budget(value=0.5, of="sparsity")
CUT = Budget(value=0.25, of="block_params", tolerance=0.15)
CHAINS = {
    "channels": Chain(
        first=KVPruner(allocator=Uniform(multiple_of=2), grouping="vo"),
        second=SparseGPT(block_size=16),
        ratio=HALF,
    ),
    "compensated": Chain(
        first=WandaSP(allocator=Uniform(multiple_of=1, max_ratio=1.0), compensation=LeastSquares()),
        second=Wanda(),
        ratio=HALF,
    ),
    "blocks": Chain(first=ShortGPT(), second=MagnitudeSparse(), ratio=HALF),
}
BUDGETS = {
    "channels": Budget(value=0.25, of="kv_cache"),
    "compensated": CUT,
    "blocks": Budget(value=1 / 3, of="blocks"),
}


@pytest.fixture(params=NETWORKS)
def family(request) -> str:
    return request.param


def target_of(model):
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(6))
    return Target(model, ids, batch_size=2, seed=1)


@pytest.mark.parametrize("kinds", [["qk", "vo", "ffn"], ["kv_group", "ffn"], ["block"], ["mlp"], []])
def test_edits_of_the_cut_model_are_put_back_where_they_came_from(kinds, tokens):
    model = tiny_model()
    plan = random_plan(model, kinds)
    cut = apply(model, plan)
    generator = torch.Generator().manual_seed(0)
    edits = {
        linear.weight: torch.randn(linear.rows, linear.columns, generator=generator)
        for linear in all_linears(cut.config)
    }
    whole = replace(plan, edits=uncut(model, plan, edits))
    with torch.no_grad(), edited(cut, edits):
        expected = cut(tokens).logits
    with torch.no_grad():
        assert torch.equal(apply(model, whole)(tokens).logits, expected)
        torch.testing.assert_close(mask(model, whole)(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    for name, edit in whole.edits.items():
        assert edit.shape == model.get_parameter(name).shape


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_both_by_hand(name, family, tmp_path, tokens):
    chain, budget, model = CHAINS[name], BUDGETS[name], tiny_model(family, dtype=torch.float64)
    target, profile = target_of(model), torch.zeros(3)
    chain.check(model.config, budget)
    scores = chain.score(target)
    found = chain.search(target, scores, budget, profile, tmp_path)
    write_plan(tmp_path, found)
    pruned = apply(model, read_plan(tmp_path))

    (tmp_path / "by hand").mkdir()
    if chain.first.searches:
        plan = chain.first.search(target, scores, budget, profile, tmp_path)
    else:
        plan = chain.first.plan(model.config, scores, budget, profile)
    if chain.first.compensation:
        plan = refitted(chain.first.compensation, model, target.batches, plan)
    cut = apply(model, plan)
    zeroed = chain.second.search(replace(target, model=cut), {}, HALF, profile, tmp_path / "by hand")
    with torch.no_grad(), edited(cut, zeroed.edits):
        expected = cut(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, expected, atol=1e-9, rtol=0)
    weights = [pruned.get_parameter(linear.weight) for linear in all_linears(pruned.config)]
    zeros = sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.5, abs=0.02)
    dense, left = (size(m.config, layer_shapes(m.config)).count(budget.of) for m in (model, pruned))
    assert abs(1 - left / dense - budget.value) <= budget.tolerance
    assert not (tmp_path / "second").exists()


def test_a_chain_goes_on_at_the_layer_it_was_killed_in(tmp_path):
    chain, budget, model = CHAINS["channels"], BUDGETS["channels"], tiny_model()
    target, profile = target_of(model), torch.zeros(3)
    scores = chain.score(target)
    plan = chain.first.plan(model.config, scores, budget, profile)
    killed = tmp_path / "second"
    killed.mkdir()
    chain.second.search(replace(target, model=apply(model, plan)), {}, HALF, profile, killed)
    (killed / "edits/2.safetensors").rename(killed / "edits/2.partial")
    first = load_file(killed / "edits/0.safetensors")
    marked = {name: torch.full_like(edit, 3.0) for name, edit in first.items()}
    save_file(marked, killed / "edits/0.safetensors")
    pruned = apply(model, chain.search(target, scores, budget, profile, tmp_path))
    weights = {linear.weight: pruned.get_parameter(linear.weight) for linear in all_linears(pruned.config)}
    for name, weight in weights.items():
        assert (weight == 3).all() if name in first else (weight == 0).double().mean() > 0.4


def test_the_record_and_the_table_hold_both_budgets_and_the_bytes(tmp_path, capsys):
    options = [
        "tracker=none",
        "measure=none",
        "evaluation=none",
        "recovery=none",
        "strategy=mosaic_composite",
        "ratio=block_params",
        "ratio.value=0.2",
        "ratio.tolerance=0.05",
        "strategy.ratio.value=0.6",
    ]
    record = run_here(tmp_path, *options)
    asked, achieved = record["ratio"]["asked"], record["ratio"]["achieved"]
    assert asked == {"value": 0.2, "of": "block_params", "then": [{"value": 0.6, "of": "sparsity"}]}
    assert achieved["block_params"] == pytest.approx(0.2, abs=0.05)
    assert achieved["sparsity"] == pytest.approx(0.6, abs=0.02)
    weights = [record[model]["size"]["sparsity"]["weights"] for model in ("dense", "pruned")]
    assert weights[1] < weights[0]
    print_summary(RunRecord.read(record))
    told = capsys.readouterr().out
    assert "asked 20 % of block_params, then 60 % of sparsity; achieved" in told
    assert all(f"weights, if stored {how}" in told for how in ("dense", "2:4", "bitmap"))
    assert all(stage["found"] for stage in run_here(tmp_path, *options)["stages"])


def test_refusals():
    first, second = KVPruner(allocator=Uniform(multiple_of=2), grouping="vo"), Wanda()
    with pytest.raises(ValueError, match=r"must cut and strategy\.second zero"):
        Chain(first=second, second=second, ratio=HALF)
    with pytest.raises(ValueError, match=r"must cut and strategy\.second zero"):
        Chain(first=first, second=first, ratio=HALF)
    with pytest.raises(ValueError, match="SliceGPT slices the residual stream"):
        Chain(first=SliceGPT(), second=second, ratio=HALF)
    with pytest.raises(ValueError, match="choose ratio=kv_cache"):
        Chain(first=first, second=second, ratio=HALF).check(tiny_config(), HALF)
    with pytest.raises(ValueError, match="choose ratio=sparsity"):
        Chain(first=first, second=second, ratio=CUT).check(tiny_config(), BUDGETS["channels"])


def test_memory_counts_the_dense_model_beside_the_cut_one():
    model, second = tiny_model("llama", "gqa"), Wanda()
    chain = Chain(first=KVPruner(), second=second, ratio=Budget(value=0.5, of="sparsity"))
    sizes = {"samples": 4, "batch_size": 2, "length": 16}
    edits = sum(model.get_parameter(linear.weight).nbytes for linear in all_linears(model.config))
    dense = sum(parameter.nbytes for parameter in model.parameters())
    alone = second.peak_bytes(model.config, **sizes, on_cpu=True)
    assert alone["weights"] == dense + edits  # states pass what is pruned
    assert chain.peak_bytes(model.config, **sizes, on_cpu=True)["total"] == alone["total"] + dense + edits
    alone = second.peak_bytes(model.config, **sizes, on_cpu=False)
    assert chain.peak_bytes(model.config, **sizes, on_cpu=False)["total"] >= alone["total"]
