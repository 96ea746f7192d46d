"""An export on disk: whole or not there, whoever else writes and whatever ends it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvp.serving.whole import whole
from kvp.serving.write import SERVING
from kvp.store import StageError, Store
from tests.process import ROOT


def fill(directory: Path) -> None:
    (directory / SERVING).write_text("{}")
    (directory / "model.safetensors").write_bytes(b"x" * 1000)
    (directory / "model.safetensors").chmod(0o600)


def write_until(error: BaseException, out: Path) -> None:
    with whole(out, SERVING) as partial:
        fill(partial)
        raise error


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def other_process(code: str, out: Path) -> subprocess.Popen:
    head = f"""
import sys, time
from pathlib import Path
from kvp.serving.whole import whole
from kvp.serving.write import SERVING
out = Path({str(out)!r})
"""
    words = [sys.executable, "-c", head + code]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids="{:03o}".format)
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole(tmp_path / "a" / "out", SERVING) as partial:
            fill(partial)
    finally:
        os.umask(before)
    assert names(tmp_path / "a") == ["out"]
    for path in (tmp_path / "a" / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError("no")])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write_until(error, tmp_path / "out")
    assert not names(tmp_path)


def test_a_full_disk_is_one_clear_error(tmp_path):
    for text in ("[Errno 28] No space left on device", "PytorchStreamWriter failed writing file data/0"):
        with pytest.raises(StageError, match=r"cannot write .*out: .*choose another directory"):
            write_until(RuntimeError(text), tmp_path / "out")
    assert not names(tmp_path)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / ".out.partial").symlink_to("/etc")
    for out in (tmp_path / "file" / "out", tmp_path / "out"):
        with (
            pytest.raises(StageError, match=r"cannot write .*out: .*choose another directory"),
            whole(out, SERVING),
        ):
            raise AssertionError
    assert os.path.exists("/etc/passwd")


def test_two_at_a_time_are_refused_and_the_first_is_whole(tmp_path):
    out = tmp_path / "out"
    with whole(out, SERVING) as partial:
        fill(partial)
        with pytest.raises(FileExistsError, match=r"another process writes .*out now"), whole(out, SERVING):
            raise AssertionError
    assert names(out) == ["model.safetensors", SERVING]
    with pytest.raises(FileExistsError), whole(out, SERVING):
        raise AssertionError
    assert names(out) == ["model.safetensors", SERVING]


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_can_be_seen_and_the_next_attempt_begins_anew(tmp_path):
    code = """
with whole(out, SERVING) as partial:
    (partial / "half").write_text("x")
    (partial / "folder").mkdir()
    print("half", flush=True)
    time.sleep(600)
"""
    victim = other_process(code, tmp_path / "out")
    assert victim.stdout is not None and victim.stdout.readline() == "half\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert names(tmp_path) == [".out.partial"]
    with whole(tmp_path / "out", SERVING) as partial:
        assert not names(partial)
        fill(partial)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("place", ["export", "prune/0123456789abcdef/model/export"])
def test_a_place_inside_a_store_is_refused(tmp_path, place):
    """An export there would be a file added to a stage, which is damage."""
    Store(tmp_path).once("prune", {}, lambda directory: (directory / "model").mkdir())
    with (
        pytest.raises(ValueError, match=r"lies inside the store .*: choose another directory"),
        whole(tmp_path / place, SERVING),
    ):
        pass
    assert not (tmp_path / place).parent.joinpath(".export.partial").exists()
