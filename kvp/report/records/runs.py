"""Runs that a report reads: run.json files, or results.jsonl, their committed form.

runs = read_runs(["outputs/runs", "ratio_sweep"])
collect(runs, Path("experiments/ratio_sweep/results.jsonl"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvp.record import WAY_OUT, RunRecord
from kvp.report.records.sound import require_sound
from kvp.tables import plain

ROOT = Path(__file__).resolve().parents[3]
EXPERIMENTS = (Path("experiments"), ROOT / "experiments")  # not part of an installed wheel


@dataclass(frozen=True)
class Run:
    """One record and where it was read: a run.json, or a line (from 1) of a results.jsonl."""

    path: Path
    line: int | None
    record: RunRecord

    @property
    def name(self) -> str:
        """Readable and unique: model-strategy-ratio-recovery-seed-hash."""
        return plain(self.record.name)

    @property
    def hash(self) -> str:
        """One per configuration."""
        return plain(self.record.hash)

    @property
    def status(self) -> str:
        """ "finished", "failed" or "running"."""
        return self.record.status

    @property
    def model(self) -> str:
        """Name of the dense model."""
        return plain(str(self.record.config["model"]["name"]))

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.record.config["seed"])

    @property
    def place(self) -> str:
        """The path from here or from the repository's root, the same on every machine, and the line."""
        path = self.path.resolve()
        root = next((root for root in (Path.cwd(), ROOT) if path.is_relative_to(root)), None)
        shown = (path.relative_to(root) if root else path).as_posix()
        return shown if self.line is None else f"{shown}:{self.line}"


def read_runs(paths: Sequence[Path | str]) -> list[Run]:
    """Return the runs below these paths, by name; of one configuration read twice, the newest finished one.

    Args:
        paths: run.json files, directories that hold some, results.jsonl files, or names of experiments.

    Raises:
        ValueError: A path holds no runs, or a record cannot be read; the message names the way out.
    """
    newest: dict[str, Run] = {}
    for run in (run for path in paths for file in _files(Path(path)) for run in _read(file)):
        if run.hash not in newest or _age(run) > _age(newest[run.hash]):
            newest[run.hash] = run
    return sorted(newest.values(), key=lambda run: (run.name, run.hash))


def collected(runs: Sequence[Run], out: Path) -> list[Run]:
    """Return the finished and failed runs as the lines of a results.jsonl, without what only their machine knows."""
    ended = [run.record.data() for run in runs if run.status != "running"]
    return [Run(out, i, RunRecord.read(_portable(data))) for i, data in enumerate(ended, start=1)]


def collect(runs: Sequence[Run], out: Path) -> Path:
    """Write a results.jsonl of the runs that ended, and return its path."""
    lines = [
        json.dumps(run.record.data(), ensure_ascii=False, separators=(",", ":"))
        for run in collected(runs, out)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return out


def _age(run: Run) -> tuple[bool, str, str]:
    """Return what sorts records of one configuration: finished ones last, then by start."""
    return run.status == "finished", run.record.provenance.started, str(run.path)


def _files(path: Path) -> list[Path]:
    """Return the record files that a path or an experiment's name stands for."""
    if path.is_file():
        return [path]
    places = [path, *(root / path for root in EXPERIMENTS if not path.is_absolute())]
    directory = next((place for place in places if place.is_dir()), None)
    known = sorted({results.parent.name for root in EXPERIMENTS for results in root.glob("*/results.jsonl")})
    studies = ", ".join(known) or "which only a clone of the repository has"
    way_out = f"name a run.json, a directory of runs, a results.jsonl, or an experiment ({studies})"
    if directory is None:
        raise ValueError(f"{path} is neither a path nor an experiment: {way_out}")
    found = directory.rglob("run.json")  # hidden directories are being removed
    files = sorted(
        file for file in found if not any(part.startswith(".") for part in file.relative_to(directory).parts)
    )
    files = files or sorted(directory.glob("results.jsonl"))
    if not files:
        raise ValueError(f"no run.json below {directory}: run `python -m kvp` first, or {way_out}")
    return files


def _read(path: Path) -> Iterator[Run]:
    if not path.is_file():
        raise ValueError(f"{path} is no file: remove it, or name the records one by one")
    if path.suffix != ".jsonl":
        yield Run(path, None, _sound(path.read_bytes(), str(path)))
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        yield Run(path, number, _sound(line, f"{path}:{number}"))


def _sound(text: bytes, place: str) -> RunRecord:
    try:
        record = RunRecord.read(text, place)
    except RecursionError:
        raise ValueError(f"{place} is corrupt (too deep): {WAY_OUT}") from None
    require_sound(record, place)
    return record


def _portable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record without host and traceback; paths become names: prune/<fingerprint>/model."""
    named_stages = [stage for stage in record["stages"] if stage["path"].strip("/")]
    stages = [(stage["path"], f"{stage['name']}/{stage['fingerprint'][:16]}") for stage in named_stages]

    def named(text: str) -> str:
        for path, name in stages:
            text = re.sub(rf"{re.escape(path)}(?=/|$)", name, text)
        return re.sub(r"(?<![\w./:])/(?:[^\s/=,:'\"]+/)+([^\s/=,:'\"]+)", r"\1", text)

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items() if key not in ("host", "pid", "traceback")}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return named(value) if isinstance(value, str) else value

    return walk({key: value for key, value in record.items() if key not in ("directory", "tracker")})
