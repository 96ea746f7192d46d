"""See and clean a store: what is in it, which runs need it, what may go.

  kvp store ls                    every stage and run, with bytes
  kvp store ls --whole            the same; reads every file to find damage
  kvp store gc                    what no run needs, and what is damaged,
                                  replaced or left unfinished
  kvp store gc --yes              removes it
  kvp store rm RUN --yes          a run and the stages that only it needs
  kvp store rm RUN --keep-record --yes
                                  the stages alone; numbers stay for reports
  kvp store rm prune/a98d5ad79c3ef390 --yes
                                  a stage that no run needs

gc and rm only show what they would do, until they are given --yes. A stage
that a process computes always stays.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kvp.commands import called
from kvp.store.contents import Entry, Run, entries, is_store, runs_in, users
from kvp.store.housekeeping import Verdict, discard, remove, sizes, tidy, tidy_runs, verdicts
from kvp.store.locks import alone
from kvp.store.manifest import on_disk
from kvp.store.selection import select
from kvp.tables import console_table, print_table

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def main(words: Sequence[str] | None = None) -> None:
    """Run the command; exit code 1 and one clear error for whatever a user can mend."""
    arguments = _parser().parse_args(words)
    try:
        arguments.command(arguments, *_read(arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"kvp.store: error: {error}")


def _read(arguments: argparse.Namespace) -> tuple[list[Entry], list[Run]]:
    """Return the stages of the store and the runs."""
    found = _found(arguments.store, whole=getattr(arguments, "whole", False))
    return found, runs_in(_directories(arguments.runs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=called("store"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="ls|gc|rm")
    for name, command, text in (
        ("ls", _ls, "list stages and runs"),
        ("gc", _gc, "remove what nobody needs"),
        ("rm", _rm, "remove runs or stages"),
    ):
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(command=command)
        if name == "rm":
            one.add_argument(
                "targets", nargs="+", metavar="RUN|STAGE", help="name or directory, as ls shows it"
            )
            one.add_argument("--force", action="store_true", help="also what other runs need")
            one.add_argument(
                "--keep-record", action="store_true", help="keep run.json; remove the stages alone"
            )
        one.add_argument("--store", type=Path, default=Path("outputs/store"), help="default: %(default)s")
        one.add_argument(
            "--runs",
            type=Path,
            nargs="+",
            metavar="DIR",
            help="where run.json files lie (default: outputs/runs)",
        )
        if name == "ls":
            one.add_argument("--whole", action="store_true", help="read every file, to find damage")
            continue
        one.add_argument("--yes", action="store_true", help="do it; otherwise it is shown only")
        if name == "gc":
            one.add_argument(
                "--older-than", type=_age, metavar="AGE", help="only what is older: 30m, 12h, 7d, 2w (default: "
                "all; an unfinished stage must be 7d old)"
            )  # fmt: skip
            one.add_argument("--keep-unreferenced", action="store_true", help="keep finished stages")
    return parser


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"an age is a number and s, m, h, d or w, such as 7d; got {text!r}")
    return float(match[1]) * UNITS[match[2]]


def _directories(named: list[Path] | None) -> list[Path]:
    if missing := [path for path in named or () if not path.is_dir()]:
        raise ValueError(f"there is no directory {missing[0]}: --runs names what runs=DIR named")
    usual = Path("outputs/runs")
    return [*(named or ()), *([usual] if usual.is_dir() or not named else [])]


def _found(store: Path, *, whole: bool) -> list[Entry]:
    if not store.is_dir():
        raise ValueError(f"there is no store {store}: --store names what store=DIR named")
    found = entries(store, whole=whole)
    if not is_store(store, found):
        raise ValueError(f"{store} is no store: kvp never wrote there. --store names what store=DIR named")
    return found


def _ls(arguments: argparse.Namespace, found: list[Entry], runs: list[Run]) -> None:
    needed = users(runs)
    rows = [
        (
            f"{entry.kind}/{entry.path.name}",
            entry.state + (f": {entry.fault}" if entry.fault else ""),
            _mib(entry.bytes),
            _old(entry),
            ", ".join(needed.get(entry.key, ())) if entry.in_place else "",
        )
        for entry in found
    ]
    total = sum(entry.bytes for entry in found)
    title = f"{len(found)} stages in {arguments.store}, {_mib(total)} MiB"
    print_table(console_table(("stage", "state", "MiB", "age", "runs"), rows, title=title, labels=2))
    present = {entry.key: entry for entry in found if entry.in_place}
    lines = []
    for run in runs:
        own, shared, missing = sizes(run, runs, present)
        died = run.status == "running" and not run.is_running  # as `kvp status` has it
        lines.append(
            (
                run.name,
                run.fault or ("died" if died else run.status),
                _mib(own),
                _mib(shared),
                str(missing or ""),
            )
        )
    heads = ("run", "status", "own MiB", "shared MiB", "stages missing")
    print_table(console_table(heads, lines, title=f"{len(runs)} runs", labels=2))


def _gc(arguments: argparse.Namespace, found: list[Entry], runs: list[Run]) -> None:
    if not runs and not arguments.keep_unreferenced:
        raise ValueError(
            "there is no run.json in outputs/runs, so no stage would be needed: name the runs by --runs DIR, or "
            "give --keep-unreferenced"
        )
    needed, stages = users(runs), [entry for entry in found if entry.in_place]
    if stages and not arguments.keep_unreferenced and not any(entry.key in needed for entry in stages):
        raise ValueError(
            f"none of the {len(runs)} runs found names a stage of {arguments.store}, so all of it would go: name the "
            "runs of this store by --runs DIR, or give --keep-unreferenced"
        )
    with on_disk(arguments.store), alone(arguments.store) as unused:
        found, runs = _read(arguments)  # again: a process may have written its last stage meanwhile
        judged = verdicts(
            found,
            runs,
            older_than=arguments.older_than,
            keep_unreferenced=arguments.keep_unreferenced,
            in_use=not unused,
        )
        _carry_out(judged, arguments.yes)
        if arguments.yes and unused:
            tidy(arguments.store, found)
            tidy_runs(_directories(arguments.runs))


def _rm(arguments: argparse.Namespace, found: list[Entry], runs: list[Run]) -> None:
    with on_disk(arguments.store), alone(arguments.store) as unused:
        found, runs = _read(arguments)  # again: a process may have written its last stage meanwhile
        chosen = select(arguments.targets, found, runs, force=arguments.force)
        if not unused and any(entry.in_place for entry in chosen.entries):
            raise ValueError(
                f"a process uses {arguments.store} and may have found these stages: wait until it has ended"
            )
        records = [] if arguments.keep_record else [run.path.parent for run in chosen.runs]
        for directory in records:
            print(f"{'removed' if arguments.yes else 'would remove'}: {directory}")
            if arguments.yes:  # first, so that no run.json names a stage that is gone
                with on_disk(directory):
                    discard(directory, directory)
        _carry_out([Verdict(entry, True, entry.state) for entry in chosen.entries], arguments.yes)
        if arguments.yes and unused:
            tidy(arguments.store, found)


def _carry_out(judged: list[Verdict], yes: bool) -> None:
    """Show what goes and why; with `yes` remove it."""
    going = [verdict for verdict in judged if verdict.goes]
    gone = [verdict for verdict in going if not yes or remove(verdict.entry)]
    rows = [
        (f"{one.entry.kind}/{one.entry.path.name}", one.why, _mib(one.entry.bytes), _old(one.entry))
        for one in gone
    ]
    freed = _mib(sum(one.entry.bytes for one in gone))
    title = (
        f"removed: {len(gone)} stages, {freed} MiB"
        if yes
        else f"would remove: {len(gone)} stages, {freed} MiB"
    )
    print_table(console_table(("stage", "why", "MiB", "age"), rows, title=title, labels=2))
    staying = [verdict for verdict in judged if not verdict.goes]
    for why in dict.fromkeys(verdict.why for verdict in staying):
        print(f"{sum(verdict.why == why for verdict in staying)} stay: {why}")
    if gone and not yes:
        print("nothing was removed: --yes does it")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def _old(entry: Entry) -> str:
    if entry.age is None:
        return "from the future"
    unit = next((unit for unit in "dhm" if entry.age >= UNITS[unit]), "s")
    return f"{entry.age / UNITS[unit]:.0f} {unit}"


if __name__ == "__main__":
    main()
