"""`python -m kvp.export CHECKPOINT --out DIR`: a directory that stock engines open."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from kvp.export.stock import Form
from kvp.export.write import export


def main() -> None:
    """The command; exit code 1 and one clear error for whatever a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m kvp.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a pruned (or dense) checkpoint, as run.json names it")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument(
        "--to",
        choices=get_args(Form),
        default="stock",
        help="stock: any shared set of rope pairs, as longrope factors; stock_arithmetic: rope of another theta, "
        "for pairs in arithmetic progression; padded: the dense shapes, zeros where channels were cut (for checks)",
    )
    arguments = parser.parse_args()
    try:
        serving = export(arguments.checkpoint, arguments.out, arguments.to)
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        print(f"kvp.export: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(serving, indent=2))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
