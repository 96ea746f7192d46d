"""A dry run says what would be done, and does none of it."""

from __future__ import annotations

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from kvp.__main__ import main
from kvp.hints import DRY_RUN
from tests.helpers.bad_options import TINY

LIGHT = [*TINY, "recovery=none", "evaluation.zero_shot=null", "measure=none", "tracker=none"]


@pytest.fixture
def dry(tmp_path, monkeypatch, capsys):
    """`kvp --dry-run words` in this process: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DRY_RUN, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["kvp", *words, "--dry-run"])
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_run_is_foretold_and_nothing_is_written(dry, tmp_path):
    code, out, err = dry(*LIGHT, "strategy=magnitude")
    assert (code, err) == (0, "")
    assert "0 stand" in out and "nothing is computed" in out and "perplexity" in out
    assert not [*tmp_path.iterdir()]


def test_a_stage_that_two_models_share_is_counted_as_work(dry):
    words = ["recovery=lora_text", "measure=cpu_quick", "strategy=magnitude,none"]
    code, out, _ = dry("-m", *LIGHT, *words)
    assert code == 0 and "0 stand" in out and "3 measure" in out  # dense, pruned, and the dense one tuned


def test_a_job_that_would_be_refused_ends_the_sweep_with_its_reason(dry, tmp_path):
    code, out, err = dry("-m", *LIGHT, "strategy=kvpruner", "calibration.length=4096", "ratio.value=0.25,0.5")
    assert code == 1 and "2 jobs" in out
    assert err.count("calibration.length must be <= 2048") == 1 and "all 2 jobs" in err
    assert not [*tmp_path.iterdir()]


def test_all_missing_sources_are_named_at_once(dry, tmp_path):
    words = ["model=llama_7b", "recovery=lora_alpaca", "evaluation.zero_shot=null", "measure=none"]
    corpora = "evaluation.perplexity.corpora=[wikitext2,ptb]"
    code, out, err = dry("-m", *words, corpora, "tracker=none", "device=cpu", "ratio.value=0.25,0.5")
    assert code == 1 and "2 jobs" in out
    for name in ("baffo32/decapoda-research-llama-7B-hf", "alpaca", "wikitext", "ptb"):
        assert name in err, err
    assert err.count("all 2 jobs") == 4 and "Traceback" not in err
    assert "GiB" in out and "score" in out  # the published shape is enough for estimates
    assert not [*tmp_path.iterdir()]
