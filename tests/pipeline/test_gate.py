"""Whatever options, configs and files tell of a run is refused before anything is computed or written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from kvp.__main__ import CONF
from kvp.hints import words as worded
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_inputs
from kvp.pipeline.needs import needs
from kvp.pipeline.room import check_weights, way_out
from kvp.pipeline.run import run
from tests.helpers.bad_options import ALL, TINY
from tests.helpers.runs import ROOT


@pytest.fixture(scope="module")
def smoke():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*TINY])


def configured(words, smoke):
    """Return what Hydra composes; one plain value is put into the preset, which composes in a tenth of the time."""
    first = OverridesParser.create().parse_override(words[0])
    plain = (
        not (first.is_add() or first.is_delete()) and OmegaConf.select(smoke, first.key_or_group) is not None
    )
    if len(words) > 1 or not plain or (CONF / first.key_or_group).is_dir():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=[*TINY, *words])
    config = deepcopy(smoke)
    OmegaConf.update(config, first.key_or_group, first.value())
    return config


@pytest.mark.parametrize(("words", "message"), ALL, ids=[words[-1][:40] for words, _ in ALL])
def test_a_bad_option_is_refused_before_anything_is_written(words, message, smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvp", *TINY, *words])
    with pytest.raises(Exception) as refusal:  # noqa: PT011
        check_inputs(Experiment.compose(configured(words, smoke), [*TINY, *words]))
    assert message in worded(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), ALL, ids=[words[-1][:40] for words, _ in ALL])
def test_the_real_command_refuses_it_in_seconds(words, message, tmp_path):
    command = [sys.executable, "-m", "kvp", *TINY, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - began
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("kvp: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
    assert seconds < 10 * max(1, os.getloadavg()[0] / os.cpu_count())  # on an idle machine: 10 s


def test_a_gpu_that_only_the_nodes_have_is_not_asked_for_here(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = Experiment.compose(configured(["device=cuda"], smoke))
    with pytest.raises(ValueError, match="device must be cpu or auto here"):
        check_inputs(x)
    check_inputs(x, here=False)


def test_bits_of_latents_are_refused_before_they_are_scored(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["strategy=palu", "cache=int4", "evaluation.zero_shot=null"]
    with pytest.raises(
        ValueError, match="caches latents, and a Quantized cache stores keys and values of heads"
    ):
        check_inputs(Experiment.compose(configured(words, smoke)))


def test_the_weights_must_fit_what_is_free(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    x = Experiment.compose(configured(["model.config.vocab_size=40000000"], smoke))
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, hard))
    try:
        with pytest.raises(
            ValueError, match=r"take 28\.61 GiB in float32, and [01]\.\d\d GiB are free on cpu"
        ):
            check_inputs(x)
        with pytest.raises(ValueError, match=r"or choose model.dtype=bfloat16 .* short_of_memory=warn"):
            check_weights(x, x.source.expected())
        check_weights(replace(x, short_of_memory="warn"), x.source.expected())  # mapped: pages can be dropped
        with pytest.raises(ValueError, match="free on cpu"):  # a copy in another dtype cannot
            check_weights(replace(x, short_of_memory="warn", dtype=torch.bfloat16), x.source.expected())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_estimate_above_what_is_free_is_refused_or_warned_of(smoke, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvp.pipeline.room.available_bytes", lambda device: 5 * 2**20)  # the weights take 3
    with pytest.raises(ValueError, match=r"score is estimated to take .* 0\.00 GiB are free on cpu"):
        check_inputs(Experiment.compose(configured(["recovery=none"], smoke)))
    assert "estimated" not in caplog.text
    check_inputs(Experiment.compose(configured(["recovery=none", "short_of_memory=warn"], smoke)))
    assert "score is estimated to take" in caplog.text and "0.00 GiB are free on cpu" in caplog.text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (
            "score",
            ["calibration.batch_size=1", "strategy.gradient_checkpointing=true", "model.dtype=bfloat16"],
        ),
        ("perplexity", ["evaluation.perplexity.batch_size=1", "model.dtype=bfloat16"]),
        ("zero_shot", ["evaluation.zero_shot.batch_size=1", "model.dtype=bfloat16"]),
        ("measure", ["measure.batch_size=1", "model.dtype=bfloat16"]),
        (
            "recover",
            [
                "recovery.micro_batch_size=1",
                "recovery.gradient_checkpointing=true",
                "recovery.dtype=bfloat16",
            ],
        ),
    ],
)
def test_the_way_out_is_the_first_that_fits(phase, words):
    """With each further option the phase takes less; just enough memory for it is asked no more."""

    def composed(*more):
        asked = ["model=smollm2_135m_shape", "measure.batch_size=4", "model.dtype=float32", *more]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return Experiment.compose(compose("config", overrides=asked))

    x, totals = composed(), []
    config = x.source.expected()
    for count in range(len(words) + 1):
        every = needs(composed(*words[:count]), config)
        totals.append(next(need.memory["total"] for need in every if need.phase == phase))
    assert totals == sorted(set(totals), reverse=True)
    for count, free in enumerate(totals[1:], start=1):
        assert way_out(x, config, phase, free) == f"{' '.join(words[:count])} would fit"
    assert "another device" in way_out(x, config, phase, totals[-1] - 1)


def test_what_stands_needs_neither_memory_nor_text(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["recovery=none", "strategy=random", "evaluation=none", "store=s", "runs=r"]
    run(Experiment.compose(configured(words, smoke)))
    monkeypatch.setattr("kvp.pipeline.room.available_bytes", lambda device: 0)
    check_inputs(Experiment.compose(configured(words, smoke)))
    with pytest.raises(ValueError, match="GiB are free on cpu"):
        check_inputs(Experiment.compose(configured([*words, "ratio.value=0.5"], smoke)))


def test_a_folder_of_a_group_is_no_folder_of_runs(smoke):
    x = Experiment.compose(configured(["seed=1"], smoke))
    nested = replace(x, choices={**x.choices, "strategy": "my/own"})
    assert nested.directory.parent == x.runs
    assert "-my-own-" in nested.name


def test_examples_must_fit_the_positions_too(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(
        json.dumps([{"instruction": "Add.", "input": "1 1", "output": "2"}] * 4)
    )
    words = ["recovery=lora_alpaca", "recovery.data.path=rows.json", "recovery.validation=0"]
    with pytest.raises(ValueError, match=r"recovery\.data\.cutoff must be <= 2048 .* got 4096"):
        check_inputs(Experiment.compose(configured([*words, "recovery.data.cutoff=4096"], smoke)))
    more = ["recovery.data.max_examples=3", "recovery.validation=3"]
    with pytest.raises(
        ValueError, match=r"recovery\.validation must be < recovery\.data\.max_examples=3, got 3"
    ):
        check_inputs(Experiment.compose(configured([*words, *more], smoke)))
