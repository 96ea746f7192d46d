"""The whole experiment on a tiny model: record, resumption, tracking, clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from kvp.__main__ import CONF
from kvp.run import run

ROOT = Path(__file__).parent.parent


def overrides(tmp_path, *more):
    return ["debug=smoke", "tracker=none", f"store={tmp_path}/store", f"runs={tmp_path}/runs", *more]


def run_here(tmp_path, *more):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return run(compose("config", overrides=overrides(tmp_path, *more)))


def command(*words):
    return [sys.executable, "-m", "kvp", *words]


def call(tmp_path, *more, **options):
    return subprocess.run(
        command(*overrides(tmp_path, *more)), cwd=ROOT, capture_output=True, text=True, **options
    )


def numbers(record):
    """What must not depend on how often the run was interrupted."""
    kept = {}
    for name in ("dense", "pruned", "recovered"):
        model = record[name]
        kept[name] = {"size": model["size"], "evaluation": model["evaluation"]}
    return kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    return tmp_path, run_here(tmp_path, "tracker=jsonl")


def test_record_holds_what_the_readme_promises(finished):
    _, record = finished
    written = json.loads(Path(record["directory"], "run.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert written["schema"] == 1
    for name in ("dense", "pruned", "recovered"):
        model = written[name]
        assert Path(model["checkpoint"], "config.json").exists()
        assert model["size"]["params"] > 0
        assert len(model["size"]["layers"]) == 4
        for result in model["evaluation"]["perplexity"].values():
            assert result["value"] > 1
            assert result["protocol"]["window"] == 64
            assert result["data_hash"]
        assert model["evaluation"]["zero_shot"]["piqa"]["n"] == 4
        assert model["measure"]["decode"]["tokens_per_second"] > 0
        assert model["measure"]["kv_bytes_per_token"] == model["size"]["kv_bytes_per_token"]
    achieved = written["ratio"]["achieved"]
    assert achieved["kv_cache"] == pytest.approx(0.25, abs=0.02)
    assert 0 < achieved["params"] < achieved["block_params"] < achieved["kv_cache"]
    assert achieved["blocks"] == 0
    assert {"commit", "dirty", "versions", "device", "seed", "data_hashes"} <= set(written["provenance"])
    assert all(stage["seconds"] >= 0 and stage["fingerprint"] for stage in written["stages"])


def test_checkpoints_open_with_from_pretrained_and_agree(finished):
    _, record = finished
    for name in ("pruned", "recovered"):
        model = AutoModelForCausalLM.from_pretrained(record[name]["checkpoint"])
        assert sum(p.numel() for p in model.parameters()) == record[name]["size"]["params"]
        tokens = torch.arange(3, 40)[None]
        cache = model(tokens, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == record[name]["size"]["kv_bytes_per_token"] * tokens.numel()


def test_only_safetensors_and_json_on_disk(finished):
    tmp_path, _ = finished
    suffixes = {path.suffix for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".md", ".jinja", ".lock", ".holder", ""}, suffixes


def test_a_second_run_computes_nothing(finished):
    tmp_path, first = finished
    again = run_here(tmp_path, "tracker=jsonl")
    assert all(stage["found"] for stage in again["stages"])
    assert numbers(again) == numbers(first)
    assert again["directory"] == first["directory"]
    assert again["tracker"] == first["tracker"]


def test_a_changed_option_computes_only_what_depends_on_it(finished):
    tmp_path, first = finished
    other = run_here(tmp_path, "ratio.value=0.5")
    computed = {stage["name"] for stage in other["stages"] if not stage["found"]}
    assert "score" not in computed
    assert "sensitivity" not in computed
    assert "model" not in computed
    assert {"prune", "recover"} <= computed
    assert other["dense"] == first["dense"]
    assert other["pruned"]["size"]["kv_bytes_per_token"] < first["pruned"]["size"]["kv_bytes_per_token"]


def test_dense_baseline_and_dense_control(finished):
    tmp_path, first = finished
    baseline = run_here(tmp_path, "strategy=none", "recovery=none")
    assert baseline["ratio"]["asked"] is None
    assert set(baseline["ratio"]["achieved"].values()) == {0}
    assert baseline["pruned"] == baseline["dense"]
    assert "recovered" not in baseline
    assert all(stage["found"] for stage in baseline["stages"])
    control = run_here(tmp_path, "strategy=none")
    assert control["recovered"]["size"]["params"] == first["dense"]["size"]["params"]
    assert control["recovered"]["evaluation"] != control["dense"]["evaluation"]


def test_overlap_of_calibration_and_evaluation_is_said(finished):
    tmp_path, first = finished
    assert all(
        result["overlap"] == {"calibration": "none", "recovery": "none"}
        for result in first["recovered"]["evaluation"]["perplexity"].values()
    )
    options = ["calibration=squad", "calibration.num_samples=4", "calibration.length=64", "recovery=none"]
    same_corpus = run_here(tmp_path, *options)
    assert (
        same_corpus["pruned"]["evaluation"]["perplexity"]["squad"]["overlap"]["calibration"] == "same corpus"
    )
    same_text = run_here(tmp_path, *options, "calibration.part=test")
    assert same_text["pruned"]["evaluation"]["perplexity"]["squad"]["overlap"]["calibration"] == "same text"


def test_kill_in_every_stage_then_rerun_gives_the_same(finished, tmp_path):
    _, undisturbed = finished
    for stage in ("score", "prune", "recover", "evaluate/perplexity/lambada"):
        process = subprocess.Popen(
            command(*overrides(tmp_path, "tracker=jsonl")),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        folder, deadline = tmp_path / "store" / stage, time.time() + 120
        while not list(folder.glob(".*.partial")) and process.poll() is None and time.time() < deadline:
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"{stage} was over before it could be killed"
    rerun = run_here(tmp_path, "tracker=jsonl")
    assert numbers(rerun) == numbers(undisturbed)
    weights = [
        (Path(record["recovered"]["checkpoint"]) / "model.safetensors").read_bytes()
        for record in (rerun, undisturbed)
    ]
    assert weights[0] == weights[1]


def test_an_edited_stage_is_not_trusted(finished):
    tmp_path, first = finished
    checkpoint = Path(first["pruned"]["checkpoint"])
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = run_here(tmp_path, "tracker=jsonl")
    assert weights.read_bytes() == content
    assert [stage["name"] for stage in again["stages"] if not stage["found"]] == ["prune"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ratio.value=1.5"], "ratio.value must be in [0, 1), got 1.5"),
        (["ratio.valu=0.5"], "Did you mean ratio.value"),
        (["strategy=kvprunner"], "kvpruner"),
        (["strategy.importance=tailor"], "strategy.importance must be one of random"),
        (["calibration.corpora=[squat]"], "Did you mean 'squad'?"),
        (["evaluation.perplexity.window=1"], "window must be >= 2, got 1"),
        (["recovery.rank=0"], "rank"),
        (["ratio=params", "ratio.value=0.9"], "the nearest is"),
        (["model.dtype=float8"], "model.dtype must be one of auto"),
        (["store=/dev/null/store"], "store=DIR"),
    ],
)
def test_bad_options_fail_with_one_clear_error(tmp_path, options, message):
    result = call(tmp_path, *options)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 12
    assert not list((tmp_path / "store").glob("score/*"))


def test_nan_weights_are_one_clear_error_and_leave_nothing(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(run_dense(tmp_path)).config)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (broken / file).write_bytes((Path(run_dense(tmp_path)) / file).read_bytes())
    options = ["model=local", f"model.path={broken}", "evaluation=none"]
    result = call(tmp_path, *(o for o in options), "~debug", "measure=none", "recovery=none")
    assert result.returncode == 1
    assert "not finite" in result.stderr
    assert not list((tmp_path / "store").glob("score/*"))


def run_dense(tmp_path):
    return run_here(tmp_path, "strategy=none", "recovery=none", "evaluation=none", "measure=none")["dense"][
        "checkpoint"
    ]
