"""Experts behind a router: attention and KV are cut, experts stay whole; and the sinks of gpt-oss."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kvp
from kvp.measurement.count import macs
from kvp.measurement.paths import prepare
from kvp.measurement.roofline import step_bytes
from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.linears import all_linears
from kvp.models.load import byte_tokenizer, load_model, save
from kvp.models.shapes import layer_shapes, size
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.serving.write import export
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.llm_bip import LLMBIP
from kvp.strategies.methods.magnitude import Magnitude
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.methods.wanda import Wanda
from kvp.strategies.signals.logits import observed_attention
from kvp.types import Budget, Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.checkpoints import edit_config, edit_weights
from tests.helpers.masks import mask

FILES = {"qwen3_moe": "mlp.experts.3.down_proj.weight", "mixtral": "block_sparse_moe.experts.3.w2.weight"}
FORMS = {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "gpt_oss": "GptOss"}
CACHE = Budget(value=0.25, of="kv_cache", tolerance=0.2)


@pytest.fixture(params=sorted(FORMS))
def name(request):
    return request.param


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_what_it_offers(name):
    every = tiny_config(name, **({"mlp_only_layers": []} if name == "qwen3_moe" else {}))
    assert {"block", "mlp", "kv_group", "qk", "vo"} <= {*available_kinds(every)}
    with pytest.raises(
        ValueError, match=r"has no space 'ffn', because its MLPs are experts .*; it has: block"
    ):
        find_spaces(every, ["ffn"])


def test_the_mlps_between_experts_can_be_cut():
    config = tiny_config("qwen3_moe")
    assert [shape.experts for shape in layer_shapes(config)] == [4, 0, 4]
    assert [(space.layer, space.shape) for space in find_spaces(config, ["ffn"])] == [(1, (40,))]


def test_experts_stay_whole(name):
    model = tiny_model(name)
    pruned = apply(model, random_plan(model, ["kv_group", "qk", "vo"]))
    experts = {key: tensor for key, tensor in model.state_dict().items() if ".mlp." in key}
    assert any("experts.gate_up_proj" in key for key in experts)
    for key, tensor in experts.items():
        assert pruned.state_dict()[key].data_ptr() == tensor.data_ptr()


def test_experts_follow_their_blocks(tokens):
    model = tiny_model("qwen3_moe", dtype=torch.float64, num_hidden_layers=4, decoder_sparse_step=2)
    assert [shape.experts for shape in layer_shapes(model.config)] == [0, 0, 0, 4]  # 1 is an MLP by name
    plan = Plan({find_spaces(model.config, ["block"])[0]: torch.tensor([0, 2, 3])})
    pruned = apply(model, plan)
    assert [shape.experts for shape in layer_shapes(pruned.config)] == [0, 0, 4]
    assert (logits(pruned, tokens) - logits(mask(model, plan), tokens)).abs().max() < 1e-9


def test_an_mlp_of_experts_can_be_removed(name, tokens, tmp_path):
    model = tiny_model(name, dtype=torch.float64)
    plan = Plan({find_spaces(model.config, ["mlp"])[0]: torch.tensor([1, 2])})
    pruned = apply(model, plan)
    assert (logits(pruned, tokens) - logits(mask(model, plan), tokens)).abs().max() < 1e-9
    assert (logits(pruned, tokens) - logits(model, tokens)).abs().max() > 1e-3
    assert size(pruned.config, layer_shapes(pruned.config)).params == sum(
        p.numel() for p in pruned.parameters()
    )
    pruned = pruned.float()
    save(pruned, None, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.config._experts_implementation == "grouped_mm"
    assert (logits(opened, tokens) - logits(pruned, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_that_hold_experts_one_by_one_are_checked(name, tokens, tmp_path):
    model = tiny_model(name, vocab_size=259)
    save(model, byte_tokenizer(), tmp_path)
    stored = f"model.layers.0.{FILES[name]}"
    assert stored in load_file(tmp_path / "model.safetensors")
    checked = check_checkpoint(tmp_path)
    assert checked.params == sum(p.numel() for p in model.parameters())
    opened = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert torch.equal(logits(opened, tokens), logits(model, tokens))
    edit_weights(tmp_path, lambda weights: {key: x for key, x in weights.items() if key != stored})
    with pytest.raises(ValueError, match=f"lacks 1 of the weights .*, {stored} among them"):
        check_checkpoint(tmp_path)


def test_fields_that_disagree_are_refused(tmp_path):
    save(tiny_model("qwen3_moe", vocab_size=259), byte_tokenizer(), tmp_path)
    edit_config(tmp_path, num_experts_per_tok=5)
    with pytest.raises(ValueError, match="num_experts_per_tok must be at most num_experts=4, got 5"):
        check_checkpoint(tmp_path)
    edit_config(tmp_path, num_experts_per_tok=2, mlp_only_layers=[7])
    with pytest.raises(ValueError, match="mlp_only_layers must be below num_hidden_layers=3, got 7"):
        check_checkpoint(tmp_path)
    edit_config(tmp_path, mlp_only_layers=[1], num_experts=4, num_local_experts=8)
    with pytest.raises(ValueError, match="num_experts=4 and num_local_experts=8: give one of them"):
        check_checkpoint(tmp_path)


def test_work_is_that_of_the_experts_chosen(name):
    """Two of four experts work for a token, so dropping the two others from the count leaves work and bytes alike."""
    four, two = (tiny_config(name, num_local_experts=count) for count in (4, 2))
    router = sum(shape.experts > 0 for shape in layer_shapes(four)) * four.hidden_size * 2
    work = [macs(config, layer_shapes(config), prompt_length=1) for config in (four, two)]
    assert work[0] - work[1] == router
    bytes_read = [
        step_bytes(config, batch_size=1, tokens=1, dtype=torch.float32).weights_bytes
        for config in (four, two)
    ]
    biases = 2 * len(layer_shapes(four)) if name == "gpt_oss" else 0
    assert bytes_read[0] - bytes_read[1] == 4 * (router + biases)


def test_methods_that_read_an_mlp_are_refused_by_name(name):
    config = tiny_config(name)
    with pytest.raises(ValueError, match=r"most of .* are experts, which stay whole: choose a strategy"):
        Wanda().check(config, Budget(value=0.5, of="sparsity"))
    with pytest.raises(ValueError, match="has experts, and no score here sums over their weights"):
        ShortenedLLM(criterion="magnitude", protect_first=0, protect_last=0).check(
            config, Budget(value=1 / 3, of="blocks")
        )
    with pytest.raises(ValueError, match="has experts, and no score here sums over their weights"):
        Magnitude(allocator=Uniform(multiple_of=1), grouping="mlp").check(
            config, Budget(value=0.3, of="params")
        )
    with pytest.raises(ValueError, match="has experts there"):
        LLMBIP().check(config, Budget(value=0.2, of="params"))
    with pytest.raises(ValueError, match="has experts, which read the stream"):
        SliceGPT().check(config, Budget(value=0.25, of="params"))
    ShortenedLLM(protect_first=0, protect_last=0).check(config, Budget(value=1 / 3, of="blocks"))
    Magnitude(allocator=Uniform(multiple_of=1), grouping="vo").check(config, CACHE)
    assert not any("mlp" in linear.module for linear in all_linears(tiny_config("mixtral")))


@pytest.mark.slow
def test_groups_are_stock(name, tmp_path):
    model = tiny_model(name, "mha", vocab_size=259)
    kept = {space: torch.tensor([0, 3]) for space in find_spaces(model.config, ["kv_group"])}
    pruned = apply(model, Plan(kept))
    save(pruned, byte_tokenizer(), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "stock")["check"]["passed"]
    opened, _ = kvp.load(tmp_path / "out", dtype="float32")
    assert type(opened).__name__ == f"{FORMS[name]}ForCausalLM"
    ids = torch.arange(3, 60)[None]
    assert (logits(opened, ids) - logits(pruned, ids)).abs().max() < 1e-4


@pytest.mark.parametrize(("form", "reason"), [("gguf", "writes no GGUF of"), ("mla", "experts|biases|norm")])
def test_other_forms_are_refused_by_name(form, reason, name, tmp_path):
    save(tiny_model(name, "mqa", vocab_size=259), byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "dense", tmp_path / "out", form)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_sinks_go_with_their_query_heads(heads, tokens):
    """Cut groups are those whose columns of o_proj are zero; a removed head's sink decides nothing any more."""
    model = tiny_model("gpt_oss", heads, dtype=torch.float64)
    plan = random_plan(model, ["kv_group"])
    pruned, plain = apply(model, plan), copy.deepcopy(model)
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for space, keep in plan.keep.items():
            gone = sorted(set(range(space.shape[0])) - set(keep.tolist()))
            attention = plain.model.layers[space.layer].self_attn
            for head in (group * queries + query for group in gone for query in range(queries)):
                attention.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
                attention.sinks[head] = 7
            assert len(pruned.model.layers[space.layer].self_attn.sinks) == queries * len(keep)
    assert (logits(pruned, tokens) - logits(plain, tokens)).abs().max() < 1e-9
    with torch.no_grad():
        pruned.model.layers[0].self_attn.sinks += 1
    assert (logits(pruned, tokens) - logits(plain, tokens)).abs().max() > 1e-4


def test_watching_the_attention_leaves_its_sinks(tokens):
    model, seen = tiny_model("gpt_oss"), []
    expected = logits(model, tokens)
    with observed_attention(model, lambda module, query, key: seen.append(key.shape)):
        assert torch.equal(logits(model, tokens), expected)
    assert len(seen) == 3


@pytest.mark.parametrize("path", ["static", "compiled"])
def test_kernels_without_sinks_are_refused(path):
    with pytest.raises(ValueError, match=r"gpt_oss has attention sinks, .*: use --path eager"):
        prepare(path, tiny_model("gpt_oss"), batch_size=1, prompt_length=4, new_tokens=2)
