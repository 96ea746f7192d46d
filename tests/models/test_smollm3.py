"""SmolLM3: layers without RoPE among layers with it."""

from __future__ import annotations

import pytest
import torch

import kvp
from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.load import byte_tokenizer, save
from kvp.models.spaces import find_spaces
from kvp.models.surgery import apply
from kvp.serving.stock import to_stock
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model
from tests.helpers.checkpoints import edit_config
from tests.helpers.masks import mask
from tests.helpers.stock import ROPES

FAMILY = "smollm3"
PLAIN = {"vocab_size": 259, "attention_bias": False}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def shared_pairs(model, pairs=(0, 2, 3)):
    """Keep the same pairs in all layers and groups, and as many channels, so that a stock class can hold them."""
    kept = {"qk": torch.tensor(pairs), "vo": torch.arange(2 * len(pairs))}
    spaces = find_spaces(model.config, kept)
    return apply(model, Plan({space: kept[space.kind].expand(space.shape[0], -1) for space in spaces}))


def test_the_layers_without_rope_follow_their_blocks(tokens):
    model = tiny_model(FAMILY, dtype=torch.float64)
    assert model.config.no_rope_layers == [1, 0, 1]
    plan = Plan({find_spaces(model.config, ["block"])[0]: torch.tensor([1, 2])})
    pruned = apply(model, plan)
    assert pruned.config.no_rope_layers == [0, 1]
    assert [layer.self_attn.use_rope for layer in pruned.model.layers] == [0, 1]
    assert (logits(pruned, tokens) - logits(mask(model, plan), tokens)).abs().max() < 1e-6


def test_a_layer_without_rope_looks_at_no_position(tokens):
    """A cut model of such layers alone gives the last token the same logits, in whatever order the others stand."""
    model = tiny_model(FAMILY, num_hidden_layers=1, no_rope_layers=[0], dtype=torch.float64)
    turned = tiny_model(FAMILY, num_hidden_layers=1, no_rope_layers=[1], dtype=torch.float64)
    shuffled = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    for each, same in ((model, True), (turned, False)):
        pruned = apply(each, random_plan(each, ["qk", "vo"]))
        apart = (logits(pruned, tokens) - logits(pruned, shuffled))[:, -1].abs().max()
        assert (apart < 1e-6) == same


@pytest.mark.slow
def test_shared_pairs_are_stock(tmp_path):
    pruned = shared_pairs(tiny_model(FAMILY, **PLAIN))
    save(pruned, byte_tokenizer(), tmp_path / "pruned")
    assert export(tmp_path / "pruned", tmp_path / "out", "stock")["check"]["passed"]
    opened, _ = kvp.load(tmp_path / "out", dtype="float32")
    ids = torch.arange(3, 60)[None]
    assert type(opened).__name__ == "SmolLM3ForCausalLM"
    assert (logits(opened, ids) - logits(pruned, ids)).abs().max() < 1e-4


def test_scaled_cosines_are_refused():
    pruned = shared_pairs(tiny_model(FAMILY, rope_parameters=ROPES["yarn"] | {"rope_theta": 1e3}, **PLAIN))
    with pytest.raises(ValueError, match="'yarn' scales cosines, and some layers of smollm3 have none"):
        to_stock(pruned, "stock")


@pytest.mark.parametrize(
    ("form", "reason"), [("gguf", "writes no GGUF of smollm3"), ("mla", "layers without RoPE")]
)
def test_other_forms_are_refused_by_name(form, reason, tmp_path):
    save(tiny_model(FAMILY, "mqa", **PLAIN), byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "dense", tmp_path / "out", form)


def test_a_list_of_another_length_is_refused(tmp_path):
    save(tiny_model(FAMILY, **PLAIN), byte_tokenizer(), tmp_path)
    check_checkpoint(tmp_path)
    edit_config(tmp_path, no_rope_layers=[1, 0])
    with pytest.raises(ValueError, match="no_rope_layers has 2 entries, num_hidden_layers is 3"):
        check_checkpoint(tmp_path)
