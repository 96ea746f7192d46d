"""KVPruner+: its currency against naive sums, its plans on the disk, its search after a kill."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from kvp.models.joined import joined
from kvp.models.plans import read_plan, write_plan
from kvp.models.shapes import layer_shapes
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.serving.stock import to_stock
from kvp.strategies.allocation.allocate import Global, Uniform
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.methods import kvpruner_plus
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.signals.estimate import rewriting_bytes
from kvp.strategies.signals.heads import turn
from kvp.strategies.signals.outputs import RIDGE, output_slopes, refit_errors
from kvp.strategies.signals.walk import Visit, caught_inputs, hidden_states, walk
from kvp.strategies.target import Target
from kvp.types import Budget, Plan
from tests.conftest import refitted, tiny_config, tiny_model
from tests.helpers.masks import mask

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
HALF = Budget(value=0.5, of="kv_cache", tolerance=0.05)
FOLDING = {"context": 40, "angle": 0.9}


def target(model):
    return Target(model, IDS, batch_size=2, seed=0)


def strategy(**options):
    return KVPrunerPlus(**{"allocator": Global(multiple_of=2), "grouping": "apart", **FOLDING, **options})


def searched(strategy, model, directory, budget=HALF):
    scores = strategy.score(target(model))
    return strategy.search(target(model), scores, budget, torch.zeros(3), directory)


@pytest.mark.parametrize("joins", [None, 1])
def test_memory_is_estimated_with_the_matrices_that_a_plan_rewrites(joins, tmp_path):
    method = strategy(num_key_value_heads=joins)
    model = method.recast(tiny_model("llama", "gqa", head_dim=32))
    (tmp_path / "plan").mkdir()
    plan = searched(method, model, tmp_path / "plan")
    plan = refitted(Sequential(), model, IDS.split(2), plan)
    estimate = rewriting_bytes(
        model.config,
        rewritten=method.rewritten(model.config),
        refitted=method.refitted(model.config),
        states=0,
    )
    held = sum(edit.nbytes for name, edit in plan.edits.items() if name.endswith(".weight"))
    assert held == estimate["edits"]
    sizes = {"samples": 1, "batch_size": 1, "length": 2}
    assert method.peak_bytes(model.config, **sizes, on_cpu=True)["total"] >= estimate["total"]
    assert "edits" not in method.peak_bytes(model.config, **sizes, on_cpu=False)


def test_slopes_are_the_naive_derivatives(heads):
    model = tiny_model("llama", heads, dtype=torch.float64)
    naive = torch.zeros(3, dtype=torch.float64)
    for sample in IDS:
        outputs: list[torch.Tensor] = []
        with ExitStack() as stack:
            for layer in model.model.layers:
                watch = layer.self_attn.o_proj.register_forward_hook
                hook = watch(lambda m, i, out, seen=outputs: seen.append(out))
                stack.callback(hook.remove)
            loss = model(sample[None], labels=sample[None]).loss * (len(sample) - 1)
        for layer, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            naive[layer] += gradient.square().mean() / len(IDS)
    torch.testing.assert_close(output_slopes(target(model)), naive, rtol=1e-5, atol=1e-12)


def test_what_a_refit_leaves_is_the_naive_residual(heads):
    model = tiny_model("mistral", heads, dtype=torch.float64)
    visit = next(iter(walk(model, IDS.split(2), "heads")))
    space = next(s for s in find_spaces(model.config, ("vo",)) if s.layer == 0)
    edits = turn(visit, values=True, folded=None).edits
    keep = torch.arange(5).expand(space.shape[0], -1)
    (found,) = refit_errors(visit, [Plan({space: keep}, edits)])
    name, cut = f"{visit.name}.self_attn.o_proj", mask(model, Plan({space: keep}, edits))
    with torch.no_grad(), caught_inputs(model, [name]) as x, caught_inputs(cut, [name]) as z:
        model(IDS)
        cut(IDS)
    y = x[name].flatten(0, 1) @ model.get_submodule(name).weight.T
    z, prior = z[name].flatten(0, 1), edits[f"{name}.weight"].T
    ridge = (RIDGE * z.square().mean() * len(z)).sqrt()
    rows = torch.cat([z, ridge * torch.eye(z.shape[1], dtype=z.dtype)])
    fitted = torch.linalg.lstsq(rows, torch.cat([y, ridge * prior])).solution
    expected = (y - z @ fitted).square().sum(1).mean().item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_scores_are_nats_in_proportion_to_energy():
    model = tiny_model("llama", "gqa", dtype=torch.float64)
    plus = strategy(context=None)
    scores = plus.score(target(model))
    for visit in walk(model, IDS.split(2), "heads"):
        turned = turn(visit, values=True, folded=None)
        for space, score in scores.items():
            if space.layer == visit.layer:
                ratio = score / {"qk": turned.qk, "vo": turned.vo}[space.kind]
                assert ratio.min() > 0
                assert ratio.max() / ratio.min() == pytest.approx(1, rel=1e-4)


def test_all_layers_are_folded_and_share_one_frequency(tmp_path):
    model = tiny_model("llama", "gqa")
    plan = searched(strategy(), model, tmp_path)
    assert plan.folded is not None
    for shape in layer_shapes(apply(model, plan).config):
        slow = [pair for row in shape.rope_pairs for pair in row if pair >= plan.folded]
        assert set(slow) <= {3}


def test_a_killed_search_goes_on_with_the_same_plan(tmp_path, monkeypatch):
    model, plus = tiny_model("llama", "gqa"), strategy()
    undisturbed = searched(plus, model, tmp_path / "whole") if (tmp_path / "whole").mkdir() is None else None
    (tmp_path / "killed").mkdir()
    seen: list[int] = []

    def killed(visit: Visit, **options):
        seen.append(visit.layer)
        if visit.layer == 2:
            raise KeyboardInterrupt
        return turn(visit, **options)

    scores = plus.score(target(model))
    monkeypatch.setattr(kvpruner_plus, "turn", killed)
    with pytest.raises(KeyboardInterrupt):
        plus.search(target(model), scores, HALF, torch.zeros(3), tmp_path / "killed")
    monkeypatch.setattr(
        kvpruner_plus, "turn", lambda visit, **options: seen.append(visit.layer) or turn(visit, **options)
    )
    plan = plus.search(target(model), scores, HALF, torch.zeros(3), tmp_path / "killed")
    assert seen == [0, 1, 2, 2]
    write_plan(tmp_path / "killed", plan)
    read = read_plan(tmp_path / "killed")
    assert read.folded == undisturbed.folded == plan.folded
    assert read.edits.keys() == undisturbed.edits.keys()
    assert all(torch.equal(read.edits[name], edit) for name, edit in undisturbed.edits.items())
    assert all(torch.equal(read.keep[space], keep) for space, keep in undisturbed.keep.items())


def test_each_part_may_be_left_out(tmp_path):
    model = tiny_model("llama", "gqa")
    for options in (
        {"values": "channels"},
        {"context": None},
        {"importance": "taylor_gate"},
        {"importance": "activation"},
    ):
        directory = tmp_path / "-".join(f"{k}" for k in options)
        directory.mkdir(exist_ok=True)
        plan = (
            searched(replace(strategy(), **options), model, directory / "")
            if strategy(**options).searches
            else None
        )
        assert plan is not None
    assert not strategy(values="channels", context=None).searches


def test_without_its_parts_it_is_a_plain_plan(tmp_path):
    model = tiny_model("llama", "gqa")
    plain = strategy(values="channels", context=None)
    plan = plain.plan(model.config, plain.score(target(model)), HALF, torch.zeros(3))
    found = refitted(Sequential(), model, IDS.split(2), plan)
    assert not plan.edits
    assert found.edits
    assert {name.split(".")[-2] for name in found.edits} == {"o_proj"}


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_stock_mode_gives_one_width_and_one_set_of_pairs(kv_heads, tmp_path):
    model = joined(tiny_model("mistral", "gqa", head_dim=16), kv_heads)
    stock = strategy(allocator=Uniform(multiple_of=2), scope="model", grouping="separate")
    pruned = apply(model, searched(stock, model, tmp_path))
    shapes = layer_shapes(pruned.config)
    assert len({(shape.qk_head_dim, shape.v_head_dim) for shape in shapes}) == 1
    assert len({row for shape in shapes for row in shape.rope_pairs}) == 1
    with torch.no_grad():
        served = to_stock(pruned, "stock")(IDS).logits
        torch.testing.assert_close(served, pruned(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "strategy.context must be >= 1"),
        ({"angle": 2.0}, r"strategy.angle must be in \(0, 1\)"),
        ({"values": "svd"}, "strategy.values must be one of rank, channels"),
        ({"grouping": "kv_group"}, "strategy.grouping must be one of apart, separate, vo"),
        ({"importance": "loudness"}, "strategy.importance must be one of output"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        strategy(**options)


@pytest.mark.parametrize(
    ("heads", "of", "message"),
    [(1, "params", "goes with ratio=kv_cache only"), (3, "kv_cache", "must divide the 2 KV heads")],
)
def test_heads_that_cannot_be_joined_are_refused(heads, of, message):
    with pytest.raises(ValueError, match=message):
        strategy(num_key_value_heads=heads).check(tiny_config(), replace(HALF, of=of))


def test_a_pass_ends_at_the_last_input_asked_for():
    model = tiny_model()
    visit = next(iter(walk(model, [IDS], "heads")))
    ran: list[str] = []
    for name in ("self_attn", "mlp"):
        model.get_submodule(f"{visit.name}.{name}").register_forward_pre_hook(
            lambda module, args, name=name: ran.append(name)
        )
    entry = f"{visit.name}.self_attn.q_proj"
    (caught,) = visit.inputs(entry)
    assert ran == ["self_attn"]
    assert caught[entry].shape == (IDS.numel(), model.config.hidden_size)
    visit.outputs()
    assert ran == ["self_attn", "self_attn", "mlp"]


def test_a_pass_of_the_whole_layer_is_not_repeated():
    model, entry, ran = tiny_model(), "model.layers.1.self_attn.q_proj", []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: ran.append(module))
    expected = hidden_states(model, 0, 2, input_ids=IDS)
    ran.clear()
    for visit in walk(model, IDS.split(2), "heads"):
        if visit.layer == 1:
            caught = list(visit.through(entry))
        if visit.layer == 2:
            torch.testing.assert_close(torch.cat(visit.states), expected)
    assert [ran.count(layer.mlp) for layer in model.model.layers] == [3, 3, 3]  # three batches
    assert [set(inputs) for inputs in caught] == [{entry}] * 3
    assert caught[0][entry].shape == (2 * IDS.shape[1], model.config.hidden_size)


@pytest.mark.parametrize("grouping", ["apart", "vo"])
def test_directions_without_energy_go_first(grouping):
    """Half of every head's value directions carry nothing: the ratio of two roundings must not rank the others."""
    model = tiny_model("mistral", head_dim=16)
    with torch.no_grad():
        for layer in model.model.layers:
            heads = layer.self_attn.v_proj.weight.view(-1, 16, 48)
            u, s, v = torch.linalg.svd(heads, full_matrices=False)
            s[:, 8:] = 0
            heads.copy_(u @ torch.diag_embed(s) @ v)
    scores = KVPrunerPlus(allocator=Global(), grouping=grouping, **FOLDING).score(target(model))
    for space, score in scores.items():
        if space.kind == "vo":
            assert score.min() > -1e-6 * score.max()
            assert (score > 1e-4 * score.max()).sum(1).tolist() == [8] * len(score)
