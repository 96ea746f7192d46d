"""The kernel of a few rows gives what F.linear gives, for every number of rows, outputs and channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvp.models.skinny_linear import MOST_ROWS, buildable, linear

pytestmark = pytest.mark.skipif(not buildable(), reason="no C++ compiler")


@pytest.mark.parametrize(
    "outputs", [1, 11, 12, 13, 50]
)  # tasks of twelve and of six outputs, and what is left
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 40, MOST_ROWS])
def test_it_equals_f_linear(rows, outputs):
    for width in (1, 5, 16, 33):
        weight, states = torch.randn(outputs, width), torch.randn(rows, width)
        for bias in (None, torch.randn(outputs)):
            torch.testing.assert_close(linear(states, weight, bias), F.linear(states, weight, bias))


def test_shapes_and_strides_are_those_of_f_linear():
    weight, states = torch.randn(24, 10).t(), torch.randn(24, 1, 3).transpose(0, 2)
    found = linear(states, weight, None)
    assert found.shape == (3, 1, 10)
    torch.testing.assert_close(found, F.linear(states, weight))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_gives_the_same_bits(threads):
    weight, states, before = torch.randn(100, 40), torch.randn(8, 40), torch.get_num_threads()
    expected = linear(states, weight, None)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(linear(states, weight, None), expected)
    finally:
        torch.set_num_threads(before)


def test_a_trace_knows_its_shape():
    with torch.device("meta"):
        states, weight = torch.empty(2, 1, 6), torch.empty(9, 6)
    traced = torch.compile(lambda s, w: linear(s, w, None) + 1, backend="aot_eager", fullgraph=True)
    assert linear(states, weight, None).shape == (2, 1, 9)
    real = torch.randn(2, 1, 6), torch.randn(9, 6)
    torch.testing.assert_close(traced(*real), F.linear(*real) + 1)
