"""An answer as tables."""

from __future__ import annotations

from kvp.fit.answer import Answer
from kvp.pipeline.forecast import duration
from kvp.tables import console_table, print_table

GIB = 2**30
SERVING = (
    "model",
    "cache",
    "KiB a token",
    "weights",
    "cache",
    "activations",
    "total",
    "fits",
    "batch",
    "context",
)
PHASES = ("phase", "of", "weights", "rest", "peak", "fits", "time", "known by")


def show(answer: Answer) -> None:
    """Print what serving takes, what the phases of a run take, and what was assumed."""
    print(
        f"{answer.model}: {answer.params / 1e9:.3g} billion parameters, {answer.layers} layers, {answer.positions} "
        f"positions ({answer.origin}); {answer.dtype} on {answer.device}, {_gib(answer.memory)} GiB"
    )
    rows = [
        [
            row.model,
            row.cache_type,
            f"{row.bytes_per_token / 1024:,.1f}",
            *map(_gib, (row.weights, row.cache, row.activations, row.total)),
            _yes(row.fits),
            f"{row.batch:,}",
            f"{row.context:,}",
        ]
        for row in answer.serving
    ]
    per_model = len({row.cache_type for row in answer.serving})
    title = (
        f"serving {answer.batch} x {answer.context:,} tokens (GiB); at most this batch at {answer.context:,} tokens, "
        f"this context at batch {answer.batch}"
    )
    ends = range(per_model - 1, len(rows), per_model)
    print_table(console_table(SERVING, rows, title=title, labels=2, ends=ends))
    phases = [
        [
            phase.phase,
            phase.size,
            *map(_gib, (phase.weights, phase.rest, phase.total)),
            _yes(phase.fits),
            "-" if phase.seconds is None else duration(phase.seconds),
            phase.known_by,
        ]
        for phase in answer.phases
    ]
    print_table(console_table(PHASES, phases, title="a run's phases, of the dense model (GiB)", labels=2))
    if answer.host:
        print(f"cutting and merging work on the CPU: {_gib(answer.host)} GiB of main memory")
    for note in answer.notes:
        print(note)


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f}"


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"
