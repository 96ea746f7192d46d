"""`python -m kvp.export CHECKPOINT --out DIR`: a directory that other engines open."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from kvp.bars import only_on_terminals
from kvp.serving.write import Target, export

FORMS = """
stock             any shared set of rope pairs, as longrope factors: transformers, vLLM, SGLang
stock_arithmetic  rope of another theta, for pairs in arithmetic progression
gguf              model.gguf for llama.cpp, whatever the shared set of rope pairs is
custom            any shape, as it is: opens in transformers after `import kvp`, elsewhere with an error
padded            the dense shapes, zeros where channels were cut: saves nothing, for checks
"""


def main() -> None:
    """The command; exit code 1 and one clear error for whatever a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m kvp.export",
        description=__doc__,
        epilog=f"forms:{FORMS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a pruned (or dense) checkpoint, as run.json names it")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument(
        "--to", choices=get_args(Target), default="stock", help="the form (default: %(default)s)"
    )
    arguments = parser.parse_args()
    only_on_terminals()
    try:
        serving = export(arguments.checkpoint, arguments.out, arguments.to)
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        print(f"kvp.export: error: {error}", file=sys.stderr)
        sys.exit(1)
    del serving["sample"]
    print(json.dumps(serving, indent=2))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
