"""A benchmark from its models to its record; everything that can be refused is, before a weight is made."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvp.bench.journal import begun, go_on, keep, place, write
from kvp.bench.limits import find_batch, find_context, predicted_batch
from kvp.bench.models import Subject
from kvp.bench.protocols import Protocol
from kvp.bench.rounds import Series, in_turns
from kvp.bench.rows import Row, describe, make_rows, roofline
from kvp.cost import device_name
from kvp.measurement.cache import check_whole_cache
from kvp.measurement.measure import Measure
from kvp.measurement.paths import DecodePath
from kvp.measurement.roofline import copy_bandwidth
from kvp.provenance import provenance

SCHEMA = 1  # of bench.json; raised when a key changes its meaning

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is compared, and how.

    Attributes:
        subjects: The first is what the others are compared with.
        name: Of the protocol.
        protocol: The grid of rows.
        asked: Batches that at least one model must be able to hold.
        paths: Ways to decode.
        device: Where.
        dtype: In what.
        limit: Bytes that a model and its cache may take.
    """

    subjects: Sequence[Subject]
    name: str
    protocol: Protocol
    asked: Sequence[int]
    paths: Sequence[DecodePath]
    device: torch.device
    dtype: torch.dtype
    limit: int

    def check(self) -> None:
        """Refuse what cannot be run; from shapes alone.

        Raises:
            ValueError: A sequence is longer than a model's positions, a cache cannot be served, weights or a
                batch do not fit the memory; names the bound and the largest that does.
        """
        for subject in self.subjects:
            if (weights := subject.weights_bytes(self.dtype)) >= self.limit:
                raise ValueError(
                    f"{subject.name} has {_gibibytes(weights)} of weights, the memory is {_gibibytes(self.limit)}: "
                    "give more (--memory), another --dtype or a smaller model"
                )
            for point in self.protocol.points(most=1):
                point.check_positions(subject.config.max_position_embeddings)
                check_whole_cache(subject.config, point.prompt_length + point.new_tokens)
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
        """Measure everything; `out`/bench.json grows round by round, and the same benchmark goes on from there."""
        begin = time.time()
        out.mkdir(parents=True, exist_ok=True)
        gc.collect()
        gc.freeze()  # a million objects of imported modules, which every later collection would visit
        record = go_on(self._header(begin), out)
        before = record["provenance"]["seconds"]

        def save() -> None:
            record["provenance"]["seconds"] = before + time.time() - begin
            write(record, out)

        for subject in self.subjects[len(record["limits"]) :]:
            record["limits"].append(self._limits(subject))
            save()
        found = {
            (limits["model"], batch["prompt_length"], batch["new_tokens"]): batch["found"]
            for limits in record["limits"]
            for batch in limits["largest_batch"]
        }
        models = {subject.name: self._load(subject) for subject in self.subjects}
        for path in self.paths:
            for prompt, new in self.protocol.shapes:
                most = {name: found[name, prompt, new] for name in models}
                for point in self.protocol.points_of(prompt, new, max(most.values())):
                    fit = {name: m for name, m in models.items() if most[name] >= point.batch_size}
                    if fit or point.batch_size in self.asked:
                        self._measure(record, fit, path, point, save)
        record |= {"status": "finished", "begun": None}
        for row in record["rows"]:  # of several processes the fastest copy counts
            if not row["failed"]:
                row["roofline"] |= roofline(row, record["copy_bytes_per_second"])
        save()
        return record

    def _header(self, begin: float) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "status": "running",
            "protocol": {"name": self.name, **asdict(self.protocol)},
            "paths": list(self.paths),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": device_name(str(self.device)),
            "threads": torch.get_num_threads(),
            "memory_limit_bytes": self.limit,
            "copy_bytes_per_second": copy_bandwidth(self.device),
            "models": [describe(subject, self.subjects[0], self.dtype) for subject in self.subjects],
            "limits": [],
            "rows": [],
            "begun": None,
            "provenance": {
                **provenance(str(self.device)),
                "command": " ".join(["python -m kvp.bench", *sys.argv[1:]]),
                "seed": self.protocol.seed,
                "started": datetime.fromtimestamp(begin, UTC).isoformat(timespec="seconds"),
                "seconds": 0.0,
                "processes": 1,
            },
        }

    def _load(self, subject: Subject) -> PreTrainedModel:
        return subject.load(device=self.device, dtype=self.dtype, seed=self.protocol.seed)

    def _limits(self, subject: Subject) -> Row:
        """With this model alone on the device."""
        log.info("limits of %s", subject.name)
        model = self._load(subject)
        batches = [
            {
                "prompt_length": prompt,
                "new_tokens": new,
                **find_batch(subject, model, prompt_length=prompt, new_tokens=new, limit=self.limit),
            }
            for prompt, new in self.protocol.shapes
        ]
        context = find_context(subject, model, limit=self.limit)
        return {"model": subject.name, "largest_batch": batches, "longest_context": context}

    def _measure(
        self,
        record: dict[str, Any],
        fit: Mapping[str, PreTrainedModel],
        path: DecodePath,
        point: Measure,
        save: Callable[[], None],
    ) -> None:
        """One row per model; those that the batch does not fit take no turn."""
        where = place(path, point)
        if any(row.items() >= where.items() for row in record["rows"]):
            return
        log.info(
            "%s, batch %d, %d + %d tokens", path, point.batch_size, point.prompt_length, point.new_tokens
        )

        def after(series: Mapping[str, Series]) -> None:
            keep(record, where, series)
            save()

        series = in_turns(fit, path, point, begun=begun(record, where), after=after)
        absent = Series(failed="does not fit the memory")
        every = [series.get(subject.name, absent) for subject in self.subjects]
        record["rows"] += make_rows(
            self.subjects, every, path, point, dtype=self.dtype, bandwidth=record["copy_bytes_per_second"]
        )
        save()


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"
