"""Quantised caches against a naive loop and the papers' steps: codes, bytes in memory, and losses as decoded."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from kvp.measurement.count import cache_bytes, cache_bytes_per_token
from kvp.models.caches import bytes_per_token, cache_format, mean_bytes_per_token, stored_bytes
from kvp.models.codecs import Float8, Integers, from_bytes, to_bytes
from kvp.models.family import FAMILIES
from kvp.models.joined import joined
from kvp.models.mustafar import MustafarIntegers
from kvp.models.one_pass import FORMS, as_decoded, visible
from kvp.models.packed_cache import cache_for
from kvp.models.quantized import Quantized, Quantized8
from kvp.models.shapes import layer_shapes
from tests.conftest import tiny_config, tiny_model
from tests.helpers.caches import stepwise
from tests.models.test_packed_cache import random_twin, reachable

ODD = {"qk": (5, 16, 7), "vo": (21, 8, 3), "kv_group": (1, 2, 1)}  # pairs, channels, groups, per layer
PER_TOKEN = {"format": "int", "key_bits": 4, "value_bits": 3, "group": 12, "window": 3}
PER_CHANNEL = {
    "format": "int", "key_bits": 2, "value_bits": 5, "keys": "channel", "group": 8, "window": 8
}  # fmt: skip
FORMATS = {
    "token": PER_TOKEN,
    "token, all packed": {**PER_TOKEN, "window": 0},
    "channel": PER_CHANNEL,
    "fp8": {"format": "fp8"},
    "sparse": {"format": "mustafar_int", "key_sparsity": 0.5, "value_sparsity": 0.3, "window": 2, "bits": 4},
    "mustafar": {"key_sparsity": 0.5, "value_sparsity": 0.7, "window": 4},
}


SLIDING = ("gemma3_text", "gpt_oss", "olmo3")  # whose caches forget tokens


@pytest.fixture(params=sorted(FAMILIES.keys() - SLIDING))
def family(request) -> str:
    return request.param


@pytest.fixture(params=FORMATS)
def options(request) -> dict:
    return FORMATS[request.param]


def counts(options):
    return {"counts": ODD} if "key_sparsity" not in options else {}  # a bitmap wants multiples of 8


def rounded(numbers, bits):
    """Quantise a group of numbers one by one, and return what they become."""
    half = torch.tensor(numbers).float()
    low = half.min().half().float().item()
    scale = max((half.max().item() - low) / (2**bits - 1), 2.0**-24)
    scale = torch.tensor(scale).half().float().item()
    codes = [min(max(round((x - low) / scale), 0), 2**bits - 1) for x in half.tolist()]
    return [low + scale * code for code in codes]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_fill_whole_bytes_and_come_back(bits):
    codes = torch.randint(2**bits, (2, 3, 21), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = to_bytes(codes, bits)
    assert packed.shape == (2, 3, 3 * bits) and packed.dtype == torch.uint8
    assert torch.equal(from_bytes(packed, bits)[..., :21], codes)
    number = int.from_bytes(packed[0, 0].numpy().tobytes(), "little")
    assert [number >> bits * i & 2**bits - 1 for i in range(21)] == codes[0, 0].tolist()


@pytest.mark.parametrize(
    ("width", "groups"), [(12, [12]), (20, [10, 10]), (21, [11, 10]), (37, [10, 10, 10, 7])]
)
def test_a_token_is_rounded_group_by_group(width, groups):
    states = torch.randn(1, 2, 3, width, generator=torch.Generator().manual_seed(0))
    states[0, 0, 0] = 0.25  # a group of equal numbers
    states[0, 1] += 300  # far from 0, as the biased keys of Qwen 2
    codec = Integers(width, bits=4, group=12)
    packed = codec.pack(states)
    expected = [
        [[x for part in token.split(groups) for x in rounded(part.tolist(), 4)] for token in head]
        for head in states[0]
    ]
    torch.testing.assert_close(codec.unpack(packed), torch.tensor([expected]), atol=1e-4, rtol=0)
    stored = sum(x.nbytes for x in packed)
    assert stored == 2 * 3 * codec.bytes_per_token(2)
    assert codec.bytes_per_token(2) == -(-len(groups) * groups[0] // 8) * 4 + 4 * len(groups)


def test_a_channel_is_rounded_over_the_tokens_of_a_group():
    states = torch.randn(1, 2, 16, 5, generator=torch.Generator().manual_seed(0))
    codec = Integers(5, block=16, bits=2, group=8, per_channel=True)
    packed = codec.pack(states)
    for head in range(2):
        for channel in range(5):
            for start in (0, 8):
                numbers = states[0, head, start : start + 8, channel]
                found = codec.unpack(packed)[0, head, start : start + 8, channel]
                torch.testing.assert_close(
                    found, torch.tensor(rounded(numbers.tolist(), 2)), atol=1e-4, rtol=0
                )
    assert sum(x.nbytes for x in packed) == 2 * 16 * codec.bytes_per_token(2)
    assert codec.bytes_per_token(2) == 5 * (Fraction(2, 8) + Fraction(4, 8))


def test_float8_saturates():
    states = torch.tensor([[[[0.0, 1.0, -500.0, 448.0, 1e9, 0.3, 17.0]]]])
    codec = Float8(7)
    (packed,) = codec.pack(states)
    assert packed.dtype == torch.uint8 and packed.nbytes == 7 == codec.bytes_per_token(2)
    assert codec.unpack((packed,))[0, 0, 0].tolist() == [
        0,
        1,
        -448,
        448,
        448,
        0.3125,
        16,
    ]  # 4 bits, half to even


def test_bytes_in_memory_are_those_of_the_formula(options, heads, tokens):
    """17 tokens of 2 sequences, in widths that no group divides; nothing else hangs on the cache."""
    twin = random_twin(heads=heads, options=options, **counts(options))
    cache = cache_for(twin.config)
    stepwise(twin, tokens, cache, 9)
    assert cache.get_seq_length() == 17
    assert cache_bytes_per_token(cache) == bytes_per_token(twin.config, 4)
    held = sum(reachable(cache.layers).values())
    assert held == cache_bytes(cache) == 2 * stored_bytes(twin.config, 4, 17)


def check_one_pass(twin, tokens):
    decoded = stepwise(twin.double(), tokens, cache_for(twin.config), 1)
    at_once = twin(tokens, **as_decoded(twin, 17)).logits
    torch.testing.assert_close(at_once, decoded, atol=1e-9, rtol=0)
    assert (at_once - twin(tokens).logits).abs().amax() > 1e-3


def test_one_pass_has_the_losses_of_a_decoder(options, tokens):
    check_one_pass(random_twin(options=options, **counts(options)), tokens)


def test_one_pass_has_the_losses_of_a_decoder_in_every_family(family, heads, tokens):
    """Keys per channel: three forms of a token, and no width that a group divides."""
    check_one_pass(random_twin(family, heads, options=PER_CHANNEL, counts=ODD), tokens)


def test_one_pass_serves_queries_that_read_the_values_too(tokens):
    twin = joined(tiny_model(), 1, True)
    twin.config.kvp_cache = PER_CHANNEL
    check_one_pass(twin, tokens)


def test_one_pass_is_the_same_in_eager_attention(tokens):
    twin = random_twin(options=FORMATS["mustafar"]).double()
    decoded = stepwise(twin, tokens, cache_for(twin.config), 1)
    twin.set_attn_implementation(
        "eager"
    )  # whose softmax is float32: its rounding moves a code of other formats
    torch.testing.assert_close(twin(tokens, **as_decoded(twin, 17)).logits, decoded, atol=1e-5, rtol=0)


def test_every_reader_sees_every_earlier_token_in_one_form(options):
    shown = visible(cache_format(tiny_config(kvp_cache=options)), 40)
    count = sum(shown[form].int() for form in FORMS)
    assert torch.equal(count, torch.ones(40, 40, dtype=torch.int32).tril())
    assert all(shown[False, False][i, i] for i in range(40))  # itself whole


class Kivi(DynamicLayer):
    """Algorithm 1 of KIVI, on fake-quantised keys and values."""

    def __init__(self, bits_k, bits_v, group, residual):
        super().__init__()
        self.bits, self.group, self.residual = (bits_k, bits_v), group, residual

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.old = [key_states[..., :0, :], value_states[..., :0, :]]
            self.new = [key_states[..., :0, :], value_states[..., :0, :]]
        self.new = [torch.cat(both, -2) for both in zip(self.new, (key_states, value_states), strict=True)]
        read = [torch.cat(both, -2) for both in zip(self.old, self.new, strict=True)]
        full = self.new[0].shape[-2] // self.residual * self.residual  # keys: whole windows
        past = max(self.new[1].shape[-2] - self.residual, 0)  # values: all beyond the window
        for side, count in enumerate((full, past)):
            gone = self.new[side][..., :count, :]
            codec = Integers(gone.shape[-1], bits=self.bits[side], group=self.group, per_channel=side == 0)
            gone = codec.unpack(codec.pack(gone)).to(gone.dtype)
            self.old[side] = torch.cat([self.old[side], gone], -2)
            self.new[side] = self.new[side][..., count:, :]
        return read

    def get_seq_length(self):
        return self.old[0].shape[-2] + self.new[0].shape[-2] if self.is_initialized else 0


@pytest.mark.parametrize("prompt", [1, 35])
def test_keys_per_channel_follow_kivis_algorithm(prompt):
    twin = random_twin(options={**PER_CHANNEL, "window": 16}, counts=ODD).double()
    text = torch.randint(96, (2, 37), generator=torch.Generator().manual_seed(1))
    kivi = Cache(layers=[Kivi(2, 5, 8, 16) for s in layer_shapes(twin.config) if s.num_key_value_heads])
    torch.testing.assert_close(
        stepwise(twin, text, cache_for(twin.config), prompt),
        stepwise(twin, text, kivi, prompt),
        atol=1e-9,
        rtol=0,
    )


def test_more_bits_are_nearer_and_cost_more():
    config = tiny_config(head_dim=64)
    states = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    errors, sizes = [], []
    for bits in range(1, 9):
        config.kvp_cache = {"format": "int", "key_bits": bits, "value_bits": bits}
        codec, _ = cache_format(config).codecs(64, 64)
        errors.append((codec.unpack(codec.pack(states)) - states).abs().mean().item())
        sizes.append(bytes_per_token(config, 2))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"format": "fp8"}, Fraction(1, 2)),
        ({"format": "int", "key_bits": 8, "value_bits": 8, "group": 64}, Fraction(68, 128)),
        ({"format": "int", "key_bits": 4, "value_bits": 4}, Fraction(40, 128)),
        ({"format": "int", "key_bits": 4, "value_bits": 2}, Fraction(40 + 24, 256)),
        (
            {"format": "int", "key_bits": 2, "value_bits": 2, "keys": "channel", "window": 32},
            Fraction(24, 128),
        ),
    ],
)
def test_a_head_of_64_channels_in_16_bits_shrinks_to(options, share):
    config = tiny_config(head_dim=64)
    dense = bytes_per_token(config, 2)
    config.kvp_cache = options
    assert Fraction(bytes_per_token(config, 2), dense) == share
    window = options.get("window", 0)
    whole = Fraction(window, 2 * 4096) * (1 - share)  # of values; 4096 is a multiple of a window of keys
    assert mean_bytes_per_token(config, 2) == -(-dense * (share + whole) // 1)


@pytest.mark.parametrize("name", ["token", "channel", "sparse"])
def test_the_checkpoint_carries_its_cache(name, tokens, tmp_path):
    options = FORMATS[name]
    random_twin(options=options, **counts(options)).save_pretrained(tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    said = twin.generate(tokens, return_dict_in_generate=True, **settings)
    assert cache_bytes_per_token(said.past_key_values) == bytes_per_token(twin.config, 4)
    text, cache = tokens, cache_for(twin.config)
    for new in [tokens, *said.sequences[:, 17:-1].split(1, dim=1)]:
        text = torch.cat([text, twin(new, past_key_values=cache).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said.sequences, text)


def test_beams_and_batches_can_be_chosen(options, tokens):
    twin, last = random_twin(options=options, **counts(options)), torch.tensor([[7], [9]])
    cache, other = cache_for(twin.config), cache_for(twin.config)
    stepwise(twin, tokens, cache, 9)
    cache.reorder_cache(torch.tensor([1, 1]))
    stepwise(twin, tokens[[1, 1]], other, 9)
    torch.testing.assert_close(
        twin(last, past_key_values=cache).logits, twin(last, past_key_values=other).logits
    )
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        cache.crop(-1)


def test_what_cannot_be_stored_is_refused():
    channel = {"key_bits": 4, "value_bits": 4, "keys": "channel"}
    for wrong in ({"group": 12, "window": 12}, {"window": 0}, {"window": 40}):
        with pytest.raises(ValueError, match=r"cache\.keys=channel needs .* Set cache\.group=32"):
            Quantized(**channel, **wrong)
    for wrong in ({"key_bits": 0}, {"value_bits": 9}, {"group": 0}, {"window": -1}, {"keys": "head"}):
        with pytest.raises(ValueError, match=f"cache.{next(iter(wrong))} must be"):
            Quantized(**{"key_bits": 4, "value_bits": 4, **wrong})
    for format in (Quantized(key_bits=4, value_bits=4), Quantized8(), MustafarIntegers()):
        with pytest.raises(ValueError, match="mistral has layers of sliding attention"):
            format.check(tiny_config("mistral", sliding_window=4))
    for given in ([], 3, {"format": "int3"}, {"format": []}):
        with pytest.raises(
            ValueError, match="cache must be options whose format is one of mustafar_int, int, fp8"
        ):
            cache_format(tiny_config(kvp_cache=given))
    with pytest.raises(ValueError, match="no kvp_cache"):
        as_decoded(tiny_model(), 4)
