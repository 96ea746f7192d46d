"""vLLM's own `bench serve`, imported once for all questions; a file to run, not to import.

python -I client_vllm.py: reads a JSON list of words per line, and answers each line with a line of JSON.
"""

from __future__ import annotations

import json
import sys

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser


def answer() -> None:
    """Drive a server as often as asked; what vLLM prints goes to the standard error."""
    said, sys.stdout = sys.stdout, sys.stderr
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        result = main(parser.parse_args(json.loads(line)))
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        print(json.dumps(numbers), file=said, flush=True)


if __name__ == "__main__":
    answer()
