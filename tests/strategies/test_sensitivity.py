"""The prefix-reusing pass gives the numbers of the naive one."""

from __future__ import annotations

import pytest
import torch

from kvp.models.masks import masked, without
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.strategies.signals.losses import losses_without
from kvp.strategies.signals.walk import window
from kvp.strategies.target import Target
from kvp.types import Budget, Plan, Space
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask


def naive(model, batches):
    with torch.no_grad():
        return sum(model(ids, labels=ids).loss.item() * len(ids) for ids in batches) / sum(map(len, batches))


@pytest.fixture
def batches():
    return torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(3)).split(2)


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
def test_loss_without_a_part_is_the_naive_one(family, batches, kind):
    model = tiny_model(family, dtype=torch.float64)
    space = Space(kind, None, (3,))
    cut = apply if kind in available_kinds(model.config) else mask  # attention of a model that mixes windows
    base, losses = losses_without(
        model, batches, [(n, lambda n=n: without(model, n, kind)) for n in range(3)]
    )
    assert base == pytest.approx(naive(model, batches), rel=1e-6)
    for n in range(3):
        kept = torch.tensor([i for i in range(3) if i != n])
        assert losses[n].item() == pytest.approx(naive(cut(model, Plan({space: kept})), batches), rel=1e-6)


def test_partial_probe_is_the_naive_one(family, batches):
    model = tiny_model(family, dtype=torch.float64)
    kinds = [kind for kind in ("qk", "vo", "ffn") if kind in available_kinds(model.config)]
    whole = random_plan(model, kinds)
    plans = [Plan({s: k for s, k in whole.keep.items() if s.layer == n}) for n in range(3)]
    removals = [(n, lambda plan=plan: masked(model, plan)) for n, plan in enumerate(plans)]
    _, losses = losses_without(model, batches, removals)
    for loss, plan in zip(losses, plans, strict=True):
        assert loss.item() == pytest.approx(naive(mask(model, plan), batches), rel=1e-6)


def test_layers_of_mixed_types_keep_their_own(batches):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model(
        "qwen2", dtype=torch.float64, layer_types=kinds, use_sliding_window=True, sliding_window=4
    )
    _, losses = losses_without(model, batches, [(n, lambda n=n: without(model, n, "mlp")) for n in range(3)])
    space = find_spaces(model.config, ["mlp"])[0]
    for n in range(3):
        kept = torch.tensor([i for i in range(3) if i != n])
        assert losses[n].item() == pytest.approx(naive(mask(model, Plan({space: kept})), batches), rel=1e-6)


def test_several_removals_in_one_layer_and_none_in_another(batches):
    model = tiny_model(dtype=torch.float64)
    removals = [(1, lambda kind=kind: without(model, 1, kind)) for kind in ("attention", "mlp", "block")]
    base, losses = losses_without(model, batches, removals)
    for (_, removal), loss in zip(removals, losses, strict=True):
        with removal():
            assert loss.item() == pytest.approx(naive(model, batches), rel=1e-6)
    assert base == pytest.approx(naive(model, batches), rel=1e-6)


def test_window_restores_the_model_even_after_an_error():
    model = tiny_model()
    layers = model.model.layers
    with pytest.raises(IndexError), window(model, 2, 3):
        model.model.layers[1]
    assert model.model.layers is layers


def test_where_neurons_are_cut_it_is_the_mlp_that_is_left_out(batches):
    model = tiny_model(dtype=torch.float64)
    target = Target(model, torch.cat(batches), batch_size=2, seed=0)
    removals = [(n, lambda n=n: without(model, n, "mlp")) for n in range(3)]
    base, losses = losses_without(model, batches, removals)
    neurons = KVPruner(grouping="ffn")
    assert neurons.sensitivity(target, {}).tolist() == pytest.approx((losses - base).tolist())
    assert neurons.probe_inputs()["probe"] == "mlp"
    assert KVPruner().probe_inputs()["probe"] == "attention"
    assert KVPruner().probes
    assert not KVPruner(grouping="block", importance="l2").probes  # blocks compete by their scores alone


@pytest.mark.parametrize(("grouping", "importance"), [("block", "taylor_gate"), ("kv_group", "activation")])
def test_an_importance_without_a_meaning_is_refused_before_the_model_is_read(grouping, importance):
    budget = Budget(value=0.3, of="kv_cache", tolerance=0.4)
    with pytest.raises(ValueError, match=f"importance={importance} is defined for"):
        KVPruner(grouping=grouping, importance=importance).check(tiny_config(), budget)
