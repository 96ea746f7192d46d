"""A serving benchmark from its models to its record; refuses whatever it can before it starts an engine.

Every turn (all loads of one model in one round) is a stage of a `kvp.store.Store` in the output directory, so a
benchmark that was stopped goes on after its last turn. Models take turns within a round, each round begins with
another one, and a ratio compares two turns of one round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch

from kvp.bench.ratios import KEY
from kvp.bench.rounds import ratio
from kvp.bench.serve.client import Client
from kvp.bench.serve.served import BLOCK, Served
from kvp.bench.serve.server import Server
from kvp.cost import device_name
from kvp.provenance import provenance
from kvp.store import Store
from kvp.whole import write_whole

SCHEMA = 1  # of results.json; raised when a key changes its meaning
SLACK = 8  # positions beyond prompt and answer: a text of random words has a token more or less
FILE, STEPS = "results.json", "steps"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of one length, so many at a time."""

    prompt: int
    new: int
    at_once: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """A comparison of models in a server under one cache memory.

    Attributes:
        models: Models; the others are compared with the first.
        loads: What each of them is asked in every round.
        rounds: Number of rounds.
        memory: Bytes of cache that each server gets.
        dtype: Dtype of weights and activations.
        eager: Whether the engine runs without compiled graphs.
        together: Whether all servers stay up; otherwise one at a time.
        limit: Seconds that one load may take.
        seed: Of the prompts; each round adds its number.
        python: Interpreter that has the engine.
        versions: What is installed there.
    """

    models: Sequence[Served]
    loads: Sequence[Load]
    rounds: int
    memory: int
    dtype: torch.dtype
    eager: bool
    together: bool
    limit: float
    seed: int
    python: str
    versions: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a memory that does not hold one sequence of the longest load in every model.

        Raises:
            ValueError: Names the model, what the memory holds, and the least that would do.
        """
        for served in self.models:
            if (held := served.tokens_in(self.memory)) < self._longest:
                raise ValueError(
                    f"{served.name} takes {served.token_bytes:,} bytes of cache per token, so {_mib(self.memory)} "
                    f"hold {held} tokens, and one sequence has {self._longest} ({SLACK} of them spare): give at least "
                    f"{_mib(served.bytes_for(self._longest))} (--memory), or shorter --prompt and --new"
                )

    def run(self, out: Path) -> dict[str, Any]:
        """Measure what is missing, write `out`/results.json and return it."""
        begin = time.time()
        store, inputs = Store(out / STEPS), self._inputs()
        turns: dict[str, list[dict[str, Any]]] = {served.name: [] for served in self.models}
        seconds = 0.0
        with self._servers(out) as turn:
            for number in range(self.rounds):
                first = number % len(self.models)
                for served in [*self.models[first:], *self.models[:first]]:
                    if (known := turns[served.name]) and "refused" in known[-1]:
                        known.append(known[-1])
                        continue
                    own = {**inputs, "model": served.identity(), "round": number}
                    done = store.once("turn", own, partial(turn, served, number))
                    known.append(done.result)
                    seconds += done.seconds if done.found else 0
        models = [self._described(served, turns[served.name]) for served in self.models]
        record = {
            "schema": SCHEMA,
            **inputs,
            "models": models,
            KEY: ratios(models, self.loads),
            "provenance": {
                **provenance("cpu"),
                "device_name": device_name("cuda" if torch.cuda.is_available() else "cpu"),
                "engine": self.versions,
                "command": " ".join(["kvp bench serve", *sys.argv[1:]]),
                "seconds": time.time() - begin + seconds,
            },
        }
        write_whole(out / FILE, json.dumps(record, indent=1) + "\n")
        return record

    @property
    def _longest(self) -> int:
        return max(load.prompt + load.new for load in self.loads) + SLACK

    def _inputs(self) -> dict[str, Any]:
        """Return what makes two benchmarks the same, beside their models and the number of rounds."""
        return {
            "memory_bytes": self.memory,
            "block": BLOCK,
            "dtype": str(self.dtype).removeprefix("torch."),
            "eager": self.eager,
            "together": self.together,
            "seed": self.seed,
            "engine": self.versions,
            "cores": psutil.cpu_count(),
            "loads": [asdict(load) for load in self.loads],
        }

    def _described(self, served: Served, turns: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": served.name,
            "cache_dtype": served.cache_dtype,
            "token_bytes": served.token_bytes,
            "rounds": turns,
        }

    @contextmanager
    def _servers(self, out: Path) -> Iterator[Callable[[Served, int, Path], dict[str, Any]]]:
        """Give the work of a turn; client and servers start with the first turn that needs them."""
        words = ["--dtype", str(self.dtype).removeprefix("torch."), "--max-model-len", str(self._longest)]
        words += ["--kv-cache-memory-bytes", str(self.memory), *(["--enforce-eager"] if self.eager else [])]
        up: dict[str, Server] = {}
        with ExitStack() as whole:
            client = cache(lambda: whole.enter_context(Client(self.python, out / "client.log", self.limit)))

            def turn(served: Served, number: int, _: Path) -> dict[str, Any]:
                with ExitStack() as this:
                    if (server := up.get(served.name)) is None:
                        server = Server(
                            served, self.python, words, out / f"{served.name.replace(' ', '_')}.log"
                        )
                        try:
                            (whole if self.together else this).enter_context(server)
                        except RuntimeError:
                            if served.refusable:
                                return {"refused": server.why()}
                            raise
                        if self.together:
                            up[served.name] = server
                    return self._turn(client(), server, number)

            yield turn

    def _turn(self, client: Client, server: Server, number: int) -> dict[str, Any]:
        client.warm_up(server)
        cells = []
        for load in self.loads:
            cell = client.drive(server, **asdict(load), seed=self.seed + number)
            print(
                f"round {number + 1}, {server.served.name}, {load.prompt} + {load.new} tokens, {load.at_once} at once: "
                f"{cell['tokens'] / cell['seconds']:.1f} tokens/s, "
                f"{cell['tokens'] / cell['cpu_seconds']:.1f} per CPU second",
                flush=True,
            )
            cells.append(cell)
        return {"cache_tokens": server.cache_tokens(), "loads": cells}


def make_loads(prompts: Sequence[int], news: Sequence[int], at_once: Sequence[int], waves: int) -> list[Load]:
    """Return every combination; a load has `waves` times as many requests as run at once."""
    return [
        Load(prompt=prompt, new=new, at_once=many, requests=waves * many)
        for prompt, new, many in product(prompts, news, at_once)
    ]


def _mib(count: int) -> str:
    """Return a size in MiB, rounded up, so that it is enough when it is given back."""
    return f"{ceil(count / 2**20 * 100) / 100:.2f}MiB"


def ratios(models: Sequence[dict[str, Any]], loads: Sequence[Load]) -> dict[str, Any]:
    """Return how many times the first model's tokens per second the others wrote, per load and clock."""
    kept = [model for model in models if "refused" not in model["rounds"][0]]
    found: dict[str, Any] = {}
    for (number, load), model in product(enumerate(loads), kept[1:]):
        first = kept[0]
        for clock, unit in (("seconds", "seconds"), ("cpu_seconds", "CPU seconds")):
            own, theirs = (
                [turn["loads"][number][clock] / turn["loads"][number]["tokens"] for turn in each["rounds"]]
                for each in (model, first)
            )
            place = f"{load.prompt} + {load.new} tokens, {load.at_once} at once"
            found[f"{model['name']} / {first['name']}, {place}: {unit}"] = ratio(own, theirs)
    return found
