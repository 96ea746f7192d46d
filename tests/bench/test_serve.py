"""The serving benchmark refuses before it starts an engine, compares turns of one round, and leaves no process."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import psutil
import pytest
import torch

from kvp.bench.serve.__main__ import main
from kvp.bench.serve.run import SLACK, Load, ServeBench, make_loads, ratios
from kvp.bench.serve.served import BLOCK, find_served, parse_memory
from kvp.bench.serve.server import Server, engine_versions
from kvp.bench.serve.table import table
from kvp.models.load import byte_tokenizer, save
from kvp.serving.stock import to_stock
from kvp.serving.verify import root_error
from tests.conftest import tiny_model
from tests.helpers.stock import stock_model
from tests.test_children import is_gone, until

VLLM = os.environ.get("KVP_VLLM_PYTHON", ".venv-vllm/bin/python")
BYTES = 3 * 2 * 2 * 8 * 4  # of a token of the tiny model: layers, groups, keys and values, channels, float32


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "dense"
    save(tiny_model(vocab_size=259), byte_tokenizer(), path)
    return path


def bench(models, memory: int, **changes) -> ServeBench:
    fields = {
        "rounds": 1,
        "eager": True,
        "together": False,
        "limit": 60.0,
        "seed": 0,
        "python": sys.executable,
    }
    fields |= {"loads": make_loads([20], [4], [1, 2], 2), **changes}
    return ServeBench(models=models, memory=memory, dtype=torch.float32, **fields)


@pytest.mark.parametrize(("text", "size"), [("64MiB", 2**26), ("1.5 GiB", 3 * 2**29)])
def test_a_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["64", "0MiB", "64MB", "-1GiB", "MiB"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(ValueError, match="give it as 64MiB"):
        parse_memory(text)


def test_a_model_is_served_as_it_is_and_with_another_cache(dense):
    first, eight = find_served([dense], torch.float32, ["fp8"])
    assert (first.name, first.token_bytes, first.refusable) == ("dense", BYTES, False)
    assert (eight.name, eight.token_bytes, eight.refusable) == ("dense + fp8", BYTES // 4, True)
    assert first.identity() != eight.identity()


def test_an_export_says_itself_what_a_token_takes(dense, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    serving = {"form": "stock", "dtype": "bfloat16", "kv_bytes_per_token": {"checkpoint": 90, "export": 30}}
    (tmp_path / "serving.json").write_text(json.dumps(serving))
    assert find_served([dense, tmp_path], torch.float32, [])[1].token_bytes == 60


def test_what_vllm_does_not_open_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match="is no model: give what kvp export wrote"):
        find_served([tmp_path], torch.float32, [])
    save(stock_model("llama", "gqa", vocab_size=259), byte_tokenizer(), tmp_path / "pruned")
    with pytest.raises(ValueError, match=f"export it first, kvp export {tmp_path}/pruned --out DIR"):
        find_served([tmp_path / "pruned"], torch.float32, [])
    (tmp_path / "serving.json").write_text('{"form": "gguf"}')
    with pytest.raises(ValueError, match="form gguf, which opens in llama_cpp, not in vllm"):
        find_served([tmp_path], torch.float32, [])
    with pytest.raises(ValueError, match="two models are called dense"):
        find_served([dense, dense], torch.float32, [])


def test_a_memory_that_holds_no_sequence_is_refused_with_the_least_that_does(dense):
    models = find_served([dense], torch.float32, [])
    with pytest.raises(
        ValueError, match=r"hold 32 tokens, and one sequence has 132 \(8 of them spare\)"
    ) as error:
        bench(models, 2 * BLOCK * BYTES, loads=make_loads([120], [4], [1], 1)).check()
    least = parse_memory(re.search(r"at least ([\d.]+MiB)", str(error.value))[1])
    bench(models, least, loads=make_loads([120], [4], [1], 1)).check()
    tokens = 120 + 4 + SLACK
    assert models[0].bytes_for(tokens) == pytest.approx(least, abs=2**20 / 100)
    assert models[0].tokens_in(models[0].bytes_for(tokens)) >= tokens
    assert models[0].tokens_in(models[0].bytes_for(tokens) - 1) < tokens


def test_an_interpreter_without_vllm_is_refused(tmp_path):
    for python in (sys.executable, str(tmp_path / "python")):
        with pytest.raises(ModuleNotFoundError, match="make serve-env, or name the interpreter"):
            engine_versions(python)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--python", sys.executable], "vllm is not installed in"),
        (["--memory", "64"], "'64' is no size"),
        (["--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be above 0, got 0"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(words, why, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvp bench", str(dense), "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("kvp.bench.serve: error: ")
    assert why in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_engines_first_error_is_found():
    log = """(Worker pid=7) ERROR 11-28 04:29:23 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=7) ERROR 11-28 04:29:23 [multiproc_executor.py:1063]     raise NotImplementedError(
(Worker pid=7) ERROR 11-28 04:29:23 [multiproc_executor.py:1063] NotImplementedError: FP8 needs AVX-512.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
    assert root_error(log) == "NotImplementedError: FP8 needs AVX-512."
    assert root_error("one\ntwo") == "one\ntwo"


def test_an_engine_that_dies_says_why_and_one_that_stays_leaves_no_process(dense, tmp_path):
    served = find_served([dense], torch.float32, [])[0]
    server = Server(served, sys.executable, [], tmp_path / "log")
    server.command = [sys.executable, "-S", "-c", "raise ValueError('no such model')"]
    with pytest.raises(RuntimeError, match="exit code 1 while it served dense: ValueError: no such model"):
        server.__enter__()
    stubborn = f"""
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_DFL)
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
class Yes(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", {server.port}), Yes).serve_forever()
"""
    server.command = [sys.executable, "-c", stubborn]
    before = set(psutil.Process().children(recursive=True))
    with server:
        assert server.resident_bytes() > 0
        assert server.cpu_seconds() > 0
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) == 2
    until(lambda: all(map(is_gone, started)), seconds=10)


