"""A sliced residual stream: rotation is exact, slicing is a projection, the checkpoint is an ordinary one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from kvp.measurement.count import macs
from kvp.models.family import FAMILIES
from kvp.models.load import byte_tokenizer, save
from kvp.models.masks import masked
from kvp.models.shapes import layer_shapes, size
from kvp.models.sliced import StreamNorm
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import NETWORKS, exact_norms, random_plan, tiny_config, tiny_model
from tests.helpers.masks import mask


def test_no_layer_is_split_between_devices():
    model = tiny_model("llama")
    assert {"KvpLlamaDecoderLayer", "LlamaDecoderLayer"} <= {
        *apply(model, random_plan(model, ["ffn"]))._no_split_modules
    }


WIDTHS = (40, 32, 36, 24, 44, 28)  # of the six places of three layers
WHOLE = (48,) * 6


@pytest.fixture(params=[name for name in NETWORKS if not FAMILIES[name].post_norms])
def family(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request) -> bool:
    return request.param


def random_bases(widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    squares = (torch.randn(48, 48, generator=generator, dtype=torch.float64) for _ in widths)
    return [torch.linalg.qr(square).Q[:, :width] for square, width in zip(squares, widths, strict=True)]


def sliced_model(family="llama", heads="gqa", widths=WIDTHS, **changes):
    return apply(tiny_model(family, heads, **changes), Plan({}, bases=random_bases(widths)))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_rotation_without_slicing_is_the_dense_model(family, heads, tied, tokens):
    model = tiny_model(family, heads, dtype=torch.float64, tie_word_embeddings=tied)
    rotated = apply(model, Plan({}, bases=random_bases(WHOLE)))
    assert (logits(rotated, tokens) - logits(model, tokens)).abs().max() < 1e-5  # norms in float32
    difference = logits(exact_norms(rotated), tokens) - logits(exact_norms(model), tokens)
    assert difference.abs().max() < 1e-12


def test_slicing_is_a_projection_of_the_stream(family, heads, tied, tokens):
    model = exact_norms(tiny_model(family, heads, dtype=torch.float64, tie_word_embeddings=tied))
    plan = Plan({}, bases=random_bases(WIDTHS))
    dense = logits(model, tokens)
    sliced = logits(exact_norms(apply(model, plan)), tokens)
    assert (sliced - logits(mask(model, plan), tokens)).abs().max() < 1e-12
    with masked(model, plan):
        assert (sliced - logits(model, tokens)).abs().max() < 1e-12
    assert torch.equal(logits(model, tokens), dense)
    assert (sliced - dense).abs().max() > 1e-2


def test_a_pruned_model_can_be_sliced(family, tokens):
    """Also in one plan; sublayers that are away, and other widths in every layer."""
    model = exact_norms(tiny_model(family, dtype=torch.float64))
    kinds = [kind for kind in available_kinds(model.config) if kind != "block"]
    cut = random_plan(model, kinds)
    plan = Plan(cut.keep, bases=random_bases(WIDTHS))
    shapes = layer_shapes(apply(model, plan).config)
    assert any(shape.num_key_value_heads == 0 for shape in shapes)
    assert any(shape.intermediate_size == 0 for shape in shapes)
    once = logits(exact_norms(apply(model, plan)), tokens)
    twice = exact_norms(apply(apply(model, cut), Plan({}, bases=plan.bases)))
    assert torch.equal(once, logits(twice, tokens))
    assert (once - logits(mask(model, plan), tokens)).abs().max() < 1e-12


def test_norms_divide_by_the_original_width():
    config = tiny_config()
    (basis,) = random_bases((32,))
    states = torch.randn(5, 48, dtype=torch.float64)
    rms = ((states @ basis @ basis.T).square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    torch.testing.assert_close(StreamNorm(config)(states @ basis), states @ basis / rms)
    half = StreamNorm(config)((states @ basis).bfloat16())
    assert half.dtype == torch.bfloat16


def test_the_counted_parameters_are_the_real_ones_and_the_cache_is_the_dense_one(family, heads, tied, tokens):
    dense = tiny_model(family, heads, tie_word_embeddings=tied)
    model = apply(dense, Plan({}, bases=random_bases(WIDTHS)))
    counted = size(model.config, layer_shapes(model.config))
    assert counted.params == sum(p.numel() for p in model.parameters())
    assert counted.block_params == sum(p.numel() for p in model.model.layers.parameters())
    shortcuts = 40 * 32 + 32 * 36 + 36 * 24 + 24 * 44 + 44 * 28 + 28 * 48
    assert shortcuts == sum(p.numel() for name, p in model.named_parameters() if "shortcut" in name)
    before = size(dense.config, layer_shapes(dense.config))
    assert counted.kv_bytes_per_token == before.kv_bytes_per_token and counted.blocks == before.blocks
    cache = model(tokens, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == counted.kv_bytes_per_token * tokens.numel()


def test_multiply_accumulates_as_torch_counts_them(tied):
    model = sliced_model(tie_word_embeddings=tied)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 13, dtype=torch.long))
    assert counter.get_total_flops() == 2 * macs(model.config, layer_shapes(model.config), prompt_length=13)


def test_a_saved_model_opens_bit_for_bit(family, heads, tied, tokens, tmp_path):
    model = sliced_model(family, heads, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reopened) is type(model)
    assert layer_shapes(reopened.config) == layer_shapes(model.config)
    state = reopened.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (reopened.lm_head.weight is reopened.model.embed_tokens.weight) == tied
    assert torch.equal(logits(reopened, tokens), logits(model, tokens))


def test_generation_is_the_same_with_every_cache(family, heads, tokens):
    model = sliced_model(family, heads)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(tokens, **options)
    assert torch.equal(dynamic, model.generate(tokens, cache_implementation="static", **options))
    assert torch.equal(dynamic, model.generate(tokens, use_cache=False, **options))


def test_hidden_states_are_told_in_their_widths(tokens):
    states = sliced_model()(tokens, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [40, 36, 44, 48]


def test_lora_attaches_trains_and_merges(family, tied, tokens):
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = get_peft_model(
        sliced_model(family, tie_word_embeddings=tied), LoraConfig(r=2, target_modules=targets)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = logits(model.eval(), tokens)
    assert (logits(model.merge_and_unload(), tokens) - trained).abs().max() < 1e-4


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    gradients = []
    for enabled in (False, True):
        model = sliced_model().train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens).loss.backward()
        gradients.append(model.model.layers[0].attention_shortcut.weight.grad)
    torch.testing.assert_close(*gradients)


def test_slicing_comes_last_and_once(tmp_path):
    model = sliced_model()
    for plan in (random_plan(model, ["ffn"]), Plan({}, bases=random_bases(WIDTHS))):
        with pytest.raises(ValueError, match=r"stream of this model is sliced, and slicing comes last"):
            apply(model, plan)
    assert layer_shapes(apply(model, Plan({})).config) == layer_shapes(model.config)
    with pytest.raises(ValueError, match=r"3 layers have 6 sublayers, the plan has 2 bases"):
        apply(tiny_model(), Plan({}, bases=random_bases((40, 40))))
    save(model, byte_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match="no stock class has its shortcut matrices"):
        export(tmp_path / "model", tmp_path / "out", "padded")
