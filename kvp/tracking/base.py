"""Base classes of trackers, and the facts of a run that they show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack, final


class RunInfo(TypedDict):
    """The facts of a run that a tracker shows; `run_id` is the hash of the configuration."""

    name: str
    run_id: str
    directory: Path
    config: Mapping[str, Any]
    group: NotRequired[str | None]
    job_type: NotRequired[str | None]
    tags: NotRequired[Sequence[str]]
    notes: NotRequired[str]


class Log(ABC):
    """One open run; a person finds it at `location`, a path or a URL."""

    location: str

    @abstractmethod
    def config(self, values: Mapping[str, Any]) -> None:
        """Add to the configuration what is known only later, such as the commit."""

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int | None = None, axis: str = "step") -> None:
        """Add one point to the curves of these names, at `step` of their x-axis.

        A curve keeps its axis, and `step` need not grow from call to call.
        """

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values; {"ppl": {"squad": 3.2}} is shown as "ppl/squad"."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; the cells of a column may differ in type."""

    @abstractmethod
    def bar(self, name: str, labels: Sequence[Any], values: Sequence[float], title: str) -> None:
        """Show a bar chart, one bar per label."""

    @abstractmethod
    def image(self, name: str, path: Path) -> None:
        """Show a picture."""

    @abstractmethod
    def artifact(self, path: Path, name: str, type: str) -> None:
        """Record a file or directory, which must neither move nor change afterwards."""

    @abstractmethod
    def close(self, exit_code: int) -> None:
        """End the run; 0 is success. `Tracker.run` calls it."""


class Tracker(ABC):
    """A place to show runs; it ends a run that it began, whatever happens inside."""

    @property
    def place(self) -> str:
        """Return where runs go; a run is logged once to each place."""
        return type(self).__name__.lower()

    @contextmanager
    @final
    def run(self, **info: Unpack[RunInfo]) -> Iterator[Log]:
        """Open a run; an exception inside ends it with exit code 1 and is raised again."""
        log = self.start(**info)
        try:
            yield log
        except BaseException:
            log.close(1)
            raise
        log.close(0)

    @abstractmethod
    def start(self, **info: Unpack[RunInfo]) -> Log:
        """Open a run that the caller closes."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined with "/"."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
