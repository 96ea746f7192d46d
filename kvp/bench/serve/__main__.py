"""Serve exports by vLLM under one cache memory, and measure what a client sees.

DIR is an export or an ordinary checkpoint; the first one is compared with.
Servers listen on 127.0.0.1 and are driven by vLLM's own `bench serve`.

  kvp bench serve DENSE PRUNED --quick            a first look, in minutes
  kvp bench serve DENSE PRUNED --memory 64MiB     equal bytes of cache
  kvp bench serve DENSE PRUNED --cache-dtype fp8  and DENSE with a cache of fp8

It writes results.json, table.md and a plot. A stopped benchmark goes on after
its last turn: repeat the command.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from kvp.bench.serve.served import parse_memory
from kvp.commands import called
from kvp.serving.forms import interpreter

DEFAULTS = {"concurrency": [1, 4, 16], "prompt": [128], "new": [32], "rounds": 3, "waves": 2}
QUICK = {"concurrency": [1, 4], "prompt": [32], "new": [8], "rounds": 1, "waves": 1}


def main() -> None:
    """Run the command; exit code 1 and one clear error for whatever a user can mend."""
    options = parser().parse_args()
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are ended
    try:
        run(options)
    except KeyboardInterrupt:
        print("kvp.bench.serve: stopped; the same command goes on after the last turn", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("KVP_TRACEBACK"):
            raise
        print(f"kvp.bench.serve: error: {error}", file=sys.stderr)
        sys.exit(1)


def run(options: argparse.Namespace) -> None:
    """Check the benchmark, measure, write the results and print the table."""
    for name in ("concurrency", "prompt", "new"):
        if min(getattr(options, name)) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(getattr(options, name))}")
    for name in ("rounds", "waves", "limit"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(options, name):g}")
    memory = options.memory and parse_memory(options.memory)

    from kvp.bench.serve.run import SLACK, ServeBench, make_loads
    from kvp.bench.serve.served import find_served
    from kvp.bench.serve.server import engine_versions
    from kvp.models.load import resolve_device, resolve_dtype

    dtype = resolve_dtype(options.dtype, resolve_device("auto"))
    models = find_served(options.directories, dtype, options.cache_dtype)
    loads = make_loads(options.prompt, options.new, options.concurrency, options.waves)
    longest, half = max(x.prompt + x.new for x in loads) + SLACK, -(-max(options.concurrency) // 2)
    bench = ServeBench(
        models=models,
        loads=loads,
        rounds=options.rounds,
        memory=memory or models[0].bytes_for(longest, half),
        dtype=dtype,
        eager=options.eager or options.quick,
        together=options.together,
        limit=options.limit,
        seed=options.seed,
        python=options.python,
        versions=engine_versions(options.python),
    )
    bench.check()
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    record = bench.run(options.out)

    from kvp.bench.serve.plot import write_plot
    from kvp.bench.serve.table import table

    (options.out / "table.md").write_text(table(record))
    plots = write_plot(record, options.out)
    print(table(record))
    names = ["results.json", "table.md", *(path.name for path in plots)]
    print(f"written to {options.out}: {', '.join(names)}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    made = argparse.ArgumentParser(
        prog=f"{called('bench')} serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="exports; the first is compared with")
    add(
        "--python",
        default=interpreter("vllm"),
        metavar="PATH",
        help="interpreter that has vLLM (default: $KVP_VLLM_PYTHON, else .venv-vllm/bin/python)",
    )
    add(
        "--memory",
        metavar="SIZE",
        help="of each cache: 64MiB (default: half of the most requests, of the first)",
    )
    for name, what in (
        ("concurrency", "requests at once"),
        ("prompt", "tokens read"),
        ("new", "tokens written"),
    ):
        add(f"--{name}", type=int, nargs="+", metavar="N", help=f"{what} (default: {_words(name)})")
    add("--waves", type=int, metavar="N", help=f"requests per request at once (default: {DEFAULTS['waves']})")
    add("--rounds", type=int, metavar="N", help=f"turns of each model (default: {DEFAULTS['rounds']})")
    add(
        "--cache-dtype",
        nargs="+",
        default=[],
        choices=("fp8", "fp8_e4m3", "fp8_e5m2"),
        metavar="NAME",
        help="the first model with this cache, too: fp8, fp8_e4m3, fp8_e5m2",
    )
    add("--dtype", default="auto", help="bfloat16, float16, float32 (default: the hardware's)")
    add("--eager", action="store_true", help="no compiled graphs: a server starts sooner")
    add("--together", action="store_true", help="all servers stay up: starts each once, needs memory for all")
    add("--quick", action="store_true", help="tiny loads, one round, --eager")
    add("--limit", type=float, default=600, metavar="S", help="seconds of one load (default: %(default)g)")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--out", type=Path, default=Path("outputs/bench_serve"), metavar="DIR", help="default: %(default)s")
    return made


def _words(name: str) -> str:
    return " ".join(map(str, DEFAULTS[name]))  # type: ignore[call-overload]  # a list of numbers


if __name__ == "__main__":
    main()
