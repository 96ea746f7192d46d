"""The proof of an export: an engine that never imports kvp gives the same answer to a text, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kvp import children
from kvp.serving.forms import Engine
from kvp.serving.sample import NEW_TOKENS, Sample, token_logprobs

LOGGED = re.compile(r"^\(\w+ pid=\d+\)\s*(?:ERROR \S+ \S+ \[\S+\])?\s*")
ERROR = re.compile(r"^[\w.]*(?:Error|Exception): .+")
CACHE_BYTES = 64 << 20  # of vLLM's cache during a check
SETTINGS = {"dtype": "float32", "cache_bytes": CACHE_BYTES, "options": {}, "cache": "F32"}  # of an engine
EXACT = 1e-4  # nats, root mean square over the tokens: float32 throughout
ROUNDED = 5e-2  # the same where weights, activations or the cache have 16 bits
KERNELS = 2.0  # an engine of other kernels may round twice as much as transformers in the same dtype
SLACK = 4.0  # in the largest difference: the margin below which another greedy token is no error


class Answer(dict[str, torch.Tensor]):
    """Tensors of an engine's answer, and `facts`: its "version", its "dtype", and what else it says of itself."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.facts = dict(facts)


def require(engine: Engine, python: str) -> str:
    """Return the path of an interpreter that has an engine; it takes a moment, before anything is opened.

    Raises:
        ModuleNotFoundError: There is no such interpreter, or it does not have the engine.
    """
    found = shutil.which(python)
    if found is None:
        raise ModuleNotFoundError(
            f"there is no interpreter {python}: name the one that has {engine} by --python"
            + (", or make one by make serve-env" if engine == "vllm" else "")
        )
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({engine!r}) is None)"
    if subprocess.run([found, "-I", "-c", look], capture_output=True).returncode:
        raise ModuleNotFoundError(
            f"{engine} is not installed in {python}: install it there, or name an interpreter that has it by --python"
        )
    return str(Path(found).absolute())


def ask(
    directory: Path,
    sample: Sample,
    engine: Engine,
    *,
    imports: Sequence[str] = (),
    own_code: bool = False,
    python: str = sys.executable,
    **settings: Any,
) -> Answer:
    """Return the answer of `engine` to the sample.

    Args:
        directory: Directory of the export.
        sample: The text and its tokens.
        engine: Whose process it is.
        imports: Modules that transformers needs to open the checkpoint; none for a stock one.
        own_code: Whether transformers runs the modelling file of the directory, which must be kvp's own.
        python: Interpreter that has the engine.
        settings: Of the engine, beside those of SETTINGS: "dtype" of transformers, "cache_bytes" and "options" of vLLM,
            "cache" of llama.cpp, such as "Q8_0".

    Returns:
        "logits" (tokens, vocabulary) or "logprobs" (tokens - 1,), "greedy", "ids" if it read the text itself, and
        "passage.0" and so on (tokens - 1,), log-probabilities, if it can read a text from any position on.

    Raises:
        ModuleNotFoundError: The interpreter does not have the engine.
        RuntimeError: It cannot open the export; the end of what it said is in the message.
    """
    script = Path(__file__).with_name(f"engine_{engine}.py")
    with tempfile.TemporaryDirectory() as work:
        question = {
            "text": sample.text,
            "ids": sample.ids,
            "new_tokens": NEW_TOKENS,
            "imports": list(imports),
            "own_code": own_code,
            "passages": [[start, len(logprobs) + 1] for start, logprobs in sample.passages],
            **SETTINGS,
            **settings,
        }
        Path(work, "ask.json").write_text(json.dumps(question))
        alone, environment = ("-I", None) if not imports else ("-P", _that_finds_kvp())
        command = [require(engine, python), alone, str(script), str(directory.absolute()), work]
        done = children.run(command, capture_output=True, text=True, cwd=work, env=environment)
        if done.returncode:
            raise RuntimeError(f"{engine} cannot open {directory}:\n{root_error(done.stdout + done.stderr)}")
        with safe_open(f"{work}/answer.safetensors", "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        return Answer(load_file(f"{work}/answer.safetensors"), facts)


def root_error(log: str) -> str:
    """Return the first error that a log ends a traceback with; those after it only say that there was one."""
    lines = [LOGGED.sub("", line) for line in log.splitlines()]
    errors = [line for line in lines if ERROR.match(line) and "root cause above" not in line]
    return errors[0] if errors else "\n".join(lines[-5:])


def _that_finds_kvp() -> dict[str, str]:
    here = str(Path(__file__).parents[2])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", ""), os.getcwd()]),
    }


