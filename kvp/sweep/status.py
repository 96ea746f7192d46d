"""Show which runs finished, run, wait, died or failed, and how to retry.

It reads JSON files and imports nothing heavy.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from kvp.commands import called
from kvp.record import RunRecord
from kvp.store.contents import Entry, entries, is_alive
from kvp.sweep.queue import waiting
from kvp.sweep.words import makers, reason, removed, stages
from kvp.tables import NOTE, WIDEST, console_table, plain, print_table

STAGE_COLUMNS = ("finished", "being computed", "left unfinished", "damaged", "set aside", "MiB")


@dataclass(frozen=True)
class Look:
    """A run as run.json and the processes of this machine show it.

    Attributes:
        name: The directory.
        status: "finished", "running", "waiting" (for its turn in a sweep), "died" (killed: its process is gone),
            "failed" or "unreadable".
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
    if not path.is_file():  # a pipe would be waited for
        return Look(name, "unreadable", f"{path} is no file")
    try:
        record, written = RunRecord.read(path), path.stat().st_mtime
    except (OSError, ValueError, RecursionError) as error:
        return Look(name, "unreadable", str(error))
    if record.status == "finished":
        return Look(name, record.status, f"{removed(record)} removed; {stages(record)}; {makers(record)}")
    if record.status == "failed":
        where = f"{record.stage}: " if record.stage else ""
        why = reason(record.error.type, record.error.message) if record.error else "no error is recorded"
        return Look(name, record.status, where + why, _command(record))
    started = _moment(record.provenance.started)
    since = f"since {started:%Y-%m-%d %H:%M} UTC" if started else f"since {record.provenance.started}"
    who = f"{record.stage or 'between stages'}, {record.host} pid {record.pid}, {since}"
    alive = record.pid and started and is_alive(record.host, record.pid, started.timestamp())
    if alive is False:
        return Look(name, "died", who, _command(record))
    return Look(name, record.status, who if alive else f"{who}; {_silence(written)}")


def in_line(runs: Path) -> list[Look]:
    """Return the jobs of sweeps that have not started."""
    return [
        Look(job, "waiting", f"for its turn in the sweep of {queue.host} pid {queue.pid}")
        for job, queue in waiting(runs)
    ]


def _moment(text: str) -> datetime | None:
    """Return a time of a record in UTC; None if the text is no time."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _silence(written: float) -> str:
    """Return since when nothing was written, and how long that is; a clock that was set back gives no length."""
    hours = (time.time() - written) / 3600
    long = f" ({hours / 24:.1f} days)" if hours >= 48 else f" ({hours:.1f} hours)" if hours >= 0 else ""
    last = datetime.fromtimestamp(written, UTC)
    return f"not of this machine, nothing written since {last:%Y-%m-%d %H:%M} UTC{long}"


def _command(record: RunRecord) -> str:
    """Return the command that goes on with a run; empty if it was composed in Python."""
    if record.overrides is None:
        return ""
    own = ["--config-dir", record.config_dir] if record.config_dir else []
    return f"python -m kvp {shlex.join([*own, *record.overrides])}".strip()


def stage_counts(store: Path) -> dict[str, Counter[str]]:
    """Return, per kind of stage, how many there are in each state of `STAGE_COLUMNS`, and MiB of the finished ones.

    The store may be in use: what is gone by the time it is looked at does not count.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries(store):
        counts[entry.kind][_column(entry)] += 1
        if entry.state == "finished":
            counts[entry.kind]["MiB"] += entry.bytes / 2**20  # type: ignore[assignment]
    return counts


def _column(entry: Entry) -> str:
    if entry.state == "unfinished":
        return "left unfinished"
    if entry.state in STAGE_COLUMNS:
        return entry.state
    return "damaged" if entry.in_place else "set aside"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=called("status"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "runs", nargs="?", type=Path, default=Path("outputs/runs"), metavar="DIR", help="default: %(default)s"
    )
    add("--store", type=Path, metavar="DIR", help="show the stages in a store, too")
    args = parser.parse_args()
    looks = [look(file) for file in sorted(args.runs.glob("*/run.json"))]
    looks += in_line(args.runs)
    if args.store and not args.store.is_dir():
        sys.exit(f"kvp: error: there is no store at {args.store}: name the directory that store=DIR named")
    if not looks:
        sys.exit(f"kvp: error: there is no run below {args.runs}: name the directory that runs=DIR named")
    print_table(_runs(looks))
    if args.store:
        print_table(_stages(args.store))
    retries = [each for each in looks if each.retry]
    if retries:
        print("The command of a sweep, repeated, goes on with all of its jobs; one alone:")
    for each in retries:
        print(f"  {plain(each.retry, WIDEST)}")


def _runs(looks: Sequence[Look]) -> Table:
    counts = Counter(each.status for each in looks)
    title = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return console_table(
        ("run", "status", ""),
        [(plain(each.name), each.status, plain(each.detail, NOTE)) for each in looks],
        title=title,
        labels=3,
    )


def _stages(store: Path) -> Table:
    counts = sorted(stage_counts(store).items())
    rows = [[kind, *(f"{count[name]:,.0f}" for name in STAGE_COLUMNS)] for kind, count in counts]
    return console_table(("stage", *STAGE_COLUMNS), rows, title=f"stages in {store}")


if __name__ == "__main__":
    main()
