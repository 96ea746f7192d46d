from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvp.store import Finished, StageError, Store, fingerprint

ROOT = Path(__file__).parents[1]
INPUTS = {"model": "tiny", "strategy": {"ratio": 0.25, "layers": [1, 2]}, "seed": None}


def write(directory: Path) -> dict:
    (directory / "model").mkdir()
    (directory / "model" / "weights").write_bytes(b"0123456789" * 1000)
    (directory / "plan.json").write_text("{}")
    return {"loss": 3.25, "widths": (8, 16)}


def never(directory: Path) -> dict:
    raise AssertionError("the stage was finished")


def child(code: str, root: Path, **options) -> subprocess.Popen:
    """Another process with a `store` below `root`; it starts like a command, without modelling code."""
    head = f"""
import sys, time
sys.argv = ["kvp"]
from kvp import store as stage
from pathlib import Path
root = Path({str(root)!r})
store = stage.Store(root)
"""
    return subprocess.Popen([sys.executable, "-c", head + code], text=True, cwd=ROOT, **options)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def partials(root: Path) -> list[Path]:
    return list(root.rglob(".*.partial"))


def test_second_call_does_no_work(tmp_path):
    first = Store(tmp_path).once("score", INPUTS, write)
    second = Store(tmp_path).once("score", INPUTS, never)
    assert not first.found and second == Finished(**{**vars(first), "found": True})
    assert first.result == {"loss": 3.25, "widths": [8, 16]}  # as JSON gives it back, both times
    assert first.path.parent == tmp_path / "score" and not partials(tmp_path)


def test_manifest_tells_where_the_numbers_come_from(tmp_path):
    stage = Store(tmp_path).once("evaluate/squad", INPUTS, write, version=3)
    manifest = json.loads((stage.path / "manifest.json").read_text())
    assert (manifest["stage"], manifest["version"], manifest["inputs"]) == ("evaluate/squad", 3, INPUTS)
    assert manifest["fingerprint"] == stage.fingerprint == fingerprint("evaluate/squad", 3, INPUTS)
    assert set(manifest["files"]) == {"model/weights", "plan.json", "result.json"}
    assert manifest["files"]["model/weights"]["size"] == 10_000
    assert stage.path.name == stage.fingerprint[:16] and manifest["created"].endswith("+00:00")


@pytest.mark.parametrize(
    "changed",
    [{"inputs": {**INPUTS, "seed": 1}}, {"version": 2}, {"stage": "prune"}],
    ids=lambda changed: next(iter(changed)),
)
def test_changed_input_is_another_directory_and_leaves_the_first_alone(tmp_path, changed):
    store, call = Store(tmp_path), {"stage": "score", "inputs": INPUTS, "work": write}
    first = store.once(**call)
    other = store.once(**{**call, **changed})
    assert not other.found and other.path != first.path
    assert Store(tmp_path).once(**{**call, "work": never}).found


def test_fingerprint_ignores_the_order_of_keys_and_refuses_what_is_not_json():
    assert fingerprint("s", 1, {"a": 1, "b": {"c": (1,)}}) == fingerprint("s", 1, {"b": {"c": [1]}, "a": 1})
    with pytest.raises(TypeError, match=r"inputs\.b\[1\] is a PosixPath"):
        fingerprint("s", 1, {"b": [1, Path("x")]})
    with pytest.raises(TypeError, match=r"inputs\.b has the key 3"):
        fingerprint("s", 1, {"b": {3: 1}})
    with pytest.raises(ValueError, match=r"inputs\.b is inf"):
        fingerprint("s", 1, {"b": float("inf")})


@pytest.mark.parametrize("error", [RuntimeError("diverged"), KeyboardInterrupt()])
def test_exception_leaves_nothing(tmp_path, error):
    def fail(directory: Path) -> None:
        write(directory)
        raise error

    with pytest.raises(type(error)):
        Store(tmp_path).once("score", INPUTS, fail)
    assert not [p for p in (tmp_path / "score").iterdir() if p.is_dir()]
    assert not Store(tmp_path).once("score", INPUTS, write).found


