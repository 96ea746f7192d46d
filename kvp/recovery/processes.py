"""Training in several processes, one per GPU: torchrun starts them, the first of them writes.

Recipe, job and examples reach them as a pickle. It lies in a directory that only this user can write, never in the
store. They die with the process that started them, so none writes into the next run's files.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvp import children
from kvp.bars import only_on_terminals
from kvp.recovery.examples import Example
from kvp.recovery.fit import Job, fit
from kvp.recovery.lora import Lora

STDERR_LINES = 20
SPEC, RESULT, ERROR = "spec.pkl", "result.json", "error-of-rank-"


def fit_in_processes(
    recipe: Lora, job: Job, examples: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, Any]:
    """Train the adapter in `recipe.num_processes` processes, and return the figures of `fit`.

    Raises:
        RuntimeError: A process failed; the message holds the errors, or the last lines of stderr.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // recipe.num_processes))}
    with tempfile.TemporaryDirectory() as private:
        work = Path(private)
        (work / SPEC).write_bytes(pickle.dumps((recipe, job, examples, held_out)))
        each = children.bound([sys.executable, "-m", "kvp.recovery.processes", private])
        command = [*torchrun, f"--nproc_per_node={recipe.num_processes}", *each]
        stderr = None if sys.stderr.isatty() else subprocess.PIPE  # bars belong on the terminal itself
        child = children.start(command, env=threads | os.environ, stderr=stderr, text=True)
        lines = _relay(child)
        if child.wait():
            reasons = [path.read_text() for path in work.glob(f"{ERROR}*")] or lines[-STDERR_LINES:]
            raise RuntimeError("\n".join(["training in several processes failed:", *reasons]))
        return json.loads((work / RESULT).read_text())


def _relay(child: subprocess.Popen[str]) -> list[str]:
    """Copy the processes' stderr to this one's as it comes; return the lines, none of a terminal."""
    lines = []
    for line in child.stderr or ():
        sys.stderr.write(line)
        lines.append(line.rstrip())
    return lines


def main() -> None:
    """Train as one of the processes: the private directory is the argument."""
    only_on_terminals()
    work = Path(sys.argv[1])
    recipe, job, examples, held_out = pickle.loads((work / SPEC).read_bytes())
    try:
        figures = fit(recipe, job, examples, held_out)
    except Exception as error:
        (work / f"{ERROR}{os.environ['RANK']}").write_text(str(error))
        raise
    if figures:
        (work / RESULT).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
