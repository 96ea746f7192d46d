"""Kills (-9) at seeded moments leave the numbers, no lock and nothing half; the slow test kills real commands."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvp.store import Store
from kvp.store.contents import entries
from tests.kills.campaign import campaign
from tests.kills.scenes import SCENES, check_store
from tests.process import ROOT

STAGES = 12

# Stages of many files, a resumable one that goes on, and housekeeping that removes what is not needed; over and over.
DRIVER = """
import json, sys; sys.argv = ["kvp"]
from pathlib import Path
from kvp.store import Store, __main__
root = Path({root!r})
def work(directory):
    done = len(list(directory.glob("part-*")))
    for part in range(done, 20):
        (directory / "new").write_bytes(bytes(3000))
        (directory / "new").rename(directory / f"part-{{part}}")
    return {{"parts": len(list(directory.glob("part-*")))}}
def go():
    store, keys = Store(root / "store"), []
    for seed in range({stages}):
        done = store.once("plan" if seed % 2 else "prune", {{"seed": seed}}, work, resumable=bool(seed % 2))
        keys.append({{"name": done.name, "fingerprint": done.fingerprint}})
        print(seed, flush=True)
    return keys[::3]
needed = go()
(root / "runs" / "one").mkdir(parents=True, exist_ok=True)
(root / "runs" / "one" / "run.json").write_text(json.dumps({{"status": "finished", "stages": needed}}))
__main__.main(["gc", "--yes", "--store", str(root / "store"), "--runs", str(root / "runs")])
"""


def drive(root: Path) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    code = DRIVER.format(root=str(root), stages=STAGES)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finished(root: Path) -> dict[str, str]:
    return {
        f"{entry.kind}/{entry.digest}": (entry.path / "result.json").read_text() for entry in entries(root)
    }


def test_a_store_is_whole_after_every_kill_and_ends_as_if_undisturbed(tmp_path):
    """The first kills fall on stages, the last on housekeeping."""
    undisturbed = drive(tmp_path / "undisturbed")
    undisturbed.communicate()
    assert undisturbed.returncode == 0
    expected = finished(tmp_path / "undisturbed" / "store")
    assert len(expected) == STAGES // 3
    draw, root = random.Random(18), tmp_path / "killed"
    for last in (0, 3, 7, STAGES - 1):
        victim = drive(root)
        assert victim.stdout is not None
        for line in victim.stdout:
            if int(line) == last:
                time.sleep(draw.uniform(0, 0.02))
                break
        victim.kill()
        victim.wait()
        check_store(root / "store")
    drive(root).communicate()
    assert finished(root / "store") == expected
    with Store(root / "store").once("prune", {"seed": 0}, None).path.joinpath("part-19").open() as file:  # type: ignore[arg-type]
        assert len(file.read()) == 3000


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_commands_killed_at_random_moments_end_with_the_undisturbed_result(name, tmp_path):
    outcome = campaign(name, 20, 18, tmp_path)
    assert outcome.kills == 20 and outcome.ends >= 4