def cell(tokens: int, seconds: float, cpu: float) -> dict:
    times = dict.fromkeys(("median_ttft", "p99_ttft", "median_tpot", "p99_tpot"), 10.0)
    counts = {"requests": 2, "preemptions": 3, "most_running": 5, "most_waiting": 0, "peak_bytes": 2**20}
    own = {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "cache_usage": 0.5, "load_before": 1.5}
    return own | times | counts


def test_the_table_compares_within_a_round_and_keeps_what_the_engine_refused():
    def model(name, *cells):
        rounds = [{"cache_tokens": 640, "loads": [one]} for one in cells]
        return {"name": name, "cache_dtype": "auto", "token_bytes": 64, "rounds": rounds}

    record = {
        "loads": [{"prompt": 28, "new": 4, "at_once": 2, "requests": 4}],
        "models": [
            model("dense", cell(8, 1, 2), cell(8, 4, 2)),
            model("half", cell(8, 0.5, 1), cell(8, 1, 4)),
            {"name": "dense + fp8", "rounds": [{"refused": "vllm ended: no AVX-512"}] * 2},
        ],
        "memory_bytes": 2**20,
        "together": False,
        "dtype": "float32",
        "cores": 2,
        "provenance": {"engine": {"vllm": "0.32"}, "device_name": "a CPU"},
    }
    said = re.sub(" +", " ", table(record))
    assert "| dense | 64 | 640 | 20.0 | auto |" in said
    assert "| dense | 5.0 | 1 | 4.0 | 1 | 10, 10 | 10, 10 | 5 | 50% | 3 | 1 |" in said
    assert "| half | 12.0 | 3.00 [2.00, 4.00] | 5.0 | 1.25 [0.50, 2.00] |" in said
    assert "* dense + fp8: vllm ended: no AVX-512" in said
    assert "2 rounds in turns, one server at a time" in said
    found = ratios(record["models"], [Load(prompt=28, new=4, at_once=2, requests=4)])
    assert found == {
        "half / dense, 28 + 4 tokens, 2 at once: seconds": {"median": 3.0, "iqr": [2.5, 3.5]},
        "half / dense, 28 + 4 tokens, 2 at once: CPU seconds": {"median": 1.25, "iqr": [0.875, 1.625]},
    }


def test_a_finished_turn_is_found_and_a_refused_model_keeps_its_row(dense, tmp_path):
    """The engine here dies at once: the row of a cache that may be refused says why, any other model is an error."""
    models = find_served([dense], torch.float32, ["fp8"])
    record = bench(models[1:], 2**20, rounds=2).run(tmp_path)
    assert "No module named 'vllm'" in record["models"][0]["rounds"][1]["refused"]
    log = next(tmp_path.glob("*.log")).stat().st_mtime_ns
    assert bench(models[1:], 2**20, rounds=2).run(tmp_path)["models"] == record["models"]
    assert next(tmp_path.glob("*fp8.log")).stat().st_mtime_ns == log, "nothing was started"
    with pytest.raises(RuntimeError, match="No module named 'vllm'"):
        bench(models[:1], 2**20).run(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path(VLLM).exists(), reason="needs vLLM: KVP_VLLM_PYTHON or .venv-vllm")
def test_half_of_the_cache_is_twice_the_tokens_in_vllm(tmp_path, monkeypatch, capsys):
    wide = {"vocab_size": 259, "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 256}
    for name, head_dim in (("dense", 64), ("half", 32)):
        save(to_stock(tiny_model(head_dim=head_dim, **wide), "stock"), byte_tokenizer(), tmp_path / name)
    out = tmp_path / "out"
    words = [
        str(tmp_path / "dense"),
        str(tmp_path / "half"),
        "--quick",
        "--dtype",
        "float32",
        "--python",
        VLLM,
    ]
    monkeypatch.setattr(sys, "argv", ["kvp bench", *words, "--out", str(out)])
    main()
    dense, half = (model["rounds"][0] for model in json.loads((out / "results.json").read_text())["models"])
    assert half["cache_tokens"] == 2 * dense["cache_tokens"]
    for turn in (dense, half):
        assert [one["tokens"] for one in turn["loads"]] == [8, 32]
        assert all(one["cpu_seconds"] > 0 and one["peak_bytes"] > 2**20 for one in turn["loads"])
    assert (out / "throughput.png").exists()
    assert "written to" in capsys.readouterr().out
