"""Compare the speed and memory of models, with the limit next to every number.

  kvp bench llama_7b_shape --cut 0.25,0.5        shapes, with random weights
  kvp bench llama_7b_shape --cut 0.5 --rivals    and other methods' shapes
  kvp bench tiny --cut 0.5 --protocol quick      a first look, in a minute
  kvp bench outputs/runs/NAME/run.json           a run's dense and pruned model
  kvp bench serve DIR DIR ...                    exports in vLLM, see its --help
  kvp bench compare BEFORE.json AFTER.json       what moved between two records

It writes bench.json, results.jsonl, table.md and plots. Rounds of all models
alternate in one process. A stopped benchmark goes on: repeat the command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvp.bars import only_on_terminals
from kvp.commands import called
from kvp.types import DEVICES

if TYPE_CHECKING:
    from kvp.bench.bench import Bench

PATHS = ("eager", "static", "native", "compiled")
NAMES = ("shortened_llm", "long_context", "prefill", "quick")
GIB = 2**30
ON_CPU = GIB  # bytes of cache that a CPU's limit leaves by default: trying the limits takes time
QUICK = ON_CPU // 16  # and for a first look


def main() -> None:
    """Run the command; exit code 1 and one clear error for whatever a user can mend."""
    if sys.argv[1:2] == ["serve"]:
        from kvp.bench.serve.__main__ import main as serve

        del sys.argv[1]
        return serve()
    if sys.argv[1:2] == ["compare"]:
        from kvp.bench.compare import main as compare

        del sys.argv[1]
        return compare()
    options = parser().parse_args()
    only_on_terminals()
    try:
        run(options)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("KVP_TRACEBACK"):
            raise
        print(f"kvp.bench: error: {error}", file=sys.stderr)
        sys.exit(1)


def run(options: argparse.Namespace) -> None:
    """Check the benchmark, measure, write the results and print them."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "matplotlib", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    bench = compose(options)
    bench.check()
    record = bench.run(options.out)

    from kvp.bench.plots import write_plots
    from kvp.bench.table import markdown, print_tables

    header = {key: value for key, value in record.items() if key != "rows"}
    lines = [json.dumps(line) + "\n" for line in (header, *record["rows"])]
    (options.out / "results.jsonl").write_text("".join(lines))
    (options.out / "table.md").write_text(markdown(record))
    print_tables(record)
    written = [
        "bench.json",
        "results.jsonl",
        "table.md",
        *(path.name for path in write_plots(record, options.out)),
    ]
    print(f"written to {options.out}: {', '.join(written)}")


def compose(options: argparse.Namespace) -> Bench:
    """Return the benchmark that the options describe; reads configs, makes no weights.

    Raises:
        ValueError: An option is out of range, or names nothing that there is.
    """
    import torch

    from kvp.bench.bench import Bench
    from kvp.bench.models import distinct, find_subjects
    from kvp.bench.plans import cut_subjects, planned_subject
    from kvp.bench.protocols import PROTOCOLS
    from kvp.measurement.measure import check_hardware
    from kvp.measurement.memory import available_bytes
    from kvp.models.load import check_device, resolve_device, resolve_dtype

    if options.rivals and not options.cut:
        raise ValueError("--rivals match the cuts of --cut: give some, such as --cut 0.25,0.5")
    subjects = [subject for word in options.models for subject in find_subjects(word)]
    for value in options.cut:
        subjects += cut_subjects(subjects[0], value, rivals=options.rivals)
    subjects += [planned_subject(subjects[0], directory) for directory in options.plan]
    check_device(options.device)
    device = torch.device(resolve_device(options.device))
    dtype = resolve_dtype(options.dtype, device.type)
    check_hardware(str(device), str(dtype).removeprefix("torch."))
    available = available_bytes(device)
    default = available
    if device.type == "cpu":
        cache = QUICK if options.protocol == "quick" else ON_CPU
        default = min(available, cache + max(subject.weights_bytes(dtype) for subject in subjects))
    limit = default if options.memory is None else options.memory * GIB
    if not 0 < limit <= available:
        raise ValueError(
            f"--memory must be above 0 and at most {available / GIB:.2f} GiB, what is free on {device}, got "
            f"{limit / GIB:g}"
        )
    subjects = distinct(subjects)
    if (held := sum(subject.weights_bytes(dtype) for subject in subjects)) > available:
        raise ValueError(
            f"the weights of all {len(subjects)} models take {held / GIB:.2f} GiB together, as they take turns in one "
            f"process, and {available / GIB:.2f} GiB are free on {device}: leave models out, or give another --dtype"
        )
    return Bench(
        subjects=subjects,
        name=options.protocol,
        protocol=PROTOCOLS[options.protocol].changed(
            prompts=options.prompt,
            new_tokens=options.new,
            batches=options.batch,
            warmup=options.warmup,
            runs=options.runs,
            seed=options.seed,
        ),
        asked=options.batch or (),
        paths=options.path,
        device=device,
        dtype=dtype,
        limit=int(limit),
        limit_asked=options.memory is not None,
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = argparse.ArgumentParser(
        prog=called("bench"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a checkpoint, a run.json, or a shape of conf/model; the first is compared with",
    )
    add(
        "--cut",
        type=_numbers(float),
        default=(),
        metavar="R,R",
        help="cut the first's KV cache by R, uniformly",
    )
    add("--rivals", action="store_true", help="and LLM-Pruner's and Shortened-LLM's shapes")
    add("--plan", type=Path, action="append", default=[], metavar="DIR", help="and this plan.json's shape")
    add("--protocol", choices=NAMES, default=NAMES[0], metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--path", type=_words, default=PATHS[:2], metavar="PATH,PATH", help=f"of {', '.join(PATHS)}")
    for name, what in (
        ("batch", "batch sizes"),
        ("prompt", "prompt lengths"),
        ("new", "numbers of new tokens"),
    ):
        add(f"--{name}", type=_numbers(int), metavar="N,N", help=f"{what}, instead of the protocol's")
    add("--warmup", type=int, metavar="N", help="rounds that do not count")
    add("--runs", type=int, metavar="N", help="rounds that count")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="memory for a model and its cache (default: free)",
    )
    add(
        "--device",
        choices=DEVICES,
        metavar="NAME",
        default="auto",
        help="cpu or cuda (default: cuda if there is one)",
    )
    add(
        "--dtype",
        default="auto",
        help="bfloat16, float16, float32 (default: the hardware's)",
    )
    add("--seed", type=int, default=0, help="of prompts and random weights")
    add("--out", type=Path, default=Path("outputs/bench"), metavar="DIR", help="default: %(default)s")
    return made


def _numbers(kind: type) -> Any:
    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    return numbers


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := [word for word in words if word not in PATHS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {', '.join(PATHS)}")
    return words


if __name__ == "__main__":
    main()
