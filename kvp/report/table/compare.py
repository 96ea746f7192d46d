"""Numbers that must not be compared are not: where a column mixes what they were measured under."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvp.report.records.facts import Facts, facts, phrase
from kvp.report.records.keys import label
from kvp.report.records.runs import Run

HARD = (
    "corpus",
    "part",
    "window",
    "metrics",
    "batch_size",
    "prompt_length",
    "new_tokens",
)  # refused, not noted
MACHINE = ("device", "threads")  # the seeds of one cell may come from different machines
UNCOMMITTED = "uncommitted code"
KEYS = {  # of the configuration, behind a fact
    **{f: f"evaluation.perplexity.{f}" for f in ("part", "window", "stride", "join", "bos", "max_tokens")},
    "metrics": "evaluation.zero_shot.tasks",
    **{f: f"evaluation.zero_shot.{f}" for f in ("limit", "num_fewshot", "add_bos_token", "source")},
    **{f: f"measure.{f}" for f in ("batch_size", "prompt_length", "new_tokens", "warmup", "runs")},
    "dtype": "dtype",
}


@dataclass(frozen=True, eq=False)
class Number:
    """A run's number in a row: `metric` as it is in the record, dense.x in the dense row."""

    row: int
    run: Run
    metric: str


@dataclass(frozen=True)
class Comparison:
    """What a column's numbers were measured under.

    Attributes:
        common: What most of them share.
        remarks: What to say of a row's number.
        read: Rows of which calibration or recovery read the evaluated corpus, and which of them.
        comparable: Whether the best of the column can be told.
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
        ValueError: They must not stand in one column, or in one cell; the message names two runs and the
            filter that parts them.
    """
    under = {number: facts(number.run.record, number.metric) for number in numbers}
    names = dict.fromkeys(name for its in under.values() for name in its)
    common: Facts = {}
    remarks: dict[int, list[str]] = {}
    comparable = True
    for name in names:
        values = {number: its[name] for number, its in under.items() if name in its}
        common[name] = usual = Counter(values.values()).most_common(1)[0][0]
        if KEYS.get(name) in shown:
            continue
        _refuse_within_cells(title, name, values)
        for number, value in values.items():
            if value != usual:
                if name in HARD and not allow_mixed:
                    first = next(other for other, its in values.items() if its == usual)
                    _refuse(title, name, (first, usual), (number, value))
                comparable &= name not in HARD
                _remark(remarks, number, f"{phrase(name, value)}, most are {phrase(name, usual)}")
    read: dict[int, list[str]] = {}
    for number in numbers:
        for text in _overlaps(number):
            _remark(read, number, text)
            _remark(remarks, number, text)
        if number.run.record.provenance.dirty:
            _remark(remarks, number, UNCOMMITTED)
    return Comparison(common, remarks, read, comparable)


def facts_differ(ours: Facts, theirs: Facts) -> tuple[bool, list[str]]:
    """Whether our numbers may be compared with published ones, and what differs, in words."""
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


def _overlaps(number: Number) -> list[str]:
    """Who read the corpus of a perplexity."""
    model, *path = number.metric.split(".")
    if model == "dense" or path[:2] != ["evaluation", "perplexity"]:
        return []
    overlap = number.run.record.models()[model].evaluation.perplexity[path[2]].overlap
    readers = {"calibration": overlap.calibration}
    if model == "recovered":
        readers["recovery"] = overlap.recovery
    return [f"{reader} read the {text}" for reader, text in readers.items() if text != "none"]
