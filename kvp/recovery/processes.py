"""Training in several processes, one per GPU: torchrun starts them, the first of them writes.

Recipe, job and examples reach them as a pickle in the Trainer's directory. They die with the process that started
them, so a killed run leaves no process that would write into the next run's files.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvp.bars import only_on_terminals
from kvp.recovery.examples import Example
from kvp.recovery.fit import Job, fit
from kvp.recovery.lora import Lora

PR_SET_PDEATHSIG = 1  # of Linux's prctl
STDERR_LINES = 20
ERROR = "error-of-rank-"


def fit_in_processes(
    recipe: Lora, job: Job, examples: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, Any]:
    """Train the adapter in `recipe.num_processes` processes, and return the figures of `fit`.

    Raises:
        RuntimeError: A process failed; the message holds the errors, or the last lines of stderr.
    """
    work = Path(job.directory) / "trainer"
    work.mkdir(exist_ok=True)
    spec, result = work / "spec.pkl", work / "result.json"
    for stale in work.glob(f"{ERROR}*"):
        stale.unlink()
    spec.write_bytes(pickle.dumps((recipe, job, examples, held_out)))
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={recipe.num_processes}"]
    command = [sys.executable, "-m", *torchrun, "-m", "kvp.recovery.processes", str(spec), str(result)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // recipe.num_processes))}
    stderr = None if sys.stderr.isatty() else subprocess.PIPE  # bars belong on the terminal itself
    child = subprocess.Popen(
        command, env=threads | os.environ, stderr=stderr, text=True, preexec_fn=_die_with_parent
    )
    lines = _relay(child)
    if child.wait():
        reasons = [path.read_text() for path in work.glob(f"{ERROR}*")] or lines[-STDERR_LINES:]
        raise RuntimeError("\n".join(["training in several processes failed:", *reasons]))
    return json.loads(result.read_text())


def _relay(child: subprocess.Popen[str]) -> list[str]:
    """Copy the processes' stderr to this one's as it comes; return the lines, none of a terminal."""
    lines = []
    for line in child.stderr or ():
        sys.stderr.write(line)
        lines.append(line.rstrip())
    return lines


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Train as one of the processes: `spec.pkl result.json` are the arguments."""
    _die_with_parent()
    only_on_terminals()
    recipe, job, examples, held_out = pickle.loads(Path(sys.argv[1]).read_bytes())
    try:
        figures = fit(recipe, job, examples, held_out)
    except Exception as error:
        Path(job.directory, "trainer", ERROR + os.environ["RANK"]).write_text(str(error))
        raise
    if figures:
        Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
