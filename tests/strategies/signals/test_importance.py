"""Every importance against a loop that knows nothing of spaces and members."""

from __future__ import annotations

import gc
from typing import get_args

import pytest
import torch

from kvp.models.spaces import find_spaces
from kvp.strategies.signals.importance import Importance, score_spaces
from kvp.strategies.target import Target
from tests.conftest import tiny_model
from tests.helpers.gradients import HEAD_DIM, naive_gradients


@pytest.fixture
def target(heads):
    model = tiny_model("llama", heads, num_hidden_layers=2, attention_bias=False)
    ids = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=3, seed=4)


def slices(target, space, group, index):
    """The slices (parameter name, rows, columns) that one index removes, written out by hand."""
    config = target.config
    per_group = config.num_attention_heads // config.num_key_value_heads
    heads = range(group * per_group, (group + 1) * per_group)
    attention, everything = f"model.layers.{space.layer}.self_attn", slice(None)
    half = HEAD_DIM // 2
    if space.kind == "qk":
        rows = [("q_proj", h * HEAD_DIM + i) for h in heads for i in (index, index + half)]
        rows += [("k_proj", group * HEAD_DIM + i) for i in (index, index + half)]
        return [(f"{attention}.{name}.weight", row, everything) for name, row in rows]
    if space.kind == "vo":
        out = [(f"{attention}.v_proj.weight", group * HEAD_DIM + index, everything)]
        return out + [(f"{attention}.o_proj.weight", everything, h * HEAD_DIM + index) for h in heads]
    if space.kind == "ffn":
        mlp = f"model.layers.{space.layer}.mlp"
        rows = [(f"{mlp}.{name}.weight", index, everything) for name in ("gate_proj", "up_proj")]
        return [*rows, (f"{mlp}.down_proj.weight", everything, index)]
    out = []
    for i in range(HEAD_DIM):
        out += [(f"{attention}.{n}_proj.weight", index * HEAD_DIM + i, everything) for n in "kv"]
        for h in range(index * per_group, (index + 1) * per_group):
            out.append((f"{attention}.q_proj.weight", h * HEAD_DIM + i, everything))
            out.append((f"{attention}.o_proj.weight", everything, h * HEAD_DIM + i))
    return out


def naive_mixed(target, parts):
    """|w g - w^2 F / 2| with the gradient g of a batch and F over its samples, which are equally many."""
    weights, batches = dict(target.model.named_parameters()), naive_gradients(target, target.batch_size)
    samples, total = naive_gradients(target, 1), 0.0
    for number, gradient in enumerate(batches):
        own = samples[number * target.batch_size : (number + 1) * target.batch_size]
        for name, rows, columns in parts:
            w, g = weights[name][rows, columns].detach(), gradient[name][rows, columns]
            f = sum(sample[name][rows, columns] ** 2 for sample in own) / len(own)
            total += (w * g - w**2 * f / 2).abs().sum() / len(batches)
    return total


def naive_score(target, space, group, index, importance):
    weights = dict(target.model.named_parameters())
    parts = slices(target, space, group, index)
    pieces = [weights[name][rows, columns].detach() for name, rows, columns in parts]
    if importance in ("l1", "l2"):
        return sum(w.abs().pow(int(importance[1])).sum() for w in pieces)
    if importance == "mixed":
        return naive_mixed(target, parts)
    copies = naive_gradients(target, 1 if importance == "second_order" else target.batch_size)
    products = [
        [w * g[name][rows, columns] for g in copies]
        for w, (name, rows, columns) in zip(pieces, parts, strict=True)
    ]
    n = len(copies)
    if importance == "taylor_group":
        return abs(sum(p.sum() for piece in products for p in piece) / n)
    if importance == "taylor_vector":
        return sum(abs(sum(p.sum() for p in piece) / n) for piece in products)
    if importance == "taylor_element":
        return sum(p.abs().sum() for piece in products for p in piece) / n
    return sum((p**2).sum() for piece in products for p in piece) / n


