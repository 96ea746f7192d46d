"""The tracker that appends to a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from typing_extensions import override

from kvp.tracking.base import Log, RunInfo, Tracker, flat


class Jsonl(Tracker):
    """One JSON object per call, appended to `directory`/metrics.jsonl; "kind" names the call.

    The first object of a run has kind "run" and holds name, id and config.
    """

    @override
    def start(self, **info: Unpack[RunInfo]) -> Log:
        directory, about = info["directory"], {k: v for k, v in info.items() if k != "directory"}
        directory.mkdir(parents=True, exist_ok=True)
        return _JsonlLog(directory / "metrics.jsonl", about)


class _JsonlLog(Log):
    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.location = str(path)
        self.stream = path.open("a")
        self._write("run", **about)

    def _write(self, kind: str, **values: Any) -> None:
        print(json.dumps({"kind": kind, **values}), file=self.stream, flush=True)

    def config(self, values: Mapping[str, Any]) -> None:
        self._write("config", values=dict(values))

    def metrics(self, values: Mapping[str, float], step: int | None = None, axis: str = "step") -> None:
        self._write("metrics", **({} if step is None else {axis: step}), values=dict(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._write("summary", values=flat(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._write("table", name=name, columns=list(columns), rows=[list(row) for row in rows])

    def bar(self, name: str, labels: Sequence[Any], values: Sequence[float], title: str) -> None:
        self._write("bar", name=name, title=title, labels=list(labels), values=list(values))

    def image(self, name: str, path: Path) -> None:
        self._write("image", name=name, path=str(path))

    def artifact(self, path: Path, name: str, type: str) -> None:
        self._write("artifact", name=name, type=type, path=str(path))

    def close(self, exit_code: int) -> None:
        self._write("exit", exit_code=exit_code)
        self.stream.close()
