"""Cost of a sweep over 3 ratios x 2 recoveries in one store, against its six jobs in a store each.

    python -m experiments.scripts.sharing [--debug] [--work DIR] [option=value ...]

Both run the same commands as a person would, start-up included. Other processes lengthen the wall time of whatever
runs beside them; CPU time suffers less. --debug takes the tiny model and a reduced protocol, whose start-up
outweighs the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

RATIOS = ("0.2", "0.35", "0.5")
RECOVERIES = ("none", "lora_text")
DEBUG = ("debug=smoke", "measure=none", "evaluation.zero_shot=null")


def cost(*options: str) -> tuple[float, float]:
    """Wall and CPU seconds of one command, its children included."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "kvp", *options], check=True, stdout=sys.stderr)
    after = os.times()
    cpu = sum(getattr(after, kind) - getattr(before, kind) for kind in ("children_user", "children_system"))
    return time.perf_counter() - started, cpu


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
        shared = cost(
            "-m",
            f"ratio.value={','.join(RATIOS)}",
            f"recovery={','.join(RECOVERIES)}",
            *kept_in(f"{place}/shared"),
            *common,
        )
        alone = [
            cost(
                f"ratio.value={ratio}",
                f"recovery={recovery}",
                *kept_in(f"{place}/{n}"),
                *common,
            )
            for n, (ratio, recovery) in enumerate(product(RATIOS, RECOVERIES))
        ]
    result: dict[str, Any] = {
        name: {"one_store": one, "own_stores": own, "ratio": one / sum(own)}
        for name, one, own in zip(("seconds", "cpu_seconds"), shared, zip(*alone, strict=True), strict=True)
    }
    result["command"] = " ".join(["python -m experiments.scripts.sharing", *sys.argv[1:]])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
