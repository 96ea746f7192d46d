"""The tracker that shows nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from typing_extensions import override

from kvp.tracking.base import Log, RunInfo, Tracker


class Null(Tracker):
    """A tracker that shows nothing."""

    @override
    def start(self, **info: Unpack[RunInfo]) -> Log:
        return _NullLog()


class _NullLog(Log):
    location = ""

    def config(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int | None = None, axis: str = "step") -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def bar(self, name: str, labels: Sequence[Any], values: Sequence[float], title: str) -> None: ...

    def image(self, name: str, path: Path) -> None: ...

    def artifact(self, path: Path, name: str, type: str) -> None: ...

    def close(self, exit_code: int) -> None: ...
