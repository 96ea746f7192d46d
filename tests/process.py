"""Processes of their own that start at once: forked from one that has imported what every run needs.

Each can be killed like `python -m kvp`, which takes seconds to import torch and transformers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "kvp.__main__",
        "kvp.pipeline.run",
        "kvp.models.pruned",
        "kvp.recovery.fit",
        "lm_eval.models.huggingface",
    ]
)


def start(target: Callable[..., Any], *args: Any, log: Path | str = os.devnull) -> BaseProcess:
    """Call a function of a module in a process of its own; what it prints goes to `log`."""
    process = FORKS.Process(target=_call, args=(str(log), target, *args))
    process.start()
    return process


def start_kvp(*words: str, log: Path | str = os.devnull) -> BaseProcess:
    """`python -m kvp words`."""
    return start(_kvp, words, log=log)


def _call(log: str, target: Callable[..., Any], *args: Any) -> None:
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it
    target(*args)


def _kvp(words: tuple[str, ...]) -> None:
    from kvp.__main__ import main

    os.chdir(ROOT)
    sys.argv = ["kvp", *words]
    main()
