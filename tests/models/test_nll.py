"""The model's own loss, token by token, and its gradients, whatever is computed at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvp.models import nll
from tests.conftest import tiny_model


@pytest.mark.parametrize(("rows", "words"), [(512, 4096), (7, 96), (7, 40), (1, 1)])
def test_next_token_nll_is_the_models_own_loss(family, rows, words, monkeypatch):
    monkeypatch.setattr(nll, "ROWS", rows)
    monkeypatch.setattr(nll, "WORDS", words)
    model = tiny_model(family)
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    losses = nll.next_token_nll(model, input_ids=ids, labels=ids)
    logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    weight = model.model.layers[1].self_attn.v_proj.weight
    ours, theirs = (
        torch.autograd.grad(loss, weight)[0] for loss in (losses.mean(), model(ids, labels=ids).loss)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
