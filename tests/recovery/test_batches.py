"""A loss without logits is the model's own, with its gradients, and a trained head keeps its logits."""

from __future__ import annotations

import peft
import pytest
import torch

from kvp.data.tokens import IGNORE
from kvp.models.linears import linear_names
from kvp.recovery.batches import lose_without_logits
from tests.conftest import tiny_model


def adapted(family, modules=("q_proj", "v_proj")):
    torch.manual_seed(0)
    model = tiny_model(family)
    config = peft.LoraConfig(
        r=2, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).train()


def batch(seed=0):
    ids = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = labels[2, 9:] = IGNORE  # a prompt, and padding
    return {"input_ids": ids, "labels": labels}


def found(model, **options):
    loss = model(**batch(), **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": torch.tensor(70)}], ids=["mean", "accumulated"]
)
def test_the_loss_and_its_gradients_are_the_models_own(family, options):
    expected = found(adapted(family), **options)
    model = adapted(family)
    sizes = sorted(p.numel() for p in model.parameters())
    lose_without_logits(model.get_base_model())
    assert (
        sorted(p.numel() for p in model.parameters()) == sizes
    )  # a head that is left behind stays on the CPU
    torch.testing.assert_close(found(model, **options), expected, rtol=1e-4, atol=1e-6)
    assert len(expected) > 4
    assert model(**batch()).logits.shape == (3, 17, model.config.hidden_size)


def test_a_head_that_is_trained_keeps_its_logits():
    model = adapted("llama", ["q_proj", "lm_head"])
    lose_without_logits(model.get_base_model())
    assert model(**batch()).logits.shape == (3, 17, model.config.vocab_size)
    assert any("lm_head" in name for name in found(model))


def test_a_head_that_shares_its_matrix_is_not_among_the_modules_to_tune():
    """An update of a shared head would change the embeddings once merged."""
    names = {
        tied: linear_names(model.config, model)
        for tied in (False, True)
        for model in [tiny_model(tie_word_embeddings=tied)]
    }
    assert set(names[False]) - set(names[True]) == {"lm_head"}
