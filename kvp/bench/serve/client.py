"""The client that drives a server: vLLM's `bench serve` in a process of its own, watched while it works."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvp import children
from kvp.bench.serve.server import ALONE, HOST, MODEL, POLL, Server

SCRIPT = Path(__file__).with_name("client_vllm.py")
WARM_UP = (1, 1, 8, 4)  # requests, at once, tokens read, tokens written


class Client:
    """A client that has imported vLLM once, from `with` on.

    Attributes:
        limit: Seconds that one question may take.
    """

    def __init__(self, python: str, log: Path, limit: float) -> None:
        self._python, self._log, self.limit = python, log, limit

    def __enter__(self) -> Client:
        with self._log.open("w") as log:
            self._process = children.start(
                [self._python, "-I", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | ALONE,
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def warm_up(self, server: Server) -> None:
        """Send one short request, which counts nowhere: a server's first one pays for what all later ones find."""
        requests, at_once, prompt, new = WARM_UP
        self._ask(server, requests, at_once, prompt, new, 0, lambda: None)

    def drive(
        self, server: Server, *, requests: int, at_once: int, prompt: int, new: int, seed: int
    ) -> dict[str, Any]:
        """Send `requests` requests, at most `at_once` of them at a time; return what client and server saw.

        Raises:
            RuntimeError: The client or the server died, took too long, or a request failed.
        """
        usage, running, waiting, resident = [0.0], [0.0], [0.0], [0]

        def look() -> None:
            now = server.metrics()
            usage.append(now["vllm:kv_cache_usage_perc"])
            running.append(now["vllm:num_requests_running"])
            waiting.append(now["vllm:num_requests_waiting"])
            resident.append(server.resident_bytes())

        load = os.getloadavg()[0]
        preempted, spent = server.metrics()["vllm:num_preemptions_total"], server.cpu_seconds()
        said = self._ask(server, requests, at_once, prompt, new, seed, look)
        spent, after = server.cpu_seconds() - spent, server.metrics()
        if said["completed"] != requests:
            raise server.failure(f"{requests - said['completed']} of {requests} requests failed")
        tokens = int(said["total_output_tokens"])
        return {
            "requests": requests,
            "tokens": tokens,
            "seconds": said["duration"],
            "cpu_seconds": spent,
            **{name: said[f"{name}_ms"] for name in ("median_ttft", "p99_ttft", "median_tpot", "p99_tpot")},
            "preemptions": int(after["vllm:num_preemptions_total"] - preempted),
            "most_running": int(max(running)),
            "most_waiting": int(max(waiting)),
            "cache_usage": max(usage),
            "peak_bytes": max(resident),
            "load_before": load,
        }

    def _ask(
        self,
        server: Server,
        requests: int,
        at_once: int,
        prompt: int,
        new: int,
        seed: int,
        look: Callable[[], None],
    ) -> dict[str, Any]:
        words = [
            *["--backend", "openai", "--host", HOST, "--port", str(server.port)],
            *["--model", str(server.served.directory.absolute()), "--served-model-name", MODEL],
            *["--dataset-name", "random", "--input-len", str(prompt), "--output-len", str(new)],
            *["--num-prompts", str(requests), "--max-concurrency", str(at_once), "--seed", str(seed)],
            *["--temperature", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0"],
        ]
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        end = time.monotonic() + self.limit
        while time.monotonic() < end:
            look()
            if select.select([self._process.stdout], [], [], POLL)[0]:
                if line := self._process.stdout.readline():
                    return dict(json.loads(line))
                raise server.failure(f"the client died (see {self._log})")
        raise server.failure(f"{requests} requests took more than {self.limit:g} seconds (--limit)")
