"""Olica's attention, as its authors' code does it, naively."""

from __future__ import annotations

import pytest
import torch

from kvp.models.shapes import layer_shapes
from kvp.models.surgery import apply
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.olica import Olica
from kvp.strategies.signals.walk import caught_inputs
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import HEADS, tiny_config, tiny_model
from tests.helpers.published import LLAMA_7B

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
HALF = Budget(value=0.5, of="kv_cache", tolerance=0.05)
METHOD = Olica(allocator=Uniform(multiple_of=2))
PLAIN = {"attention_bias": False, "mlp_bias": False}


def pruned_of(model, path, budget=HALF):
    whole = METHOD.recast(model)
    target = Target(whole, IDS, batch_size=3, seed=0)
    return apply(whole, METHOD.search(target, METHOD.score(target), budget, torch.zeros(3), path))


def test_keys_and_values_are_those_of_the_authors(heads, tmp_path):
    """Keys: SVD of W_k by its inputs' sizes. Values: a rotation of each head, by o_proj and its outputs' sizes."""
    model = tiny_model("llama", heads, dtype=torch.float64, **PLAIN)
    queries, groups = HEADS[heads]
    dense, made = model.model.layers[0].self_attn, pruned_of(model, tmp_path)
    pruned, shape = made.model.layers[0].self_attn, layer_shapes(made.config)[0]
    with (
        torch.no_grad(),
        caught_inputs(model, [f"model.layers.0.self_attn.{p}_proj" for p in "ko"]) as caught,
    ):
        model(IDS)
    x, read = (each.flatten(0, 1) for each in caught.values())
    key, value, output = (getattr(dense, f"{part}_proj").weight.detach() for part in "kvo")

    by_input = x.norm(dim=0)
    left, energies, right = torch.linalg.svd(key * by_input, full_matrices=False)
    rank = shape.k_latents[1]
    theirs = left[:, :rank] * energies[:rank] @ right[:rank] / by_input
    torch.testing.assert_close(pruned.k_up_proj.weight @ pruned.k_proj.weight, theirs)

    by_output, kept = (read @ output.T).norm(dim=0), shape.v_latents[1]
    assert shape.v_latents[0] == groups
    for group in range(groups):
        columns = output.unflatten(1, (groups, queries // groups, -1))[:, group]  # (hidden, queries, 8)
        states = read.unflatten(1, (groups, queries // groups, -1))[:, group]
        rows = value.unflatten(0, (groups, -1))[group]
        turn = torch.linalg.svd((by_output[:, None, None] * columns).flatten(0, 1)).Vh.T
        rows, columns, states = turn.T @ rows, columns @ turn, states @ turn
        worth = (rows * by_input).norm(dim=1) + (columns * states.norm(dim=0)).flatten(0, 1).norm(dim=0)
        best = worth.topk(kept).indices
        theirs = turn[:, best] @ rows[best]
        up = pruned.v_up_proj.weight.unflatten(1, (groups, -1))[:, group]
        torch.testing.assert_close(up @ pruned.v_proj.weight.unflatten(0, (groups, -1))[group], theirs)


@torch.no_grad()
def test_without_a_cut_the_logits_stay(tmp_path):
    model = tiny_model("llama", "gqa", dtype=torch.float64)  # with biases
    whole = pruned_of(model, tmp_path, Budget(value=0.0, of="kv_cache"))
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)


def test_half_of_llama_7b_is_half_of_keys_and_half_of_each_value_head():
    method = Olica()
    config = method.recast_config(LLAMA_7B)
    scores = {space: torch.zeros(space.shape) for space in method.spaces(config)}
    plan = method.plan(config, scores, Budget(value=0.5, of="kv_cache"), torch.zeros(32))
    widths = {(space.kind, keep.shape) for space, keep in plan.keep.items()}
    assert widths == {("k_latent", (1, 2048)), ("v_latent", (32, 64))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"of": "params"}, "ratio=kv_cache only"), ({"value": 0.99}, "cannot be reached")],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        METHOD.check(tiny_config(**PLAIN), Budget(**{"value": 0.5, "of": "kv_cache"} | changes))


def test_several_heads_per_latent_of_values_are_refused():
    with pytest.raises(ValueError, match="value_heads"):
        Olica(value_heads=2)
