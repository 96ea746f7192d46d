"""Heads in a new basis: the same function, and no better basis of that rank."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from kvp.models.joined import joined
from kvp.models.masks import edited, fold_rotary
from kvp.models.surgery import apply
from kvp.strategies.signals.head_moments import output_columns, statistics
from kvp.strategies.signals.heads import by_rank, first_folded, roots, turn
from kvp.strategies.signals.logits import observed_attention
from kvp.strategies.signals.walk import Visit, caught_inputs, hidden_states, walk
from kvp.types import Plan
from tests.conftest import exact_norms, tiny_model
from tests.helpers.masks import mask
from tests.helpers.stock import ROPES

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
OFFERS_PAIRS = ("llama", "mistral", "qwen2")


def visits(model):
    return walk(model, IDS.split(2), "heads")


def all_edits(model, *, values, folded):
    edits = {}
    for visit in visits(model):
        edits |= turn(visit, values=values, folded=folded).edits
    return edits


def random_rows(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def test_turned_values_leave_the_function_as_it_is(family, heads):
    model = exact_norms(tiny_model(family, heads, dtype=torch.float64))
    edits = all_edits(model, values=True, folded=None)
    with torch.no_grad():
        turned = exact_norms(apply(model, Plan({}, edits)))
        torch.testing.assert_close(turned(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", OFFERS_PAIRS)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_turned_joined_heads_leave_the_function_as_it_is(family, heads):
    """Values of several heads are one set, and so are pairs that turn alike."""
    model = exact_norms(joined(tiny_model(family, heads, dtype=torch.float64), 1))
    edits = all_edits(model, values=True, folded=None)
    assert any("k_proj" in name for name in edits)
    with torch.no_grad(), edited(model, edits):
        turned = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(turned, model(IDS).logits)


@pytest.mark.parametrize("family", OFFERS_PAIRS)
def test_folded_pairs_lose_nothing_but_their_frequency(family, heads):
    """Pairs that do not turn at all, here by a theta without bound, may be mixed freely."""
    rope = {"rope_type": "default", "rope_theta": 1e38}
    model = exact_norms(tiny_model(family, heads, dtype=torch.float64, rope_parameters=rope))
    folded = first_folded(model, 20, 1e-3)
    assert folded == 1
    plan = Plan({}, all_edits(model, values=False, folded=folded), folded=folded)
    with torch.no_grad():
        dense = model(IDS).logits
        torch.testing.assert_close(exact_norms(apply(model, plan))(IDS).logits, dense)
        torch.testing.assert_close(exact_norms(mask(model, plan))(IDS).logits, dense)


def test_folded_pairs_are_worth_what_yarn_makes_of_their_logits():
    """Yarn multiplies cosine and sine by 0.1 log(4) + 1, so a logit by the square, and a logit's square once more."""
    worth = []
    for rope in ("default", "yarn"):
        rope = ROPES[rope] | {"rope_theta": 1e38}
        visit = next(iter(visits(tiny_model("llama", "gqa", dtype=torch.float64, rope_parameters=rope))))
        worth.append(turn(visit, values=False, folded=1).qk)
    torch.testing.assert_close(worth[1][:, 1:], (0.1 * math.log(4) + 1) ** 4 * worth[0][:, 1:])


def test_folding_stops_where_pairs_turn(heads):
    model = tiny_model("llama", heads, head_dim=16)  # frequencies 10,000^(-i / 8)
    assert first_folded(model, None, 0.2) is None
    assert first_folded(model, 100, 0.2) == 6  # (0.001 - 0.0003) * 100 = 0.07; the pair before: 0.29
    assert first_folded(model, 1000, 0.2) is None
    fold_rotary(model, 6)
    assert model.model.rotary_emb.inv_freq[6] == model.model.rotary_emb.inv_freq[7]


def test_no_basis_of_that_rank_keeps_more_of_the_logits():
    q, k = random_rows(40, 6), random_rows(30, 6) * torch.arange(1, 7)
    query_map, key_map, energies = by_rank(q.T @ q, k.T @ k)
    torch.testing.assert_close(query_map.T @ key_map, torch.eye(6, dtype=torch.float64))
    order = energies.argsort(descending=True)
    assert order.tolist() == [0, 3, 1, 4, 2, 5]  # the best two are the channels of the first of three pairs
    logits = q @ k.T
    for rank in range(7):
        kept = order[:rank]
        error = (logits - (q @ query_map[kept].T) @ (k @ key_map[kept].T).T).square().sum()
        torch.testing.assert_close(error, torch.linalg.svdvals(logits)[rank:].square().sum())
        torch.testing.assert_close(error, energies[order[rank:]].sum(), rtol=1e-6, atol=1e-6)


