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
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NotRequired, TypedDict, Unpack, final

from pydantic import Field
from typing_extensions import override

from kvp.options import options

if TYPE_CHECKING:
    import wandb


LONGEST = 128  # characters of a group in W&B


class RunInfo(TypedDict):
    """The facts of a run that a tracker shows; `run_id` is the hash of the configuration."""

    name: str
    run_id: str
    directory: Path
    config: Mapping[str, Any]
    group: NotRequired[str | None]
    job_type: NotRequired[str | None]
    tags: NotRequired[Sequence[str]]


class Log(ABC):
    """One open run; a person finds it at `location`, a path or a URL."""

    location: str

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Add one point to the curves of these names; `step` need not grow from call to call."""

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


@options
class Wandb(Tracker):
    """A Weights & Biases run below `directory`, without console capture, system metrics or printed output.

    Offline it needs no network. Each start of a `run_id` is then a directory of its own, and `wandb sync` merges them
    into one run. Online, the run of that id goes on.
    """

    node: ClassVar[str] = "tracker"
    project: str = Field(default="kvp", description="project of W&B")
    entity: str | None = Field(default=None, description="team or user; null: your default one")
    mode: Literal["offline", "online"] = Field(
        default="offline", description="it wins over WANDB_MODE; for no W&B at all, choose tracker=none"
    )
    group: str | None = Field(default=None, description="group of every run; null: the experiment's")

    @override
    def start(self, **info: Unpack[RunInfo]) -> Log:
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
    """One JSON object per call, appended to `directory`/metrics.jsonl; "kind" names the call.

    The first object of a run has kind "run" and holds name, id and config.
    """

    @override
    def start(self, **info: Unpack[RunInfo]) -> Log:
        directory, about = info["directory"], {k: v for k, v in info.items() if k != "directory"}
        directory.mkdir(parents=True, exist_ok=True)
        return _JsonlLog(directory / "metrics.jsonl", about)


class Null(Tracker):
    """A tracker that shows nothing."""

    @override
    def start(self, **info: Unpack[RunInfo]) -> Log:
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
    """Return nested mappings as one, keys joined with "/"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
