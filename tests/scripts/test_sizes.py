"""Cost against size: the fit against an exact law, the tables, and one model for real."""

from __future__ import annotations

import pytest

from experiments.scripts.sizes import WORKS, measure, power_law, tables

SIZES = {"small": 1e8, "middle": 3e8, "large": 1e9}


def lines():
    """Costs of an exact law, 2e-10 * parameters ** 1.1 seconds per token; the middle one is twice as dear."""
    return [
        {
            "model": model,
            "params": params,
            "work": work,
            "tokens": 512,
            "cpu_seconds": 512 * 2e-10 * params**1.1 * (2 if model == "middle" else 1),
            "estimate": 2**30,
            "measured": 2**30 * 1.05,
        }
        for model, params in SIZES.items()
        for work in WORKS
    ]


def test_a_power_law_is_found_from_two_points_and_from_more():
    law = {x: 3e-9 * x**1.25 for x in (1e8, 5e8, 1e9)}
    assert power_law(law) == pytest.approx((3e-9, 1.25))
    assert power_law(dict(list(law.items())[:2])) == pytest.approx((3e-9, 1.25))


def test_the_unseen_model_is_predicted_and_not_fitted():
    text = tables(lines(), ["small", "large"], "middle")
    fits = [row.split("|") for row in text.splitlines() if "1.10 |" in row]
    assert len(fits) == len(WORKS)
    predicted = 1e3 * 2e-10 * SIZES["middle"] ** 1.1
    for fit in fits:
        assert float(fit[3]) == pytest.approx(predicted, abs=0.06)
        assert float(fit[5]) == 0.5  # it was measured at twice the law
    assert text.count("1.050") == len(SIZES) * len(WORKS)


@pytest.mark.slow
def test_every_work_of_a_model_is_measured():
    found = measure("smollm2_135m_shape")
    assert [line["work"] for line in found] == list(WORKS)
    for line in found:
        assert line["cpu_seconds"] > 0 and line["tokens"] >= 256
        assert 0.8 < line["measured"] / line["estimate"] < 1.25
