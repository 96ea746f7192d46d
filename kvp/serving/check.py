"""Check that an engine gives the answers of the exported checkpoint.

DIR is what `kvp export` wrote. The engine opens it in a process without kvp
(`--to custom` needs kvp), and reads the text that serving.json carries. Its
log-probabilities must be the same, its greedy tokens up to near ties. Exit
code 0: they are; 1: they are not, or the engine cannot be asked.

  kvp check DIR                  transformers, or llama.cpp for a GGUF
  kvp check DIR --engine vllm    vLLM of `make serve-env`, or of KVP_VLLM_PYTHON
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from kvp.commands import called
from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.checkpoint.files import read_json
from kvp.serving.check_vllm import check_vllm
from kvp.serving.forms import MLA, Engine, Target, engines_of, imports_of, interpreter, own_form
from kvp.serving.remote_code import require_own_code
from kvp.serving.sample import Sample
from kvp.serving.verify import ROUNDED, ask, compare
from kvp.types import DTYPES


def check(
    directory: Path,
    engine: Engine | None = None,
    python: str | None = None,
    trusted: Collection[str] = (),
) -> dict[str, Any]:
    """Ask `engine` (None: the one that the export is for), and compare its answer with the sample.

    Returns:
        Differences; "passed", and if it did not, "why".

    Raises:
        FileNotFoundError: `directory` is no export.
        ValueError: The engine does not open this form.
        ModuleNotFoundError: The interpreter does not have the engine.
        RuntimeError: It cannot open the export.
    """
    file = directory / "serving.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{directory} has no serving.json: export the checkpoint first, python -m kvp.export CHECKPOINT --out "
            "DIR (--to custom, if only kvp opens it)"
        )
    serving = read_json(file)
    if "sample" not in serving:
        raise ValueError(f"{file} has no sample: it was written by an older kvp, export the checkpoint again")
    form, sample = str(serving.get("form")), _sample(file, serving["sample"])
    if (form not in get_args(Target) and ":" not in form) or serving.get("dtype") not in DTYPES:
        raise ValueError(f"{file} names no form and dtype of an export: export the checkpoint again")
    own = own_form(form, trusted)
    able = engines_of(form)
    engine = engine or able[0]
    python = python or interpreter(engine)
    if engine not in able:
        raise ValueError(f"an export of form {form} opens in {' and '.join(able)}, not in {engine}")
    if own_code := form == "remote_code":
        require_own_code(directory)
    elif form not in ("gguf", *MLA):
        check_checkpoint(directory)
    if engine == "vllm":
        report = check_vllm(directory, serving, sample, own_code=own_code, python=python)
    else:
        answer = ask(
            directory, sample, engine, imports=imports_of(form, own), own_code=own_code, python=python
        )
        quantized = serving.get("quantized")
        exact = serving["dtype"] == "float32" and not quantized
        tolerance = ROUNDED + quantized["logprobs_rms_difference"] if quantized else None
        report = {**answer.facts, **compare(sample, answer, exact=exact, tolerance=tolerance)}
    return {"engine": engine, **report}


def _sample(file: Path, stored: Any) -> Sample:
    try:
        return TypeAdapter(Sample).validate_python(stored)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ValueError(f"{file}: its sample is damaged at {where or 'the top'}: export it again") from None


def main() -> None:
    """Run the command; exit code 1 if the engine gives another answer, or cannot be asked."""
    parser = argparse.ArgumentParser(
        prog=called("check"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="an export")
    parser.add_argument("--engine", choices=get_args(Engine), help="default: the one that the export is for")
    parser.add_argument(
        "--python", help="the engine's interpreter (default: this one; vLLM's: .venv-vllm/bin/python)"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="packages with forms of your own"
    )
    arguments = parser.parse_args()
    try:
        report = check(arguments.directory, arguments.engine, arguments.python, arguments.trust)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"kvp.check: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(report, indent=2))
    print("passed" if report["passed"] else f"FAILED: {report['why']}")
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()