def has(engine: Engine) -> bool:
    """Whether this interpreter has the engine."""
    return find_spec(engine) is not None


def compare(
    sample: Sample,
    answer: Mapping[str, torch.Tensor],
    *,
    exact: bool,
    tolerance: float | None = None,
    logits: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Compare an answer with the sample.

    Args:
        sample: What is expected.
        answer: As `ask` gives it.
        exact: Both were computed in float32 from the same numbers.
        tolerance: Nats, root mean square; None: EXACT or ROUNDED.
        logits: Those that the sample was made of, for two more figures.

    Returns:
        Differences; "passed", and if it did not, "why".
    """
    said = torch.tensor(_logprobs(answer, sample), dtype=torch.float64)
    difference = said - torch.tensor(sample.logprobs).double()
    rms, largest = difference.square().mean().sqrt().item(), difference.abs().max().item()
    tolerance = tolerance or (EXACT if exact else ROUNDED)
    report: dict[str, Any] = {
        "tokens": len(sample.ids),
        "logprobs_rms_difference": rms,
        "logprobs_max_difference": largest,
        "tolerance": tolerance,
    }
    if logits is not None and "logits" in answer:
        apart = answer["logits"] - logits
        report["logits_relative_difference"] = (apart.norm() / logits.norm()).item()
        report["logits_max_difference"] = largest = apart.abs().max().item()
    passages = _passages(sample, answer, tolerance)
    report |= {"positions": [each["positions"] for each in passages]} if passages else {}
    greedy = answer["greedy"].tolist()
    pairs = enumerate(zip(greedy, sample.greedy, strict=True))
    first = next((place for place, (one, other) in pairs if one != other), None)
    report |= {"greedy_tokens_equal": first is None, "greedy_tokens": len(greedy) if first is None else first}
    faults = []
    if not rms <= tolerance:
        faults.append(f"log-probabilities differ by {rms:.4f} nats, rounding explains {tolerance}")
    faults += [
        f"log-probabilities at positions {each['positions']} differ by {each['rms']:.4f} nats"
        for each in passages
        if not each["rms"] <= each["tolerance"]
    ]
    if first is not None and sample.margins[first] > SLACK * largest:
        faults.append(
            f"greedy token {first} is {greedy[first]} instead of {sample.greedy[first]}, which was no near tie "
            f"(margin {sample.margins[first]:.3f})"
        )
    if "ids" in answer and answer["ids"].tolist() != sample.ids:
        faults.append("its tokenizer reads the text differently")
    return {**report, "passed": not faults, **({"why": "; ".join(faults)} if faults else {})}


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], sample: Sample) -> float:
    """Return the root mean square in nats between two answers' log-probabilities of the sample's tokens."""
    said = [torch.tensor(_logprobs(answer, sample)) for answer in (one, other)]
    return (said[0] - said[1]).square().mean().sqrt().item()


def _logprobs(answer: Mapping[str, torch.Tensor], sample: Sample) -> list[float]:
    """Return log-probabilities in nats of all tokens but the first."""
    if "logprobs" in answer:
        return answer["logprobs"].double().tolist()
    return token_logprobs(answer["logits"], sample.ids)


def _passages(sample: Sample, answer: Mapping[str, torch.Tensor], tolerance: float) -> list[dict[str, Any]]:
    """Return how much an answer differs at each other position; rounding of the angles grows with the position."""
    found = []
    for number, (start, expected) in enumerate(sample.passages):
        if (said := answer.get(f"passage.{number}")) is None:
            continue
        difference = said.double() - torch.tensor(expected).double()
        end = start + len(expected) + 1
        found.append(
            {
                "positions": f"{start} to {end - 1}",
                "rms": difference.square().mean().sqrt().item(),
                "tolerance": tolerance * (1 + end / 1000),
            }
        )
    return found
