"""Exports open in a process that never imports kvp, with the same logits and the same greedy text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kvp.models.family import FAMILIES
from kvp.models.joined import joined
from kvp.models.load import byte_tokenizer, save
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.serving.layout import stock_layout
from kvp.serving.stock import add_old_keys, servable, to_stock
from kvp.serving.write import export
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.kvpruner import KVPruner
from kvp.types import Budget, Plan
from tests.conftest import random_plan, tiny_model
from tests.helpers.stock import ROPES, shared_plan, stock_model

WITHOUT_KVP = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for cls in AutoModelForCausalLM, LlamaForCausalLM:
    try:
        cls.from_pretrained(sys.argv[1])
        print("opened")
    except (ValueError, RuntimeError) as error:
        print(" ".join(str(error).split()))
"""


def channel_plan(model, scope):
    strategy = KVPruner(allocator=Uniform(multiple_of=2), scope=scope)
    torch.manual_seed(0)
    scores = {space: torch.rand(space.shape) for space in find_spaces(model.config, strategy.kinds())}
    budget = Budget(value=0.25, of="kv_cache")
    return strategy.plan(model.config, scores, budget, torch.zeros(model.config.num_hidden_layers))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_any_shared_set_of_pairs_gives_the_same_logits_from_disk(family, rope, heads, tmp_path, tokens):
    """Sets of 1 to 4 of the 4 pairs; all 4 keep the rope, and the scale, as they are."""
    draw = torch.Generator().manual_seed(sum(map(ord, family + rope + heads)))
    kept = 1 + int(torch.randint(4, (1,), generator=draw))
    pairs = torch.randperm(4, generator=draw)[:kept].sort().values.tolist()
    pruned = stock_model(family, heads, rope, pairs, tie_word_embeddings=heads == "mqa")
    stock = to_stock(pruned, "stock")
    assert type(stock).__module__.startswith("transformers.")
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.head_dim == 2 * kept
    assert not [name for name in loaded.config.to_dict() if name.startswith("kvp_")]
    with torch.no_grad():
        difference = loaded(tokens).logits - pruned(tokens).logits
    assert difference.abs().max() < 2e-4


@pytest.mark.parametrize("pairs", [(0, 1, 2), (0, 2), (1, 2, 3)])
def test_arithmetic_sets_need_no_factors(pairs, tokens):
    pruned = stock_model("llama", "gqa", pairs=pairs)
    stock = to_stock(pruned, "stock_arithmetic")
    assert "short_factor" not in stock.config.rope_parameters
    with torch.no_grad():
        assert (stock(tokens).logits - pruned(tokens).logits).abs().max() < 2e-4


def test_padded_gives_the_same_logits_for_any_plan(family, heads, tokens):
    model, of = tiny_model(family, heads), FAMILIES[family]
    kinds = ["vo", "ffn"] + ["kv_group"] * (not of.joint_norm) + ["qk"] * (not of.qk_norm)
    pruned = apply(
        model, random_plan(model, [kind for kind in kinds if kind in available_kinds(model.config)])
    )
    if of.fused:
        with pytest.raises(ValueError, match="has no padded form, because its class fuses matrices"):
            to_stock(pruned, "padded")
        return
    padded = to_stock(pruned, "padded")
    with torch.no_grad():
        assert (padded(tokens).logits - pruned(tokens).logits).abs().max() < 2e-4


@pytest.mark.parametrize("kinds", [["block"], ["ffn"]])
def test_depth_and_uniform_ffn_are_stock(kinds, tokens):
    model = tiny_model("mistral", "gqa")
    plan = random_plan(model, kinds)
    width = min(keep.shape[-1] for keep in plan.keep.values())
    pruned = apply(model, Plan({space: keep[..., :width] for space, keep in plan.keep.items()}))
    stock = to_stock(pruned, "stock")
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, pruned(tokens).logits)


def test_gemma_refuses_groups_that_do_not_divide_its_hidden_size():
    model = tiny_model("gemma3_text", "mha", hidden_size=40)
    pruned = apply(model, Plan({space: torch.arange(3) for space in random_plan(model, ["kv_group"]).keep}))
    with pytest.raises(
        ValueError, match="3 heads do not divide hidden_size=40, which gemma3_text classes demand"
    ):
        servable(pruned.config, stock_layout(pruned.config))


@pytest.mark.parametrize(
    ("fields", "old"),
    [
        ({"model_type": "phi3"}, {"partial_rotary_factor": 0.5, "rope_scaling": None}),
        (
            {"model_type": "phi3", "rope_type": "longrope"},
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
        ),
        (
            {"model_type": "phi3", "rope_type": "linear"},
            {"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": 0.5, "factor": 4.0}},
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 6}, {"num_experts": 6}),
    ],
)
def test_older_classes_find_their_fields(fields, old, tmp_path):
    rope = {"rope_theta": 1e4, "rope_type": fields.pop("rope_type", "default")}
    if fields["model_type"] == "phi3":
        rope |= {"partial_rotary_factor": 0.5, "factor": 4.0}
    if rope["rope_type"] == "longrope":
        rope |= {"short_factor": [1.0], "long_factor": [2.0]}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "rope_parameters": rope}))
    add_old_keys(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()).items() >= old.items()


