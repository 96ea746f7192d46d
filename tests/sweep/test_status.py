"""`python -m kvp.status`: what it says of each kind of run, how to retry, and that it starts at once."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvp.store import Store
from kvp.sweep.queue import queued, waiting
from kvp.sweep.status import look, main, stage_counts
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


def test_a_finished_run_names_the_code_behind_its_stages(tmp_path):
    record = make_record()
    (origin,), (stage,) = record["provenance"]["origins"], record["stages"]
    edited = {**origin, "commit": "cee8cf822000", "dirty": True}
    made = {**stage, "name": "score", "edits": {"mine.rule": "0" * 64}, "origins": [1, 0]}
    provenance = {**record["provenance"], "origins": [origin, edited]}
    known = write(tmp_path, "a", status="finished", stages=[stage, made], provenance=provenance)
    assert look(known).detail.endswith("2 computed; code f574f8d, cee8cf82 with edits, mine")
    old = write(tmp_path, "b", status="finished", stages=[{**stage, "origins": []}])
    assert look(old).detail.endswith("code f574f8d, of unknown origin")


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


def test_a_run_of_another_machine_says_since_when_nothing_was_written(tmp_path):
    path = write(tmp_path, "a", host="elsewhere", pid=1)
    os.utime(path, (time.time(), time.time() - 90 * 3600))
    run = look(path)
    assert run.status == "running"
    assert re.search(r"nothing written since \d{4}-\d\d-\d\d \d\d:\d\d UTC \(3\.8 days\)$", run.detail)


@pytest.mark.parametrize("host", [HERE, "elsewhere"])
def test_a_clock_that_jumped_does_not_stop_the_status(tmp_path, host):
    path = write(tmp_path, "a", host=host, started=datetime.now(UTC) + timedelta(days=400))
    os.utime(path, (time.time(), time.time() + 9e6))
    run = look(path)
    assert run.status == "running" and "days)" not in run.detail


ODD = {  # what stands in a record that is running -> the status
    "started": ({"provenance": {"started": "yesterday"}}, "running"),
    "far": ({"provenance": {"started": "9999-12-31T23:59:59-23:00"}}, "running"),
    "pid": ({"pid": 2**40}, "died"),
    "negative": ({"pid": -5}, "died"),
    "none": ({"pid": None}, "running"),
    "host": ({"host": "\x1b[31m\u202e[red]|`x`"}, "running"),
    "stage": ({"stage": "a\nb" * 9999}, "running"),
    "failed": ({"status": "failed", "error": None}, "failed"),
    "message": ({"status": "failed", "error": {"type": "[red]", "message": "\x1b[2J\n"}}, "failed"),
    "ratio": (
        {"status": "finished", "ratio": {"asked": {"value": 0.5, "of": "blocks"}, "achieved": {}}},
        "finished",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_values_in_a_record_are_shown_and_do_no_harm(tmp_path, capsys, monkeypatch, case):
    changes, status = ODD[case]
    path = write(tmp_path, "a")
    record = json.loads(path.read_text())
    record["provenance"] |= changes.get("provenance", {})
    path.write_text(json.dumps({**record, **{k: v for k, v in changes.items() if k != "provenance"}}))
    assert look(path).status == status
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path)])
    main()
    shown = capsys.readouterr().out
    assert f"1 {status}" in shown and not re.search("[\x1b\u202e]|.{9000}", shown)


@pytest.mark.parametrize("kind", ["directory", "pipe", "deep", "link", "binary"])
def test_a_run_json_that_is_none_is_one_row(tmp_path, kind):
    path = write(tmp_path, "a")
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path)
    else:
        path.write_bytes(b"[" * 100_000 if kind == "deep" else b"\xff\xfe\0")
    run = look(path)
    assert run.status == "unreadable" and run.detail


HARM = {  # a file of a finished stage or beside one left unfinished, and what it holds then
    "cut manifest": ("manifest.json", '{"files": {"a": {"si'),
    "empty manifest": ("manifest.json", ""),
    "list": ("manifest.json", "[]"),
    "no files": ("manifest.json", "{}"),
    "odd files": ("manifest.json", '{"files": {"a": 3}}'),
    "odd size": ("manifest.json", '{"files": {"a": {"size": null}}}'),
    "empty holder": (".holder", ""),
    "odd holder": (".holder", "box pid"),
    "long holder": (".holder", f"{HERE} pid {2**70}"),
}


@pytest.mark.parametrize("case", HARM)
def test_a_damaged_store_is_counted(tmp_path, case):
    store = Store(tmp_path)

    def write(directory):
        (directory / "a").write_bytes(bytes(2**20))

    def die(directory):
        raise RuntimeError

    stages = [store.once("score", {"seed": seed}, write) for seed in (1, 2)]
    with pytest.raises(RuntimeError):
        store.once("score", {"seed": 3}, die, resumable=True)
    name, text = HARM[case]
    left = next((tmp_path / "score").glob(".*.partial"))
    (left.with_suffix(name) if name == ".holder" else stages[0].path / name).write_text(text)
    damaged = int(name == "manifest.json")
    counts = stage_counts(tmp_path)["score"]
    assert counts.pop("MiB") == pytest.approx(2 - damaged, rel=0.01)
    assert counts == {"finished": 2 - damaged, "left unfinished": 1} | ({"damaged": 1} if damaged else {})


def test_a_store_in_use_is_counted(tmp_path):
    """Stages come and go while they are counted."""
    stop = threading.Event()

    def work():
        for i in itertools.count():
            if stop.is_set():
                return
            place = tmp_path / "score" / f".{i % 7:016x}.partial"
            place.mkdir(parents=True, exist_ok=True)
            (place / "manifest.json").write_text('{"files": {}}')
            place.with_suffix(".holder").write_text(f"{HERE} pid {os.getpid()}")
            final = place.with_name(f"{i % 7:016x}")
            shutil.rmtree(final, ignore_errors=True)
            place.rename(final)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(150):
            assert set(stage_counts(tmp_path)) <= {"score"}
    finally:
        stop.set()
        worker.join()


def test_a_store_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch):
    write(tmp_path, "a")
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path), "--store", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"there is no store at .*none: name the directory"):
        main()


def test_jobs_of_a_running_sweep_wait_for_their_turn(tmp_path, capsys, monkeypatch):
    write(tmp_path, "one")
    monkeypatch.setattr(sys, "argv", ["kvp.status", str(tmp_path)])
    with queued(tmp_path, ["one", "two", "three"]):
        main()
        said = capsys.readouterr().out
    assert "2 waiting, 1 running" in said
    assert f"for its turn in the sweep of {HERE} pid {os.getpid()}" in said
    main()
    assert "waiting" not in capsys.readouterr().out


def test_what_a_killed_sweep_left_waits_for_nothing(tmp_path):
    with queued(tmp_path, ["one"]):
        (left,) = tmp_path.glob(".sweep-*.json")
        queue = json.loads(left.read_text())
        assert [job for job, _ in waiting(tmp_path)] == ["one"]
        for damage in ({**queue, "pid": 2**22 + 1}, {**queue, "started": 0}, {"jobs": ["one"]}, [1]):
            left.write_text(json.dumps(damage))
            assert list(waiting(tmp_path)) == []