def test_nan_in_the_result_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"result\.ppl\.squad is nan"):
        Store(tmp_path).once("score", INPUTS, lambda _: {"ppl": {"squad": float("nan")}})
    assert not [p for p in (tmp_path / "score").iterdir() if p.is_dir()]


def test_resumable_work_finds_its_earlier_files(tmp_path):
    def train(directory: Path) -> dict:
        steps = directory / "steps"
        steps.write_text(steps.read_text() + "x" if steps.exists() else "x")
        if steps.read_text() == "x":
            raise RuntimeError("preempted")
        return {"steps": len(steps.read_text())}

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="preempted"):
        store.once("recover", INPUTS, train, resumable=True)
    assert store.once("recover", INPUTS, train, resumable=True).result == {"steps": 2}
    assert Store(tmp_path).once("recover", INPUTS, never).found and not partials(tmp_path)


@pytest.mark.parametrize("resumable", [False, True])
def test_killed_process_blocks_nobody_and_its_rest_is_kept_only_if_resumable(tmp_path, resumable):
    code = f"""
def work(directory):
    (directory / "checkpoint").write_text("half")
    (root / "begun").touch()
    time.sleep(600)
store.once("score", {INPUTS!r}, work, resumable={resumable})
"""
    victim = child(code, tmp_path)
    wait_for(tmp_path / "begun")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (partial,) = partials(tmp_path)
    assert (partial / "checkpoint").exists()

    kept = []

    def work(directory: Path) -> dict:
        kept.extend(directory.iterdir())
        return write(directory)

    stage = Store(tmp_path).once("score", INPUTS, work, resumable=resumable)
    assert bool(kept) == resumable and not partials(tmp_path)
    assert stage.result == Store(tmp_path / "fresh").once("score", INPUTS, write).result


def test_kill_between_manifest_and_rename_of_a_resumable_stage_is_harmless(tmp_path):
    store = Store(tmp_path)
    stage = store.once("score", INPUTS, lambda d: None, resumable=True)
    stage.path.rename(stage.path.with_name(f".{stage.path.name}.partial"))
    assert not store.once("score", INPUTS, write, resumable=True).found
    assert Store(tmp_path).once("score", INPUTS, never).found


def test_two_processes_do_the_work_once_and_the_second_waits(tmp_path):
    code = f"""
import logging
logging.basicConfig(level="INFO")
def work(directory):
    with open(root / "done", "a") as file:
        file.write("x")
    time.sleep(1)
    return {{"loss": 1.5}}
found = store.once("score", {INPUTS!r}, work)
print(found.result["loss"], found.found)
"""
    both = [child(code, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in both]
    assert sorted(out.strip() for out, _ in ends) == ["1.5 False", "1.5 True"]
    assert (tmp_path / "done").read_text() == "x"


def test_waiting_tells_once_who_holds_the_lock(tmp_path, caplog):
    code = f"""
def work(directory):
    (root / "begun").touch()
    time.sleep(1)
store.once("score", {INPUTS!r}, work)
"""
    holder = child(code, tmp_path)
    wait_for(tmp_path / "begun")
    with caplog.at_level(logging.INFO, "kvp.store"):
        assert Store(tmp_path).once("score", INPUTS, never).found
    assert holder.wait() == 0
    (message,) = caplog.messages
    assert message.startswith("waiting for") and f"pid {holder.pid} " in message


def truncate(file: Path) -> None:
    os.truncate(file, 5)


def edit(file: Path) -> None:
    file.write_bytes(b"X" + file.read_bytes()[1:])


@pytest.mark.parametrize("name", ["model/weights", "result.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, edit, Path.unlink], ids=["truncated", "edited", "deleted"])
def test_damaged_directory_is_moved_aside_and_computed_again(tmp_path, caplog, name, damage):
    stage = Store(tmp_path).once("score", INPUTS, write)
    damage(stage.path / name)
    again = Store(tmp_path).once("score", INPUTS, write)
    assert not again.found and again.result == stage.result
    (message,) = caplog.messages
    assert name in message and ".corrupt-1" in message
    assert stage.path.with_name(f".{stage.path.name}.corrupt-1").is_dir()
    assert Store(tmp_path).once("score", INPUTS, never).found


@pytest.mark.parametrize("field", ["seconds", "fingerprint"])
def test_edited_number_in_the_manifest_is_noticed(tmp_path, field):
    path = Store(tmp_path).once("score", INPUTS, write).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 1}))
    assert not Store(tmp_path).once("score", INPUTS, write).found


