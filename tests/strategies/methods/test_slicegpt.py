"""SliceGPT against its algebra written out matrix by matrix, its budget, and a whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvp.models.family import FAMILIES
from kvp.models.plans import read_plan, write_plan
from kvp.models.shapes import layer_shapes, size, sliced
from kvp.models.surgery import apply
from kvp.strategies.compensation.compensate import Bias
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import NETWORKS, exact_norms, tiny_config, tiny_model
from tests.helpers.masks import mask
from tests.helpers.runs import LIGHT, run_here

GOLDEN = Path(__file__).parents[1] / "golden_slicegpt.json"
WIDTH = 32  # of 48
BUDGET = Budget(value=0.1, of="block_params", tolerance=0.1)  # gives that width


def calibration():
    return torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(6))


def slice_plan(model, directory, strategy=None, budget=BUDGET, seed=1):
    strategy, target = strategy or SliceGPT(), Target(model, calibration(), batch_size=2, seed=seed)
    strategy.check(model.config, budget)
    directory.mkdir(exist_ok=True)
    return strategy.search(target, strategy.score(target), budget, torch.zeros(3), directory)


def projectors(plan):
    return torch.stack([basis @ basis.T for basis in plan.bases])


def rms(states, hidden_size, eps):
    return states / (states.square().sum(-1, keepdim=True) / hidden_size + eps).sqrt()


def naive_attention(states, weights, config):
    """One sequence (tokens, width), head by head; without the output projection."""
    q, k, v = (states @ weights[name].T + weights[f"{name}_bias"] for name in "qkv")
    width, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)

    angles = torch.outer(torch.arange(len(states)), frequencies).repeat(1, 2)

    def rotate(head):
        turned = torch.cat([-head[:, width // 2 :], head[:, : width // 2]], dim=1)
        return head * angles.cos().double() + turned * angles.sin().double()

    outputs = []
    for head in range(heads):
        of, group = slice(head * width, (head + 1) * width), head // (heads // groups)
        of_group = slice(group * width, (group + 1) * width)
        scores = rotate(q[:, of]) @ rotate(k[:, of_group]).T / width**0.5
        causal = scores.exp().tril()
        outputs.append(causal / causal.sum(1, keepdim=True) @ v[:, of_group])
    return torch.cat(outputs, dim=1)


def naive_slicegpt(model, ids, width=None, bases=None):
    """Slices as it goes: (the sliced model's logits, the bases). With `bases`, those of another run.

    As `rotate_and_slice_sequential` of the authors: what reads the stream is rotated and cut, then run, and
    its output in the old coordinates decides the next rotation.
    """
    config, hidden = model.config, model.config.hidden_size
    streams = [model.model.embed_tokens.weight[row] for row in ids]
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part in ("attention", "mlp"):
            principal = torch.linalg.svd(torch.cat(streams)).Vh[:width].T
            right = principal if bases is None else bases[len(found)]
            found.append(right)
            norm = layer.input_layernorm if part == "attention" else layer.post_attention_layernorm
            folded = torch.diag(norm.weight) @ right
            after = []
            for stream in streams:
                inside = stream @ right
                states = rms(inside, hidden, config.rms_norm_eps)
                if part == "attention":
                    weights = {n: getattr(attention, f"{n}_proj").weight @ folded for n in "qkv"}
                    weights |= {f"{n}_bias": getattr(attention, f"{n}_proj").bias for n in "qkv"}
                    out = naive_attention(states, weights, config) @ attention.o_proj.weight.T
                    out = out + attention.o_proj.bias
                else:
                    gate, up = (states @ (p.weight @ folded).T + p.bias for p in (mlp.gate_proj, mlp.up_proj))
                    out = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T + mlp.down_proj.bias
                after.append(inside @ right.T + out)
            streams = after
    final = [rms(stream, hidden, config.rms_norm_eps) * model.model.norm.weight for stream in streams]
    return torch.stack([states @ model.lm_head.weight.T for states in final]), found


@torch.no_grad()
@pytest.mark.parametrize("orientation", ["random", "pca"])
def test_bases_and_logits_are_those_of_the_naive_algebra(heads, orientation, tmp_path, tokens):
    model = exact_norms(tiny_model("llama", heads, dtype=torch.float64))
    plan = slice_plan(model, tmp_path, SliceGPT(orientation=orientation))
    expected, bases = naive_slicegpt(model, calibration(), WIDTH)
    assert (projectors(plan) - torch.stack([basis @ basis.T for basis in bases])).abs().max() < 1e-7
    pruned = exact_norms(apply(model, plan))
    assert (pruned(calibration()).logits - expected).abs().max() < 1e-7
    elsewhere, _ = naive_slicegpt(model, tokens[:1], bases=plan.bases)
    assert (pruned(tokens[:1]).logits - elsewhere).abs().max() < 1e-7  # rotary tables are float32


@pytest.fixture(params=[name for name in NETWORKS if not FAMILIES[name].post_norms])
def family(request) -> str:
    return request.param


@torch.no_grad()
def test_contract(family, heads, tmp_path, tokens):
    """Same seed same plan, masked = sliced, the model is left; what stays is where the states are largest."""
    model = tiny_model(family, heads, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, again = (slice_plan(model, tmp_path / n) for n in "ab")
    assert all(torch.equal(a, b) for a, b in zip(plan.bases, again.bases, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(plan.bases) == 6 and not plan.keep and not plan.edits
    for basis in plan.bases:
        assert basis.shape == (48, WIDTH)
        torch.testing.assert_close(basis.T @ basis, torch.eye(WIDTH, dtype=torch.float64))
    pruned = apply(model, plan)
    assert (pruned(tokens).logits - mask(model, plan)(tokens).logits).abs().max() < 1e-5  # norms in float32
    states = model.model.embed_tokens(calibration()).flatten(0, 1)
    left = [(states @ basis).square().sum() for basis in (plan.bases[0], again.bases[1])]
    assert left[0] == max(left)
    torch.testing.assert_close(left[0], torch.linalg.svdvals(states)[:WIDTH].square().sum())


def test_orientation_turns_the_bases_within_their_span(tmp_path):
    model = tiny_model(dtype=torch.float64)
    random, other, pca = (
        slice_plan(model, tmp_path / name, SliceGPT(orientation=orientation), seed=seed)
        for name, orientation, seed in (("a", "random", 1), ("b", "random", 2), ("c", "pca", 1))
    )
    for plan in (other, pca):
        assert (random.bases[0] - plan.bases[0]).abs().max() > 1e-2
        assert (projectors(random) - projectors(plan)).abs().max() < 1e-7
    states = model.model.embed_tokens(calibration()).flatten(0, 1).detach() @ pca.bases[0]
    energy = states.square().sum(0)
    assert torch.equal(energy, energy.sort(descending=True).values)
    torch.testing.assert_close(states.T @ states, torch.diag(energy), atol=1e-8, rtol=0)


def test_golden_projectors(tmp_path):
    """Of a fixed model; delete golden_slicegpt.json to write it anew after a reasoned change."""
    plan = slice_plan(tiny_model(dtype=torch.float64), tmp_path)
    found = [[round(x, 6) for x in diagonal[:8]] for diagonal in projectors(plan).diagonal(0, 1, 2).tolist()]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found))
    for row, golden in zip(found, json.loads(GOLDEN.read_text()), strict=True):
        assert row == pytest.approx(golden, abs=2e-6)


@pytest.mark.parametrize("of", ["params", "block_params"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_width_is_the_nearest_to_the_budget(of, tied):
    config = tiny_config(heads="mha", tie_word_embeddings=tied, hidden_size=256, intermediate_size=512)
    shapes = layer_shapes(config)
    dense = size(config, shapes).count(of)

    def removed(width):
        return 1 - size(config, sliced(shapes, [width] * 6 + [256])).count(of) / dense

    for value in (0.05, 0.2, 0.4):
        budget = Budget(value=value, of=of, tolerance=0.03)
        width = SliceGPT().width(config, budget)
        assert width % 8 == 0
        assert abs(removed(width) - value) == min(abs(removed(w) - value) for w in range(8, 256, 8))
        exact = Budget(value=removed(width), of=of, tolerance=1e-9)
        assert SliceGPT().width(config, exact) == width


def test_an_unsliced_rotation_would_add_parameters_so_nothing_is_rotated(tmp_path, tokens):
    model = tiny_model()
    shapes = layer_shapes(model.config)
    assert size(model.config, sliced(shapes, [48] * 7)).params > size(model.config, shapes).params
    plan = slice_plan(model, tmp_path, budget=Budget(value=0, of="params"))
    assert not plan.bases
    with torch.no_grad():
        assert torch.equal(apply(model, plan)(tokens).logits, model(tokens).logits)


def test_slices_of_llama2_7b_in_parameters():
    """What the module's text says; widths are those of the authors' code for these slices."""
    config = LlamaConfig(intermediate_size=11008)
    shapes = layer_shapes(config)
    dense = size(config, shapes)
    for slicing, removed in ((0.1, -0.0299), (0.2, 0.0939), (0.25, 0.1534), (0.3, 0.2145)):
        width = int((1 - slicing) * 4096) // 8 * 8
        left = size(config, sliced(shapes, [width] * 64 + [4096]))
        assert 1 - left.params / dense.params == pytest.approx(removed, abs=5e-5)
        assert left.kv_bytes_per_token == dense.kv_bytes_per_token
        if removed > 0:
            assert SliceGPT().width(config, Budget(value=removed, of="params")) == width


def test_clear_refusals():
    for of in ("kv_cache", "blocks", "sparsity"):
        with pytest.raises(ValueError, match=rf"shortens no {of}: choose ratio=params or ratio=block_params"):
            SliceGPT().check(tiny_config(), Budget(value=0.25, of=of))
    with pytest.raises(ValueError, match=r"the nearest is 0\.\d{4}, at a width of 8 of 48"):
        SliceGPT().check(tiny_config(), Budget(value=0.95, of="block_params"))
    with pytest.raises(ValueError, match=r"orientation must be one of random, pca, got 'upright'"):
        SliceGPT(orientation="upright")
    with pytest.raises(ValueError, match=r"strategy\.multiple_of must be >= 1, got 0"):
        SliceGPT(multiple_of=0)
    with pytest.raises(ValueError, match=r"slicing cuts rows of them"):
        SliceGPT(compensation=Bias())


def test_states_that_are_not_finite_are_named(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the residual stream before the attention of layer 2"):
        slice_plan(model, tmp_path)


def test_a_search_goes_on_after_the_layers_on_disk(tmp_path):
    """A file that is there is taken as it is: these are turned otherwise, which no later base can see."""
    model = tiny_model(dtype=torch.float64)
    whole = slice_plan(model, tmp_path / "whole")
    other = slice_plan(model, tmp_path / "other", seed=2)
    (tmp_path / "killed" / "bases").mkdir(parents=True)
    shutil.copy(tmp_path / "other/bases/0.safetensors", tmp_path / "killed/bases/0.safetensors")
    (tmp_path / "killed/bases/1.partial").write_text("half a file")
    resumed = slice_plan(model, tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(resumed.bases[:2], other.bases[:2], strict=True))
    torch.testing.assert_close(projectors(resumed), projectors(whole), atol=1e-6, rtol=0)
    write_plan(tmp_path / "killed", resumed)
    read = read_plan(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(resumed.bases, read.bases, strict=True))
    assert json.loads((tmp_path / "killed/plan.json").read_text())["stream"] == [WIDTH] * 6


def test_a_whole_run(tmp_path):
    options = ["strategy=slicegpt", "strategy.multiple_of=2", "ratio=params", "ratio.tolerance=0.01", *LIGHT]
    record = run_here(tmp_path, *options)
    achieved = record["ratio"]["achieved"]
    assert achieved["params"] == pytest.approx(0.25, abs=0.01)
    assert (achieved["kv_cache"], achieved["blocks"]) == (0, 0)
    for name in ("pruned", "recovered"):
        model = AutoModelForCausalLM.from_pretrained(record[name]["checkpoint"])
        assert sum(p.numel() for p in model.parameters()) == record[name]["size"]["params"]
        streams = [shape["stream"] for shape in record[name]["size"]["layers"]]
        assert all(stream == streams[0] for stream in streams[:-1]) and streams[-1] == [*streams[0][:2], 96]
    again = ["model=local", f"model.path={record['pruned']['checkpoint']}", "model.name=sliced"]
    with pytest.raises(ValueError, match="slicing comes last"):
        run_here(tmp_path, *options, *again)
