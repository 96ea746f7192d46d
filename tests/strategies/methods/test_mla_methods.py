"""MHA2MLA and TransMLA: attention as their papers write it, naively, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from kvp.models.joined import joined, joined_config
from kvp.models.shapes import cut, layer_shapes, size
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.serving.mla import to_mla
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.mha2mla import MHA2MLA
from kvp.strategies.methods.transmla import TransMLA
from kvp.strategies.signals.walk import caught_inputs
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import HEADS, tiny_config, tiny_model
from tests.helpers.stock import ROPES

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))
HALF = Budget(value=0.5, of="kv_cache", tolerance=0.15)
EVEN = Uniform(multiple_of=2)
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, dtype="bfloat16"
)
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16"
)
QWEN_25_7B = Qwen2Config(
    hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, dtype="bfloat16"
)
SMOLLM_135M = LlamaConfig(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, dtype="bfloat16"
)


def one_layer(heads, rope="default", **changes):
    rope = ROPES[rope] | {"rope_theta": 100.0}
    plain = {"attention_bias": False, "mlp_bias": False, "num_hidden_layers": 1}
    return tiny_model("llama", heads, dtype=torch.float64, rope_parameters=rope, **{**plain, **changes})


def planned(method, model, path, budget=HALF):
    path.mkdir(exist_ok=True)
    target = Target(model, IDS if method.needs_calibration else None, batch_size=2, seed=0)
    return method.search(target, method.score(target), budget, torch.zeros(3), path)


def pruned_of(method, model, path, budget=HALF):
    whole = joined(model, 1, latent=True)
    return apply(whole, planned(method, whole, path, budget))


@torch.no_grad()
def attended(model):
    """Return what enters o_proj of the only layer, times o_proj, and what enters q_proj."""
    with caught_inputs(model, names := [f"model.layers.0.self_attn.{part}_proj" for part in "qo"]) as caught:
        model(IDS)
    return caught[names[1]] @ model.get_parameter(f"{names[1]}.weight").T, caught[names[0]]


class Parts:
    """A dense attention as its paper sees it: queries (b, t, heads, 2, pairs), keys and values per KV head."""

    def __init__(self, model, heads):
        attention = model.model.layers[0].self_attn
        self.x = attended(model)[1]
        self.queries, self.groups = HEADS[heads]
        weights = [getattr(attention, f"{part}_proj").weight.detach() for part in "qkvo"]
        self.q = (self.x @ weights[0].T).unflatten(-1, (self.queries, 2, -1))
        self.k = (self.x @ weights[1].T).unflatten(-1, (self.groups, 2, -1))
        self.v = (self.x @ weights[2].T).unflatten(-1, (self.groups, -1))
        self.columns, self.weights = weights[3].unflatten(1, (self.queries, -1)), weights
        self.rotary = model.model.rotary_emb

    def logits(self, query, key, pairs):
        """Turn (b, t, 2, n) at the frequencies of `pairs`; None: they stand still."""
        if pairs is None:
            return self.rotary.attention_scaling**2 * torch.einsum("btcn,bscn->bts", query, key)
        angles = torch.arange(20.0).double()[:, None] * self.rotary.inv_freq.double()[torch.as_tensor(pairs)]
        turn = torch.polar(torch.ones_like(angles), angles)
        query, key = (torch.complex(*states.unbind(-2)) * turn for states in (query, key))
        return self.rotary.attention_scaling**2 * torch.einsum("btn,bsn->bts", query, key.conj()).real

    def output(self, logits, values):
        """Attend by logits (b, t, s) to values (b, t, d), per query head."""
        future = torch.ones(20, 20).triu(1).bool()
        total = 0
        for head in range(self.queries):
            weights = (logits[head] / 8**0.5).masked_fill(future, -torch.inf).softmax(-1)
            total = total + weights @ values[head] @ self.columns[:, head].T
        return total


@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize("selection", ["2-norm", "high"])
def test_mha2mla_is_partial_rope_and_a_joint_svd(heads, selection, rope, tmp_path):
    method = MHA2MLA(allocator=EVEN, qk_rope_head_dim=4, selection=selection)
    model = one_layer(heads, rope)
    pruned, parts = pruned_of(method, model, tmp_path), Parts(model, heads)
    shape, share = layer_shapes(pruned.config)[0], parts.queries // parts.groups
    assert shape.qk_head_dim == 4 * parts.groups
    turning = []
    for group in range(parts.groups):
        lengths = parts.k[:, :, group].norm(dim=2).mean((0, 1)) * sum(
            parts.q[:, :, group * share + n].norm(dim=2).mean((0, 1)) for n in range(share)
        )
        best = range(4) if selection == "high" else lengths.argsort(descending=True).tolist()
        turning.append(sorted(best[:2]))
    still = [[pair for pair in range(4) if pair not in turning[g]] for g in range(parts.groups)]
    rows = parts.weights[1].unflatten(0, (parts.groups, 2, 4))
    nope = torch.cat([rows[g][:, still[g]].flatten(0, 1) for g in range(parts.groups)])
    left, energies, right = torch.linalg.svd(torch.cat([nope, parts.weights[2]]), full_matrices=False)
    rank = shape.v_head_dim
    near = parts.x @ (left[:, :rank] * energies[:rank] @ right[:rank]).T
    keys, values = near.split([len(nope), len(parts.weights[2])], -1)
    keys = keys.unflatten(-1, (parts.groups, 2, 2))
    logits, read = [], values.unflatten(-1, (parts.groups, -1))
    for head in range(parts.queries):
        group = head // share
        query, key = parts.q[:, :, head], parts.k[:, :, group]
        turned = parts.logits(query[..., turning[group]], key[..., turning[group]], turning[group])
        logits.append(turned + parts.logits(query[..., still[group]], keys[:, :, group], None))
    naive = parts.output(logits, [read[:, :, head // share] for head in range(parts.queries)])
    torch.testing.assert_close(attended(pruned)[0], naive, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rope", ["default", "yarn"])
@pytest.mark.parametrize(("freqfold", "rotated"), [(1, 8), (2, 4), (2, 8), (4, 4)])
def test_transmla_is_rorope_freqfold_and_a_balanced_pca(heads, freqfold, rotated, rope, tmp_path):
    """Repeat the authors' code, from states in the place of second moments."""
    model = one_layer(heads, rope)
    method = TransMLA(allocator=EVEN, qk_rope_head_dim=rotated, freqfold=freqfold)
    pruned, parts = pruned_of(method, model, tmp_path), Parts(model, heads)
    shape, share = layer_shapes(pruned.config)[0], parts.queries // parts.groups
    collapse = 8 // rotated
    assert shape.rope_pairs == (tuple(range(0, 4, collapse)),)
    logits = [0.0] * parts.queries
    still, ups = [], []  # components of keys, and per query head what asks for each
    for start in range(0, 4, freqfold):
        folded = parts.k[..., start : start + freqfold].transpose(-1, -2).flatten(2, 3)  # (b, t, heads M, 2)
        basis = torch.linalg.svd(folded.transpose(-1, -2).flatten(0, 2), full_matrices=False).Vh.T
        components = torch.einsum("btnc,nm->btcm", folded, basis)
        by_head = basis.unflatten(0, (parts.groups, freqfold))
        asks = [
            torch.einsum("btcf,fm->btcm", parts.q[:, :, n, :, start : start + freqfold], by_head[n // share])
            for n in range(parts.queries)
        ]
        kept = freqfold // collapse
        pairs = [start + m * collapse for m in range(kept)]
        for head in range(parts.queries):
            logits[head] = logits[head] + parts.logits(asks[head][..., :kept], components[..., :kept], pairs)
        still.append(components[..., kept:])
        ups.append([ask[..., kept:] for ask in asks])
    keys = torch.cat(still, -1)
    values, channels = parts.v.flatten(2), keys.flatten(2)
    size_of_keys, size_of_values = (each.flatten(0, 1).norm(dim=0).mean() for each in (channels, values))
    balance = size_of_keys / size_of_values if channels.shape[-1] else 1.0
    both = torch.cat([channels / balance, values], -1)
    directions = torch.linalg.svd(both.flatten(0, 1), full_matrices=False).Vh[: shape.v_head_dim]
    near = both @ directions.T @ directions
    near_keys = (balance * near[..., : channels.shape[-1]]).unflatten(-1, keys.shape[2:])
    read = near[..., channels.shape[-1] :].unflatten(-1, (parts.groups, -1))
    for head in range(parts.queries):
        ask = torch.cat([each[head] for each in ups], -1)
        logits[head] = logits[head] + parts.logits(ask, near_keys, None)
    naive = parts.output(logits, [read[:, :, head // share] for head in range(parts.queries)])
    torch.testing.assert_close(attended(pruned)[0], naive, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        TransMLA(allocator=EVEN, qk_rope_head_dim=8, freqfold=1),
        MHA2MLA(allocator=EVEN, qk_rope_head_dim=8),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_where_nothing_is_lost_the_logits_stay(method, family, tmp_path):
    """MQA, all pairs turn, and the latent is as wide as the values; biases of Qwen2 are rotated along."""
    model = tiny_model(family, "mqa", dtype=torch.float64)
    pruned = pruned_of(method, model, tmp_path, Budget(value=0.0, of="kv_cache"))
    torch.testing.assert_close(pruned(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (TransMLA(allocator=EVEN, qk_rope_head_dim=4), "mla"),
        (MHA2MLA(allocator=EVEN, qk_rope_head_dim=2, selection="high"), "mla_longrope"),
    ],
    ids=["transmla", "mha2mla"],
)
@torch.no_grad()
def test_the_export_is_exact(method, form, tmp_path):
    model = one_layer("gqa", num_hidden_layers=3, rms_norm_eps=1e-5)
    pruned = pruned_of(method, model, tmp_path).float()
    assert (to_mla(pruned, form)(IDS).logits - pruned(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("method", "config", "removed"),
    [
        (TransMLA(kv_lora_rank=512, qk_rope_head_dim=64), LLAMA_2_7B, 0.9297),  # the paper's 93 %
        (TransMLA(kv_lora_rank=448, qk_rope_head_dim=128), LLAMA_2_7B, 0.9297),
        (TransMLA(kv_lora_rank=512, qk_rope_head_dim=64), LLAMA_3_8B, 0.7188),
        (TransMLA(kv_lora_rank=512, qk_rope_head_dim=64), QWEN_25_7B, 0.4375),
        (MHA2MLA(kv_lora_rank=32 * 64), LLAMA_2_7B, 0.6875),  # d_kv = 64, 32 and 16 of each head
        (MHA2MLA(kv_lora_rank=32 * 32), LLAMA_2_7B, 0.8125),
        (MHA2MLA(kv_lora_rank=32 * 16), LLAMA_2_7B, 0.875),
        (MHA2MLA(kv_lora_rank=3 * 32), SMOLLM_135M, 0.6875),
        (MHA2MLA(kv_lora_rank=3 * 8), SMOLLM_135M, 0.875),
    ],
)
def test_published_widths_remove_what_is_published(method, config, removed):
    budget = Budget(value=removed, of="kv_cache", tolerance=1e-4)
    method.check(config, budget)
    whole = joined_config(config, 1, latent=True)
    scores = {space: torch.zeros(space.shape) for space in find_spaces(whole, ("qk", "vo"))}
    shapes = cut(layer_shapes(whole), method.plan(whole, scores, budget, torch.zeros(32)))
    dense, left = (size(whole, each).kv_bytes_per_token for each in (layer_shapes(whole), shapes))
    assert 1 - left / dense == pytest.approx(removed, abs=1e-4)
    assert {shape.v_head_dim for shape in shapes} == {method.kv_lora_rank}


@pytest.mark.parametrize(
    ("method", "config", "budget", "message"),
    [
        (TransMLA(), LLAMA_3_8B, Budget(value=0.5, of="params"), "TransMLA cuts .* got ratio.of=params"),
        (MHA2MLA(), LLAMA_3_8B, Budget(value=0.5, of="params"), "MHA2MLA cuts .* got ratio.of=params"),
        (TransMLA(), tiny_config("qwen3"), HALF, "norms queries and keys.*cannot share one latent"),
        (MHA2MLA(), joined_config(tiny_config("llama"), 1), HALF, "starts from a dense model"),
        (TransMLA(freqfold=3), LLAMA_3_8B, HALF, "freqfold=3 must divide the 64 frequencies"),
        (TransMLA(freqfold=1), LLAMA_3_8B, HALF, "multiple of the 2 frequencies .* 32 rotated pairs"),
        (TransMLA(), LLAMA_3_8B, replace(HALF, value=0.2), "a latent of at most 1024 and 64 rotated"),
        (
            MHA2MLA(qk_rope_head_dim=130),
            LLAMA_3_8B,
            HALF,
            "130 of each KV head, and 128 of its channels turn",
        ),
        (MHA2MLA(), LLAMA_3_8B, replace(HALF, value=0.2), "a latent of at most 1024 and 128 rotated"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(method, config, budget, message):
    with pytest.raises(ValueError, match=message):
        method.check(config, budget)
