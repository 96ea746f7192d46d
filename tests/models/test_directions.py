"""A cache whose bits differ by channel: against numbers one by one, its bytes in memory, its losses as decoded."""

from __future__ import annotations

import random
from math import ceil

import pytest
import torch

from kvp.measurement.count import cache_bytes, cache_bytes_per_token
from kvp.models.caches import bytes_per_token, cache_format, stated, stored_bytes
from kvp.models.directions import Directions, Mixed
from kvp.models.packed_cache import cache_for
from kvp.models.shapes import layer_shapes
from tests.conftest import tiny_config
from tests.helpers.caches import stepwise
from tests.models.test_packed_cache import random_twin
from tests.models.test_quantized import ODD, check_one_pass

WINDOW = 8


def written(config, seed=0):
    """Return options with random digits for every channel of a model, some of them 0."""
    draw = random.Random(seed)

    def digits(width):
        return "3" + "".join(draw.choice("00234") for _ in range(width - 1))

    cached = [shape.cached for shape in layer_shapes(config) if shape.num_key_value_heads]
    keys, values = ([digits(width) for width in widths] for widths in zip(*cached, strict=True))
    return {
        "format": "directions", "bits": 2, "group": WINDOW, "window": WINDOW, "keys": keys, "values": values
    }  # fmt: skip


def twin_of(family="llama", heads="gqa"):
    twin = random_twin(family, heads, options=None, counts=ODD)
    twin.config.kvp_cache = written(twin.config)
    return twin


@pytest.fixture
def tokens():
    return torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("per_channel", [True, False])
def test_numbers_come_back_as_one_by_one(per_channel):
    digits = "30402" + "00420"  # two heads
    codec = Mixed(5, block=8, digits=digits, group=8 if per_channel else 2, per_channel=per_channel)
    states = torch.randn(2, 2, 16, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(states)
    order = [4, 8, 0, 2, 7]  # of 2, 2, 3, 4 and 4 bits
    flat = states.transpose(1, 2).flatten(2)
    groups = [[i] for i in order] if per_channel else [[4, 8], [0, 2], [7]]
    for batch in range(2):
        for first in range(0, 16, 8 if per_channel else 1):
            rows = slice(first, first + (8 if per_channel else 1))
            for group in groups:
                numbers = flat[batch, rows, group]
                low = numbers.min().half().float()
                span = (numbers.max() - low).clamp(min=2.0**-24).half().float()
                for channel in group:
                    levels = 2 ** int(digits[channel]) - 1
                    share = ((flat[batch, rows, channel] - low) / span).clamp(0, 1)
                    back = (share * levels).round() / levels * span + low
                    expected[batch, channel // 5, rows, channel % 5] = back
    packed = codec.pack(states)
    torch.testing.assert_close(codec.unpack(packed), expected, atol=1e-6, rtol=0)
    assert sum(part.nbytes for part in packed) == 2 * 16 * 2 * codec.bytes_per_token(4)


@pytest.mark.parametrize(
    ("family", "heads"), [("llama", "mha"), ("llama", "gqa"), ("llama", "mqa"), ("qwen2", "gqa")]
)
def test_one_pass_has_the_losses_of_a_decoder(family, heads, tokens):
    check_one_pass(twin_of(family, heads), tokens)


def test_the_bytes_are_those_of_a_real_cache(tokens):
    twin = twin_of()
    cache = cache_for(twin.config)
    stepwise(twin, tokens, cache, 5)
    assert cache_bytes_per_token(cache) == bytes_per_token(twin.config, 4)
    assert cache_bytes(cache) == 2 * stored_bytes(twin.config, 4, 17)


def test_one_digit_everywhere_takes_the_bytes_of_its_bits():
    config = tiny_config(head_dim=32)
    cached = [shape.cached for shape in layer_shapes(config)]
    config.kvp_cache = {
        "format": "directions",
        "bits": 4,
        "keys": ["3" * keys for keys, _ in cached],
        "values": ["3" * values for _, values in cached],
    }
    channels = sum(map(sum, cached))
    assert bytes_per_token(config, 2) == ceil(channels * (3 + 1) / 8)
    assert stated(config) == {"format": "directions", "bits": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o["keys"].pop(), "cache.keys must give each of the model's"),
        (
            lambda o: o["values"].__setitem__(0, o["values"][0][1:]),
            "cache.values must give each of the model's",
        ),
        (lambda o: o["keys"].__setitem__(1, "0" * len(o["keys"][1])), "no layer zeros only"),
        (
            lambda o: o["keys"].__setitem__(1, "9" * len(o["keys"][1])),
            "cache.keys must be of digits 0 to 8, got '9'",
        ),
        (lambda o: o.update(keys=(), values=()), "A run of kvp writes them"),
        (lambda o: o.update(group=12), r"cache.group that is a multiple of 8"),
        (lambda o: o.update(bits=9), r"cache.bits must be"),
    ],
)
def test_digits_that_do_not_fit_the_model_are_refused(change, message):
    config = twin_of().config
    change(config.kvp_cache)
    with pytest.raises(ValueError, match=message):
        cache_format(config).check(config)


def test_sliding_attention_is_refused():
    with pytest.raises(ValueError, match="mistral has layers of sliding attention"):
        Directions(bits=2).check(tiny_config("mistral", sliding_window=4))
