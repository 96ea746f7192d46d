"""Rows before their numbers: the dense baseline, the dense model tuned alike, and a row per combination of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from kvp.report.records.keys import MISSING, PRUNING, differences, label, order, recovers, untouched
from kvp.report.records.runs import Run
from kvp.report.table.table import Kind

NAMES = {"dense": "dense", "control": "dense, tuned alike"}
IDLE: dict[Kind, tuple[str, ...]] = {  # nodes of the configuration without effect on a kind of row
    "dense": (*PRUNING, "cache", "recovery"),
    "control": (*PRUNING, "cache"),
    "run": (),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row before its numbers.

    Attributes:
        kind: Baseline, control or run.
        labels: Label by key; a dash where the key has no effect.
        runs: The runs with these labels.
        untuned: The runs that share the model before tuning, whatever their recovery.
        section: Number of the group of rows; the baselines are group 0.
    """

    kind: Kind
    labels: dict[str, str]
    runs: tuple[Run, ...]
    untuned: tuple[Run, ...] = ()
    section: int = 0

    def of(self, model: str) -> tuple[Run, ...]:
        """Return the runs that have a number of a model."""
        return tuple(filter(recovers, self.runs)) if model == "recovered" else self.untuned

    def alike(self, other: Line, without: Collection[str]) -> bool:
        """Whether two rows have the same labels, apart from the keys of the nodes `without`."""
        keys = [key for key in self.labels if key.partition(".")[0] not in without]
        return all(self.labels[key] == other.labels[key] for key in keys)


def make_lines(runs: Sequence[Run], keys: Sequence[str], group: Collection[str] = ()) -> list[Line]:
    """Return the rows, sorted: baselines first, then the combinations, in sections by the keys in `group`.

    A combination that differs from another only by not being tuned needs no row: its numbers stand there.
    """
    members: dict[Kind, list[Run]] = {
        "dense": list(runs),
        "control": [run for run in runs if untouched(run) and recovers(run)],
        "run": [run for run in runs if not untouched(run)],
    }
    lines = [line for kind, some in members.items() for line in _of_kind(kind, some, keys, group)]
    return _in_sections([_pooled(line, lines) for line in lines if not _covered(line, lines)], group)


def _of_kind(kind: Kind, runs: Sequence[Run], keys: Sequence[str], group: Collection[str]) -> list[Line]:
    """Return a row per combination of labels, sorted by the keys of the sections, then by the others."""
    applied = [key for key in keys if key.partition(".")[0] not in IDLE[kind]]
    sections_first = sorted(applied, key=lambda key: key not in group)
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: [order(run, key) for key in sections_first]):
        rows.setdefault(tuple(label(run, key) for key in applied), []).append(run)
    dashes = dict.fromkeys(keys, MISSING)
    return [
        Line(kind=kind, labels=dashes | dict(zip(applied, values, strict=True)), runs=tuple(alike))
        for values, alike in rows.items()
    ]


def _pooled(line: Line, lines: Sequence[Line]) -> Line:
    """Return the row with the runs of all rows that differ in the recovery only."""
    akin = [other for other in lines if other.kind == line.kind and other.alike(line, ("recovery",))]
    return replace(line, untuned=tuple(run for other in akin for run in other.runs))


def _covered(line: Line, lines: Sequence[Line]) -> bool:
    """Whether the row is untuned and another row shows the same model with a recovery."""
    return not any(map(recovers, line.runs)) and any(
        other.kind == line.kind and other.alike(line, ("recovery",)) and any(map(recovers, other.runs))
        for other in lines
    )


def _in_sections(lines: Sequence[Line], group: Collection[str]) -> list[Line]:
    """Number the sections: a new one begins where a label of the group changes; baselines are section 0."""
    numbered: list[Line] = []
    seen: list[tuple[str, ...] | None] = []
    for line in lines:
        title = tuple(line.labels[key] for key in group) if line.kind == "run" else None
        if not seen or seen[-1] != title:
            seen.append(title)
        numbered.append(replace(line, section=len(seen) - 1))
    return numbered


def vary(runs: Sequence[Run], keys: Sequence[str], models: Collection[str]) -> list[str]:
    """Return further keys that tell apart what would else share a row and differs in more than the seed."""
    found: list[str] = []
    while key := _most_telling(runs, [*keys, *found], models):
        found.append(key)
    return found


def _most_telling(runs: Sequence[Run], keys: Sequence[str], models: Collection[str]) -> str | None:
    """Return the key that parts the rows under these keys best; None if each row holds one setting."""
    counts: Counter[str] = Counter()
    for line in make_lines(runs, keys):
        for model in {"dense"} if line.kind == "dense" else {*models} - {"dense"}:
            counts |= Counter(differences(line.of(model), model))
    # a class says more than its settings, and the setting of most values more than the others
    ranked = sorted(counts, key=lambda key: (not key.endswith(".class"), -counts[key], key))
    nodes = [key.removesuffix(".class") for key in ranked]
    return next((key for key in (*nodes, *ranked) if key not in keys), None)
