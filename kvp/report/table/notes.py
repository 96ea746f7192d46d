"""Notes below a table: protocols, how to read the numbers, what they lack."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvp.report.records.facts import Facts, phrase, phrases
from kvp.report.records.keys import recovers
from kvp.report.table.cells import AT_CHANCE, Draft
from kvp.report.table.lines import Line

CONTROL_NOTE = (
    'read recovered numbers against "dense, tuned alike": tuning on text lowers perplexity by itself'
)
NO_CONTROL = (
    "some recovered rows have no dense model tuned by the same recipe (strategy=none): part of what they gain "
    "is what tuning gives any model"
)


def make_notes(drafts: Sequence[Draft], lines: Sequence[Line], extra: Sequence[str]) -> list[str]:
    """Return the notes of a table; `extra` are the keys that label rows without being asked for."""
    protocols: dict[str, list[str]] = {}
    for draft in drafts:
        common = draft.comparison.common
        subject, said = _subject(draft.spec.metric, common)
        if words := phrases(common, leave_out=(*said, "corpus", "join", "kv_bytes", "data_hash")):
            subjects = protocols.setdefault("; ".join(words), [])
            subjects += [subject] if subject not in subjects else []
    notes = [f"{', '.join(subjects)}: {words}" for words, subjects in protocols.items()]
    if any(cell.std for draft in drafts for cell in draft.cells):
        notes.append("± is the standard deviation over seeds")
    if any(cell.stderr for draft in drafts for cell in draft.cells):
        notes.append("± of a task in one run is the standard error over its documents")
    if any(cell.text == AT_CHANCE for draft in drafts for cell in draft.cells):
        notes.append(
            "at chance: guessing gets as much right with a probability above 5 % (binomial), or as much as the dense "
            "model; such an accuracy says nothing"
        )
    if any(cell.delta is not None for draft in drafts for cell in draft.cells):
        notes.append("in brackets: distance to dense, of recovered numbers to dense tuned alike")
    if any(draft.spec.model == "recovered" for draft in drafts):
        notes.append(CONTROL_NOTE if _controlled(lines) else NO_CONTROL)
    if extra:
        notes.append(f"not asked for, shown because it varies: {', '.join(extra)}")
    return notes


def _subject(metric: str, common: Facts) -> tuple[str, Collection[str]]:
    """Return what a protocol belongs to, and the facts that it says already."""
    if metric.startswith("pruning."):
        return "pruning", ()
    if "corpus" in common:
        return f"perplexity of {common['corpus']}", ()
    if ".evaluation.needles." in metric:
        return f"needles {metric.split('.')[3]}", ()
    if ".evaluation." not in metric:
        return "speed and memory", ()
    if ".average." in metric or "metrics" not in common or "version" not in common:
        return "zero-shot", ()
    return f"{common['metrics']} ({phrase('version', common['version'])})", ("metrics", "version")


def _controlled(lines: Sequence[Line]) -> bool:
    """Whether every tuned run has a dense model tuned by the same recipe beside it."""

    def recipes(kind: str) -> set[str]:
        tuned = [run for line in lines if line.kind == kind for run in line.runs if recovers(run)]
        return {repr([run.record.config[node] for node in ("model", "recovery")]) for run in tuned}

    return recipes("run") <= recipes("control")
