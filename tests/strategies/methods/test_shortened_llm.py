"""Shortened-LLM's three criteria against loops that know nothing of members and suffixes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from experiments.scripts.sensitivity import naive_losses
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from kvp.strategies.methods.shortened_llm import ShortenedLLM
from kvp.strategies.target import Target
from kvp.types import Plan, Space
from tests.conftest import tiny_model

BLOCK = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
NORMS = "input_layernorm post_attention_layernorm"
NAMES = {
    "block": f"{BLOCK} {NORMS}".split(),
    "attention": BLOCK.split()[:4],
    "mlp": BLOCK.split()[4:],
}


@pytest.fixture
def target(heads):
    model = tiny_model("llama", heads, num_hidden_layers=2)
    ids = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(2))
    return Target(model, ids, batch_size=6, seed=4)


def scores(target, **options):
    (found,) = ShortenedLLM(protect_first=0, protect_last=0, **options).score(target).values()
    return found


def naive_taylor(target, grouping, batch_size=6):
    """Sum of |w g| per block and batch, from whole copies of the gradients; the mean over batches."""
    total, batches = torch.zeros(2), target.calibration.split(batch_size)
    for ids in batches:
        target.model.zero_grad()
        logits = target.model(ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for n in range(2):
            for name in NAMES[grouping]:
                weight = target.model.get_parameter(f"model.layers.{n}.{name}.weight")
                total[n] += (weight * weight.grad).abs().sum().detach() / len(batches)
    target.model.zero_grad()
    return total


@pytest.mark.parametrize("grouping", NAMES)
def test_taylor_is_the_naive_sum(target, grouping):
    found = scores(target, criterion="taylor", grouping=grouping)
    torch.testing.assert_close(found, naive_taylor(target, grouping), rtol=1e-4, atol=0)


def test_taylor_of_several_batches_is_their_mean(target):
    split = Target(target.model, target.calibration, batch_size=3, seed=0)
    torch.testing.assert_close(
        scores(split, criterion="taylor"), naive_taylor(target, "block", batch_size=3), rtol=1e-4, atol=0
    )


def test_gradient_checkpointing_changes_nothing(target):
    plain, checkpointed = (
        scores(target, criterion="taylor", gradient_checkpointing=flag) for flag in (False, True)
    )
    torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grouping", NAMES)
def test_magnitude_is_the_naive_sum(target, grouping):
    bare = Target(target.model, None, batch_size=1, seed=0)
    assert not ShortenedLLM(criterion="magnitude").needs_calibration
    weights = dict(target.model.named_parameters())
    expected = [
        sum(weights[f"model.layers.{n}.{name}.weight"].abs().sum().item() for name in NAMES[grouping])
        for n in range(2)
    ]
    found = scores(bare, criterion="magnitude", grouping=grouping)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


def test_perplexity_is_that_of_the_model_cut_without_the_block(target):
    found = scores(target)
    for n in range(2):
        cut = apply(target.model, Plan({Space("block", None, (2,)): torch.tensor([1 - n])}))
        with torch.no_grad():
            expected = cut(target.calibration, labels=target.calibration).loss.item()
        assert found[n].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", NAMES)
def test_the_ranking_is_that_of_the_naive_pass(family, kind):
    model = tiny_model(family, num_hidden_layers=8, dtype=torch.float64)
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(7))
    if kind not in available_kinds(model.config):
        with pytest.raises(ValueError, match="sliding and full attention"):
            scores(Target(model, ids, batch_size=2, seed=0), grouping=kind)
        return
    found = scores(Target(model, ids, batch_size=2, seed=0), grouping=kind)
    naive = naive_losses(model, ids.split(2), kind)
    assert torch.equal(found.argsort(), naive.argsort())
    torch.testing.assert_close(found, naive, rtol=1e-6, atol=0)


def test_a_loss_that_is_no_number_is_refused():
    model = tiny_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    ids = torch.randint(3, 96, (2, 9))
    with pytest.raises(FloatingPointError, match="a calibration loss without one block is not finite"):
        scores(Target(model, ids, batch_size=2, seed=0))
