"""One job of a sweep, in whatever process a launcher runs it."""

from __future__ import annotations

import gc
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process, parent_process
from pathlib import Path

import torch

from kvp import children
from kvp.pipeline.experiment import Experiment
from kvp.sweep.ahead import job_ended
from kvp.sweep.words import facts, line, reason

WORKER = re.compile(r"LokyProcess-(\d+)")
LOG = "run.log"  # beside run.json: everything that a job of a sweep prints


class JobFailed(RuntimeError):
    """Why, in one line; the rest is in the job's run.json. It crosses processes."""


def attempt(x: Experiment, number: int) -> str:
    """Run a job, and print a line when it starts and when it ends.

    Returns:
        The directory of its run.json.

    Raises:
        JobFailed: Whatever went wrong; the model and the memory of the failure are let go.
    """
    from kvp.pipeline.run import run

    directory, why = x.directory, None
    print(line(number, "started", x.name), flush=True)
    with _output_to(directory / LOG):
        try:
            summary = facts(run(x))
        except Exception as error:
            traceback.print_exc()
            why = summary = reason(type(error).__name__, str(error))
            traceback.clear_frames(error.__traceback__)
    left = job_ended(number, x)
    ending = f"{summary}; {left} of the sweep" if left else summary
    print(line(number, "failed" if why else "finished", x.name, ending), flush=True)
    if why:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise JobFailed(why)
    return str(directory)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what this process and its children print to a file, from the file descriptors up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = [os.dup(descriptor) for descriptor in (1, 2)]
    with path.open("ab") as file:
        _flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, saved in zip((1, 2), terminal, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def settle() -> None:
    """Bind a worker of joblib to the sweep: it ends with it, and takes a GPU of its own before CUDA starts in it."""
    parent = parent_process()
    if parent is None or parent.pid is None or not WORKER.fullmatch(current_process().name):
        return  # in the sweep's own process, whose parent is the user's shell
    children.end_with_parent(parent.pid)
    if not torch.cuda.is_initialized() and (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(current_process().name, visible)


def gpu_of(process: str, visible: str) -> str:
    """The one of the visible GPUs ("0,2") that falls to a process by its name; all if joblib did not name it."""
    number = WORKER.fullmatch(process)
    devices = visible.split(",")
    return devices[(int(number[1]) - 1) % len(devices)] if number else visible
