"""Kills (-9) at random moments: `python -m tests.kills.campaign [--kills 100] [--seed 0]` prints a table.

An undisturbed command gives the numbers and its duration. Then the command is killed at seeded moments of that
duration, again and again over what the kills before left, until it ends by itself; a new directory follows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kvp.tables import markdown
from tests.kills.scenes import SCENES, Scene
from tests.process import start

SHARES = {"run": 0.34, "sweep": 0.2, "export": 0.16, "report": 0.14, "gc": 0.16}
PATIENCE = 5  # kills of one directory; then the command may end


@dataclass
class Outcome:
    """Kills of one command, where they fell, and how often the undisturbed result came out afterwards."""

    kills: int = 0
    ends: int = 0
    where: Counter[str] = field(default_factory=Counter)


def campaign(name: str, kills: int, seed: int, home: Path) -> Outcome:
    """Kill a command; raise AssertionError at the first lock, half file or other number."""
    draw, outcome = random.Random(f"{name} {seed}"), Outcome()
    start(time.sleep, 0).join()  # the process that all are forked from takes long to begin
    scene = _scene(name, home / "undisturbed")
    began = time.monotonic()
    _end(scene)
    duration, expected = time.monotonic() - began, scene.result()
    print(f"{name}: {duration:.1f} s undisturbed", flush=True)
    number = 0
    while outcome.kills < kills:
        number += 1
        scene = _scene(name, home / str(number))
        for _ in range(min(PATIENCE, kills - outcome.kills)):
            process = scene.start()
            process.join(timeout=draw.uniform(0.02, 0.95) * duration)
            if not process.is_alive():
                break
            below = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.join()
            psutil.wait_procs(below, timeout=10)
            assert not [one for one in below if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
            outcome.kills += 1
            outcome.where[scene.where()] += 1
            scene.check()
        _end(scene)
        assert scene.result() == expected, f"{name} in {scene.home}"
        outcome.ends += 1
    return outcome


def _scene(name: str, home: Path) -> Scene:
    home.mkdir(parents=True)
    scene = SCENES[name](home)
    scene.prepare()
    return scene


def _end(scene: Scene) -> None:
    process = scene.start()
    process.join()
    said = scene.home / "log"
    ended = process.exitcode == 0 or (scene.name == "export" and (scene.home / "out").exists())
    assert ended, said.read_text()[-2000:] if said.exists() else process.exitcode


def main() -> None:
    """Print where the kills fell and what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SCENES, nargs="+", default=[*SCENES])
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as home:
            outcome = campaign(name, round(SHARES[name] * arguments.kills), arguments.seed, Path(home))
        where = ", ".join(f"{place} {count}" for place, count in outcome.where.most_common())
        rows.append((name, where, str(outcome.kills), str(outcome.ends)))
        print(rows[-1], flush=True)
    print(markdown(("command", "where", "kills", "ends with the undisturbed result"), rows, labels=2))


if __name__ == "__main__":
    main()
