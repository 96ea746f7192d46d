"""Child processes that end with the process that started them, however that one ends.

    run([sys.executable, "-m", "kvp.measurement.child", spec], capture_output=True, text=True)

A parent killed by SIGKILL, SIGTERM or SIGHUP cannot end its children itself, so Linux is asked to do it. A child that
has children of its own gets SIGTERM (`ending`), so that it can end them. Elsewhere the functions are those of
`subprocess`. The thread that starts a child must live as long as the child.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux's prctl
LINUX = sys.platform == "linux"

# A process of its own asks, then becomes the command: `preexec_fn` would run Python between fork and exec, where the
# threads of torch may hold locks, and would copy the page tables of a large parent. Its parent, or the parent's, must
# be the process that asks for it: otherwise that one, or what it had started, ended in between.
PRELUDE = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, int(sys.argv[2]))
parent = str(os.getppid())
above = open(f"/proc/{{parent}}/stat").read().rpartition(")")[2].split()[1]
if sys.argv[1] in (parent, above):
    os.execv(sys.argv[3], sys.argv[3:])
"""


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command like `subprocess.run`, and end it if this process ends first.

    Raises:
        FileNotFoundError: The program does not exist, or cannot be executed.
    """
    return subprocess.run(bound(command), **options)


def start(command: Sequence[str], *, ending: int = signal.SIGKILL, **options: Any) -> subprocess.Popen[str]:
    """Start a command like `subprocess.Popen`, and end it by the signal `ending` if this process ends first.

    Raises:
        FileNotFoundError: The program does not exist, or cannot be executed.
    """
    return subprocess.Popen(bound(command, ending), **options)


def bound(command: Sequence[str], ending: int = signal.SIGKILL) -> list[str]:
    """Return a command that ends with its parent, by a signal, for this process or a child of it to start.

    Raises:
        FileNotFoundError: The program does not exist, or cannot be executed.
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(f"there is no program {command[0]} that can be executed")
    if not LINUX:
        return [program, *command[1:]]
    asks = [sys.executable, "-I", "-S", "-c", PRELUDE, str(os.getpid()), str(int(ending))]
    return [*asks, program, *command[1:]]


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends; at once if that is no longer the process of this number."""
    if not LINUX:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
