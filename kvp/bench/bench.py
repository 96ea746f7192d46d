"""A benchmark from its models to its record; refuses whatever it can before it makes a weight.

Every step (the limits of a model, a round of all models) is a stage of a `kvp.store.Store` in the output directory.
Each benchmark has a store of its own there. One that was killed goes on after its last step; a finished one removes
its steps and is measured anew.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvp.bench.limits import find_batch, find_context, held_in_place, predicted_batch
from kvp.bench.models import Subject
from kvp.bench.protocols import Protocol
from kvp.bench.ratios import KEY, of_rows
from kvp.bench.rounds import Round, Series, in_turns
from kvp.bench.rows import Row, describe, make_rows
from kvp.cost import device_name
from kvp.measurement.measure import Measure
from kvp.measurement.native_step import check_native
from kvp.measurement.paths import DecodePath, check_path
from kvp.measurement.roofline import copy_bandwidth
from kvp.provenance import provenance
from kvp.store import Store, fingerprint
from kvp.whole import write_whole

FILE, STEPS = "bench.json", "steps"  # the record, and the stores of unfinished benchmarks
CODE = ("kvp", "commit", "dirty_sha256")  # of provenance; rounds of different code are not mixed
LIBRARIES = ("torch", "transformers")  # whose version decides what a round takes
SCHEMA = 1  # of bench.json; raised when a key changes its meaning

log = logging.getLogger(__name__)


class Steps:
    """Steps of one benchmark, each done once, by however many processes it takes.

    Attributes:
        seconds: Time that earlier processes spent on the steps found so far.
    """

    def __init__(self, root: Path, bench: Mapping[str, Any]) -> None:
        self.bench, self.seconds = fingerprint("bench", SCHEMA, bench), 0.0
        self.store = Store(root / self.bench[:16])

    def once(
        self, step: str, inputs: Mapping[str, Any], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the result of a step, found or worked now."""
        done = self.store.once(step, {"bench": self.bench, **inputs}, lambda directory: work())
        self.seconds += done.seconds if done.found else 0
        return done.result

    def processes(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what every process of this benchmark began with, this one last, and remember `own` for the next."""
        begun: list[dict[str, Any]] = []
        for number in count(1):
            done = self.store.once("process", {"bench": self.bench, "number": number}, lambda directory: own)
            begun.append(done.result)
            if not done.found:
                break
        return begun

    def remove(self) -> None:
        """Remove the steps of this benchmark; those of others, and files of users beside them, stay."""
        shutil.rmtree(self.store.root)
        with suppress(OSError):  # not empty
            self.store.root.parent.rmdir()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A comparison of models under one protocol.

    Attributes:
        subjects: Models; the others are compared with the first.
        name: Name of the protocol.
        protocol: Grid of rows.
        asked: Batches that at least one model must be able to hold.
        paths: Ways to decode.
        device: Device of all models.
        dtype: Dtype of weights and cache.
        limit: Bytes that a model and its cache may take.
        limit_asked: Whether the limit was asked for; else it is what happens to be free.
    """

    subjects: Sequence[Subject]
    name: str
    protocol: Protocol
    asked: Sequence[int]
    paths: Sequence[DecodePath]
    device: torch.device
    dtype: torch.dtype
    limit: int
    limit_asked: bool = False

    def check(self) -> None:
        """Refuse what cannot be run, from shapes alone.

        Raises:
            ValueError: A sequence is longer than a model's positions, a cache cannot be served, weights or a
                batch do not fit the memory; names the bound and the largest that does. Or a path has no device.
        """
        if "native" in self.paths:
            check_native(self.device, self.dtype)
        for subject in self.subjects:
            if (weights := subject.weights_bytes(self.dtype)) >= self.limit:
                raise ValueError(
                    f"{subject.name} has {_gibibytes(weights)} of weights, the memory is {_gibibytes(self.limit)}: "
                    "give more (--memory), another --dtype or a smaller model"
                )
            for point in self.protocol.points(most=1):
                point.check_positions(subject.config.max_position_embeddings)
                for path in self.paths:
                    check_path(path, subject.config, point.prompt_length + point.new_tokens)
        for prompt, new in self.protocol.shapes:
            most = max(
                predicted_batch(subject, length=prompt + new, limit=self.limit, dtype=self.dtype)
                for subject in self.subjects
            )
            for batch in self.asked:
                if batch > most:
                    raise ValueError(
                        f"a batch of {batch} sequences of {prompt} + {new} tokens does not fit "
                        f"{_gibibytes(self.limit)}: the largest of any of these models is {most} "
                        "(--batch, --prompt, --new, --memory)"
                    )

    def run(self, out: Path) -> dict[str, Any]:
        """Measure everything and write `out`/bench.json; go on after the last step of an unfinished benchmark."""
        begin = time.time()
        out.mkdir(parents=True, exist_ok=True)
        gc.collect()
        gc.freeze()  # a million objects of imported modules, which every later collection would visit
        header = self._header()
        steps = Steps(out / STEPS, self.same())
        own = {
            "memory_limit_bytes": self.limit,
            "copy_bytes_per_second": copy_bandwidth(self.device),
            "started": datetime.fromtimestamp(begin, UTC).isoformat(timespec="seconds"),
        }
        processes = steps.processes(own)
        limit = processes[0]["memory_limit_bytes"]  # free memory varies; one benchmark keeps its limit
        bandwidth = max(process["copy_bytes_per_second"] for process in processes)
        limits = [self._limits(subject, limit, steps) for subject in self.subjects]
        rows = self._rows(limits, bandwidth, steps)
        record = {
            "schema": SCHEMA,
            "status": "finished",
            **header,
            "memory_limit_bytes": limit,
            "copy_bytes_per_second": bandwidth,
            "limits": limits,
            "rows": rows,
            KEY: of_rows(rows),
            "provenance": {
                **provenance(str(self.device)),
                "command": " ".join(["python -m kvp.bench", *sys.argv[1:]]),
                "seed": self.protocol.seed,
                "started": processes[0]["started"],
                "seconds": time.time() - begin + steps.seconds,
                "processes": len(processes),
            },
        }
        write_whole(out / FILE, json.dumps(record, indent=1))
        steps.remove()
        return json.loads(json.dumps(record))

    def same(self) -> dict[str, Any]:
        """Return what makes two benchmarks the same: the question, the code, and the memory if it was asked for.

        The memory that happens to be free does not count.
        """
        made = provenance(str(self.device))
        return {
            **self._header(),
            "memory": self.limit if self.limit_asked else None,
            **{key: made[key] for key in CODE},
            "versions": {name: made["versions"].get(name) for name in LIBRARIES},
        }

    def _header(self) -> dict[str, Any]:
        """Return what the record says of the question."""
        return {
            "protocol": {"name": self.name, **asdict(self.protocol)},
            "paths": list(self.paths),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device_name(str(self.device)),
            "threads": torch.get_num_threads(),
            "models": [describe(subject, self.subjects[0], self.dtype) for subject in self.subjects],
        }

    def _load(self, subject: Subject) -> PreTrainedModel:
        return subject.load(device=self.device, dtype=self.dtype, seed=self.protocol.seed)

    def _limits(self, subject: Subject, limit: int, steps: Steps) -> Row:
        """Return the largest batches and the longest context of a model alone on the device."""

        def work() -> Row:
            log.info("limits of %s", subject.name)
            model, trial = self._load(subject), set(self.paths) != {"eager"} or held_in_place(subject.config)
            batches = [
                {
                    "prompt_length": prompt,
                    "new_tokens": new,
                    **find_batch(
                        subject, model, prompt_length=prompt, new_tokens=new, limit=limit, trial=trial
                    ),
                }
                for prompt, new in self.protocol.shapes
            ]
            context = find_context(subject, model, limit=limit, trial=trial)
            return {"model": subject.name, "largest_batch": batches, "longest_context": context}

        return steps.once("limits", {"model": subject.name}, work)

    def _rows(self, limits: Sequence[Row], bandwidth: float, steps: Steps) -> list[Row]:
        """Return the rows of all paths and points that at least one model can hold, or that were asked for."""
        most = {
            (one["model"], batch["prompt_length"], batch["new_tokens"]): batch["found"]
            for one in limits
            for batch in one["largest_batch"]
        }
        models = {subject.name: self._load(subject) for subject in self.subjects}
        rows = []
        for path in self.paths:
            for prompt, new in self.protocol.shapes:
                largest = {name: most[name, prompt, new] for name in models}
                for point in self.protocol.points_of(prompt, new, max(largest.values())):
                    fit = {name: m for name, m in models.items() if largest[name] >= point.batch_size}
                    if fit or point.batch_size in self.asked:
                        rows += self._measure(fit, path, point, bandwidth, steps)
        return rows

    def _measure(
        self,
        fit: Mapping[str, PreTrainedModel],
        path: DecodePath,
        point: Measure,
        bandwidth: float,
        steps: Steps,
    ) -> list[Row]:
        """Return one row per model; a model that the batch does not fit takes no turn."""
        log.info(
            "%s, batch %d, %d + %d tokens", path, point.batch_size, point.prompt_length, point.new_tokens
        )

        def keep(number: int, work: Callable[[], Round]) -> Round:
            return steps.once("round", {"path": path, "point": asdict(point), "number": number}, work)

        series = in_turns(fit, path, point, keep=keep)
        absent = Series(failed="does not fit the memory")
        every = [series.get(subject.name, absent) for subject in self.subjects]
        return make_rows(self.subjects, every, path, point, dtype=self.dtype, bandwidth=bandwidth)


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"
