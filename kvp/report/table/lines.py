"""Which runs stand in which row: the dense baseline, the dense model tuned alike, and a row per combination."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from kvp.report.records.keys import PRUNING, differences, label, order, recovers, untouched
from kvp.report.records.runs import Run
from kvp.report.table.table import MISSING, Kind

NAMES = {"dense": "dense", "control": "dense, tuned alike"}
IDLE: dict[Kind, tuple[str, ...]] = {
    "dense": (*PRUNING, "cache", "recovery"),
    "control": (*PRUNING, "cache"),
    "run": (),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row before its numbers.

    Attributes:
        labels: By key; a dash where the key has no effect.
        runs: Those with these labels.
        untuned: Those that share the model before tuning: runs of other recoveries, or of none, as well.
        section: Counts the groups of rows from 0, the baselines.
    """

    kind: Kind
    labels: dict[str, str]
    runs: tuple[Run, ...]
    untuned: tuple[Run, ...] = ()
    section: int = 0

    def of(self, model: str) -> tuple[Run, ...]:
        """The runs that have a number of this model."""
        return tuple(filter(recovers, self.runs)) if model == "recovered" else self.untuned

    def alike(self, other: Line, without: Collection[str]) -> bool:
        """Whether two rows have the same labels, apart from the keys of these nodes."""
        keys = [key for key in self.labels if key.partition(".")[0] not in without]
        return all(self.labels[key] == other.labels[key] for key in keys)


def make_lines(runs: Sequence[Run], keys: Sequence[str], group: Collection[str] = ()) -> list[Line]:
    """The rows, sorted: baselines first, then the combinations, in sections by the keys in `group`.

    A combination that differs from another only by not being tuned needs no row: its numbers stand there.
    """
    members: dict[Kind, list[Run]] = {
        "dense": list(runs),
        "control": [run for run in runs if untouched(run) and recovers(run)],
        "run": [run for run in runs if not untouched(run)],
    }
    lines: list[Line] = []
    for kind, its in members.items():
        applied = [key for key in keys if key.partition(".")[0] not in IDLE[kind]]
        first = sorted(applied, key=lambda key: key not in group)
        rows: dict[tuple[str, ...], list[Run]] = {}
        for run in sorted(its, key=lambda run: [order(run, key) for key in first]):
            rows.setdefault(tuple(label(run, key) for key in applied), []).append(run)
        for values, its in rows.items():
            labels = dict.fromkeys(keys, MISSING) | dict(zip(applied, values, strict=True))
            lines.append(Line(kind=kind, labels=labels, runs=tuple(its)))
    return _in_sections([_pooled(line, lines) for line in lines if not _covered(line, lines)], group)


def _pooled(line: Line, lines: Sequence[Line]) -> Line:
    akin = [other for other in lines if other.kind == line.kind and other.alike(line, ("recovery",))]
    return replace(line, untuned=tuple(run for other in akin for run in other.runs))


def _covered(line: Line, lines: Sequence[Line]) -> bool:
    return not any(map(recovers, line.runs)) and any(
        other.kind == line.kind and other.alike(line, ("recovery",)) and any(map(recovers, other.runs))
        for other in lines
    )


def _in_sections(lines: Sequence[Line], group: Collection[str]) -> list[Line]:
    """Baselines are section 0; a change of a label of the group begins the next."""
    numbered: list[Line] = []
    section, before = 0, None
    for line in lines:
        now = line.kind == "run", *(line.labels[key] for key in group if line.kind == "run")
        section += before is not None and now != before
        numbered.append(replace(line, section=section))
        before = now
    return numbered


def vary(runs: Sequence[Run], keys: Sequence[str], models: Collection[str]) -> list[str]:
    """Further keys that tell apart what would else share a row, and differs in more than the seed."""
    found: list[str] = []
    while True:
        counts: Counter[str] = Counter()
        for line in make_lines(runs, [*keys, *found]):
            for model in {"dense"} if line.kind == "dense" else {*models} - {"dense"}:
                counts |= Counter(differences(line.of(model), model))
        # a class says more than its settings, and the setting of most values more than the others
        ranked = sorted(counts, key=lambda key: (not key.endswith(".class"), -counts[key], key))
        new = [key for key in map(_short, ranked) if key not in (*keys, *found)] or [
            key for key in ranked if key not in (*keys, *found)
        ]
        if not new:
            return found
        found.append(new[0])


def _short(key: str) -> str:
    return key.removesuffix(".class")
