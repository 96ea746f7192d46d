"""Trackers: where a person looks at a run - Weights & Biases, a JSON-lines file, or nowhere.

    with Jsonl().run(name="kvpruner", run_id="1f3a", directory=Path("run"), config={"seed": 0}) as log:
        log.metrics({"loss": 3.2}, step=10)

A tracker shows results; the store keeps them, and nothing is ever read back from a tracker.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, Unpack, final

if TYPE_CHECKING:
    import wandb


LONGEST = 128  # characters of a group in W&B


class RunInfo(TypedDict):
    """What a tracker is told when a run begins; `run_id` is one per configuration (its hash)."""

    name: str
    run_id: str
    directory: Path
    config: Mapping[str, Any]
    group: NotRequired[str | None]
    job_type: NotRequired[str | None]
    tags: NotRequired[Sequence[str]]


class Log(ABC):
    """One open run. `location` is where a person finds it: a path or a URL."""

    location: str

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Adds one point to the curves of these names; `step` need not grow from call to call."""

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None:
        """Sets final values; {"ppl": {"squad": 3.2}} is shown as "ppl/squad"."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table; the cells of a column may differ in type."""

    @abstractmethod
    def bar(self, name: str, labels: Sequence[Any], values: Sequence[float], title: str) -> None:
        """Shows a bar chart, one bar per label."""

    @abstractmethod
    def image(self, name: str, path: Path) -> None:
        """Shows a picture."""

    @abstractmethod
    def artifact(self, path: Path, name: str, type: str) -> None:
        """Records a file or directory, which must stay where it is and as it is."""

    @abstractmethod
    def close(self, exit_code: int) -> None:
        """Ends the run; 0 is success. `Tracker.run` calls it."""


class Tracker(ABC):
    """Begins runs, and ends them whatever happens inside."""

    @contextmanager
    @final
    def run(self, **info: Unpack[RunInfo]) -> Iterator[Log]:
        """Opens a run; an exception inside ends it with exit code 1 and is raised again."""
        log = self.start(**info)
        try:
            yield log
        except BaseException:
            log.close(1)
            raise
        log.close(0)

    @abstractmethod
    def start(self, **info: Unpack[RunInfo]) -> Log:
        """Opens a run that the caller closes."""


@dataclass(frozen=True, kw_only=True)
class Wandb(Tracker):
    """A Weights & Biases run below `directory`; offline unless asked, then it needs no network at all.

    Offline, each start of a `run_id` is a directory of its own; `wandb sync` merges them into one run.
    Online, the run of that id goes on.

    Attributes:
        entity: Team or user; None: your default one.
        mode: "offline" or "online". It wins over WANDB_MODE and `wandb offline`.
        group: Put every run in this group instead of the experiment's.
    """

    project: str = "kvp"
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ValueError(f"mode must be offline or online, got {self.mode!r}; for neither, tracker=none")

    def start(self, **info: Unpack[RunInfo]) -> Log:
        """Begins the W&B run, without console capture, system metrics or output of its own."""
        import wandb

        info["directory"].mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            id=info["run_id"],
            name=info["name"],
            dir=info["directory"],
            config=dict(info["config"]),
            group=(self.group or info.get("group") or "")[:LONGEST] or None,
            job_type=info.get("job_type"),
            tags=info.get("tags"),
            resume="allow" if self.mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, quiet=True, x_disable_stats=True),
        )
        run.define_metric("*", step_metric="step")  # wandb drops points whose own step goes back
        return _WandbLog(run, str(run.url if self.mode == "online" else Path(run.dir).parent))


class Jsonl(Tracker):
    """Appends one JSON object per call to `directory`/metrics.jsonl; `kind` says which call it was."""

    def start(self, **info: Unpack[RunInfo]) -> Log:
        """Opens the file and writes the run's name, id and config."""
        directory, about = info["directory"], {k: v for k, v in info.items() if k != "directory"}
        directory.mkdir(parents=True, exist_ok=True)
        return _JsonlLog(directory / "metrics.jsonl", about)


class Null(Tracker):
    """Tracks nothing."""

    def start(self, **info: Unpack[RunInfo]) -> Log:
        """Begins nothing."""
        return _NullLog()


class _WandbLog(Log):
    def __init__(self, run: wandb.Run, location: str) -> None:
        self.run, self.location = run, location

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.run.log(dict(values) if step is None else {**values, "step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(_flat(values))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        data = [list(row) for row in rows]
        self.run.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

    def bar(self, name: str, labels: Sequence[Any], values: Sequence[float], title: str) -> None:
        import wandb

        data = [[str(label), value] for label, value in zip(labels, values, strict=True)]
        table = wandb.Table(columns=["label", "value"], data=data)
        self.run.log({name: wandb.plot.bar(table, "label", "value", title=title)})

    def image(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def artifact(self, path: Path, name: str, type: str) -> None:
        import wandb

        artifact = wandb.Artifact(name, type)
        base, files = (path, path.rglob("*")) if path.is_dir() else (path.parent, [path])
        for file in filter(Path.is_file, files):  # immutable, skip_cache: no second copy of a model
            inside = file.relative_to(base).as_posix()
            artifact.add_file(str(file), inside, policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact)

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class _JsonlLog(Log):
    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.location = str(path)
        self.stream = path.open("a")
        self._write("run", **about)

    def _write(self, kind: str, **values: Any) -> None:
        print(json.dumps({"kind": kind, **values}), file=self.stream, flush=True)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._write("metrics", step=step, values=dict(values))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._write("summary", values=_flat(values))

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


class _NullLog(Log):
    location = ""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def bar(self, name: str, labels: Sequence[Any], values: Sequence[float], title: str) -> None: ...

    def image(self, name: str, path: Path) -> None: ...

    def artifact(self, path: Path, name: str, type: str) -> None: ...

    def close(self, exit_code: int) -> None: ...


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with "/"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
