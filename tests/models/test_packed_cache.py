"""The sparse cache against naive zeroing, its bytes as they lie in memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvp.measurement.count import cache_bytes, cache_bytes_per_token
from kvp.models.caches import bytes_per_token
from kvp.models.family import FAMILIES
from kvp.models.mustafar import Mustafar, kept, pack, unpack
from kvp.models.packed_cache import cache_for
from kvp.models.shapes import layer_shapes
from kvp.models.spaces import available_kinds, find_spaces
from kvp.models.surgery import apply
from kvp.types import Plan
from tests.conftest import random_plan, tiny_config, tiny_model
from tests.helpers.caches import naive, stepwise

OPTIONS = {"key_sparsity": 0.5, "value_sparsity": 0.7, "window": 4}
KEPT = {"qk": (12, 16, 4), "vo": (24, 8, 32), "kv_group": (1, 2, 1)}  # pairs, channels, groups, per layer


@pytest.fixture(params=sorted(name for name in FAMILIES if name != "gemma3_text"))  # whose attention slides
def family(request) -> str:
    return request.param


def random_twin(family="llama", heads="gqa", *, options=OPTIONS, counts=KEPT, **changes):
    """Unequal widths in every layer, by default multiples of 8, and one layer without attention."""
    model = tiny_model(family, heads, head_dim=32, num_hidden_layers=4, **changes)
    generator, keep = torch.Generator().manual_seed(3), {}
    kinds = [kind for kind in ("qk", "vo", "kv_group") if kind in available_kinds(model.config)]
    for space in find_spaces(model.config, kinds):
        count = min((*counts[space.kind], counts[space.kind][0])[space.layer], space.shape[-1])
        scores = torch.rand(space.shape, generator=generator)
        keep[space] = scores.topk(count).indices.sort().values
    keep[find_spaces(model.config, ["attention"])[0]] = torch.tensor([0, 1, 2])
    twin = apply(model, Plan(keep))
    twin.config.kvp_cache = options
    return twin


def reachable(thing: object) -> dict[int, int]:
    """Bytes of every tensor storage that hangs on an object, by address."""
    if isinstance(thing, Tensor):
        return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()}
    if isinstance(thing, list | tuple):
        return {at: size for part in thing for at, size in reachable(part).items()}
    return reachable(list(vars(thing).values())) if hasattr(thing, "__dict__") else {}


def test_packing_keeps_the_largest_and_gives_them_back():
    states = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(0))
    states[0, 0, 0] = 1.0  # ties
    values, bitmap = pack(states, 7)
    assert values.shape == (2, 3, 5, 7) and bitmap.shape == (2, 3, 5, 3) and bitmap.dtype == torch.uint8
    dense = unpack(values, bitmap)
    assert ((dense != 0).sum(-1) == 7).all()
    assert torch.equal(dense[dense != 0], states[dense != 0])
    dropped = states.abs().masked_fill(dense != 0, 0).amax(-1)
    assert (dropped <= values.abs().amin(-1)).all()
    assert bitmap[1, 2, 3].tolist() == [
        sum(1 << bit for bit in range(8) if dense[1, 2, 3, 8 * byte + bit]) for byte in range(3)
    ]


def test_how_many_channels_stay():
    assert [kept(64, s) for s in (0.0, 0.5, 0.7, 0.99)] == [64, 32, 20, 1]
    assert kept(200, 0.29) == 142


@pytest.mark.parametrize("prompt", [1, 9])
def test_attention_equals_dense_attention_over_zeroed_entries(family, heads, prompt, tokens):
    """`prompt` tokens are read densely, those after it one by one."""
    twin = random_twin(family, heads)
    twin.double()
    sparse = stepwise(twin, tokens, cache_for(twin.config), prompt)
    assert torch.allclose(sparse, stepwise(twin, tokens, naive(twin.config), prompt), atol=1e-10)
    dense = twin(tokens).logits
    whole = max(prompt, OPTIONS["window"] + 1)  # until then every token is in the window
    assert torch.allclose(sparse[:, :whole], dense[:, :whole], atol=1e-10)
    assert (sparse - dense)[:, whole:].abs().amax() > 1e-3


def test_bytes_in_memory_are_those_of_the_formula(heads, tokens):
    """17 tokens of 2 sequences: 4 of them whole, 13 packed; nothing else hangs on the cache."""
    twin = random_twin(heads=heads)
    cache = cache_for(twin.config)
    stepwise(twin, tokens, cache, 9)
    packed, whole = bytes_per_token(twin.config, 4), 4 * sum(s.kv_width for s in layer_shapes(twin.config))
    assert cache_bytes_per_token(cache) == packed
    assert sum(reachable(cache.layers).values()) == cache_bytes(cache) == 2 * (13 * packed + 4 * whole)


def test_bytes_shrink_as_promised():
    """Per value at 50 % in 16 bits: half the values and one bit; at 70 % of 64 channels, 20 and one bit each."""
    config = tiny_config(head_dim=64, kvp_cache={"key_sparsity": 0.5, "value_sparsity": 0.5})
    dense = 2 * sum(shape.kv_width for shape in layer_shapes(config))
    assert bytes_per_token(config, 2) / dense == 0.5 + 1 / 16
    config.kvp_cache = {"key_sparsity": 0.7, "value_sparsity": 0.7}
    assert bytes_per_token(config, 2) / dense == 20 / 64 + 1 / 16


def test_the_checkpoint_carries_its_cache(family, tokens, tmp_path):
    random_twin(family).save_pretrained(tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    sparse = twin.generate(tokens, **options)
    assert cache_bytes_per_token(sparse.past_key_values) == bytes_per_token(twin.config, 4)
    text, cache = tokens, naive(twin.config)
    for new in [tokens, *sparse.sequences[:, 17:-1].split(1, dim=1)]:
        logits = twin(new, past_key_values=cache).logits[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(sparse.sequences, text)
    chosen = twin.generate(tokens, past_key_values=DynamicCache(config=twin.config), **options)
    assert torch.equal(chosen.sequences, twin.generate(tokens, use_cache=False, **options).sequences)


def test_without_sparsity_it_is_the_dynamic_cache(tokens):
    twin = random_twin(options={"key_sparsity": 0.0, "value_sparsity": 0.0, "window": 3})
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for beams in (1, 3):
        sparse = twin.generate(tokens, num_beams=beams, **options)
        dense = DynamicCache(config=twin.config)
        assert torch.equal(sparse, twin.generate(tokens, num_beams=beams, past_key_values=dense, **options))


def test_sequences_can_be_chosen_and_repeated(tokens):
    twin, last = random_twin(), torch.tensor([[7], [9]])
    cache = cache_for(twin.config)
    stepwise(twin, tokens, cache, 9)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    other = cache_for(twin.config)
    stepwise(twin, tokens[[1, 1]], other, 9)
    torch.testing.assert_close(
        twin(last, past_key_values=cache).logits, twin(last, past_key_values=other).logits
    )
    cache.reset()
    assert cache.get_seq_length() == cache_bytes(cache) == 0
    assert torch.equal(twin(tokens, past_key_values=cache).logits, twin(tokens).logits)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        cache.crop(-1)


def test_what_cannot_be_stored_is_refused():
    options = Mustafar()
    model = tiny_model(head_dim=32)
    with pytest.raises(ValueError, match=r"layer 0 has qk_head_dim=20, no multiple of 8: .*multiple_of=8"):
        options.check(apply(model, random_plan(model, ["qk"])).config)
    with pytest.raises(ValueError, match="sliding attention"):
        options.check(tiny_config("mistral", sliding_window=4))
    for wrong in ({"key_sparsity": 1.0}, {"value_sparsity": -0.1}, {"window": -1}):
        with pytest.raises(ValueError, match=f"cache.{next(iter(wrong))} must be"):
            Mustafar(**wrong)
