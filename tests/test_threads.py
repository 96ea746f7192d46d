"""Threads of commands wait briefly for each other; a library leaves its user's threads alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvp.threads import BRIEFLY, briefly

SET = {name: value for name, value in os.environ.items() if name not in BRIEFLY}


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_the_users_setting_stays(chosen):
    assert briefly({"HOME": "/", **chosen}) == {"HOME": "/", **chosen}
    assert briefly({"HOME": "/"}) == {"HOME": "/", **BRIEFLY}


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux")
@pytest.mark.parametrize(
    ("command", "rounds"),
    [
        (["-m", "kvp.bench", "--help"], {BRIEFLY["GOMP_SPINCOUNT"]}),
        (["-m", "kvp", "--dry-run", "tracker=none"], {BRIEFLY["GOMP_SPINCOUNT"]}),
        (["-c", "import kvp"], {"300000"}),
    ],
)
def test_a_command_sets_it_before_torch_reads_it(command, rounds, tmp_path):
    done = subprocess.run(
        [sys.executable, *command],
        env={**SET, "OMP_DISPLAY_ENV": "verbose"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert {line.split("'")[1] for line in lines} == rounds, done.stderr
