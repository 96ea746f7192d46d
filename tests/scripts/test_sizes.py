"""Cost against size: the fit against an exact line, the tables, and one model for real."""

from __future__ import annotations

import pytest

from experiments.scripts.sizes import WORKS, foresee, line, measure, shape, tables

SIZES = {"small": 1e8, "middle": 3e8, "large": 1e9}


def lines():
    """Costs of an exact line, 0.004 s + 2e-11 s per multiply-accumulate; the middle one is twice as dear."""
    return [
        {
            "model": model,
            "params": params,
            "macs": params,
            "work": work,
            "tokens": 512,
            "cpu_seconds": 512 * (0.004 + 2e-11 * params) * (2 if model == "middle" else 1),
            "estimate": 2**30,
            "measured": 2**30 * 1.05,
        }
        for model, params in SIZES.items()
        for work in WORKS
    ]


def test_a_line_is_found_from_two_points_and_from_more():
    law = [(x, 0.5 + 3e-9 * x) for x in (1e8, 5e8, 1e9)]
    assert line(law) == pytest.approx((0.5, 3e-9))
    assert line(law[:2]) == pytest.approx((0.5, 3e-9))


def test_errors_count_by_what_was_measured():
    """One of three points is off: the constant that fits best weighs each by its own size, sum(1/y) / sum(1/y^2)."""
    a, b = line([(1.0, 1.0), (1.0, 2.0)])
    assert a + b == pytest.approx((1 + 1 / 2) / (1 + 1 / 4))


def test_the_unseen_model_is_predicted_and_not_fitted():
    text = tables(lines(), ["small", "large"], "middle")
    fits = [row.split("|") for row in text.splitlines() if " 50.0 |" in row]
    assert len(fits) == len(WORKS)
    predicted = 1e3 * (0.004 + 2e-11 * SIZES["middle"])
    for fit in fits:
        assert float(fit[4]) == pytest.approx(predicted, abs=0.06)
        assert float(fit[6]) == 0.5  # it was measured at twice the line
    assert text.count("1.050") == len(SIZES) * len(WORKS)


def test_tables_of_one_work_have_no_rows_of_others():
    text = tables([each for each in lines() if each["work"] == "LoRA"], ["small", "large"], "middle")
    assert text.count("| LoRA ") == 3 + 1 + 3 and "scoring" not in text  # measured, fitted, large


def test_large_shapes_are_those_of_their_papers():
    params = [
        round(foresee(shape(name, "bfloat16"))[0]["params"] / 1e6) for name in ("LLaMA-7B", "Llama-3-70B")
    ]
    assert params == [6738, 70554]


def test_work_is_counted_from_the_shapes():
    """A pass of KVPruner's scoring has a backward; each layer's removal is half a pass more, by its place."""
    macs = {each["work"]: each["macs"] for each in foresee(shape("smollm2_135m_shape", "float32"))}
    perplexity, kvpruner, lora = (macs[work] for work in ("perplexity", "scoring, kvpruner", "LoRA"))
    assert perplexity == pytest.approx(134.5e6, rel=0.1)  # a multiply-accumulate per parameter, and attention
    assert kvpruner / perplexity == pytest.approx(2 + 1 + 30 / 2, rel=0.1)
    assert lora / perplexity == pytest.approx(2, rel=0.1)


@pytest.mark.slow
def test_every_work_of_a_model_is_measured():
    found = list(measure("smollm2_135m_shape"))
    assert {each["work"] for each in found} == {*WORKS}
    for each in found:
        assert each["cpu_seconds"] > 0 and each["tokens"] >= 256
        whole = each["work"].split(",")[0] not in (
            "search",
            "refit",
        )  # steps of a phase whose peak is scoring
        assert (0.8 if whole else 0.3) < each["measured"] / each["estimate"] < 1.25