def test_no_complex_basis_keeps_more_of_pairs_that_turn():
    """Mean over all turns of a logit, the real part of a product: by rank, half of its squares."""
    q, k = (torch.complex(random_rows(n, 3), random_rows(n, 3, 1)[..., 0]) for n in (40, 30))
    turns = torch.polar(torch.ones(8).double(), torch.arange(8).double() * torch.pi / 4)
    query_map, key_map, energies = by_rank(q.T @ q.conj(), k.T @ k.conj())
    torch.testing.assert_close(key_map.mH @ query_map, torch.eye(3, dtype=torch.complex128))
    products = q @ k.mH
    for rank in range(4):
        lost = products - (q @ query_map[:rank].T) @ (k @ key_map[:rank].T).mH
        over_turns = (lost[..., None] * turns).real.square().mean(-1).sum()
        best = torch.linalg.svdvals(products)[rank:].square().sum() / 2
        torch.testing.assert_close(over_turns, best)
        torch.testing.assert_close(over_turns, energies[rank:].sum() / 2)


def test_no_basis_of_that_rank_keeps_more_of_the_output():
    """With one query head per group and nothing else in between: the best approximation there is."""
    model = tiny_model("llama", "mha", dtype=torch.float64)
    visit = next(iter(visits(model)))
    turned, columns = turn(visit, values=True, folded=None), output_columns(visit)
    name = f"{visit.name}.self_attn.o_proj"
    mixed = torch.cat([inputs[name] for inputs in visit.inputs(name)]).unflatten(1, (4, -1))
    for group in range(4):
        output = mixed[:, group] @ columns[group, 0].T
        exact = torch.linalg.svdvals(output).square() / len(output)
        torch.testing.assert_close(turned.vo[group], exact[: turned.vo.shape[1]])


def test_turned_values_are_as_large_as_before(heads):
    """Else LoRA, whose steps are of one size, would do little to v_proj and much to o_proj."""
    model = tiny_model("llama", heads, dtype=torch.float64)
    visit = list(visits(model))[1]
    name = f"{visit.name}.self_attn.o_proj"

    def mean_square(edits):
        with edited(model, edits):
            return torch.cat([inputs[name] for inputs in visit.inputs(name)]).square().mean()

    turned = turn(visit, values=True, folded=None)
    torch.testing.assert_close(mean_square(turned.edits), mean_square({}))


def test_statistics_are_the_naive_means(family, heads):
    model = tiny_model(family, heads, dtype=torch.float64)
    visit = list(visits(model))[1]
    found, shape = statistics(visit), model.config
    groups, queries = shape.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads
    attention = f"{visit.name}.self_attn"
    values = torch.zeros(groups, 8, 8, dtype=torch.float64)
    keys, query_sum = values.clone(), values.clone()
    with torch.no_grad(), caught_inputs(model, [f"{attention}.q_proj", f"{attention}.o_proj"]) as caught:
        hidden_states(model, 0, 3, input_ids=IDS)
    module = model.get_submodule(attention)
    with torch.no_grad():
        x, mixed = caught[f"{attention}.q_proj"], caught[f"{attention}.o_proj"]
        q, k = module.q_proj(x), module.k_proj(x)
    for sample in range(len(IDS)):
        centred = k[sample] - k[sample].mean(0)
        for token in range(IDS.shape[1]):
            for group in range(groups):
                row = centred[token, 8 * group : 8 * group + 8]
                keys[group] += torch.outer(row, row) / IDS.numel()
                for head in range(queries * group, queries * group + queries):
                    for sums, states in ((values, mixed), (query_sum, q)):
                        row = states[sample, token, 8 * head : 8 * head + 8]
                        sums[group] += torch.outer(row, row) / IDS.numel()
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.queries, query_sum)
    torch.testing.assert_close(found.keys, keys)


def test_turning_moments_are_the_naive_means(heads):
    """Of rotated pairs; the keys of a sample are centred."""
    model = tiny_model("llama", heads, dtype=torch.float64)
    visit = list(visits(model))[1]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with observed_attention(model, lambda module, q, k: seen.append((q, k))), torch.no_grad():
        model(IDS)
    found, (query, key) = statistics(visit), seen[visit.layer]
    groups = key.shape[1]
    naive = [torch.zeros(groups, 4, 4, dtype=torch.complex128) for _ in range(2)]
    for total, states in zip(naive, (query, key - key.mean(2, keepdim=True)), strict=True):
        for head in range(states.shape[1]):
            for token in states[:, head].flatten(0, 1):
                pair = torch.complex(token[:4], token[4:])
                total[head * groups // states.shape[1]] += torch.outer(pair, pair.conj()) / IDS.numel()
    torch.testing.assert_close(found.turning_queries, naive[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.turning_keys, naive[1], rtol=1e-4, atol=1e-5)


def test_roots_of_a_singular_moment_stay_finite():
    rows = random_rows(3, 5)
    root, inverse = roots(rows.T @ rows)
    torch.testing.assert_close(root @ root, rows.T @ rows, rtol=1e-4, atol=1e-6)
    assert inverse.isfinite().all()
    assert roots(torch.zeros(4, 4, dtype=torch.float64))[1].isfinite().all()


def test_a_broken_state_is_named():
    model = tiny_model("llama", "gqa")
    visit = Visit(model, 0, [torch.full((1, 4, 48), torch.nan)], ExitStack())
    with pytest.raises(FloatingPointError, match="of layer 0"):
        turn(replace(visit), values=True, folded=None)
