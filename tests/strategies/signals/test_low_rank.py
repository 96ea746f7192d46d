"""Factors of keys and values: no other map of the same rank loses less, and at full rank nothing is lost."""

from __future__ import annotations

import pytest
import torch

from kvp.models.latents import with_latents
from kvp.models.masks import edited
from kvp.strategies.signals.fisher import mean_root_fisher
from kvp.strategies.signals.low_rank import edits_of, factored, input_moments_of, rows_of
from kvp.strategies.signals.walk import walk
from tests.conftest import tiny_model

IDS = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(3))


def states(count=300, width=12, seed=0):
    """Correlated inputs with one channel much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, dtype=torch.float64, generator=generator)
    return (
        mixed
        @ torch.randn(width, width, dtype=torch.float64, generator=generator)
        * torch.linspace(0.2, 4, width)
    )


def test_dropped_energies_are_the_mean_square_lost():
    x, rows = states(), torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = factored(rows, x.T @ x / len(x))
    for rank in range(7):
        kept = found.expands[..., :rank] @ found.reads[:, :rank]
        lost = ((x @ (rows - kept).mT) ** 2).sum(-1).mean(-1)
        torch.testing.assert_close(lost, found.energies[:, rank:].sum(1))


def test_no_other_rank_loses_less():
    """The Eckart-Young optimum by another road: the outputs' own principal directions."""
    x, rows = states(), torch.randn(1, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, y = factored(rows, x.T @ x / len(x)), x @ rows[0].T
    for rank in range(1, 6):
        best = torch.linalg.svd(y, full_matrices=False)
        lost = (best.S[rank:] ** 2).sum() / len(x)
        torch.testing.assert_close(found.energies[0, rank:].sum(), lost)
        kept = x @ (found.expands[0, :, :rank] @ found.reads[0, :rank]).T
        torch.testing.assert_close(((y - kept) ** 2).sum() / len(x), lost)


def test_every_root_gives_the_same_factors():
    """Cholesky's root, as Palu and SVD-LLM take it, and the symmetric one of CARE."""
    x, rows = states(), torch.randn(1, 6, 12, dtype=torch.float64)
    moment = x.T @ x / len(x)
    found = factored(rows, moment)
    values, vectors = torch.linalg.eigh(moment)
    for root in (torch.linalg.cholesky(moment), vectors * values.sqrt() @ vectors.T):
        left, singular, right = torch.linalg.svd(rows[0] @ root, full_matrices=False)
        for rank in (1, 3, 5):
            theirs = left[:, :rank] * singular[:rank] @ right[:rank] @ torch.linalg.inv(root)
            ours = found.expands[0, :, :rank] @ found.reads[0, :rank]
            torch.testing.assert_close(ours, theirs)


def test_damping_is_relative_to_the_mean_diagonal():
    x, rows = states(), torch.randn(1, 6, 12, dtype=torch.float64)
    moment = x.T @ x / len(x)
    by_hand = moment + 0.1 * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(factored(rows, moment, 0.1).energies, factored(rows, by_hand).energies)


def test_fewer_inputs_than_rows_and_silent_inputs_are_solvable():
    rows = torch.randn(1, 6, 4, dtype=torch.float64)
    moment = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=torch.float64))
    found = factored(rows, moment)
    torch.testing.assert_close(found.expands @ found.reads, rows)
    assert found.energies.shape == (1, 6)
    assert (found.energies[0, 4:] == 0).all()


@torch.no_grad()
def test_all_channels_are_the_same_function(family, heads, tokens):
    model = with_latents(tiny_model(family, heads, dtype=torch.float64), 2, None)
    expected = model(tokens).logits
    edits = {}
    for visit in walk(model, IDS.split(2), "test"):
        moments = input_moments_of(visit)
        for part in ("k", "v"):
            found = factored(rows_of(visit, part), moments.gram / moments.count)
            edits |= edits_of(visit, part, found.reads, found.expands)
    assert len(edits) >= 12
    with edited(model, edits):
        assert (model(tokens).logits - expected).abs().max() < 1e-6


def test_fisher_information_is_that_of_autograd():
    model = with_latents(tiny_model(), 2, None)
    names = [f"model.layers.{n}.self_attn.{part}" for n in (0, 2) for part in ("k_proj", "v_proj")]
    found = mean_root_fisher(model, names, IDS.split(3))
    squares = dict.fromkeys(names, 0.0)
    for sample in IDS:
        model.zero_grad()
        logits = model(sample[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sample[1:]).backward()
        for name in names:
            squares[name] = squares[name] + model.get_parameter(f"{name}.weight").grad ** 2 / len(IDS)
    for name in names:
        assert found[name] == pytest.approx(squares[name].sqrt().mean().item(), rel=1e-4)
