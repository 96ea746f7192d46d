"""Specs: small YAML files that say what a table shows. `specs/` has the shipped ones; main.yaml explains them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from kvp.record import MODELS, RunRecord
from kvp.report.records.facts import pruning
from kvp.report.records.keys import near, recovers
from kvp.report.records.runs import Run
from kvp.report.table.table import Better
from kvp.results import Part
from kvp.tables import plain

SPECS = Path(__file__).parent / "specs"
_NOWHERE = object()
UNITS = {"": 1.0, "%": 100.0, "M": 1e-6, "KiB": 2.0**-10, "MiB": 2.0**-20}


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """A column; with a pattern in the metric (`*`, `a|b`), one per match, {} in the title being the match.

    Attributes:
        metric: Path in the record, or the difference "a - b" of two; `pruning.seconds` and `pruning.peak_bytes` are
            those of its stages. In the dense row, `pruned.` is `dense.`.
        unit: One of `UNITS`, what the number is shown in.
        delta: Show the distance to the unpruned model treated alike: to dense, or for a recovered number to
            the dense model tuned alike.
        stderr: Show the standard error that the record has beside the number, where it is that of one run.
    """

    title: str
    metric: str
    unit: str = ""
    decimals: int = 2
    better: Better | None = None
    delta: bool = False
    stderr: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(filter(None, UNITS))}, got {self.unit!r}")
        if self.better not in ("lower", "higher", None):
            raise ValueError(f"better must be lower or higher, got {self.better!r}")
        if self.stderr and " - " in self.metric:
            raise ValueError(f"stderr: a difference of two numbers has none, got {self.metric!r}")

    @property
    def model(self) -> str:
        """The model that the number belongs to; ratio.* and pruning.* count as pruned."""
        root = self.metric.partition(".")[0]
        return root if root in MODELS else {"recovery": "recovered"}.get(root, "pruned")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A table.

    Attributes:
        rows: Heading of a label -> key of the configuration; a row per combination of their values.
        columns: The numbers.
        optional: The headings that are left out where no run has their key.
        group: The headings whose values part the rows into sections; the best is marked within each.
        across: A key whose every value gets its own set of columns.
        where: Filters, as --where takes them.
        published: Show the published numbers of the model.
    """

    name: str
    title: str
    rows: Mapping[str, str]
    columns: Sequence[ColumnSpec]
    optional: Sequence[str] = ()
    group: Sequence[str] = ()
    across: str | None = None
    where: Sequence[str] = ()
    published: bool = False

    def __post_init__(self) -> None:
        for option in ("group", "optional"):
            for heading in getattr(self, option):
                if heading not in self.rows:
                    raise ValueError(
                        f"{option} names {heading!r}, which is no row{near(heading, list(self.rows))}"
                    )


def load_spec(name: str) -> Spec:
    """Return a shipped spec by name, or any spec by path.

    Raises:
        ValueError: There is none, or it does not say what a table needs.
    """
    shipped = sorted(path.stem for path in SPECS.glob("*.yaml"))
    path = SPECS / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise ValueError(f"no spec {name}: name a YAML file or one of {', '.join(shipped)}")
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = [_build(ColumnSpec, column) for column in node.pop("columns", ())]
        return _build(Spec, {**node, "name": path.stem, "columns": columns})
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"spec {path}: {error}") from error


def expand(columns: Sequence[ColumnSpec], runs: Sequence[Run]) -> list[ColumnSpec]:
    """Return the columns with patterns filled in from the records; columns that no record has are left out.

    Raises:
        ValueError: A metric is neither in a record nor can it be.
    """
    return [filled for column in columns for filled in _expand(column, runs)]


def as_model(metric: str, model: str) -> str:
    """Return the metric of another of the three models; a metric of the run stays."""
    paths = [path.strip().partition(".") for path in metric.split(" - ")]
    return " - ".join(f"{model if root in MODELS else root}{dot}{rest}" for root, dot, rest in paths)


def stderr_of(metric: str) -> str:
    """Return the path of a number's standard error: `stderr` beside `value` or `accuracy`, else `acc_stderr`."""
    stem, _, name = metric.rpartition(".")
    return f"{stem}.stderr" if name in ("value", "accuracy") else f"{metric}_stderr"


def bound_of(metric: str) -> str:
    """Return the path of what an accuracy must reach to be above chance: `bound` beside it."""
    return f"{metric.rpartition('.')[0]}.bound"


def of_any_model(metric: str) -> list[str]:
    """Return the metric of each of the three models."""
    return list(dict.fromkeys(as_model(metric, model) for model in MODELS))


def read(record: RunRecord, metric: str) -> float | None:
    """Return the number behind a metric; None if the record has none."""
    values = [_walk(record, path.strip().split(".")) for path in metric.split(" - ")]
    if not all(isinstance(value, int | float) for value in values):
        return None
    return values[0] - sum(values[1:])


def _build(node: Any, values: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(node)]
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r} is no option{near(name, known)}")
    return node(**values)


def _expand(column: ColumnSpec, runs: Sequence[Run]) -> Iterator[ColumnSpec]:
    parts = column.metric.split(".")
    at = next((i for i, part in enumerate(parts) if part == "*" or "|" in part), None)
    if at is None:
        if any(_has(run, column.metric) for run in runs):
            yield column
        else:
            _check(column, runs)
        return
    stems = of_any_model(".".join(parts[:at]))
    nodes = [_walk(run.record, stem.split(".")) for run in runs for stem in stems]
    names = dict.fromkeys(name for node in nodes for name in _children(node))
    for name in names if parts[at] == "*" else parts[at].split("|"):
        metric = ".".join([*parts[:at], name, *parts[at + 1 :]])
        if any(_has(run, metric) for run in runs):
            yield replace(column, title=column.title.replace("{}", plain(name)), metric=metric)


def _has(run: Run, metric: str) -> bool:
    """Whether a run has a metric, or would have it had it not failed on the way."""
    if metric.startswith("recovered.") and not recovers(run):
        return False
    return any(read(run.record, other) is not None for other in of_any_model(metric))


def _check(column: ColumnSpec, runs: Sequence[Run]) -> None:
    """Refuse a metric that no model of any record has or could have, had it been measured (null)."""
    records = [run.record for run in runs if run.status == "finished"]
    for path in column.metric.split(" - "):
        others = [other.split(".") for other in of_any_model(path.strip())]
        ends = [_walk(record, other) for record in records for other in others]
        if records and not any(end is None or isinstance(end, int | float) for end in ends):
            known = sorted({known for record in records for known in _numbers(record)})
            raise ValueError(f"column {column.title!r}: no record has a number {path}{near(path, known)}")


def _walk(node: Any, path: Sequence[str]) -> Any:
    """Return what lies at a path: None where it ends in a null, `_NOWHERE` where it leaves the record."""
    if path[0] == "pruning":
        node = {"pruning": pruning(node)}
    for part in path:
        if node is None:
            return None
        node = _children(node).get(part, _NOWHERE)
    return node


def _children(node: Any) -> Mapping[str, Any]:
    """Return the parts of a node of a record by name; none of what is a value."""
    if isinstance(node, Part):
        return node.present()
    return node if isinstance(node, Mapping) else {}


def _numbers(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in _children(node).items():
        if isinstance(value, int | float):
            yield prefix + key
        elif key != "config":
            yield from _numbers(value, f"{prefix}{key}.")
