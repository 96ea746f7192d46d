"""Compare the ratios of two benchmarks: which moved by more than their spread.

  kvp bench compare BEFORE/bench.json AFTER/bench.json
  kvp bench compare BEFORE/bench.json AFTER/bench.json --fail-if-worse

A ratio says how many times faster a model was than the first one, in turns on
the same machine. It moved if the quartiles of both records do not overlap and
its median changed by more than --tolerance. Seconds are not compared.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kvp.bench.ratios import Ratio, Verdict, read_ratios, verdict
from kvp.commands import called
from kvp.tables import console_table, print_table

ORDER: tuple[Verdict, ...] = ("worse", "better", "missing", "as before")


def main() -> None:
    """Run the command; exit code 1 for what a user can mend, and with --fail-if-worse if a ratio got worse."""
    options = parser().parse_args()
    try:
        worse = run(options)
    except (ValueError, OSError) as error:
        if os.environ.get("KVP_TRACEBACK"):
            raise
        print(f"kvp.bench.compare: error: {error}", file=sys.stderr)
        sys.exit(1)
    if worse and options.fail_if_worse:
        sys.exit(1)


def run(options: argparse.Namespace) -> int:
    """Print the ratios of both records, those that moved first; return how many got worse, or are gone.

    Raises:
        ValueError: A file holds no ratios, the two have none in common, or the tolerance is below 0.
    """
    if options.tolerance < 0:
        raise ValueError(f"--tolerance must be at least 0, got {options.tolerance:g}")
    (before, old), (after, new) = read_ratios(options.before), read_ratios(options.after)
    if not before.keys() & after.keys():
        raise ValueError(
            f"{options.before} and {options.after} have no ratio in common: they measured other models, paths or sizes "
            f"({next(iter(before))!r} and {next(iter(after))!r})"
        )
    found = {
        name: verdict(before.get(name), after.get(name), options.tolerance)
        for name in dict.fromkeys((*before, *after))
    }
    rows = [
        [name, _shown(before.get(name)), _shown(after.get(name)), found[name]]
        for name in sorted(found, key=lambda name: ORDER.index(found[name]))
    ]
    print_table(console_table(("times as fast", "before", "after", "moved"), rows, title="ratios"))
    counts = [sum(each == kind for each in found.values()) for kind in ORDER]
    print(", ".join(f"{count} {kind}" for count, kind in zip(counts, ORDER, strict=True)))
    if old != new:
        print(f"Devices, dtypes or threads differ, and ratios with them: {old} before, {new} after.")
    return sum(found[name] == "worse" or name not in after for name in before)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = argparse.ArgumentParser(
        prog=f"{called('bench')} compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "before", type=Path, metavar="BEFORE", help="a bench.json or results.jsonl, or of serve"
    )
    made.add_argument("after", type=Path, metavar="AFTER", help="the same benchmark, measured later")
    made.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="T",
        help="smaller changes do not count (default: %(default)g, of the ratio)",
    )
    made.add_argument(
        "--fail-if-worse", action="store_true", help="exit code 1 if a ratio got worse or is gone"
    )
    return made


def _shown(ratio: Ratio | None) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" if ratio else "-"
