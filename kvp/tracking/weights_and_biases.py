"""The tracker of Weights & Biases, offline or online."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from pydantic import Field
from typing_extensions import override

from kvp.options import options
from kvp.tracking.base import Log, RunInfo, Tracker, flat

if TYPE_CHECKING:
    import wandb

LONGEST, LONGEST_TAG = 128, 64  # characters of a group and of a tag in W&B
OFFLINE = "offline-run-"  # begins the name of a directory that waits for `wandb sync`


def upload_command(location: str | None) -> str | None:
    """Return the command that uploads an offline run; None for any other place."""
    if not location or not Path(location).name.startswith(OFFLINE):
        return None
    return f"wandb sync {shlex.quote(location)}"


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

    @property
    @override
    def place(self) -> str:
        return f"wandb {self.mode} {self.entity or ''}/{self.project}"

    @override
    def start(self, **info: Unpack[RunInfo]) -> Log:
        import wandb

        info["directory"].mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                id=info["run_id"],
                name=info["name"],
                notes=info.get("notes"),
                dir=info["directory"],
                config=dict(info["config"]),
                group=(self.group or info.get("group") or "")[:LONGEST] or None,
                job_type=info.get("job_type"),
                tags=[tag[:LONGEST_TAG] for tag in info.get("tags", ()) if tag],
                resume="allow" if self.mode == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, quiet=True, x_disable_stats=True),
            )
        except wandb.Error as error:
            raise RuntimeError(
                f"tracker.mode must be offline where W&B cannot be reached, got {self.mode!r} ({error}): log in with "
                "`wandb login`, or keep the run offline and upload it later by `wandb sync`"
            ) from error
        return _WandbLog(run, str(run.url if self.mode == "online" else Path(run.dir).parent))


class _WandbLog(Log):
    def __init__(self, run: wandb.Run, location: str) -> None:
        self.run, self.location = run, location
        self._defined: set[str] = set()

    def config(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def metrics(self, values: Mapping[str, float], step: int | None = None, axis: str = "step") -> None:
        if step is None:
            self.run.log(dict(values))
            return
        if axis not in self._defined:  # an axis is no result: neither a chart nor a final value
            self.run.define_metric(axis, hidden=True, summary="none")
        for name in values.keys() - self._defined:  # wandb drops points whose own step goes back
            self.run.define_metric(name, step_metric=axis)
        self._defined |= {axis, *values}
        self.run.log({**values, axis: step})

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.summary.update(flat(values))

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
