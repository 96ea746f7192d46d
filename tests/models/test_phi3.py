"""Phi-3 and Phi-4: fused matrices taken one by one, partial RoPE, and RoPE of two sets of factors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvp
from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.load import byte_tokenizer, load_model, save
from kvp.models.shapes import layer_shapes, size, turning_pairs
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.models.unfused import fused_state, unfused
from kvp.serving.stock import to_stock
from kvp.serving.write import export
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.methods.kvpruner_plus import KVPrunerPlus
from kvp.strategies.methods.magnitude import Magnitude
from kvp.types import KINDS, Budget, Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.checkpoints import PARTIAL, edit_config
from tests.helpers.masks import mask
from tests.helpers.stock import fused, shared_plan

TWO_SETS = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG = {
    "rope_parameters": TWO_SETS | {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    "original_max_position_embeddings": 16,
}
MINI = {
    "rope_parameters": TWO_SETS
    | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]},
    "original_max_position_embeddings": 16,
}
EVERY = {"full": {}, "partial": PARTIAL, "long": LONG, "mini": MINI}
TEXTS = (9, 40)  # below the original length and above


@pytest.fixture(params=sorted(EVERY))
def twin(request):
    return tiny_model("phi3", dtype=torch.float64, vocab_size=259, **EVERY[request.param])


def ids(length):
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(length))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_the_twin_computes_what_transformers_does(twin):
    dense = fused(twin)
    assert {*dense.state_dict()} != {*twin.state_dict()}
    for length in TEXTS:
        assert (logits(unfused(dense), ids(length)) - logits(dense, ids(length))).abs().max() < 1e-6
    assert unfused(twin) is twin


def test_fusing_undoes_it(twin):
    state = fused(twin).state_dict()
    again = fused_state(twin.config, unfused(fused(twin)).state_dict())
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("kinds", [["kv_group", "qk"], ["qk", "vo", "ffn"], ["block", "qk"]], ids="+".join)
def test_masked_equals_sliced(kinds, twin):
    plan = random_plan(twin, kinds)
    for length in TEXTS:
        sliced = logits(apply(twin, plan), ids(length))
        assert (sliced - logits(mask(twin, plan), ids(length))).abs().max() < 1e-6
        assert (sliced - logits(twin, ids(length))).abs().max() > 1e-3


def test_pairs_that_stand_still_look_at_no_position():
    model = tiny_model("phi3", dtype=torch.float64, num_hidden_layers=1, **PARTIAL)
    own = tuple(kind for kind in KINDS if "latent" not in kind)
    assert available_kinds(model.config) == own and turning_pairs(model.config) == 2
    text = ids(9)
    shuffled = torch.cat([text[:, :-1].flip(1), text[:, -1:]], dim=1)
    for pairs, same in (([2, 3], True), ([1, 2], False)):
        keep = {space: torch.tensor([pairs] * 2) for space in find_spaces(model.config, ["qk"])}
        pruned = apply(model, Plan(keep))
        moved = (logits(pruned, text) - logits(pruned, shuffled))[:, -1].abs().max()
        assert (moved < 1e-6) == same


@pytest.mark.parametrize("name", ["full", "mini"])
def test_generation_is_the_same_with_every_cache(name):
    model = tiny_model("phi3", **EVERY[name])
    pruned = apply(model, random_plan(model, ["kv_group", "qk", "vo"]))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    text = ids(18)  # beyond the original length, where one set of factors holds
    dynamic = pruned.generate(text, **options)
    assert torch.equal(dynamic, pruned.generate(text, cache_implementation="static", **options))
    assert torch.equal(dynamic, pruned.generate(text, use_cache=False, **options))


def test_a_checkpoint_opens_as_its_twin(twin, tmp_path):
    dense = fused(twin.float())
    save(dense, byte_tokenizer(), tmp_path / "dense")
    checked = check_checkpoint(tmp_path / "dense")
    assert "model.layers.0.self_attn.q_proj" in checked.linears
    assert checked.params == size(twin.config, layer_shapes(twin.config)).params
    opened = load_model(tmp_path / "dense", dtype=torch.float32, device="cpu")
    assert type(opened) is type(twin)
    assert (logits(opened, ids(9)) - logits(dense, ids(9))).abs().max() < 1e-4
    pruned = apply(opened, random_plan(opened, ["qk", "vo"]))
    save(pruned, byte_tokenizer(), tmp_path / "pruned")
    check_checkpoint(tmp_path / "pruned")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(reopened, ids(40)), logits(pruned, ids(40)))
    save(opened, byte_tokenizer(), tmp_path / "twin")  # whose q, k and v lie in one storage
    again = load_model(tmp_path / "twin", dtype=torch.float32, device="cpu")
    assert torch.equal(logits(again, ids(9)), logits(opened, ids(9)))


def test_a_model_in_memory_is_pruned():
    dense = fused(tiny_model("phi3"))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    method = Magnitude(allocator=Uniform(multiple_of=2), grouping="vo")
    pruned = kvp.prune(dense, strategy=method, ratio=0.25, calibration=ids(12))
    assert type(pruned.model).__name__ == "KvpPhi3ForCausalLM"
    assert pruned.achieved["kv_cache"] == pytest.approx(0.25, abs=0.1)
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["full", "long"])
def test_shared_pairs_are_those_of_mistral(name):
    model = tiny_model("phi3", vocab_size=259, **EVERY[name])
    pruned = apply(model, shared_plan(model, (0, 2, 3)))
    stock = to_stock(pruned, "stock")
    assert type(stock).__name__ == "MistralForCausalLM"
    for length in TEXTS:
        assert (logits(stock, ids(length)) - logits(pruned, ids(length))).abs().max() < 2e-4


def test_whole_heads_that_turn_in_part_are_those_of_phi3():
    model = tiny_model("phi3", vocab_size=259, **MINI)
    keep = {space: torch.arange(3, 35) for space in find_spaces(model.config, ["ffn"])}
    keep[find_spaces(model.config, ["block"])[0]] = torch.tensor([0, 2])
    pruned = apply(model, Plan(keep))
    stock = to_stock(pruned, "stock")
    assert type(stock).__name__ == "Phi3ForCausalLM"
    for length in TEXTS:
        assert (logits(stock, ids(length)) - logits(pruned, ids(length))).abs().max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "mini"])
def test_what_is_stock_opens_elsewhere(name, tmp_path):
    model = tiny_model("phi3", vocab_size=259, **EVERY[name])
    keep = {space: torch.arange(3, 35) for space in find_spaces(model.config, ["ffn"])}
    save(apply(model, Plan(keep)), byte_tokenizer(), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "stock")["check"]["passed"]


@pytest.mark.parametrize(
    ("form", "reason"),
    [("stock", "never turn.*--to remote_code"), ("gguf", "never turn"), ("mla", "never turn")],
)
def test_channels_that_never_turn_are_refused_by_name(form, reason, tmp_path):
    model = tiny_model("phi3", "mqa", vocab_size=259, **PARTIAL)
    cut = apply(model, shared_plan(model, (0, 2, 3)) if form == "stock" else Plan({}))
    save(cut, byte_tokenizer(), tmp_path / "cut")
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "cut", tmp_path / "out", form)


def test_no_pairs_are_folded_with_those_that_never_turn():
    config, budget = tiny_config("phi3", **PARTIAL), Budget(value=0.25, of="kv_cache", tolerance=0.2)
    with pytest.raises(ValueError, match=r"some pairs of phi3 never turn .*set strategy.context=null"):
        KVPrunerPlus().check(config, budget)


def test_shares_that_turn_are_checked(tmp_path):
    save(fused(tiny_model("phi3", vocab_size=259, **PARTIAL)), byte_tokenizer(), tmp_path)
    rope = PARTIAL["rope_parameters"]
    for share, said in ((0.4, "turns 3 of 8 channels"), (0.1, "turns 0 of 8 channels")):
        edit_config(tmp_path, rope_parameters=rope | {"partial_rotary_factor": share})
        with pytest.raises(ValueError, match=said):
            check_checkpoint(tmp_path)