def test_groups_that_do_not_divide_the_hidden_size_become_mistral(tokens):
    model = tiny_model("llama", "mha", attention_bias=False, mlp_bias=False, hidden_size=40)
    spaces = random_plan(model, ["kv_group"]).keep
    pruned = apply(model, Plan({space: torch.arange(3) for space in spaces}))
    stock = to_stock(pruned, "stock")
    assert stock.config.model_type == "mistral"
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, pruned(tokens).logits)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["qk"], "different qk_head_dim.*kvpruner_stock"),
        (["vo"], "different v_head_dim"),
        (["attention"], "sublayer is missing"),
        (["ffn"], "different intermediate_size"),
    ],
)
def test_what_is_not_stock_is_refused_with_the_way_out(kinds, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        stock_layout(apply(model, random_plan(model, kinds)).config)


def test_free_rope_pairs_are_refused():
    model = tiny_model()
    plan = channel_plan(model, "head")
    with pytest.raises(ValueError, match=r"one set of rope pairs.*scope=model"):
        stock_layout(apply(model, plan).config)


@pytest.mark.parametrize("pairs", [(1, 5, 6, 7), tuple(range(8))])
def test_folded_pairs_are_stock_but_have_no_other_form(pairs, tokens):
    model = tiny_model("mistral", "gqa", head_dim=16, dtype=torch.float64)
    pruned = apply(model, replace(shared_plan(model, pairs), folded=5))
    stock = to_stock(pruned, "stock")
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, pruned(tokens).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no arithmetic progression"):
        to_stock(pruned, "stock_arithmetic")
    with pytest.raises(ValueError, match=r"strategy\.context=null"):
        to_stock(pruned, "padded")


def test_joined_heads_are_stock_and_have_no_padded_form(tokens):
    model = joined(tiny_model("mistral", "gqa", head_dim=16, dtype=torch.float64), 1)
    pruned = apply(model, shared_plan(model, (1, 5, 9, 10, 13)))
    stock = to_stock(pruned, "stock")
    assert (stock.config.num_key_value_heads, stock.config.head_dim) == (1, 10)
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, pruned(tokens).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"strategy\.num_key_value_heads=null"):
        to_stock(pruned, "padded")


def test_scope_model_is_stock(tokens):
    model = tiny_model()
    pruned = apply(model, channel_plan(model, "model"))
    with torch.no_grad():
        assert (to_stock(pruned, "stock")(tokens).logits - pruned(tokens).logits).abs().max() < 2e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "pruned"
    pruned = stock_model("llama", "gqa", vocab_size=259)
    save(pruned, byte_tokenizer(), path)
    return path


def test_the_command_writes_what_a_stranger_opens(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kvp.export", str(checkpoint), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    serving = json.loads((out / "serving.json").read_text())
    assert serving["check"]["logits_relative_difference"] < 1e-4
    assert serving["check"]["logprobs_rms_difference"] < 1e-4
    assert serving["check"]["greedy_tokens_equal"]
    assert serving["kv_bytes_per_token"]["checkpoint"] == serving["kv_bytes_per_token"]["export"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["rope_scaling"]["short_factor"] == config["rope_parameters"]["long_factor"]
    assert config["rope_theta"] == 1000.0
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "LlamaForCausalLM"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_bad_input_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        export(tmp_path, tmp_path / "out", "stock")
    model = tiny_model(vocab_size=259)
    save(apply(model, random_plan(model, ["vo"])), byte_tokenizer(), tmp_path / "pruned")
    for to in ("stock", "stock_arithmetic", "gguf"):
        with pytest.raises(ValueError, match="different v_head_dim"):
            export(tmp_path / "pruned", tmp_path / "out", to)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' is not supported; known families"):
        export(tmp_path / "bert", tmp_path / "out", "stock")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "pruned"]


def test_weights_of_another_plan_write_nothing(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "mixed")
    other = stock_model("llama", "gqa", pairs=(0, 1), vocab_size=259).state_dict()
    save_file(other, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"k_proj.*mismatched"):
        export(tmp_path / "mixed", tmp_path / "out", "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_an_export_that_differs_is_removed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("kvp.serving.stock.query_scale", lambda layout, scaling: 1.0)
    with pytest.raises(ArithmeticError, match="The export was removed"):
        export(checkpoint, tmp_path / "out", "stock")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_custom_is_any_shape_and_opens_with_kvp_only(tmp_path):
    model = tiny_model(vocab_size=259)
    save(apply(model, random_plan(model, ["qk", "vo", "ffn"])), byte_tokenizer(), tmp_path / "pruned")
    serving = export(tmp_path / "pruned", tmp_path / "custom", "custom")
    assert serving["check"]["logits_max_difference"] < 1e-5
    assert "after `import kvp`" in serving["engines"]["transformers"]
    assert serving["engines"]["vllm"].startswith("no")
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_KVP, str(tmp_path / "custom")], capture_output=True, text=True
    )
    auto, llama = stranger.stdout.splitlines()
    assert "kvp_llama" in auto
    assert "mismatched" in llama
    save(model, byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(ValueError, match="an ordinary llama checkpoint: export it --to stock"):
        export(tmp_path / "dense", tmp_path / "out", "custom")
