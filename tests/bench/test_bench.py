"""The command: one run on the tiny shape, its record, and what it refuses before it makes a weight."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pytest
import torch

from kvp.bench import __main__ as command
from kvp.bench.bench import Steps
from kvp.bench.plots import write_plots
from kvp.bench.protocols import PROTOCOLS
from kvp.bench.table import markdown
from kvp.measurement.measure import Measure
from kvp.models.load import resolve_dtype
from kvp.models.sparse_attention import readable
from kvp.models.surgery import apply
from kvp.provenance import provenance
from kvp.types import Plan
from tests.conftest import tiny_model
from tests.process import start

WORDS = [
    "tiny",
    "--cut",
    "0.5",
    "--batch",
    "1,3",
    "--prompt",
    "8",
    "--new",
    "4",
    "--warmup",
    "1",
    "--runs",
    "2",
]
ROW = {
    "model",
    "path",
    "batch_size",
    "prompt_length",
    "new_tokens",
    "failed",
    "latency",
    "prefill",
    "decode",
} | {
    "memory",
    "attention",
    "roofline",
    "against_first",
}


def bench(*words, out):
    command.run(command.parser().parse_args([*words, "--device", "cpu", "--out", str(out)]))
    return json.loads((out / "bench.json").read_bytes())


def measure(out, *words):
    """The benchmark without tables and plots."""
    return command.compose(command.parser().parse_args([*words, "--device", "cpu"])).run(out)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def record(directory):
    return bench(*WORDS, "--memory", "0.05", out=directory)


def test_record_says_what_was_run(record):
    assert record["schema"] == 1 and record["status"] == "finished"
    assert record["protocol"]["batches"] == [1, 3] and record["protocol"]["warmup"] == 1
    assert f"torch.{record['dtype']}" == str(resolve_dtype("auto", "cpu")) and record["threads"] >= 1
    assert record["copy_bytes_per_second"] > 0
    assert {"commit", "versions", "command", "started", "seconds", "seed"} <= record["provenance"].keys()
    rows = {(row["path"], row["batch_size"], row["model"]): row for row in record["rows"]}
    assert len(record["ratios"]) == 3 * len(rows) / 2  # the dense model is not compared with itself
    name = "KVPruner 50% KV / tiny, static, batch 3, 8 + 4 tokens: decode"
    assert record["ratios"][name] == rows["static", 3, "KVPruner 50% KV"]["against_first"]["decode"]
    dense, cut = record["models"]
    assert [dense["removed"]["kv_cache"], cut["removed"]["kv_cache"]] == [0, 0.5]
    assert cut["aligned"] and len(cut["layers"]) == 10 and cut["checkpoint"] is None
    assert cut["kv_bytes_per_token"] == getattr(torch, record["dtype"]).itemsize * sum(
        layer["num_key_value_heads"] * (layer["qk_head_dim"] + layer["v_head_dim"]) for layer in cut["layers"]
    )


def test_rows_cover_the_grid_and_carry_their_limit(record):
    rows = record["rows"]
    grid = [(row["path"], row["batch_size"], row["model"]) for row in rows]
    assert grid == [
        (path, batch, name)
        for path in ("eager", "static")
        for batch in (1, 3)
        for name in ("tiny", "KVPruner 50% KV")
    ]
    for row in rows:
        assert row.keys() == ROW and row["failed"] is None
        step, limit = row["decode"]["milliseconds_per_step"], row["roofline"]["milliseconds_per_step"]
        moved = row["roofline"]["weights_bytes"] + row["roofline"]["cache_bytes"]
        assert limit == pytest.approx(1000 * moved / record["copy_bytes_per_second"])
        assert row["roofline"]["fraction"] == pytest.approx(limit / step)
        assert len(row["decode"]["seconds"]) == 2
        low, high = row["latency"]["iqr"]
        assert low <= row["latency"]["seconds"] <= high
        assert row["memory"]["cache_bytes"] > 0
    first, second = rows[:2]
    assert first["against_first"]["decode"]["median"] == 1
    moved = [row["roofline"]["weights_bytes"] + row["roofline"]["cache_bytes"] for row in (first, second)]
    assert second["against_first"]["decode_by_bytes"] == pytest.approx(moved[0] / moved[1])
    seconds = zip(second["decode"]["seconds"], first["decode"]["seconds"], strict=True)
    rates = [base / own for own, base in seconds]
    assert second["against_first"]["decode"]["median"] == pytest.approx(sum(rates) / 2)


def finished(out, step):
    """Results of the finished steps of a kind, oldest first."""
    found = sorted(out.glob(f"steps/*/{step}/[!.]*/result.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_bytes()) for path in found]


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_after_its_last_round(tmp_path, monkeypatch):
    """The limits and rounds of the killed process stay, and its faster copies count; the rest is measured."""
    words = [*WORDS, "--memory", "0.05", "--runs", "12", "--path", "eager"]
    process = start(measure, tmp_path, *words)
    while len(finished(tmp_path, "round")) < 4:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "bench.json").exists()
    limits, rounds = finished(tmp_path, "limits"), finished(tmp_path, "round")
    (began,) = finished(tmp_path, "process")
    monkeypatch.setattr("kvp.bench.bench.copy_bandwidth", lambda device: began["copy_bytes_per_second"] / 2)
    monkeypatch.setattr("kvp.bench.bench.find_batch", lambda *args, **kwargs: 1 / 0)
    whole = measure(tmp_path, *words)
    assert whole["status"] == "finished" and len(whole["rows"]) == 4 and whole["limits"] == limits
    for row in whole["rows"][:2]:
        kept = [run[row["model"]]["decode"] for run in rounds[1:12]]  # the first is the warm-up
        assert row["decode"]["seconds"][: len(kept)] == kept
    assert whole["copy_bytes_per_second"] == began["copy_bytes_per_second"]
    assert whole["provenance"]["processes"] == 2 and whole["provenance"]["started"] == began["started"]
    assert not (tmp_path / "steps").exists()


def test_another_benchmark_begins_anew(tmp_path, monkeypatch):
    def steps(*words, **changes):
        made = command.compose(command.parser().parse_args([*WORDS, "--device", "cpu", *words]))
        return Steps(tmp_path, replace(made, **changes).same())

    def once(steps):
        return steps.once("round", {"number": 0}, lambda: {"worked": True, "again": calls.append(steps)})

    calls = []
    for words in (
        [],
        ["--memory", "0.05"],
        ["--protocol", "prefill"],
        ["--path", "static"],
        ["--dtype", "float16"],
    ):
        once(steps(*words))
    assert len(calls) == 5, "a memory that was asked for makes another benchmark"
    once(steps(limit=2**20))
    assert len(calls) == 5, "free memory does not make another benchmark"
    made = provenance("cpu")
    for changed in ({"commit": "another"}, {"versions": made["versions"] | {"torch": "another"}}):
        monkeypatch.setattr("kvp.bench.bench.provenance", lambda device, changed=changed: made | changed)
        once(steps())
    assert len(calls) == 7, "rounds of other code are not mixed with these"
    monkeypatch.undo()
    words = [*WORDS, "--memory", "0.05", "--path", "eager"]
    again, once_more = (measure(tmp_path, *words) for _ in range(2))
    assert again["provenance"]["processes"] == 1
    assert once_more["provenance"]["processes"] == 1, "a finished one is measured again"
    assert once_more["rows"][0]["decode"] != again["rows"][0]["decode"]


def test_a_finished_benchmark_removes_its_own_steps_alone(tmp_path):
    other, own, note = (
        Steps(tmp_path / "steps", {"n": 1}),
        Steps(tmp_path / "steps", {"n": 2}),
        "steps/note.txt",
    )
    other.once("round", {}, lambda: {"seconds": 1})
    (tmp_path / note).write_text("mine")
    own.remove()
    assert Steps(tmp_path / "steps", {"n": 1}).once("round", {}, lambda: 1 / 0) == {"seconds": 1}
    (tmp_path / note).unlink()
    other.remove()
    assert not (tmp_path / "steps").exists()


def test_limits_are_found_and_predicted(record):
    for limits, model in zip(record["limits"], record["models"], strict=True):
        (batch,) = limits["largest_batch"]
        assert limits["model"] == model["name"]
        left = record["memory_limit_bytes"] - model["weights_bytes"]
        assert batch["predicted"] == left // (16 * model["kv_bytes_per_token"])
        assert 3 <= batch["found"] <= batch["predicted"]
        assert 0 < limits["longest_context"]["found"] <= limits["longest_context"]["positions"] == 2048


def test_tables_and_plots_are_written(record, directory):
    text = re.sub(" +", " ", (directory / "table.md").read_text())
    assert "| **static, batch 3, 8 + 4** |" in text and "| KVPruner 50% KV | " in text
    columns = {line.count("|") for line in text.splitlines() if "of roofline" in line or "| flash |" in line}
    assert len(columns) == 1
    header, *rows = map(json.loads, (directory / "results.jsonl").read_text().splitlines())
    assert rows == record["rows"] and header["limits"] == record["limits"] and "rows" not in header
    for name in ("decode", "memory"):
        for suffix in ("png", "svg"):
            assert (directory / f"{name}.{suffix}").stat().st_size > 1000
    assert not (directory / "steps").exists()


def test_where_the_first_model_does_not_fit_there_is_no_decode_plot(record, tmp_path):
    rows = [row | {"against_first": None} for row in record["rows"] if row["batch_size"] == 3]
    first = record["models"][0]["name"]
    alone = [row | ({"failed": "does not fit the memory"} if row["model"] == first else {}) for row in rows]
    names = {path.name for path in write_plots(record | {"rows": alone}, tmp_path)}
    assert names == {"memory.png", "memory.svg"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no model"),
        (
            ["tiny", "--batch", "1,9999999"],
            "a batch of 9999999 sequences of .* does not fit .* the largest .* is",
        ),
        (["tiny", "--batch", "0"], "measure.batch_size must be >= 1, got 0"),
        (["tiny", "--memory", "0.001"], "tiny has .* of weights, the memory is"),
        (["tiny", "--memory", "99999"], "--memory must be above 0 and at most"),
        (["tiny", "--protocol", "long_context"], "prompt_length .* must be <= 2048"),
        (["tiny", "--rivals"], "--rivals match the cuts of --cut"),
        (["tiny", "--cut", "0.9"], "cannot be reached"),
        (["tiny", "--dtype", "int8"], "dtype must be one of"),
        (["tiny", "tiny"], "two models are called tiny"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench(*words, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device must be cpu or auto here, got 'cuda'"):
        command.compose(command.parser().parse_args(["tiny", "--device", "cuda"]))


def test_a_ratio_of_different_kernels_is_pointed_out(record):
    warned = "by different kernels on path"
    assert warned not in markdown(record)
    changed = json.loads(json.dumps(record))
    for row in changed["rows"]:
        if row["model"] == record["models"][1]["name"]:
            row["attention"] = ["all layers"]
    lines = [line for line in markdown(changed).splitlines() if warned in line]
    assert len(lines) == len(record["paths"])
    names = [model["name"] for model in reversed(record["models"])]
    for line in lines:
        assert line.startswith(" and ".join(names)) and "(all layers and " in line


def test_error_of_the_command_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["kvp.bench", "nowhere", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("kvp.bench: error: nowhere is no model")


def test_protocols_are_those_of_the_papers():
    shortened = PROTOCOLS["shortened_llm"].points(most=1)
    assert {(p.prompt_length, p.new_tokens, p.warmup, p.runs) for p in shortened} == {
        (12, 128, 10, 20),
        (12, 512, 10, 20),
    }
    assert [p.batch_size for p in shortened[:7]] == [1, 8, 16, 32, 64, 128, 256]
    context = PROTOCOLS["long_context"].points(most=20)
    assert [p.batch_size for p in context if p.prompt_length == 8192] == [1, 2, 4, 8, 16]
    assert {(p.prompt_length, p.new_tokens) for p in context} == {(512, 128), (2048, 128), (8192, 128)}
    changed = PROTOCOLS["prefill"].changed(batches=(2,), prompts=(5,), runs=None)
    assert changed.points(most=1) == [
        Measure(batch_size=2, prompt_length=5, new_tokens=1, warmup=2, runs=10, seed=0)
    ]


@pytest.fixture
def sparse(tmp_path):
    """A checkpoint whose cache drops half of every key and value, and the dense one."""
    model = tiny_model(head_dim=16)
    model.save_pretrained(tmp_path / "dense")
    twin = apply(model, Plan({}))
    twin.config.kvp_cache = {"key_sparsity": 0.5, "value_sparsity": 0.5, "window": 4}
    twin.save_pretrained(tmp_path / "sparse")
    return [str(tmp_path / name) for name in ("dense", "sparse")]


@pytest.mark.skipif(not readable(torch.device("cpu"), torch.float32), reason="no C++ compiler")
def test_a_sparse_cache_is_timed_where_a_kernel_reads_it(sparse, tmp_path):
    words = [
        *sparse,
        "--batch",
        "2",
        "--prompt",
        "8",
        "--new",
        "4",
        "--runs",
        "1",
        "--warmup",
        "0",
        "--memory",
        "0.05",
    ]
    with pytest.raises(ValueError, match=r"packed cache .*: give --path native or eager alone, or"):
        measure(tmp_path / "static", *words)
    record = measure(tmp_path / "native", *words, "--path", "native")
    dense, half = record["models"]
    assert half["removed"]["kv_cache"] == 0.5 - 1 / 32  # half of 32 bits, and the bitmap's one
    assert [row["failed"] for row in record["rows"]] == [None, None]
    assert record["rows"][1]["attention"] == ["all layers"]
    roofline = [row["roofline"]["cache_bytes"] for row in record["rows"]]
    whole = dense["kv_bytes_per_token"], half["kv_bytes_per_token"]
    assert roofline[0] == 2 * 10.5 * whole[0]
    assert roofline[1] == 2 * (4 * whole[0] + 6.5 * whole[1])  # the window is whole
    batches = [limits["largest_batch"][0] for limits in record["limits"]]
    assert 1.1 * batches[0]["predicted"] < batches[1]["predicted"]
    assert 0 < batches[1]["found"] <= batches[1]["predicted"]


@pytest.mark.parametrize("kind", ["window", "sinks", "packed"])
def test_what_no_fixed_cache_serves_is_benched_eagerly(kind, tmp_path):
    model = {
        "window": lambda: tiny_model("mistral", sliding_window=40),
        "sinks": lambda: tiny_model("gpt_oss"),
        "packed": lambda: apply(tiny_model(head_dim=16), Plan({})),
    }[kind]()
    if kind == "packed":
        model.config.kvp_cache = {"format": "int", "key_bits": 4, "value_bits": 4}
    model.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), *WORDS[3:], "--memory", "0.05", "--runs", "1", "--dtype", "float32"]
    if kind != "window":
        with pytest.raises(
            ValueError, match="give --path eager alone" if kind == "packed" else "use --path eager"
        ):
            command.compose(command.parser().parse_args([*words, "--device", "cpu"])).check()
    record = bench(*words, "--path", "eager", out=tmp_path / "out")
    assert [row["failed"] for row in record["rows"]] == [None, None]
    context = record["limits"][0]["longest_context"]
    assert 0 < context["found"] <= context["predicted"] <= (32 if kind == "window" else context["positions"])


def test_models_that_do_not_fit_together_are_refused(monkeypatch):
    words = command.parser().parse_args(["llama_7b_shape", "--cut", "0.25,0.5", "--dtype", "bfloat16"])
    monkeypatch.setattr("kvp.measurement.memory.available_bytes", lambda device: 20 * 2**30)
    with pytest.raises(ValueError, match=r"all 3 models take 3\d\.\d\d GiB together, .* 20\.00 GiB are free"):
        command.compose(words)
