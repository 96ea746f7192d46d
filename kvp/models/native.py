"""C++ of kvp, compiled for this CPU when it is first used.

The compiler is the one that torch's extensions use: `$CXX`, or else `c++`. The library lies in the user's cache folder
(`~/.cache/kvp`). Its name says for which source, headers, compiler options and CPU it was built, so a home that several
machines share holds one library per kind of CPU. Without a compiler there is no library, and the caller computes in
another way.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
CPUINFO = Path("/proc/cpuinfo")
SECONDS = 120  # a compiler that takes longer hangs

log = logging.getLogger(__name__)


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the compiled source, built now if this CPU has none; None, and one line in the log, if it cannot be."""
    try:
        target = _folder() / f"{source.stem}-{_identity(source)}.so"
        if not target.is_file():
            _build(source, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = (said.strip().splitlines() or ["no reason given"])[0]
        log.warning("%s was not compiled, which costs speed alone: %s", source.name, reason)
        return None


def _folder() -> Path:
    """Return the folder of compiled code, made for this user alone.

    Raises:
        RuntimeError: Others can write what would be loaded.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise RuntimeError(f"{folder} can be written by others: make it yours alone (chmod 700)")
    return folder


def _identity(source: Path) -> str:
    """Return a name for the source, the compiler with its options and the kind of CPU."""
    headers = sorted(source.parent.glob("*.h"))
    about = [
        *(file.read_text() for file in (source, *headers)),
        *_compiler(),
        *FLAGS,
        platform.machine(),
        platform.processor(),
    ]
    if CPUINFO.is_file():
        told = CPUINFO.read_text().splitlines()
        about += sorted(
            {line for line in told if line.startswith(("model name", "flags", "Features", "CPU part"))}
        )
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _build(source: Path, target: Path) -> None:
    """Compile; the target appears whole, whoever builds it at the same time."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        command = [*_compiler(), *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        made.replace(target)
