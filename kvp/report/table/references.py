"""Published numbers beside ours: experiments/references/<model>.yaml, one line per method, and the difference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvp.report.records.keys import MISSING, matches
from kvp.report.records.runs import EXPERIMENTS
from kvp.report.table.cells import Draft
from kvp.report.table.compare import facts_differ
from kvp.report.table.lines import Line
from kvp.report.table.spec import UNITS
from kvp.report.table.table import Cell

PACKAGED = Path(__file__).parents[1] / "references"  # of an installed wheel
AVERAGE = "evaluation.zero_shot.average.value"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A line of a paper's table.

    Attributes:
        paper: Short name; `source` says where exactly the numbers were read.
        ratio: The nominal fraction removed, and of what, in words.
        numbers: Metric, of pruned also for the dense line, -> value.
        protocol: "perplexity" and "zero_shot" -> facts as `compare` names them.
        metrics: Task -> "acc" or "acc_norm".
        ours: Key -> labels of our rows of the same method; None: the dense row.
        recipe: Key -> labels of the same recovery.
    """

    model: str
    paper: str
    source: str
    method: str
    ratio: str
    numbers: Mapping[str, float]
    protocol: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, str]
    ours: Mapping[str, Sequence[str]] | None
    recipe: Mapping[str, Sequence[str]]


def load_published(models: Iterable[str]) -> list[Published]:
    """Return what was published for these models; nothing where there is no folder of references.

    Raises:
        ValueError: A file is no list of published numbers.
    """
    found = []
    for model in sorted(name for name in {*models} if re.fullmatch(r"[\w-][\w.-]*", name)):  # no path
        places = [*(root / "references" for root in EXPERIMENTS), PACKAGED]
        path = next((p for place in places if (p := place / f"{model}.yaml").exists()), None)
        try:
            papers = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
            for name, paper in papers.items():
                found += [_published(model, name, paper, row) for row in paper["rows"]]
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no list of published numbers: {error!r}") from error
    return found


def _published(model: str, name: str, paper: Mapping[str, Any], row: Mapping[str, Any]) -> Published:
    metrics = paper.get("metrics", {})
    numbers = {"pruned.size.params": row["params"]} if "params" in row else {}
    for stage, place in (("dense", "pruned"), ("pruned", "pruned"), ("recovered", "recovered")):
        for corpus, value in row.get(stage, {}).items():
            if corpus == "average" or corpus in metrics:
                path = AVERAGE if corpus == "average" else f"evaluation.zero_shot.{corpus}.{metrics[corpus]}"
                numbers[f"{place}.{path}"] = value / 100
            else:
                numbers[f"{place}.evaluation.perplexity.{corpus}.value"] = value
    return Published(
        model=model,
        paper=name,
        source=paper["source"],
        method=row["method"],
        ratio=row.get("ratio", MISSING),
        numbers=numbers,
        protocol={kind: paper.get(kind, {}) for kind in ("perplexity", "zero_shot")},
        metrics=metrics,
        ours=None if "dense" in row else _labels(row.get("ours", {})),
        recipe=_labels(paper.get("recipe", {})),
    )


def _labels(filters: Mapping[str, Any]) -> dict[str, list[str]]:
    return {key: value if isinstance(value, list) else [str(value)] for key, value in filters.items()}


def published_cell(entry: Published, draft: Draft, lines: Sequence[Line]) -> tuple[Cell, list[str]]:
    """Return a published number in one of our columns with our distance to it, and the remarks on it."""
    spec, metric = draft.spec, draft.spec.metric
    if metric not in entry.numbers:
        return Cell(), []
    theirs = dict(entry.protocol.get(metric.split(".")[2], {}))
    if metric.endswith(AVERAGE):
        theirs["metrics"] = ", ".join(f"{task} {kind}" for task, kind in entry.metrics.items())
    comparable, remarks = facts_differ(draft.comparison.common, theirs)
    value = UNITS[spec.unit] * entry.numbers[metric]
    ours = _ours(entry, draft, lines) if comparable else None
    delta = None if ours is None else ours - value
    text = f"{value:,.{spec.decimals}f}" + ("" if delta is None else f" (ours {delta:+,.{spec.decimals}f})")
    return Cell(text=text, value=value, delta=delta), remarks


def _ours(entry: Published, draft: Draft, lines: Sequence[Line]) -> float | None:
    """Return the number of our row of the same method, if there is just one."""
    found = [
        cell.value
        for line, cell in zip(lines, draft.cells, strict=True)
        if cell.value is not None and _same(entry, line, draft.spec.model)
    ]
    return found[0] if len(found) == 1 else None


def _same(entry: Published, line: Line, model: str) -> bool:
    if not entry.ours:
        return entry.ours is None and line.kind == "dense"
    filters = {**entry.ours, **(entry.recipe if model == "recovered" else {})}
    return line.kind == "run" and all(
        matches(run, *each) for run in line.of(model) for each in filters.items()
    )
