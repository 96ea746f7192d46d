"""Measure on one GPU of 80 GB what kvp has measured on CPUs only: `make gpu`.

    python -m experiments.scripts.gpu [--minutes N] [--out DIR] [--only WORD] [--retry]
    python -m experiments.scripts.gpu --rehearse       # every kind of cell on the tiny shape, on a CPU

The study is a list of cells, the most telling first: the tests marked gpu, Mustafar's kernel, dense models beside
pruned ones of equal bytes, the peak of scoring and of a refit, then other paths and sizes. `gpu_cells` says what a cell
measures. vLLM is not in it: it needs an environment of its own (`make serve-env`, `kvp bench serve`).

Cells that share models run in one process, which a crash ends without ending the study. The study ends when its time is
up. results.json holds every finished cell and is replaced as a whole, so a killed command loses one cell at most. The
same command goes on with the cells that are missing. A failed cell says why; --retry measures those again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch is imported: see kvp/threads.py

from experiments.scripts.gpu_cells import OTHERS, PRUNED, Cell, Scale, measure
from kvp import children
from kvp.tables import markdown
from kvp.whole import write_whole

SCHEMA = 1
SHAPES = ("llama_7b_shape", "llama3_8b_shape")
POINTS = ((8, 2048), (1, 2048), (64, 512), (1, 8192))  # batch, tokens in the cache: the telling ones
REST = ((8, 512), (1, 512), (8, 8192), (64, 2048), (64, 8192))
GROUP_SECONDS = 300  # after which a process begins no further cell
CELL_SECONDS = 480  # after which a process is ended in the middle of a cell
HEADS = ("cell", "x dense: prefill", "decode", "by bytes", "failed")

Record = dict[str, Any]


def main() -> None:
    """Measure what is missing; exit code 1 if a cell has failed."""
    options = parser().parse_args()
    if options.group:
        return work(options)
    try:
        record = study(options)
    except ValueError as error:
        print(f"experiments.scripts.gpu: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(table(record))
    sys.exit(any(cell["failed"] for cell in record["cells"].values()))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = argparse.ArgumentParser(
        prog="python -m experiments.scripts.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--minutes", type=float, default=25, metavar="N", help="default: %(default)g")
    made.add_argument("--out", type=Path, default=Path("experiments/speed_gpu"), metavar="DIR")
    made.add_argument("--only", default="", metavar="WORD", help="cells whose name has this in it")
    made.add_argument("--retry", action="store_true", help="measure failed cells again")
    made.add_argument(
        "--rehearse", action="store_true", help="try the code: tiny shape, CPU, outputs/rehearsal"
    )
    made.add_argument("--group", help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return made


def cells(rehearsal: bool) -> list[Cell]:
    """Return all cells, the most telling first; those of a group follow one another."""
    shapes, points, rest = (("tiny",), ((2, 32),), ((1, 48),)) if rehearsal else (SHAPES, POINTS, REST)
    small = points[:2]
    ours = next(iter(OTHERS))

    def of(kind: str, at: Sequence[tuple[int, int]], *, path: str = "", model: str = "") -> list[list[Cell]]:
        """Return the cells of each shape at these points."""
        return [[Cell(kind, shape, model, path, *point) for point in at] for shape in shapes]

    static = {name: of("decode", points, path="static", model=name) for name in OTHERS}
    found = [
        [Cell("tests")],
        *of("kernel", points),
        *static.pop(ours),
        *([Cell("prune", shapes[0], name)] for name in PRUNED),
        *of("sparse", points[:1]),
        *(each for both in zip(*static.values(), strict=True) for each in both),
        *of("decode", points[:3], path="eager", model=ours),
        *of("decode", small, path="compiled", model=ours),
        *of("kernel", rest),
        *(each for name in list(OTHERS)[:2] for each in of("decode", rest, path="static", model=name)),
    ]
    return [cell for group in found for cell in group]


def study(options: argparse.Namespace) -> Record:
    """Measure the missing cells until the time is up, each group in a process of its own; return the record.

    Raises:
        ValueError: There is no GPU, or results.json is of another device.
    """
    options = _placed(options)
    until = time.time() + 60 * options.minutes
    record = _opened(options)
    if options.retry:
        record["cells"] = {name: cell for name, cell in record["cells"].items() if not cell["failed"]}
    _write(options.out, record)
    while time.time() < until and (missing := _missing(options, record)):
        cell = missing[0]
        print(f"{(until - time.time()) / 60:.1f} minutes left: {cell.group}", file=sys.stderr, flush=True)
        why = _in_a_process(cell.group, options, until)
        record = json.loads((options.out / "results.json").read_text())
        if why and cell.name not in record["cells"]:
            _add(options.out, record, cell, {"failed": why, "seconds": None})
    (options.out / "table.md").write_text(table(record) + "\n")
    return record


def work(options: argparse.Namespace) -> None:
    """Measure the missing cells of a group in this process, and write each as soon as it is done."""
    options = _placed(options)
    gc.collect()
    gc.freeze()  # a million objects of imported modules, which every later collection would visit
    record, begun = json.loads((options.out / "results.json").read_text()), time.time()
    scale = _scale(options.rehearse)
    for cell in _missing(options, record):
        if cell.group != options.group:
            break  # another group's cell tells more
        if time.time() > min(options.until, begun + GROUP_SECONDS):
            break
        started, result = time.time(), {}
        try:
            result, failed = measure(cell, scale), None
        except (
            ValueError,
            RuntimeError,
            ImportError,
            OSError,
        ) as error:  # torch's out of memory is a RuntimeError
            failed = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        _add(options.out, record, cell, {"failed": failed, "seconds": time.time() - started, **result})
        if failed:
            print(f"{cell.name}: {failed}", file=sys.stderr, flush=True)


def _placed(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the rehearsal's own folder, so that its numbers are never taken for a GPU's."""
    if options.rehearse and options.out == Path("experiments/speed_gpu"):
        options.out = Path("outputs/rehearsal")
    return options


