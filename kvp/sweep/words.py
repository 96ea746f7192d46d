"""Words of a sweep about one job: cells of the table, and the line when it ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvp.record import RunRecord
from kvp.results import ModelRecord

FEW = 3  # jobs that a line names
JOBS = "KVP_SWEEP_JOBS"  # how many there are, for the processes that run them


def read(directory: Path) -> RunRecord | None:
    """Return the record of a run; None if there is none to be read."""
    try:
        return RunRecord.read(directory / "run.json")
    except (OSError, ValueError):
        return None


def line(number: int, status: str, name: str, text: str = "") -> str:
    """Return the line of a job that started or ended: "[ 4/18] finished <run>: ..."."""
    jobs = os.environ.get(JOBS, "?")
    return f"[{number + 1:>{len(jobs)}}/{jobs}] {status:<8} {name}{f': {text}' if text else ''}"


def facts(record: RunRecord) -> str:
    """Return what a finished run removed, found and took, in one line."""
    names = corpora([record])
    found = " > ".join(map(perplexities, record.models().values()))
    quality = f"perplexity {names} {found}" if names else "no perplexity"
    return f"{removed(record)}; {quality}; {stages(record)}; {record.provenance.seconds:.0f} s"


def reason(kind: str, message: str) -> str:
    """Return an error in one line: the class, and the last line of the message that is not empty."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{kind}: {lines[-1]}" if lines else kind


def removed(record: RunRecord) -> str:
    """Return what a finished run removed of what was asked for: "25.0 % of kv_cache", or "nothing"."""
    asked, achieved = record.ratio.asked, record.ratio.achieved or {}
    if asked is None:
        return "nothing"
    return f"{100 * achieved[asked.of]:.1f} % of {asked.of}" if asked.of in achieved else f"no {asked.of}"


def corpora(records: Sequence[RunRecord]) -> str:
    """Return the names of the corpora of finished runs, in the order of `perplexities`: "squad / drop"."""
    evaluated = [record.models()["dense"].evaluation.perplexity for record in records]
    return " | ".join(dict.fromkeys(map(" / ".join, evaluated)))


def perplexities(model: ModelRecord) -> str:
    """Return the perplexities of a model, one per corpus: "20.51 / 33.08"."""
    return " / ".join(f"{result.value:.2f}" for result in model.evaluation.perplexity.values())


def stages(record: RunRecord) -> str:
    """Return how many stages of a run were found and how many computed: "3 found, 2 computed"."""
    found = sum(stage.found for stage in record.stages)
    return f"{found} found, {len(record.stages) - found} computed"


def apart(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return what each job has that the others have not, as words of a command; all of it for a single one."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in job if word not in common) for job in jobs]


def gathered(refused: Sequence[tuple[str, str]], jobs: int) -> list[str]:
    """Return one line for all jobs that are refused alike: how many, why, and which.

    Args:
        refused: (job, reason) pairs.
        jobs: How many jobs there are.
    """
    alike: dict[str, list[str]] = {}
    for job, why in refused:
        alike.setdefault(why, []).append(job)
    return [_alike(why, names, jobs) for why, names in alike.items()]


def _alike(why: str, names: Sequence[str], jobs: int) -> str:
    if jobs == 1:
        return why
    if len(names) == jobs:
        return f"all {jobs} jobs: {why}"
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return f"{len(names)} of {jobs} jobs: {why} ({'; '.join(names[:FEW])}{more})"


def makers(record: RunRecord) -> str:
    """Return the code behind a run's stages: "code 033dd9bc, cee8cf82 with edits, mypkg"."""
    commits = (
        f"{(o.commit or o.kvp)[:8]}{' with edits' if o.dirty else ''}" for o in record.provenance.origins
    )
    own = {name.partition(".")[0] for stage in record.stages for name in stage.edits} - {"kvp"}
    unknown = ["of unknown origin"] if any(not stage.origins for stage in record.stages) else []
    return f"code {', '.join([*dict.fromkeys(commits), *sorted(own), *unknown])}"
