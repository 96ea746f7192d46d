"""Products of 16 bits that a CPU does not have: the same numbers, rounded once, with the same gradients."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from kvp.models import half
from kvp.models.half import HalfLinear, linear, widened
from kvp.models.load import load_model, save
from tests.conftest import tiny_model

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def without_hardware(monkeypatch):
    """The CPU has none, and a matrix takes several blocks."""
    monkeypatch.setattr(half, "in_hardware", lambda dtype: False)
    monkeypatch.setattr(half, "BLOCK", 24 * 10)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 9), (11,), (3,)])  # the last: few rows, which torch multiplies
def test_products_and_gradients_are_those_of_float64_rounded_once(dtype, bias, shape):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*size, generator=generator).to(dtype) for size in ((*shape, 24), (37, 24), (37,))]
    states, weight, added = (tensor.requires_grad_() for tensor in made)
    output = linear(states, weight, added if bias else None)
    exact = [tensor.detach().double().requires_grad_() for tensor in made]
    expected = F.linear(exact[0], exact[1], exact[2] if bias else None)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, atol=4 * step, rtol=2 * step)
    slopes = torch.randn(*output.shape, generator=generator).to(dtype)
    output.backward(slopes)
    expected.backward(slopes.double())
    for found, wanted in zip((states, weight), exact, strict=False):
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.grad.double(), wanted.grad, atol=8 * step, rtol=2 * step)


def test_only_what_is_asked_for_is_held_and_computed():
    states, weight = torch.randn(9, 24).bfloat16(), torch.randn(37, 24).bfloat16()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        linear(states.requires_grad_(), weight).sum().backward()
    assert [tensor.shape for tensor in held] == [weight.shape] and weight.grad is None
    linear(states.detach(), weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_computes_so_and_is_saved_as_before(dtype, tmp_path):
    dense = tiny_model(dtype=dtype)
    save(dense, None, tmp_path / "a")
    model = load_model(tmp_path / "a", dtype=dtype, device="cpu")
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(module) for module in linears} == {HalfLinear}
    assert {type(module) for module in deepcopy(model).modules() if hasattr(module, "in_features")} == {
        HalfLinear
    }
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, found, plain = (
            each(ids).logits.float() for each in (dense.float(), model, tiny_model(dtype=dtype))
        )
    assert (found - exact).norm() < 2 * (plain - exact).norm()
    save(model, None, tmp_path / "b")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_float32_and_hardware_are_left_alone(monkeypatch):
    assert not any(type(module) is HalfLinear for module in widened(tiny_model()).modules())
    monkeypatch.setattr(half, "in_hardware", lambda dtype: True)
    assert not any(
        type(module) is HalfLinear for module in widened(tiny_model(dtype=torch.bfloat16)).modules()
    )
