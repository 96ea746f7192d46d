"""Write a checkpoint as a directory that other engines open, and prove it there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kvp.bars import only_on_terminals
from kvp.commands import called
from kvp.serving.forms import FORMS
from kvp.serving.quantize import TYPES
from kvp.serving.write import export


def main() -> None:
    """The command; exit code 1 and one clear error for whatever a user can mend."""
    lines = [f"  {name:<18}{form.summary}" for name, form in FORMS.items()]
    lines.append("  mypkg.forms:half  a function of yours: docs/extend/plugin.md")
    parser = argparse.ArgumentParser(
        prog=called("export"),
        description=__doc__,
        epilog="\n".join(["forms:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a pruned (or dense) checkpoint, or the run.json that names it",
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory to write; must not exist")
    parser.add_argument("--to", default="stock", metavar="FORM", help="default: %(default)s")
    parser.add_argument("--quantize", metavar="TYPE", help=f"with --to gguf: {', '.join(TYPES)}")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="packages with forms of your own"
    )
    arguments = parser.parse_args()
    only_on_terminals()
    try:
        serving = export(
            arguments.checkpoint, arguments.out, arguments.to, arguments.trust, arguments.quantize
        )
    except (ValueError, OSError, ArithmeticError, ImportError, RuntimeError) as error:
        print(f"kvp.export: error: {error}", file=sys.stderr)
        sys.exit(1)
    del serving["sample"]
    print(json.dumps(serving, indent=2))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
