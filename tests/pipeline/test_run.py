"""The whole experiment on a tiny model: record, resumption, tracking, clear errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from kvp.__main__ import CONF, main
from kvp.models.caches import bytes_per_token
from kvp.models.load import load_config, load_tokenizer
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import foretell
from kvp.record import RunRecord
from kvp.upgrade import SCHEMA
from tests.helpers.runs import LIGHT, ROOT, compose_here, overrides, run_here
from tests.helpers.tracking import records
from tests.process import start_kvp


def main_here(monkeypatch, capsys, *words):
    """`python -m kvp words`, in this process: its exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["kvp", *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, capsys.readouterr().err


def numbers(record):
    """What must not depend on how often the run was interrupted."""
    kept = {}
    for name in ("dense", "pruned", "recovered"):
        model = record[name]
        perplexity = {key: result["value"] for key, result in model["evaluation"]["perplexity"].items()}
        kept[name] = {"size": model["size"], "perplexity": perplexity}
    return kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    return tmp_path, run_here(tmp_path)


def test_wandb_holds_the_run(finished):
    """Read back from the offline run's own log."""
    _, record = finished
    written = list(records(Path(record["directory"])))
    run = next(r.run for r in written if r.WhichOneof("record_type") == "run")
    assert run.run_id == record["hash"]
    assert run.run_group == "tiny-kvpruner"
    assert run.job_type == "run"
    assert json.loads(next(i.value_json for i in run.config.update if i.key == "ratio"))["value"] == 0.25
    summary = {}
    for r in written:
        if r.WhichOneof("record_type") == "summary":
            summary |= {item.key or "/".join(item.nested_key): item.value_json for item in r.summary.update}
    assert json.loads(summary["pruned/bytes/kv_per_token"]) == record["pruned"]["size"]["kv_bytes_per_token"]
    squad = record["recovered"]["evaluation"]["perplexity"]["squad"]["value"]
    assert json.loads(summary["recovered/perplexity/squad"]) == pytest.approx(squad)
    history = [
        {i.key or "/".join(i.nested_key) for i in r.history.item} for r in written if r.HasField("history")
    ]
    for key in ("recover/loss", "perplexity/squad", "stages", "widths", "sensitivity"):
        assert any(name.startswith(key) for row in history for name in row), key
    assert any(r.HasField("artifact") for r in written)
    assert next(r.exit.exit_code for r in written if r.HasField("exit")) == 0


def test_record_holds_what_the_readme_promises(finished):
    _, record = finished
    written = json.loads(Path(record["directory"], "run.json").read_text())
    assert written == json.loads(json.dumps(record)) == RunRecord.read(written).data()
    assert (written["schema"], written["status"]) == (SCHEMA, "finished")
    for name in ("dense", "pruned", "recovered"):
        model = written[name]
        assert Path(model["checkpoint"], "config.json").exists()
        assert model["size"]["params"] > 0
        assert len(model["size"]["layers"]) == 10
        for result in model["evaluation"]["perplexity"].values():
            assert result["value"] > 1
            assert result["protocol"]["window"] == 64
            assert result["data_hash"]
        assert model["evaluation"]["zero_shot"]["piqa"]["n"] == 4
        assert model["measure"]["decode"]["tokens_per_second"] > 0
        assert model["measure"]["kv_bytes_per_token"] == model["size"]["kv_bytes_per_token"]
    assert written["recovered"]["measure"] == written["pruned"]["measure"] != written["dense"]["measure"]
    achieved = written["ratio"]["achieved"]
    assert achieved["kv_cache"] == pytest.approx(0.25, abs=0.02)
    assert 0 < achieved["params"] < achieved["block_params"] < achieved["kv_cache"]
    assert achieved["blocks"] == 0
    assert {"seed", "data_hashes", "command"} <= set(written["provenance"])
    (origin,) = written["provenance"]["origins"]
    assert {"commit", "dirty", "versions", "device", "device_name", "threads"} <= set(origin)
    assert all(stage["origins"] == [0] and stage["code"] and stage["started"] for stage in written["stages"])
    assert {stage["model"] for stage in written["stages"]} == {"dense", "pruned", "recovered"}
    assert all(stage["seconds"] >= 0 and stage["fingerprint"] for stage in written["stages"])
    assert [(stage["model"], stage["name"]) for stage in written["stages"] if stage["found"]] == [
        ("recovered", "measure")
    ]


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
    again = run_here(tmp_path)
    assert all(stage["found"] for stage in again["stages"])
    assert numbers(again) == numbers(first)
    assert again["directory"] == first["directory"]
    assert again["tracker"] == first["tracker"]


def test_a_changed_option_computes_only_what_depends_on_it(finished):
    tmp_path, first = finished
    other = run_here(tmp_path, *LIGHT, "ratio.value=0.5")
    computed = {stage["name"] for stage in other["stages"] if not stage["found"]}
    assert "score" not in computed
    assert "sensitivity" not in computed
    assert "model" not in computed
    assert {"prune", "recover"} <= computed
    assert other["dense"]["evaluation"]["perplexity"] == first["dense"]["evaluation"]["perplexity"]
    assert other["pruned"]["size"]["kv_bytes_per_token"] < first["pruned"]["size"]["kv_bytes_per_token"]


def test_dense_baseline_and_dense_control(finished):
    tmp_path, first = finished
    baseline = run_here(tmp_path, "tracker=none", "strategy=none", "recovery=none")
    assert baseline["ratio"]["asked"] is None
    assert set(baseline["ratio"]["achieved"].values()) == {0}
    assert baseline["pruned"] == baseline["dense"]
    assert "recovered" not in baseline
    assert all(stage["found"] for stage in baseline["stages"])
    control = run_here(tmp_path, *LIGHT, "strategy=none")
    assert control["recovered"]["size"]["params"] == first["dense"]["size"]["params"]
    assert numbers(control)["recovered"]["perplexity"] != numbers(control)["dense"]["perplexity"]


def test_overlap_of_calibration_and_evaluation_is_said(finished):
    tmp_path, first = finished
    assert all(
        result["overlap"] == {"calibration": "none", "recovery": "none"}
        for result in first["recovered"]["evaluation"]["perplexity"].values()
    )
    options = [
        *LIGHT,
        "calibration=squad",
        "calibration.num_samples=4",
        "calibration.length=64",
        "recovery=none",
    ]
    same_corpus = run_here(tmp_path, *options)
    assert (
        same_corpus["pruned"]["evaluation"]["perplexity"]["squad"]["overlap"]["calibration"] == "same corpus"
    )
    same_text = run_here(tmp_path, *options, "calibration.part=test")
    assert same_text["pruned"]["evaluation"]["perplexity"]["squad"]["overlap"]["calibration"] == "same text"


def test_a_sparse_cache_is_carried_by_the_checkpoint(finished):
    tmp_path, first = finished
    sparse = [
        "tracker=none",
        "cache=mustafar",
        "cache.window=8",
        "evaluation.zero_shot=null",
        "evaluation.perplexity.corpora=[squad]",
        "evaluation.perplexity.max_tokens=128",
    ]
    alone = run_here(tmp_path, *sparse, "strategy=none", "recovery=none")
    dense, packed = (alone[model]["measure"]["kv_bytes_per_token"] for model in ("dense", "pruned"))
    assert (dense, packed) == (5120, 5120 // 2 + 5120 // 32)  # half of the float32 values, one bit for each
    held = alone["pruned"]["measure"]["memory"]["cache_bytes"]
    assert held == 2 * (8 * dense + (32 + 8 - 8) * packed)
    squad = alone["pruned"]["evaluation"]["perplexity"]["squad"]
    assert squad["cache"] == {"key_sparsity": 0.5, "value_sparsity": 0.5, "window": 8}
    assert squad["value"] != alone["dense"]["evaluation"]["perplexity"]["squad"]["value"]
    assert alone["ratio"]["asked"] is None
    combined = run_here(tmp_path, *sparse, "measure=none", "evaluation.perplexity=null")
    assert {stage["name"] for stage in combined["stages"] if not stage["found"]} == {
        "pack/pruned",
        "pack/recovered",
    }
    assert combined["pruned"]["size"] | {"stored_bytes_per_token": 3840} == first["pruned"]["size"]
    for model in ("pruned", "recovered"):
        packed, plain = (Path(run[model]["checkpoint"]) for run in (combined, first))
        assert load_config(packed).kvp_cache == squad["cache"]
        assert getattr(load_config(plain), "kvp_cache", None) is None
        assert (packed / "model.safetensors").samefile(plain / "model.safetensors")
    config = compose_here(tmp_path, *sparse, "strategy=none", "recovery=none")
    assert all(stage.stands for stage in foretell(Experiment.compose(config))[0])


def test_a_cache_of_few_bits_is_counted_and_read(finished):
    tmp_path, _ = finished
    words = [
        "tracker=none",
        "strategy=none",
        "recovery=none",
        "evaluation.zero_shot=null",
        "evaluation.perplexity.corpora=[squad]",
        "evaluation.perplexity.max_tokens=128",
    ]
    kivi = run_here(tmp_path, *words, "cache=kivi2", "cache.group=8", "cache.window=8")
    dense, packed = kivi["dense"], kivi["pruned"]
    assert (dense["size"]["stored_bytes_per_token"], dense["size"]["kv_bytes_per_token"]) == (5120, 5120)
    keys, values = (
        20 * 32 * (2 / 8 + 4 / 8),
        20 * (4 * 2 + 4 * 4),
    )  # a head: 32 channels, four groups of values
    assert packed["measure"]["kv_bytes_per_token"] == keys + values
    assert packed["measure"]["memory"]["cache_bytes"] == 2 * (40 * keys + 32 * values + 8 * 2560)
    whole = (4096 * keys + 4088 * values + 8 * 2560) / 4096
    assert packed["size"]["stored_bytes_per_token"] == -(-whole // 1)
    assert kivi["ratio"]["achieved"]["cache_bytes"] == 1 - packed["size"]["stored_bytes_per_token"] / 5120
    squad = packed["evaluation"]["perplexity"]["squad"]
    assert squad["cache"]["key_bits"] == 2 and squad["cache"]["format"] == "int"
    assert squad["value"] != dense["evaluation"]["perplexity"]["squad"]["value"]


def test_directions_get_bits_within_their_budget(finished):
    tmp_path, _ = finished
    words = [
        "tracker=none",
        "strategy=kvpruner_plus",
        "strategy.num_key_value_heads=1",
        "ratio.value=0.25",
        *LIGHT,
    ]
    cache = ["cache=directions", "cache.bits=3", "cache.group=8", "cache.window=8"]
    squad = ["evaluation.perplexity.corpora=[squad]", "evaluation.perplexity.max_tokens=128"]
    record = run_here(tmp_path, *words, *cache, *squad, "recovery=none")
    pruned, dense = record["pruned"], record["dense"]
    channels = dense["size"]["kv_bytes_per_token"] // 4
    config = json.loads((Path(pruned["checkpoint"]) / "config.json").read_text())
    digits = config["kvp_cache"]["keys"] + config["kvp_cache"]["values"]
    assert sum(map(len, digits)) == pruned["size"]["kv_bytes_per_token"] // 4 < channels
    assert (
        0.9 * channels * 3 / 8
        < bytes_per_token(load_config(Path(pruned["checkpoint"])), 4)
        <= channels * 3 / 8
    )
    assert pruned["evaluation"]["perplexity"]["squad"]["cache"] == {
        "format": "directions", "bits": 3.0, "most": 4, "group": 8, "window": 8
    }  # fmt: skip


def test_a_budget_of_bytes_counts_bits_and_cut(finished):
    tmp_path, _ = finished
    words = ["ratio=cache_bytes", "ratio.value=0.86", "cache=int8", "evaluation.perplexity=null", *LIGHT]
    record = run_here(tmp_path, *words, "recovery=none")
    assert record["ratio"]["asked"] == {"value": 0.86, "of": "cache_bytes"}
    achieved = record["ratio"]["achieved"]["cache_bytes"]
    assert 0.86 <= achieved < 0.9
    assert achieved == 1 - record["pruned"]["size"]["stored_bytes_per_token"] / 5120
    assert record["ratio"]["achieved"]["kv_cache"] > 0.4
    other = run_here(tmp_path, *words, "recovery=none", "cache=int4")  # a plan of its own
    assert 0 < other["ratio"]["achieved"]["kv_cache"] < 0.4
    dense = 4 * record["dense"]["size"]["params"] + 4 * 1024 * 5120
    limit = 0.8 * dense / 2**30
    memory = ["ratio=memory", f"ratio.gib={limit}", "ratio.batch_size=4", "ratio.context=1024"]
    fitting = run_here(tmp_path, *memory, "evaluation.perplexity=null", "recovery=none", *LIGHT)
    held = (
        4 * fitting["pruned"]["size"]["params"] + 4 * 1024 * fitting["pruned"]["size"]["kv_bytes_per_token"]
    )
    assert held <= 0.8 * dense
    assert fitting["ratio"]["asked"]["value"] == pytest.approx(0.2)
    assert fitting["ratio"]["achieved"]["memory"] == pytest.approx(1 - held / dense)
    assert f"memory{limit:g}GiB" in fitting["name"]


def test_joined_heads_are_a_stage_and_an_ordinary_checkpoint(tmp_path):
    words = ("strategy=kvpruner_plus", "strategy.num_key_value_heads=1", "ratio.value=0.5", *LIGHT)
    record = run_here(tmp_path, *words)
    assert {layer["num_key_value_heads"] for layer in record["dense"]["size"]["layers"]} == {2}
    assert {layer["num_key_value_heads"] for layer in record["recovered"]["size"]["layers"]} == {1}
    assert record["ratio"]["achieved"]["kv_cache"] == pytest.approx(0.5, abs=0.02)
    assert "join" in [stage["name"] for stage in record["stages"]]
    assert all(stage.stands for stage in foretell(Experiment.compose(compose_here(tmp_path, *words)))[0])


@pytest.mark.slow
def test_kill_in_every_stage_then_rerun_gives_the_same(finished, tmp_path):
    undisturbed = run_here(finished[0], *LIGHT)
    for stage in ("score", "prune", "recover", "evaluate/perplexity/lambada"):
        process = start_kvp(*overrides(tmp_path, *LIGHT))
        folder, deadline = tmp_path / "store" / stage, time.time() + 120
        while not list(folder.glob(".*.partial")) and process.is_alive() and time.time() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{stage} was over before it could be killed"
    rerun = run_here(tmp_path, *LIGHT)
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
    again = run_here(tmp_path)
    assert weights.read_bytes() == content
    assert [stage["name"] for stage in again["stages"] if not stage["found"]] == ["prune"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ratio.value=1.5"], "ratio.value must be in [0, 1), got 1.5"),
        (["ratio.value=abc"], "ratio.value must be a number, got 'abc': it is the fraction removed"),
        (["ratio.valu=0.5"], "Did you mean ratio.value"),
        (["strategy=kvprunner"], "Did you mean kvpruner?"),
        (["strategi=random"], "strategi"),
        (["strategy.importance=tailor"], "strategy.importance must be one of random"),
        (["strategy.allocator.temperature=-1"], "temperature must be >= 0"),
        (["calibration.corpora=[squat]"], "Did you mean squad?"),
        (["evaluation.perplexity.window=1"], "window must be >= 2, got 1"),
        (["evaluation.zero_shot.tasks=[piqua]"], "piqa"),
        (["evaluation=needles", "evaluation.needles.corpus=squat"], "Did you mean squad?"),
        (
            ["evaluation=needles", "evaluation.needles.lengths=[4096]"],
            "lengths must be <= 2048 (max_position",
        ),
        (
            ["evaluation=needles", "cache=kivi2", "cache.window=64", "evaluation.needles.lengths=[64]"],
            "lengths must be >= 66, got 64",
        ),
        (["recovery.rank=0"], "rank must be > 0, got 0"),
        (["cache=mustafar"], "evaluation.zero_shot=null"),
        (["cache=mustafar", "cache.window=62", "evaluation.zero_shot=null"], "window must be >= 65, got 64"),
        (["cache=int4"], "evaluation.zero_shot=null"),
        (["cache=directions", *LIGHT], "which strategy=kvpruner does not measure"),
        (
            ["cache=directions", "strategy=kvpruner_plus", "strategy.importance=l2", *LIGHT],
            "choose strategy=kvpruner_plus with strategy.importance=output",
        ),
        (
            ["cache=directions", "strategy=kvpruner_plus", "ratio=cache_bytes", "ratio.value=0.9", *LIGHT],
            "cache=directions has a budget of its own",
        ),
        (
            ["cache=directions", "cache.bits=4", "strategy=kvpruner_plus", "ratio.value=0.25", *LIGHT],
            "cache.bits must be <= 3.75, got 4",
        ),
        (["cache=kivi4", "cache.group=12"], "cache.keys=channel needs a cache.group that is a multiple of 8"),
        (["cache=kivi2", "cache.window=64", "evaluation.zero_shot=null"], "window must be >= 66, got 64"),
        (
            ["ratio=cache_bytes", "ratio.value=0.5", "cache=int4", "evaluation.zero_shot=null"],
            "without a cut",
        ),
        (
            ["ratio=memory", "ratio.gib=0.000001", "ratio.context=64"],
            "the most that can be cut leaves ratio.gib=",
        ),
        (["ratio=memory"], "ratio.context must be <= 2048"),
        (["measure.batch_size=0"], "batch_size must be >= 1, got 0"),
        (["ratio=params", "ratio.value=0.9"], "the nearest is"),
        (["model.dtype=float8"], "model.dtype must be one of auto"),
        (["store=/dev/null/store"], "store=DIR"),
        (["model=local", "model.path=/nowhere"], "is no directory here"),
        (["evaluation.perplexity.corpora=[text]"], "KVP_TEXT"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_fail_with_one_clear_error(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, stderr = main_here(monkeypatch, capsys, *overrides(tmp_path, *options))
    assert code == 1
    errors = [line for line in stderr.splitlines() if line.startswith("kvp: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in stderr
    assert not list((tmp_path / "store").glob("score/*"))


@pytest.mark.parametrize(
    ("option", "unread"), [("seeed=1", "torch"), ("ratio.value=1.5", "transformers.modeling_utils")]
)
def test_bad_options_fail_before_seconds_of_imports(option, unread):
    command = [sys.executable, "-X", "importtime", "-m", "kvp", option]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "kvp: error: " in failed.stderr
    assert "omegaconf" in (
        imported := {line.rpartition("|")[2].strip() for line in failed.stderr.splitlines()}
    )
    assert unread not in imported


def test_weights_that_are_not_finite_are_one_clear_error_and_leave_nothing(
    finished, tmp_path, monkeypatch, capsys
):
    dense = finished[1]["dense"]["checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(dense).save_pretrained(tmp_path / "broken")
    options = ["model=local", f"model.path={tmp_path}/broken", "evaluation=none", *LIGHT]
    code, stderr = main_here(monkeypatch, capsys, *overrides(tmp_path, *options))
    assert code == 1
    assert f"kvp: error: {tmp_path}/broken holds lm_head.weight with values that are not finite" in stderr
    left = {path.suffix for path in (tmp_path / "store" / "score").iterdir()}
    assert left <= {".lock", ".holder"}


def test_a_sweep_scores_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["kvp", "-m", *overrides(tmp_path, *LIGHT), "ratio.value=0.25,0.5", "recovery=none"]
    )
    GlobalHydra.instance().clear()
    main()
    assert len(list((tmp_path / "store" / "score").glob("[!.]*"))) == 1
    assert len(list((tmp_path / "store" / "prune").glob("[!.]*"))) == 2
    assert len(list((tmp_path / "runs").glob("*/run.json"))) == 2


@pytest.mark.parametrize("group", sorted(path.name for path in CONF.iterdir() if path.is_dir()))
def test_every_option_of_every_group_composes(group):
    skipped = {"machine", "hydra"}
    for path in () if group in skipped else sorted((CONF / group).glob("*.yaml")):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=[f"{group}={path.stem}"])
            assert OmegaConf.to_container(config, resolve=path.stem != "local", throw_on_missing=False)


@pytest.mark.parametrize(("widths", "multiple"), [("kernels", 8), ("engines", 32)])
def test_widths_are_the_allocators(widths, multiple):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("config", overrides=[f"widths={widths}"]).strategy.allocator.multiple_of == multiple
