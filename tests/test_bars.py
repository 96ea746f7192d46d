"""Progress bars: on a terminal, in a file, in the log of a sweep's job."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARS = """
import sys
sys.argv[:] = ["kvp"]  # else `import kvp` would import modelling code
from kvp.bars import label, only_on_terminals
only_on_terminals(); only_on_terminals()
from tqdm.auto import tqdm
label("[2/6] dense · piqa")
for _ in tqdm(range(2)): pass
for _ in tqdm(range(2), desc="named", disable=False): pass
for _ in tqdm(range(2), "by place"): pass
for _ in tqdm(range(2), desc="off", disable=True): pass
print("end")
"""
NAMELESS = re.compile(r"(?:^|[\r\n]) *\d+%\|")
SMOKE = ("debug=smoke", "tracker=none", "evaluation.zero_shot.limit=2", "measure.runs=1")


def in_a_file(tmp_path: Path, *words: str) -> str:
    """Return what a process prints into a file."""
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, check=False)
    shown = (tmp_path / "log").read_bytes().decode()
    assert done.returncode == 0, shown
    return shown


def on_a_terminal(*words: str) -> str:
    """Return what a process shows on a terminal of 120 columns."""
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *words])
    shown = b""
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:  # the process has ended
            break
        shown += more
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, shown.decode()
    return shown.decode()


def test_bars_stay_out_of_a_file(tmp_path):
    assert in_a_file(tmp_path, "-c", BARS) == "end\n"


def test_bars_on_a_terminal_have_names():
    shown = on_a_terminal("-c", BARS)
    for name in ("[2/6] dense · piqa", "named", "by place"):
        assert f"{name}: 100%" in shown
    assert "off" not in shown
    assert not NAMELESS.search(shown)


def places(tmp_path, name):
    return f"store={tmp_path}/{name}/store", f"runs={tmp_path}/{name}/runs"


@pytest.mark.slow
def test_a_whole_run_in_a_file_has_lines_only(tmp_path):
    """Every library's bars, those of the measuring child and of two training processes included."""
    words = [
        "-m",
        "kvp",
        *SMOKE,
        "recovery.num_processes=2",
        "recovery.micro_batch_size=1",
        *places(tmp_path, "file"),
    ]
    shown = in_a_file(tmp_path, *words)
    assert "\r" not in shown and "%|" not in shown
    assert "[18/18] recovered · measure  found" in shown


@pytest.mark.slow
def test_a_whole_run_on_a_terminal_has_bars_with_names(tmp_path):
    shown = on_a_terminal("-m", "kvp", *SMOKE, "measure=none", *places(tmp_path, "terminal"))
    for name in ("Loading weights", "perplexity squad", "gates", "lora", "] dense · evaluate/zero_shot/piqa"):
        assert f"{name}: " in shown
    assert not NAMELESS.search(shown)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_logs_no_bars_and_says_when_jobs_start(tmp_path, launcher):
    words = ["-m", "kvp", "-m", *SMOKE, "measure=none", "seed=0,1", f"launcher={launcher}"]
    shown = on_a_terminal(*words, *places(tmp_path, launcher))
    logs = [log.read_bytes() for log in tmp_path.glob(f"{launcher}/runs/*/run.log")]
    assert len(logs) == 2
    assert all(b"\r" not in log and b"%|" not in log for log in logs)
    for line in ("[1/2] started ", "[2/2] started ", "[1/2] finished", "[2/2] finished"):
        assert line in shown
    assert "left of the sweep" in shown
