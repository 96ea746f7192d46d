"""Time steps of a model while its threads wait for each other in several ways, alone and beside busy processes.

    python -m experiments.scripts.waiting [--model NAME] [--turns N] [--busy N,N] [--out FILE]

    asleep      a thread sleeps at once and must be woken (OMP_WAIT_POLICY=PASSIVE alone)
    2,000       it stays awake for 2,000 rounds of GNU's OpenMP first, which kvp's commands set
    300,000     it stays awake for 300,000 rounds, OpenMP's own default

    LoRA        a step of two sequences of 128 tokens
    decode      five eager steps of four sequences, after 128 tokens and those of earlier turns

OpenMP reads how to wait when it starts, so every way has a process of its own. They take turns, forth and back, beside
as many others as --busy says, each of which keeps a core busy. A ratio is the median over the turns of the seconds of
threads asleep by a way's own, so more is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from kvp import children
from kvp.bench.models import find_subjects
from kvp.bench.rounds import ratio
from kvp.measurement.paths import Eager
from kvp.measurement.speed import quartiles
from kvp.provenance import provenance
from kvp.recovery.batches import lose_without_logits
from kvp.recovery.lora import PROJECTIONS
from kvp.tables import markdown
from kvp.threads import BRIEFLY

ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
WAYS = {"asleep": ASLEEP, "2,000": BRIEFLY, "300,000": {**ASLEEP, "GOMP_SPINCOUNT": "300000"}}
WORK = ("LoRA", "decode")
WARMUP = 2  # turns that do not count
BUSY = [sys.executable, "-c", "while True: pass"]


def main() -> None:
    """Measure every work beside every number of busy processes, write the record and print its table."""
    args = _parser().parse_args()
    if args.work:
        _serve(args.work, args.model)
        return
    rows: list[dict[str, Any]] = []
    for work in WORK:
        with ExitStack() as stack:
            ways = {way: stack.enter_context(_server(way, work, args.model)) for way in WAYS}
            for busy in args.busy:
                rows += _measured(ways, work, busy, args.turns)
                print(_table(rows), file=sys.stderr, flush=True)
    record = {
        "model": args.model,
        "rows": rows,
        "ratios": {
            f"{row['work']}, {row['way']} / asleep, {row['busy']} busy": row["ratio"]
            for row in rows
            if row["way"] != "asleep"
        },
        "provenance": {
            **provenance("cpu"),
            "command": " ".join(["python -m experiments.scripts.waiting", *sys.argv[1:]]),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(rows))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments.scripts.waiting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", default="smollm2_135m_shape", metavar="NAME", help="a shape of conf/model")
    made.add_argument("--turns", type=int, default=8, metavar="N", help="turns that count")
    made.add_argument(
        "--busy",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(0, 1, 2),
        metavar="N,N",
        help="processes that keep a core busy meanwhile",
    )
    made.add_argument("--out", type=Path, default=Path("outputs/waiting.json"), metavar="FILE")
    made.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    return made


@contextmanager
def _server(way: str, work: str, model: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that does the work once for every line that it is sent."""
    command = [sys.executable, "-m", "experiments.scripts.waiting", "--work", work, "--model", model]
    others = {name: value for name, value in os.environ.items() if name not in BRIEFLY}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with children.start(command, env={**others, **WAYS[way]}, **pipes) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def _measured(
    ways: dict[str, subprocess.Popen[str]], work: str, busy: int, turns: int
) -> list[dict[str, Any]]:
    """Return a row per way: its seconds, and how many times as fast as asleep it is."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    others = [children.start(BUSY) for _ in range(busy)]
    try:
        for turn in range(WARMUP + turns):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                seconds[way].append(_once(ways[way]))
    finally:
        for other in others:
            other.kill()
            other.wait()
    counted = {way: own[WARMUP:] for way, own in seconds.items()}
    return [
        {
            "work": work,
            "busy": busy,
            "way": way,
            "seconds": {"median": quartiles(own)[1], "turns": own},
            "ratio": ratio(own, counted["asleep"]),
        }
        for way, own in counted.items()
    ]


def _once(process: subprocess.Popen[str]) -> float:
    """Return the seconds that a process took for its work."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _serve(work: str, model: str) -> None:
    """Do the work once for every line, and print its seconds."""
    step = {"LoRA": _lora, "decode": _decode}[work](model)
    for _ in sys.stdin:
        begun = time.perf_counter()
        step()
        print(time.perf_counter() - begun, flush=True)


def _shape(model: str) -> PreTrainedModel:
    return find_subjects(model)[0].load(device=torch.device("cpu"), dtype=torch.float32, seed=0)


def _lora(model: str) -> Callable[[], None]:
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    tuned = get_peft_model(_shape(model), config).train()
    lose_without_logits(tuned.get_base_model())  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3, fused=True)
    ids = torch.randint(1000, (2, 128), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _decode(model: str) -> Callable[[], None]:
    decoder = Eager(_shape(model))

    @torch.inference_mode()
    def steps() -> None:
        for _ in range(5):
            decoder.step()

    with torch.inference_mode():
        decoder.read(torch.randint(1000, (4, 128), generator=torch.Generator().manual_seed(0)))
    return steps


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown: milliseconds, and how many times as fast as asleep they are."""
    lines = [
        [
            row["work"],
            str(row["busy"]),
            row["way"],
            f"{1e3 * row['seconds']['median']:.0f}",
            f"{row['ratio']['median']:.2f}",
        ]
        for row in rows
    ]
    return markdown(["work", "busy processes", "threads wait", "ms", "x asleep"], lines, labels=3)


if __name__ == "__main__":
    main()
