"""`python -m kvp.status`: what it says of each kind of run, how to retry, and that it starts at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvp.store import Store
from kvp.sweep.status import look, stage_counts
from tests.report.sample_records import make_record

ROOT = Path(__file__).parents[2]
HERE = socket.gethostname()


def write(runs, name, **record):
    """A run.json as `kvp.pipeline.runfile` writes it, of a run that begins now."""
    started = record.pop("started", datetime.now(UTC))
    head = {
        **make_record(),
        "name": name,
        "status": "running",
        "overrides": ["seed=1", "evaluation.perplexity.corpora=[squad]"],
        "stage": "recover",
        "stages": [],
        "host": HERE,
        "pid": os.getpid(),
    }
    head["provenance"] |= {"started": started.isoformat(timespec="seconds")}
    (runs / name).mkdir(parents=True)
    path = runs / name / "run.json"
    path.write_text(json.dumps(head | record))
    return path


def failed(kind, message, **more):
    return {"status": "failed", "error": {"type": kind, "message": message, "traceback": ""}, **more}


def test_a_running_run_names_its_stage_host_and_process(tmp_path):
    run = look(write(tmp_path, "a"))
    assert run.status == "running"
    assert run.detail.startswith(f"recover, {HERE} pid {os.getpid()}, since 20")
    assert not run.retry


def test_a_run_whose_process_is_gone_died_and_its_command_goes_on_with_it(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = look(write(tmp_path, "a", pid=gone.pid))
    assert run.status == "died"
    assert run.retry == "python -m kvp seed=1 'evaluation.perplexity.corpora=[squad]'"


def test_another_process_with_the_same_number_is_not_the_run(tmp_path):
    assert look(write(tmp_path, "a", started=datetime.now(UTC) - timedelta(days=1))).status == "died"


def test_of_another_machine_s_processes_nothing_is_known(tmp_path):
    assert look(write(tmp_path, "a", host="elsewhere", pid=1)).status == "running"


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (
            failed("ValueError", "ratio.value=0.9 is out of reach"),
            "recover: ValueError: ratio.value=0.9 is out",
        ),
        (failed("RuntimeError", "it failed\n  File x\nMemoryError\n"), "recover: RuntimeError: MemoryError"),
        (failed("AssertionError", "", stage=None), "AssertionError"),
    ],
)
def test_a_failed_run_gives_the_last_line_of_its_error(tmp_path, error, detail):
    run = look(write(tmp_path, "a", **error))
    assert run.status == "failed"
    assert run.detail.startswith(detail)
    assert run.retry.startswith("python -m kvp seed=1")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "status": "running"}'])
def test_a_corrupt_record_is_one_row_that_names_file_and_way_out(tmp_path, text):
    path = write(tmp_path, "a")
    path.write_text(text)
    run = look(path)
    assert run.status == "unreadable"
    assert str(path) in run.detail
    assert "delete it" in run.detail


def test_stages_of_a_store_are_counted(tmp_path):
    store = Store(tmp_path)
    store.once("evaluate/squad", {"seed": 0}, lambda directory: {})
    store.once("score", {"seed": 0}, lambda directory: {})
    store.once("score", {"seed": 0}, lambda directory: {}, since=time.time() + 9)

    def killed(directory):
        counts = stage_counts(tmp_path)["score"]
        assert counts["being computed"] == 1
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.once("score", {"seed": 1}, killed, resumable=True)
    counts = stage_counts(tmp_path)
    assert counts["evaluate/squad"]["finished"] == counts["score"]["finished"] == 1
    assert counts["score"]["set aside"] == 1


def test_the_command_starts_without_torch(tmp_path):
    write(tmp_path, "a", **failed("ValueError", "no"))
    Store(tmp_path / "store").once("score", {}, lambda directory: {})
    words = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "kvp.status",
        str(tmp_path),
        "--store",
        f"{tmp_path}/store",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "1 failed" in done.stdout
    assert "ValueError: no" in done.stdout
    assert "python -m kvp seed=1" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rich.table" in imported
    assert not {"torch", "transformers", "hydra"} & imported


def test_a_directory_without_runs_is_one_clear_error(tmp_path):
    words = [sys.executable, "-m", "kvp.status", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == f"kvp: error: there is no run below {tmp_path}: name the directory that runs=DIR named"
    )