def _scale(rehearsal: bool) -> Scale:
    import torch

    if rehearsal:
        return Scale(torch.device("cpu"), torch.float32, new_tokens=4, warmup=1, runs=2, rehearsal=True)
    return Scale(torch.device("cuda"), torch.bfloat16, new_tokens=32, warmup=1, runs=3, rehearsal=False)


def _missing(options: argparse.Namespace, record: Record) -> list[Cell]:
    return [
        cell
        for cell in cells(options.rehearse)
        if options.only in cell.name and cell.name not in record["cells"]
    ]


def _opened(options: argparse.Namespace) -> Record:
    """Return the record so far, or a new one."""
    import torch

    from kvp.cost import device_name
    from kvp.provenance import provenance

    if not options.rehearse and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} finds no CUDA device: install a build for CUDA, or try the study on a CPU by "
            "--rehearse"
        )
    device = "cpu" if options.rehearse else "cuda"
    head = {"schema": SCHEMA, "device": device_name(device), "rehearsal": options.rehearse}
    file = options.out / "results.json"
    old = json.loads(file.read_text()) if file.exists() else {**head, "cells": {}}
    if changed := [key for key, value in head.items() if old.get(key) != value]:
        raise ValueError(
            f"{file} has another {', '.join(changed)} ({old.get(changed[0])}): give another --out"
        )
    command = " ".join(["python -m experiments.scripts.gpu", *sys.argv[1:]])
    return {
        **head,
        "dtype": str(_scale(options.rehearse).dtype).removeprefix("torch."),
        "cells": old["cells"],
        "ratios": old.get("ratios", {}),
        "provenance": {
            **provenance(device),
            "command": command,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def _in_a_process(group: str, options: argparse.Namespace, until: float) -> str | None:
    """Measure a group; return why the cell on which its process ended failed, or None if it may be tried again."""
    words = ["--group", group, "--out", str(options.out), "--only", options.only, "--until", str(until)]
    command = [sys.executable, "-m", "experiments.scripts.gpu", *words]
    left = until - time.time()
    try:
        done = children.run(
            [*command, *(["--rehearse"] if options.rehearse else [])], timeout=min(left, CELL_SECONDS)
        )
    except TimeoutExpired:
        return None if left < CELL_SECONDS else f"its process took longer than {CELL_SECONDS} s"
    if not done.returncode:
        return None
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"its process ended with {how}"


def _add(out: Path, record: Record, cell: Cell, result: Record) -> None:
    """Put a finished cell into the record, and the record into its file."""
    ratios = result.pop("ratios", {})
    record["cells"][cell.name] = {"commit": record["provenance"]["commit"], **result}
    record["ratios"] |= ratios
    _write(out, record)


def _write(out: Path, record: Record) -> None:
    """Replace results.json as a whole."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", json.dumps(record, indent=1) + "\n")


def table(record: Record) -> str:
    """Return the cells as Markdown: how many times faster than dense, and why a cell failed."""
    rows = []
    for name, cell in record["cells"].items():
        other = cell.get("rows", [{}])[-1].get("against_first") if not cell["failed"] else None
        shown = [f"{other[part]['median']:.2f}" for part in ("prefill", "decode")] if other else ["", ""]
        rows.append(
            [name, *shown, f"{other['decode_by_bytes']:.2f}" if other else "", (cell["failed"] or "")[:80]]
        )
    rest = [[name, f"{found['median']:.2f}"] for name, found in record["ratios"].items() if "kernel" in name]
    parts = (
        [markdown(HEADS, rows), markdown(("times as fast", "median"), rest)]
        if rest
        else [markdown(HEADS, rows)]
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
