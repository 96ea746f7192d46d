"""A sweep: header, jobs, table, and an error if one of them failed."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus

from kvp.pipeline.experiment import Experiment
from kvp.record import RunRecord
from kvp.sweep.words import JOBS, apart, corpora, gathered, perplexities, read, reason, removed, stages
from kvp.tables import console_table, print_table
from kvp.tracking import Wandb, upload_command

if TYPE_CHECKING:
    from kvp.pipeline.foretell import Foretold

HEADS = ("run", "status", "removed", "pruned", "recovered", "stages", "s")

Launch = Callable[..., Sequence[JobReturn]]


class SweepFailed(RuntimeError):
    """Some jobs failed; the others were run."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job: "finished", "failed", "running" (killed), "refused" or "not run", and the record."""

    name: str
    status: str
    record: RunRecord | None
    why: str = ""

    @classmethod
    def of(cls, x: Experiment, returned: JobReturn | None, began: float) -> Outcome:
        """Return the outcome from what the launcher returned; where it returned nothing, from run.json.

        A record from before the sweep `began` (seconds since 1970) says nothing of it then.
        """
        directory = x.directory
        if returned and returned.status == JobStatus.FAILED:
            return cls(directory.name, "failed", read(directory), str(returned._return_value))
        if returned:
            directory = Path(returned.return_value)  # named by the device of the process that ran it
        record = read(directory)
        if record is None or (returned is None and _started(record) < began):
            return cls(directory.name, "not run", None)
        why = reason(record.error.type, record.error.message) if record.error else ""
        return cls(directory.name, record.status, record, why)


def sweep(
    jobs: Sequence[list[str]], experiments: Sequence[Experiment], launch: Launch, *, here: bool = True
) -> None:
    """Launch the jobs; print what is refused and what stands before, and what came of it after.

    A job that cannot end well is refused before any starts. The others run.

    Args:
        jobs: The options of each.
        experiments: What they compose.
        launch: Hydra's: from jobs to what became of them.
        here: Whether the jobs run on this machine.

    Raises:
        ValueError: All jobs are refused; nothing is started.
        SweepFailed: A job failed, or was refused.
    """
    from kvp.pipeline.gate import refusal  # modelling code, which a wrong option need not wait for
    from kvp.sweep.ahead import listed
    from kvp.sweep.census import census
    from kvp.sweep.queue import queued

    began = time.time()
    reasons = [refusal(x, here=here) for x in experiments]
    refused = [(own, why) for own, why in zip(apart(jobs), reasons, strict=True) if why]
    if len(refused) == len(jobs):
        raise ValueError(" | ".join([*gathered(refused, len(jobs)), "nothing was started"]))
    for words in gathered(refused, len(jobs)):
        print(f"refused: {words}", flush=True)
    group = _group(experiments)
    fine = [n for n, why in enumerate(reasons) if not why]
    for n in fine:
        job, x = jobs[n], experiments[n]
        if isinstance(x.tracker, Wandb) and x.tracker.group is None and x.group != group:
            job.append(f"tracker.group='{group}'")
        if x.force and not any(word.startswith("since=") for word in job):
            job.append(f"since={began}")  # what one job has made again, the others find
    chains: list[list[Foretold]] = []
    for words in census([experiments[n] for n in fine], chains):
        print(words, flush=True)  # before the jobs of other processes
    os.environ[JOBS] = str(len(fine))
    outcomes = {
        n: Outcome(x.name, "refused", None, reasons[n]) for n, x in enumerate(experiments) if reasons[n]
    }
    try:
        with listed(chains), queued(experiments[0].runs, [experiments[n].name for n in fine]):
            returns = _launched([jobs[n] for n in fine], [experiments[n] for n in fine], launch, began)
    except BaseException:
        returns = [None] * len(fine)
        raise
    finally:
        outcomes |= {
            n: Outcome.of(experiments[n], each, began) for n, each in zip(fine, returns, strict=True)
        }
        shown = [outcomes[n] for n in range(len(jobs))]
        _print(shown, time.time() - began)
    if failed := sum(outcome.status != "finished" for outcome in shown):
        also = f", {len(refused)} of them refused before they started" if refused else ""
        raise SweepFailed(
            f"{failed} of {len(jobs)} jobs failed{also}: their run.json holds the traceback, run.log beside it what "
            "they printed; the same command finds what is finished and tries these again"
        )


def _launched(
    jobs: Sequence[list[str]], experiments: Sequence[Experiment], launch: Launch, began: float
) -> Sequence[JobReturn | None]:
    """Launch the jobs; where a worker is killed, launch once more what its end took with it.

    A pool of processes ends with any of its workers. The jobs that it left are found by their run.json.
    """
    try:
        return launch(jobs, initial_job_idx=0)
    except BrokenProcessPool as error:
        left = [n for n, x in enumerate(experiments) if Outcome.of(x, None, began).status != "finished"]
        print(
            f"a worker was killed, as when memory runs out ({_short(error)}); {len(left)} jobs go on",
            flush=True,
        )
    returns: list[JobReturn | None] = [None] * len(jobs)
    try:
        again = launch([jobs[n] for n in left], initial_job_idx=0)
    except BrokenProcessPool:
        print(
            "a worker was killed again: fewer processes (hydra.launcher.n_jobs) or smaller batches",
            flush=True,
        )
        return returns
    for n, each in zip(left, again, strict=True):
        returns[n] = each
    return returns


def _started(record: RunRecord) -> float:
    """Return when a run started, in seconds since 1970, rounded up to those that its record holds."""
    try:
        return datetime.fromisoformat(record.provenance.started).timestamp() + 1
    except ValueError:
        return 0.0


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _group(experiments: Sequence[Experiment]) -> str:
    """Return the group of all jobs in a tracker: "smollm2_135m-kvpruner+random"."""
    models = {x.source.name for x in experiments}
    strategies = {x.chosen("strategy") for x in experiments}
    return "-".join("+".join(sorted(names)) for names in (models, strategies))


def _print(outcomes: Sequence[Outcome], seconds: float) -> None:
    finished = [each.record for each in outcomes if each.status == "finished" and each.record]
    title = f"{len(finished)} of {len(outcomes)} jobs finished, {seconds:.0f} s; perplexity: {corpora(finished) or '-'}"
    rows = [[outcome.name, outcome.status, *_cells(outcome)] for outcome in outcomes]
    print_table(console_table(HEADS, rows, title=title))
    for outcome in outcomes:
        if outcome.why:
            print(f"{outcome.name}: {outcome.why}")
    offline = [record.tracker for record in finished if record.tracker and upload_command(record.tracker)]
    if offline:
        print(f"to upload: wandb sync {shlex.join(offline)}")


def _cells(outcome: Outcome) -> list[str]:
    record = outcome.record
    if outcome.status != "finished" or record is None:
        return [""] * 5
    models = record.models()
    pruned, tuned = (
        perplexities(models[name]) if name in models else "-" for name in ("pruned", "recovered")
    )
    return [removed(record), pruned, tuned, stages(record), f"{record.provenance.seconds:.1f}"]