def test_files_are_hashed_once_per_store(tmp_path):
    store = Store(tmp_path)
    stage = store.once("score", INPUTS, write)
    edit(stage.path / "model" / "weights")
    assert store.once("score", INPUTS, never).found
    assert not Store(tmp_path).once("score", INPUTS, write).found


def test_root_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StageError, match=r"cannot write .*file/store.*store=DIR"):
        Store(tmp_path / "file" / "store")


def test_stage_that_cannot_be_written_is_one_clear_error(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "score").touch()
    with pytest.raises(StageError, match=r"cannot write .*/score/.*store=DIR"):
        store.once("score", INPUTS, never)


@pytest.mark.parametrize("where", ["work", "result"])
def test_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, where):
    code = f"""
def work(directory):
    if {where!r} == "work":
        (directory / "weights").write_bytes(bytes(200_000))
    return {{"text": "x" * 200_000}}
try:
    store.once("score", {INPUTS!r}, work)
except stage.StageError as error:
    print(error)
"""
    limit = 100_000
    process = child(
        code,
        tmp_path,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "store=DIR" in out and str(tmp_path / "score") in out
    assert not [p for p in (tmp_path / "score").iterdir() if p.is_dir()]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset on Linux only")
def test_peak_is_that_of_the_block_alone(tmp_path):
    code = """
from kvp.cost import measured
with measured() as large:
    bytearray(b"x") * 200_000_000
with measured() as small:
    time.sleep(0.05)
print(large["peak_bytes"] - small["peak_bytes"], small["seconds"])
"""
    out, _ = child(code, tmp_path, stdout=subprocess.PIPE).communicate(timeout=60)
    difference, seconds = map(float, out.split())
    assert difference > 150_000_000 and seconds >= 0.05


def test_what_is_forced_does_not_go_on_from_files_that_are_older(tmp_path):
    def die(directory: Path) -> None:
        (directory / "old").write_text("of other inputs")
        raise KeyboardInterrupt

    def work(directory: Path) -> dict:
        return {"found": (directory / "old").exists()}

    for since, found in ((None, True), (time.time() + 60, False)):
        store = Store(tmp_path / str(found))
        with pytest.raises(KeyboardInterrupt):
            store.once("plan", INPUTS, die, resumable=True)
        assert store.once("plan", INPUTS, work, resumable=True, since=since).result == {"found": found}


def test_a_stage_says_who_made_it_and_whose_work_it_went_on_with(tmp_path):
    store = Store(tmp_path)

    def train(directory: Path) -> None:
        (directory / "step-1").touch()
        if len(list(directory.iterdir())) == 1 and not store.root.joinpath("fixed").exists():
            raise ValueError("killed")

    def once(commit: str, work=train) -> Finished:
        return store.once("recover", INPUTS, work, resumable=True, origin=lambda: {"commit": commit})

    with pytest.raises(ValueError, match="killed"):
        once("a")
    with pytest.raises(ValueError, match="killed"):
        once("a")  # the same code again is no further origin
    (tmp_path / "fixed").touch()
    assert once("b").origins == ({"commit": "a"}, {"commit": "b"})
    assert once("c", never).origins == ({"commit": "a"}, {"commit": "b"})
    assert store.once("score", INPUTS, write, origin=lambda: {"commit": "d"}).origins == ({"commit": "d"},)
    assert store.once("plan", INPUTS, write).origins == ({},)


def test_a_begun_stage_that_was_thrown_away_is_no_origin(tmp_path):
    store = Store(tmp_path)
    for commit in "ab":
        with pytest.raises(ZeroDivisionError):
            store.once("score", INPUTS, lambda _: 1 // 0, origin=lambda commit=commit: {"commit": commit})
    assert store.once("score", INPUTS, write, origin=lambda: {"commit": "c"}).origins == ({"commit": "c"},)
    assert not list(tmp_path.rglob(".*.attempts"))