@pytest.mark.parametrize(
    "importance", ["l1", "l2", "taylor_group", "taylor_vector", "taylor_element", "second_order", "mixed"]
)
@pytest.mark.parametrize("kind", ["qk", "vo", "kv_group", "ffn"])
def test_scores_match_a_naive_loop(target, importance, kind):
    space = find_spaces(target.config, [kind])[1]
    score = score_spaces(target, find_spaces(target.config, [kind]), importance)[space]
    assert score.shape == space.shape
    rows = score.view(-1, space.shape[-1])
    for group, index in [(0, 0), (len(rows) - 1, space.shape[-1] - 1), (0, space.shape[-1] // 2)]:
        expected = naive_score(target, space, group, index, importance)
        assert rows[group, index].item() == pytest.approx(expected.item(), rel=2e-4, abs=1e-9)


def test_activation_scores_match_a_naive_loop(target):
    model, config = target.model, target.config
    spaces = find_spaces(config, ["qk", "vo"])
    scores = score_spaces(target, spaces, "activation")
    caught = {}
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda m, i, o, name=name: caught.__setitem__(name, o))
    with torch.no_grad():
        model(target.calibration)
    per_group, half = config.num_attention_heads // config.num_key_value_heads, HEAD_DIM // 2
    q, k, v = (
        caught[n].view(-1, caught[n].shape[-1] // HEAD_DIM, HEAD_DIM) for n in ("q_proj", "k_proj", "v_proj")
    )
    qk, vo = (next(s for s in spaces if s.kind == kind and s.layer == 1) for kind in ("qk", "vo"))
    o = attention.o_proj.weight.detach().view(config.hidden_size, -1, HEAD_DIM)
    for group in range(config.num_key_value_heads):
        heads = range(group * per_group, (group + 1) * per_group)
        for pair in range(half):
            expected = sum(
                q[:, h, [pair, pair + half]].norm() * k[:, group, [pair, pair + half]].norm() for h in heads
            )
            assert scores[qk][group, pair].item() == pytest.approx(expected.item(), rel=1e-4)
        for j in range(HEAD_DIM):
            expected = v[:, group, j].norm() * torch.stack([o[:, h, j] for h in heads]).norm()
            assert scores[vo][group, j].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["qk", "vo", "kv_group", "ffn"])
def test_gate_scores_match_weights_times_gradients(target, kind):
    """Scaling what a channel carries is scaling the weights that write it (or, for the FFN, read it)."""
    space = find_spaces(target.config, [kind])[1]
    rows = score_spaces(target, [space], "taylor_gate")[space].view(-1, space.shape[-1])
    carries = {"qk": "k_proj", "vo": "v_proj", "kv_group": "v_proj", "ffn": "down_proj"}[kind]
    weights, samples = dict(target.model.named_parameters()), naive_gradients(target, 1)
    for group, index in [(0, 0), (len(rows) - 1, space.shape[-1] - 1)]:
        parts = [part for part in slices(target, space, group, index) if carries in part[0]]
        gates = [sum((weights[n][i, j] * g[n][i, j]).sum() for n, i, j in parts) for g in samples]
        expected = sum(gate.abs() for gate in gates) / len(gates)
        assert rows[group, index].item() == pytest.approx(expected.item(), rel=1e-3)


def test_activation_is_refused_where_it_is_not_defined(target):
    with pytest.raises(ValueError, match="defined for qk, vo, not for ffn"):
        score_spaces(target, find_spaces(target.config, ["ffn"]), "activation")


@pytest.mark.parametrize("importance", get_args(Importance))
def test_same_seed_same_scores_and_the_model_is_left_alone(target, importance):
    spaces = find_spaces(target.config, ["qk", "vo"])
    before = {name: p.clone() for name, p in target.model.named_parameters()}
    first, second = (score_spaces(target, spaces, importance) for _ in range(2))
    assert all(torch.equal(first[s], second[s]) for s in spaces)
    assert all(torch.equal(p, before[name]) for name, p in target.model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in target.model.parameters())


def test_gradient_checkpointing_changes_nothing(target):
    spaces = find_spaces(target.config, ["qk", "vo", "ffn"])
    for importance in ("taylor_element", "taylor_gate", "mixed"):
        plain, checkpointed = (score_spaces(target, spaces, importance, flag) for flag in (False, True))
        assert all(torch.allclose(plain[s], checkpointed[s], rtol=1e-5, atol=1e-8) for s in spaces)


@pytest.mark.parametrize("heads", ["gqa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("importance", get_args(Importance))
def test_no_batch_outlives_its_scores(target, importance, checkpointing):
    """A hook that holds its own tensor keeps a batch's graph for ever: the collector does not see that cycle."""

    def live() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    spaces = find_spaces(target.config, ["qk", "vo"])
    score_spaces(target, spaces, importance, checkpointing)
    before = live()
    score_spaces(target, spaces, importance, checkpointing)
    assert live() == before


@pytest.mark.parametrize(
    "importance", ["l2", "taylor_gate", "taylor_group", "taylor_element", "second_order", "activation"]
)
def test_scores_permute_with_the_kv_groups(importance):
    model = tiny_model("llama", "gqa", num_hidden_layers=2, attention_bias=False)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(2))
    spaces = find_spaces(model.config, ["qk", "vo"])
    before = score_spaces(Target(model, ids, 2, 0), spaces, importance)
    attention, order = model.model.layers[1].self_attn, [1, 0]
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for name, block in (("q_proj", per_group * HEAD_DIM), ("k_proj", HEAD_DIM), ("v_proj", HEAD_DIM)):
            weight = getattr(attention, name).weight
            weight.copy_(weight.view(2, block, -1)[order].flatten(0, 1).clone())
        o = attention.o_proj.weight
        o.copy_(o.view(len(o), 2, -1)[:, order].flatten(1).clone())
    after = score_spaces(Target(model, ids, 2, 0), spaces, importance)
    for space in spaces:
        expected = before[space][order] if space.layer == 1 else before[space]
        assert torch.allclose(after[space], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("importance", ["taylor_group", "taylor_vector", "taylor_gate", "second_order"])
def test_a_short_last_batch_changes_nothing(importance):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(2))
    spaces = find_spaces(model.config, ["qk", "vo"])
    whole, parted = (
        score_spaces(Target(model, ids, batch_size=n, seed=0), spaces, importance) for n in (6, 4)
    )
    for space in spaces:
        torch.testing.assert_close(parted[space], whole[space], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("importance", ["taylor_gate", "taylor_group"])
def test_checkpointing_changes_no_score_and_leaves_the_model_as_it_was(importance):
    model = tiny_model(attention_dropout=0.5)
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(2))
    spaces, target = find_spaces(model.config, ["qk", "vo"]), Target(model, ids, batch_size=2, seed=0)
    model.activation_checkpointing_enable()
    hooks = len(model.get_input_embeddings()._forward_hooks)
    plain = score_spaces(target, spaces, importance)
    sparing = score_spaces(target, spaces, importance, True)
    for space in spaces:
        torch.testing.assert_close(sparing[space], plain[space])
    assert model.is_activation_checkpointing
    assert not any(module.training for module in model.modules())
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    model.activation_checkpointing_disable()
    score_spaces(target, spaces, importance, True)
    assert not model.is_activation_checkpointing


def test_an_overflow_is_said():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(float("inf"))
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(2))
    spaces = find_spaces(model.config, ["qk", "vo"])
    with pytest.raises(FloatingPointError, match="is not finite"):
        score_spaces(Target(model, ids, batch_size=2, seed=0), spaces, "activation")
