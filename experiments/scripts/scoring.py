"""Measure the cost of pruning by each method: seconds and peak memory, every method in a fresh process.

    python -m experiments.scripts.scoring [--strategies NAME,NAME] [--out DIR] [option=value ...]
    python -m experiments.scripts.scoring model=llama_7b_shape         # on a GPU: random weights, no download
    python -m experiments.scripts.scoring --strategies "flap,adapruner strategy.trials=50"

Options are those of `python -m kvp`; ratio.value is 0.2 of the KV cache unless said. A strategy may bring its own;
without any, those that search take the small budgets of experiment=rivals_kv. Timed are score, sensitivity, plan
and refit, not the cut itself, which is the same for all: on the clock, and in CPU seconds of all threads,
which other processes disturb less. Shapes of random weights read random tokens, which cost the same.
Peaks are over an empty process: the weights are in them, the interpreter is not.

Writes cost.jsonl (with provenance) and cost.md after every method. Results of other methods or models that cost.jsonl
holds already stay. A method that fails says why, and the others go on. A command that was killed goes on after its
last method; a finished one measures anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from kvp.store import Store
from kvp.tables import markdown
from kvp.whole import write_whole

METHODS: dict[str, list[str]] = {
    "magnitude": [],
    "random": [],
    "kvpruner": [],
    "kvpruner_plus": [],
    "llm_pruner": [],
    "shortened_llm": [],
    "shortgpt": [],
    "sleb": ["strategy.samples=8", "strategy.max_ratio=0.2"],
    "flap": [],
    "wanda_sp": [],
    "numerical": [],
    "llm_bip": [],
    "think": [],
    "nirvana": [],
    "search_llm": [
        "strategy/evolution=quick",
        "strategy.evolution.generations=6",
        "strategy.evolution.samples=4",
    ],
    "adapruner": ["strategy.trials=20"],
}
COMMON = ("recovery=none", "measure=none", "evaluation=none", "tracker=none", "ratio.value=0.2")

Line = dict[str, Any]


def main() -> None:
    """Measure the strategies one after the other; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scripts.scoring",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--strategies", default=",".join(METHODS), help="each with options of its own, if any, after spaces"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/scoring"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="of python -m kvp, for all strategies")
    args = parser.parse_args()
    if args.child:
        from experiments.scripts.meter import measure  # the parent needs no torch

        print(json.dumps(measure(args.options)), flush=True)
        return
    command = " ".join(["python -m experiments.scripts.scoring", *sys.argv[1:]])
    lines = run(parse(args.strategies), args.options, args.out, command)
    print((args.out / "cost.md").read_text())
    sys.exit(any(line["failed"] for line in lines))


def parse(strategies: str) -> dict[str, list[str]]:
    """Return options by name from "flap,adapruner strategy.trials=50"."""
    asked = [words.split() for words in strategies.split(",")]
    return {name: options or METHODS.get(name, []) for name, *options in asked}


def run(
    strategies: Mapping[str, Sequence[str]], common: Sequence[str], out: Path, command: str
) -> list[Line]:
    """Measure each strategy in a process of its own, and return the lines of this command.

    Finished strategies of a killed command are found in `out`/steps, which a finished command removes.
    """
    store, lines = Store(out / "steps"), []
    for number, (name, options) in enumerate(strategies.items(), start=1):
        print(f"[{number}/{len(strategies)}] {' '.join([name, *options])}", file=sys.stderr, flush=True)
        words = [*COMMON, *common, f"strategy={name}", *options]
        try:
            line = store.once("cost", {"options": words}, partial(_in_a_process, words)).result
        except MethodError as error:
            line = error.line
        line = {"strategy": name, "options": list(options), **line}
        line["provenance"] = {**line.get("provenance", {}), "command": command}
        outcome = line["failed"] or f"{line['seconds']:.1f} s, {line['peak_bytes'] / 2**20:,.0f} MiB"
        print(f"[{number}/{len(strategies)}] {name}: {outcome}", file=sys.stderr, flush=True)
        lines.append(line)
        write([*_others(out / "cost.jsonl", lines), *lines], out)
    shutil.rmtree(store.root)
    return lines


class MethodError(Exception):
    """A method failed; `line` says why. No store keeps it, so a repeated command tries again."""

    def __init__(self, line: Line) -> None:
        super().__init__(line["failed"])
        self.line = line


def _in_a_process(words: Sequence[str], _: Path) -> Line:
    """Return what the child prints last.

    Raises:
        MethodError: The method failed, or its process was killed.
    """
    with tempfile.TemporaryFile("w+") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.scripts.scoring", "--child", *words], stdout=output
        )
        output.seek(0)
        printed = output.read().splitlines()
    how = f"killed by signal {-ended.returncode}" if ended.returncode < 0 else f"exit {ended.returncode}"
    line: Line = {"model": None, "failed": f"{how}, see above"}
    if ended.returncode == 0 and printed:
        line = json.loads(printed[-1])
    if line["failed"]:
        raise MethodError(line)
    return line


def _others(path: Path, lines: Sequence[Line]) -> list[Line]:
    """Return the lines in a cost.jsonl of other methods or models; a failed one without a model makes way, too."""
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = {(line["model"], line["strategy"]) for line in lines}
    measured = {line["strategy"] for line in lines}
    return [
        line
        for line in earlier
        if (line["model"], line["strategy"]) not in new
        and not (
            line["failed"] and line["model"] is None and line["strategy"] in measured
        )  # a killed process
    ]


def write(lines: Sequence[Line], out: Path) -> None:
    """Write cost.jsonl, and a table per model as cost.md."""
    write_whole(out / "cost.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    measured = [line for line in lines if not line["failed"]]
    parts = [table(title, list(group)) for title, group in groupby(sorted(measured, key=_title), key=_title)]
    failed = [f"- {line['strategy']} failed: {line['failed']}" for line in lines if line["failed"]]
    (out / "cost.md").write_text("\n".join([*parts, *failed]) + "\n")


def _title(line: Line) -> str:
    machine, read, ratio = line["provenance"], line["calibration"], line["ratio"]
    device = machine.get("device_name") or machine["device"]  # an old line knows the kind alone
    return (
        f"**Cost of pruning {line['model']}**: {ratio['value']:.4g} of {ratio['of']}; {read['samples']} x "
        f"{read['length']} tokens, batches of {read['batch_size']}; {line['dtype']}, {device}, "
        f"{machine['threads']} threads; weights {line['weights_bytes'] / 2**20:,.0f} MiB"
    )


def table(title: str, lines: Sequence[Line]) -> str:
    """Return seconds per step as Markdown, cheapest method first."""
    steps = list(dict.fromkeys(step for line in lines for step in line["steps"]))
    ends = ("all s", "CPU s", "peak MiB", "peak / weights")
    heads = ["strategy", "options", *(f"{step} s" for step in steps), *ends]
    rows = []
    for line in sorted(lines, key=lambda line: line["seconds"]):
        seconds = [f"{line['steps'][s]['seconds']:.1f}" if s in line["steps"] else "—" for s in steps]
        peak = line["peak_bytes"]
        sizes = [
            f"{line['seconds']:.1f}",
            f"{line['cpu_seconds']:.1f}",
            f"{peak / 2**20:,.0f}",
            f"{peak / line['weights_bytes']:.2f}",
        ]
        rows.append([line["strategy"], " ".join(line["options"]) or "—", *seconds, *sizes])
    return f"{title}\n\n{markdown(heads, rows, labels=2)}\n"


if __name__ == "__main__":
    main()
