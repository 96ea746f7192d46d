"""The dry run of jobs: what stands, what is to do, what that takes, what is missing.

Nothing is computed, downloaded or written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from kvp.measurement.memory import available_bytes
from kvp.models.published import config_of
from kvp.pipeline.clock import Clock
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.forecast import duration
from kvp.pipeline.foretell import Foretold
from kvp.pipeline.gate import missing_sources, refusal
from kvp.pipeline.needs import Need, needs
from kvp.sweep.census import census, in_bytes
from kvp.sweep.words import apart, gathered
from kvp.tables import console_table, print_table

PHASES = ("phase", "of", "peak", "time for one model", "known by")
HEADS = ("run", "stand", "to do", "peak", "in")


def dry_run(jobs: Sequence[Sequence[str]], experiments: Sequence[Experiment], *, here: bool = True) -> None:
    """Print what jobs would do and take.

    Args:
        jobs: The options of each.
        experiments: What they compose.
        here: Whether they would run on this machine.

    Raises:
        ValueError: A job would be refused, or a source is missing here; each reason once, with its jobs.
    """
    chains: list[list[Foretold]] = []
    for words in census(experiments, chains):
        print(words)
    wants = [_needs(x) for x in experiments]
    rows = [
        [x.name, *_stages(chain), *_peak(need)]
        for x, chain, need in zip(experiments, chains, wants, strict=True)
    ]
    print_table(console_table(HEADS, rows, title="dry run: nothing is computed, nothing is written"))
    _print_phases(experiments, wants, here)
    refused = [
        (own, why)
        for own, x in zip(apart(jobs), experiments, strict=True)
        for why in missing_sources(x, here=here) or [refusal(x, here=here)]
        if why
    ]
    if refused:
        raise ValueError("\n".join(["these jobs would be refused:", *gathered(refused, len(jobs))]))


def _print_phases(experiments: Sequence[Experiment], wants: Sequence[Sequence[Need]], here: bool) -> None:
    """Print the largest of each phase of all jobs, and the seconds that it takes for one model."""
    largest: dict[str, tuple[Experiment, Need]] = {}
    for x, each in zip(experiments, wants, strict=True):
        for need in each:
            if need.phase not in largest or largest[need.phase][1].memory["total"] < need.memory["total"]:
                largest[need.phase] = x, need
    clocks = {x.name: Clock(x, config_of(x.source)[0], here=here) for x, _ in largest.values()}
    rows = []
    for x, need in largest.values():
        seconds, known_by = clocks[x.name].seconds(need)
        known = "-" if seconds is None else duration(seconds)
        rows.append([need.phase, need.size, in_bytes(need.memory["total"]), known, known_by])
    device = experiments[0].device
    free = f", {in_bytes(available_bytes(torch.device(device)))} free" if here else ""
    print_table(console_table(PHASES, rows, title=f"the largest of each phase on {device}{free}", labels=2))


def _needs(x: Experiment) -> list[Need]:
    """Return what the phases of a job take; nothing if its config is out of reach."""
    try:
        return needs(x, config_of(x.source)[0])
    except (OSError, ValueError):
        return []


def _stages(chain: Sequence[Foretold]) -> tuple[str, str]:
    if not chain:
        return "?", "?"
    stand = sum(stage.stands for stage in chain)
    missing = Counter(stage.kind for stage in chain if not stage.stands)
    return str(stand), ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in missing.items())


def _peak(wants: Sequence[Need]) -> tuple[str, str]:
    most = max(wants, key=lambda need: need.memory["total"], default=None)
    return (in_bytes(most.memory["total"]), most.phase) if most else ("?", "?")
