"""Comparison of a column's numbers: some differences are refused, others are footnotes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvp.record import MODELS
from kvp.report.records.facts import Facts, facts, phrase
from kvp.report.records.keys import label
from kvp.report.records.runs import Run

# facts that are refused in one column; other differences get a footnote
HARD = ("corpus", "part", "window", "metrics", "batch_size", "prompt_length", "new_tokens", "choices", "hops")
MACHINE = ("device", "threads")  # facts in which the seeds of one cell may differ
UNCOMMITTED = "uncommitted code"
PLACES = {"evaluation": "evaluate", "measure": "measure"}  # stages behind a part of a model's record
KEYS = {  # the key of the configuration behind a fact
    **{f: f"evaluation.perplexity.{f}" for f in ("part", "window", "stride", "join", "bos", "max_tokens")},
    "metrics": "evaluation.zero_shot.tasks",
    **{f: f"evaluation.zero_shot.{f}" for f in ("limit", "num_fewshot", "add_bos_token", "source")},
    **{f: f"evaluation.needles.{f}" for f in ("choices", "hops")},
    **{f: f"measure.{f}" for f in ("batch_size", "prompt_length", "new_tokens", "warmup", "runs")},
    "dtype": "dtype",
}


@dataclass(frozen=True, eq=False)
class Number:
    """A run's number in a row; `metric` is the path in the record, dense.x in the dense row."""

    row: int
    run: Run
    metric: str


@dataclass(frozen=True)
class Comparison:
    """The facts of a column's numbers, and where they differ.

    Attributes:
        common: The facts that most of them share.
        remarks: What to say of a number, by row.
        read: Who read the evaluated corpus before (calibration, recovery), by row.
        comparable: Whether the column can have a best number.
    """

    common: Facts
    remarks: Mapping[int, list[str]]
    read: Mapping[int, list[str]]
    comparable: bool


def compare(
    title: str, numbers: Sequence[Number], shown: Collection[str], *, allow_mixed: bool
) -> Comparison:
    """Compare the numbers of a column; facts whose key is `shown` as a label of the rows may differ.

    Raises:
        ValueError: Numbers must not stand in one column, or in one cell; the message names two runs and the
            filter that parts them.
    """
    under = {number: facts(number.run.record, number.metric) for number in numbers}
    common: Facts = {}
    remarks: dict[int, list[str]] = {}
    read: dict[int, list[str]] = {}
    comparable = True
    for name in dict.fromkeys(name for known in under.values() for name in known):
        values = {number: known[name] for number, known in under.items() if name in known}
        common[name] = usual = Counter(values.values()).most_common(1)[0][0]
        if KEYS.get(name) in shown:
            continue
        _refuse_within_cells(title, name, values)
        different = {number: value for number, value in values.items() if value != usual}
        if different and name in HARD and not allow_mixed:
            first = next(number for number, value in values.items() if value == usual)
            _refuse(title, name, (first, usual), next(iter(different.items())))
        comparable &= not different or name not in HARD
        for number, value in different.items():
            _remark(remarks, number, f"{phrase(name, value)}, most are {phrase(name, usual)}")
    for number in numbers:
        for text in _overlaps(number):
            _remark(read, number, text)
            _remark(remarks, number, text)
        for text in _uncommitted(number):
            _remark(remarks, number, text)
    return Comparison(common, remarks, read, comparable)


def facts_differ(ours: Facts, theirs: Facts) -> tuple[bool, list[str]]:
    """Return whether our numbers may be compared with published ones, and what differs, in words."""
    differing = [name for name, value in theirs.items() if name in ours and ours[name] != value]
    remarks = [f"{phrase(name, theirs[name])}, ours {phrase(name, ours[name])}" for name in differing]
    return not {*HARD, "max_tokens", "limit"} & {*differing}, remarks


def _remark(remarks: dict[int, list[str]], number: Number, text: str) -> None:
    texts = remarks.setdefault(number.row, [])
    if text not in texts:
        texts.append(text)


def _refuse_within_cells(title: str, name: str, values: Mapping[Number, Any]) -> None:
    first: dict[int, tuple[Number, Any]] = {}
    for number, value in values.items():
        other = first.setdefault(number.row, (number, value))
        if other[1] != value and name not in MACHINE:
            _refuse(title, name, other, (number, value), cell=True)


def _refuse(title: str, name: str, *pair: tuple[Number, Any], cell: bool = False) -> None:
    (a, under_a), (b, under_b) = pair
    key = KEYS.get(name, "")
    told_apart = label(a.run, key) != label(b.run, key)
    ways = [f"--where {key}={label(a.run, key)}" if told_apart else "report on one of them"]
    ways += [] if cell else ["--allow-mixed (which footnotes them)"]
    place = "be averaged in one cell" if cell else "stand in one column"
    raise ValueError(
        f"{title}: {a.run.name} ({phrase(name, under_a)}) and {b.run.name} ({phrase(name, under_b)}) must not "
        f"{place}; {' or '.join(ways)}"
    )


def _uncommitted(number: Number) -> list[str]:
    """Return which code behind a number no commit of kvp holds: edits of kvp, and the user's own packages.

    Where a stage does not know its code, the state of the whole checkout stands for it.
    """
    record, (model, *path) = number.run.record, number.metric.split(" - ")[0].split(".")
    stages = record.behind(model if model in MODELS else "pruned", PLACES.get(path[0] if path else "", ""))
    unknown = [stage for stage in stages if stage.code is None]
    makers = record.origins(unknown) if any(stage.origins for stage in unknown) else record.provenance.origins
    packages = sorted({name.partition(".")[0] for stage in stages for name in stage.edits})
    edited = "kvp" in packages or ((unknown or not stages) and any(maker.dirty for maker in makers))
    own = [name for name in packages if name != "kvp"]
    return [*([UNCOMMITTED] if edited else []), *([f"code of {', '.join(own)}"] if own else [])]


def _overlaps(number: Number) -> list[str]:
    """Return who read the corpus of a perplexity before: "calibration read the same text"."""
    model, *path = number.metric.split(".")
    if model == "dense" or path[:2] != ["evaluation", "perplexity"]:
        return []
    overlap = number.run.record.models()[model].evaluation.perplexity[path[2]].overlap
    readers = {"calibration": overlap.calibration}
    if model == "recovered":
        readers["recovery"] = overlap.recovery
    return [f"{reader} read the {text}" for reader, text in readers.items() if text != "none"]
