"""Training in several processes, one per GPU: torchrun starts them, the first of them writes.

Recipe, job and examples reach them as JSON in the Trainer's directory. They die with whoever started
them, so that a killed run leaves nobody behind who would write beside the next.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kvp.recovery.base import Example
from kvp.recovery.distillation import Distillation
from kvp.recovery.fit import Job, fit
from kvp.recovery.lora import Lora

PR_SET_PDEATHSIG = 1  # of Linux's prctl
STDERR_LINES = 20
ERROR = "error-of-rank-"


def fit_in_processes(
    recipe: Lora, job: Job, examples: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, Any]:
    """As `fit`, in `recipe.num_processes` processes.

    Raises:
        RuntimeError: One of them failed; the end of what they said is in the message.
    """
    work = Path(job.directory) / "trainer"
    work.mkdir(exist_ok=True)
    spec, result = work / "spec.json", work / "result.json"
    for stale in work.glob(f"{ERROR}*"):
        stale.unlink()
    options = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "data"}
    options["target_modules"] = list(recipe.target_modules)
    options["distillation"] = recipe.distillation and asdict(recipe.distillation)
    content = {"recipe": options, "job": asdict(job), "examples": list(examples), "held_out": list(held_out)}
    spec.write_text(json.dumps(content))
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={recipe.num_processes}"]
    command = [sys.executable, "-m", *torchrun, "-m", "kvp.recovery.processes", str(spec), str(result)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // recipe.num_processes))}
    child = subprocess.Popen(
        command, env=threads | os.environ, stderr=subprocess.PIPE, text=True, preexec_fn=_die_with_parent
    )
    said = _relay(child)
    if child.wait():
        reasons = [path.read_text() for path in work.glob(f"{ERROR}*")] or said[-STDERR_LINES:]
        raise RuntimeError("\n".join(["training in several processes failed:", *reasons]))
    return json.loads(result.read_text())


def _relay(child: subprocess.Popen[str]) -> list[str]:
    """Shows what the processes say (their progress bar) while they say it."""
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        sys.stderr.write(line)
        said.append(line.rstrip())
    return said


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """One of the processes."""
    _die_with_parent()
    spec = json.loads(Path(sys.argv[1]).read_text())
    options = spec["recipe"]
    options["distillation"] = options["distillation"] and Distillation(**options["distillation"])
    recipe, job = Lora(data=None, **options), Job(**spec["job"])  # type: ignore[arg-type]
    try:
        figures = fit(recipe, job, spec["examples"], spec["held_out"])
    except Exception as error:
        Path(job.directory, "trainer", ERROR + os.environ["RANK"]).write_text(str(error))
        raise
    if figures:
        Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
