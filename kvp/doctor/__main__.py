"""Show what works here, what is missing, and how to get it.

Exit code 0, unless a package that every run needs is missing or out of range.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from kvp.commands import called
from kvp.doctor.finding import Finding
from kvp.tables import console_table, print_table

NAMED = ("kvp", "Python", "torch", "transformers", "peft")  # packages with a line of their own


def findings(store: Path, pythons: Sequence[str] = ()) -> list[Finding]:
    """Return everything, in the order of the report; the hub is asked meanwhile."""
    from kvp.doctor.installed import packages

    found = [*packages()]
    if any(one.state == "BROKEN" for one in found):  # what follows needs them
        return found
    from kvp.doctor.device import attention, devices
    from kvp.doctor.installed import assets, engines, launchers, plugins
    from kvp.doctor.reach import places, services

    with ThreadPoolExecutor(1) as aside:
        asked = aside.submit(lambda: [*services()])
        parts = (devices(), attention(), launchers(), engines([*pythons]), assets(), plugins(), places(store))
        return [*found, *(one for part in parts for one in part), *asked.result()]


def folded(found: Sequence[Finding]) -> list[Finding]:
    """Return the findings with one line for all packages that are in order, but for the best known."""
    well = [one for one in found if one.about == "packages" and one.state == "ok" and one.name not in NAMED]
    rest = [one for one in found if one not in well]
    count = sum(one.about == "packages" for one in rest)
    line = Finding("packages", f"{len(well)} others", "ok", "in the ranges of kvp")
    return [*rest[:count], *([line] if well else []), *rest[count:]]


def main(words: Sequence[str] | None = None) -> None:
    """Print the report; exit code 1 if a run cannot work."""
    parser = argparse.ArgumentParser(
        prog=called("doctor"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print the findings as JSON")
    add("--store", type=Path, default=Path("outputs/store"), metavar="DIR", help="default: %(default)s")
    add(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="look for engines there, too; repeatable",
    )
    options = parser.parse_args(words)
    found = findings(options.store, options.python)
    broken = [one for one in found if one.state == "BROKEN"]
    if options.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(one) for one in found]}, indent=2))
    else:
        title = (
            f"broken: {', '.join(one.name for one in broken)}" if broken else "what every run needs is here"
        )
        rows = [(one.about, one.name, one.state, one.value, one.fix) for one in folded(found)]
        heads = ("part", "name", "state", "found", "what for, and how to get it")
        print_table(console_table(heads, rows, title=title, labels=len(heads)))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
