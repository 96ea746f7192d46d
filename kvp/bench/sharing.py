"""Seconds of a sweep over 3 ratios x 2 recoveries in one store, against its six jobs in a store each.

    python -m kvp.bench.sharing [--debug] [--work DIR] [option=value ...]

Both run the same commands as a person would, start-up included; --debug takes the tiny model and a reduced
protocol, whose start-up outweighs the rest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

RATIOS = ("0.2", "0.35", "0.5")
RECOVERIES = ("none", "lora_text")
DEBUG = ("debug=smoke", "measure=none", "evaluation.zero_shot=null")


def seconds(*options: str) -> float:
    """Wall time of one command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvp", *options], check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def kept_in(place: str) -> tuple[str, str]:
    """The options that keep everything there."""
    return f"store={place}/store", f"runs={place}/runs"


def main() -> None:
    """Print one JSON line; progress goes to stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="the tiny model, perplexity only")
    parser.add_argument("--work", type=Path, help="where the stores go (default: a temporary directory)")
    parser.add_argument("options", nargs="*", help="of python -m kvp, for all jobs")
    args = parser.parse_args()
    common = ["tracker=none", *(DEBUG if args.debug else ()), *args.options]
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        shared = seconds(
            "-m",
            f"ratio.value={','.join(RATIOS)}",
            f"recovery={','.join(RECOVERIES)}",
            *kept_in(f"{place}/shared"),
            *common,
        )
        alone = [
            seconds(
                f"ratio.value={ratio}",
                f"recovery={recovery}",
                *kept_in(f"{place}/{n}"),
                *common,
            )
            for n, (ratio, recovery) in enumerate(product(RATIOS, RECOVERIES))
        ]
    result = {
        "one_store_seconds": shared,
        "own_stores_seconds": alone,
        "ratio": shared / sum(alone),
        "command": " ".join(["python -m kvp.bench.sharing", *sys.argv[1:]]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
