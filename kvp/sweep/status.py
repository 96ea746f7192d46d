"""Status of runs: finished, running, died or failed, and how to retry. It reads JSON files and imports nothing heavy.

python -m kvp.status [outputs/runs] [--store outputs/store]
"""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from rich.table import Table

from kvp.record import RunRecord
from kvp.sweep.words import reason, removed, stages
from kvp.tables import console_table, print_table

STAGE_COLUMNS = ("finished", "being computed", "left unfinished", "set aside", "MiB")


@dataclass(frozen=True)
class Look:
    """A run as run.json and the processes of this machine show it.

    Attributes:
        name: The directory.
        status: "finished", "running", "died" (killed: its process is gone), "failed" or "unreadable".
        detail: Why or where it ended, or who runs which stage since when.
        retry: The command that goes on with it; empty if there is nothing to go on with.
    """

    name: str
    status: str
    detail: str
    retry: str = ""


def look(path: Path) -> Look:
    """Return how the run of a run.json stands."""
    name = path.parent.name
    try:
        record = RunRecord.read(path)
    except (OSError, ValueError) as error:
        return Look(name, "unreadable", str(error))
    if record.status == "finished":
        return Look(name, record.status, f"{removed(record)} removed; {stages(record)}")
    if record.status == "failed":
        where = f"{record.stage}: " if record.stage else ""
        why = reason(record.error.type, record.error.message) if record.error else "no error is recorded"
        return Look(name, record.status, where + why, _command(record))
    started = datetime.fromisoformat(record.provenance.started)
    stage = record.stage or "between stages"
    who = f"{stage}, {record.host} pid {record.pid}, since {started:%Y-%m-%d %H:%M} UTC"
    if record.pid and is_alive(record.host, record.pid, started.timestamp()) is False:
        return Look(name, "died", who, _command(record))
    return Look(name, record.status, who)


def is_alive(host: str | None, pid: int, since: float) -> bool | None:
    """Return whether a process that ran at a time (seconds since 1970) still runs; None if it is another machine's."""
    if host != socket.gethostname():
        return None
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(record: RunRecord) -> str:
    """Return the command that goes on with a run; empty if it was composed in Python."""
    if record.overrides is None:
        return ""
    own = ["--config-dir", record.config_dir] if record.config_dir else []
    return f"python -m kvp {shlex.join([*own, *record.overrides])}".strip()


def stage_counts(store: Path) -> dict[str, Counter[str]]:
    """Return, per kind of stage, how many there are in each state of `STAGE_COLUMNS`, and MiB of the finished ones."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for manifest in store.rglob("manifest.json"):
        stage = manifest.parent
        if not stage.name.startswith("."):
            sizes = (file["size"] for file in json.loads(manifest.read_bytes())["files"].values())
            counts[_kind(stage, store)] += Counter({"finished": 1, "MiB": sum(sizes) / 2**20})
    for partial in store.rglob(".*.partial"):
        counts[_kind(partial, store)]["being computed" if _is_held(partial) else "left unfinished"] += 1
    for aside in [*store.rglob(".*.corrupt-*"), *store.rglob(".*.replaced-*")]:
        counts[_kind(aside, store)]["set aside"] += 1
    return counts


def _kind(stage: Path, store: Path) -> str:
    return stage.parent.relative_to(store).as_posix()


def _is_held(partial: Path) -> bool:
    holder = partial.with_suffix(".holder")
    if not holder.exists():
        return False
    host, _, pid = holder.read_text().split()
    return is_alive(host, int(pid), holder.stat().st_mtime) is not False


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="?", type=Path, default=Path("outputs/runs"))
    parser.add_argument("--store", type=Path, help="tell of the stages in a store, too")
    args = parser.parse_args()
    looks = [look(file) for file in sorted(args.runs.glob("*/run.json"))]
    if not looks:
        sys.exit(f"kvp: error: there is no run below {args.runs}: name the directory that runs=DIR named")
    print_table(_runs(looks))
    if args.store:
        print_table(_stages(args.store))
    retries = [each for each in looks if each.retry]
    if retries:
        print("The command of a sweep, repeated, goes on with all of its jobs; one alone:")
    for each in retries:
        print(f"  {each.retry}")


def _runs(looks: Sequence[Look]) -> Table:
    counts = Counter(each.status for each in looks)
    title = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return console_table(
        ("run", "status", ""),
        [(each.name, each.status, each.detail) for each in looks],
        title=title,
        labels=3,
    )


def _stages(store: Path) -> Table:
    counts = sorted(stage_counts(store).items())
    rows = [[kind, *(f"{count[name]:,.0f}" for name in STAGE_COLUMNS)] for kind, count in counts]
    return console_table(("stage", *STAGE_COLUMNS), rows, title=f"stages in {store}")


if __name__ == "__main__":
    main()
