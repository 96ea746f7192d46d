"""The question of a command line: its own words, and the options of a run among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

OWN = ("memory", "context", "batch", "ratio", "dtype", "tflops")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
NUMBERS = re.compile(r"[\d.,eE+-]*\d[\d.,]*")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a command line.

    Attributes:
        options: Options of a run.
        memory: Bytes there are; None: what is free here.
        context: Tokens per sequence; None: 4,096, or the model's positions if they are fewer.
        batch: Sequences at a time.
        ratios: Fractions to remove.
        tflops: Assumed 10^12 floating-point operations per second; None: measured here.
    """

    options: tuple[str, ...]
    memory: int | None = None
    context: int | None = None
    batch: int = 1
    ratios: tuple[float, ...] = (0.25, 0.5)
    tflops: float | None = None


def question(words: Sequence[str]) -> Question:
    """Return what words such as "memory=24GiB" and "model=llama3_8b" ask.

    Raises:
        ValueError: A word is no option, or a value out of its bounds.
    """
    own: dict[str, str] = {}
    options: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is no option: options have the form option=value, see --help")
        if _is_own(key, value):
            own[key] = value
        elif key == "ratio.value":
            own["ratio"] = value
        elif key == "model" and "/" in value:
            options += ["model=local", f"model.path={value}", f"model.name={value.rpartition('/')[2]}"]
        else:
            options.append(word)
    if "dtype" in own:
        options.append(f"model.dtype={own['dtype']}")
    elif _elsewhere(options):
        options.append("model.dtype=bfloat16")  # what such a GPU computes in
    return Question(
        options=tuple(options),
        memory=_bytes(own["memory"]) if "memory" in own else None,
        context=_count("context", own["context"]) if "context" in own else None,
        batch=_count("batch", own.get("batch", "1")),
        ratios=_ratios(own["ratio"]) if "ratio" in own else Question.ratios,
        tflops=_positive("tflops", own["tflops"]) if "tflops" in own else None,
    )


def _elsewhere(options: Sequence[str]) -> bool:
    """Return whether the dtype is left to a GPU that is not here to be asked."""
    chosen = any(option.startswith("model.dtype=") for option in options)
    return "device=cuda" in options and not chosen and not torch.cuda.is_available()


def check_fixed(words: Sequence[str]) -> None:
    """Refuse words that ask about sizes, where the cases that `kvp fit --check` measures are fixed.

    Raises:
        ValueError: A word is of `kvp fit` itself and no option of a run; names it.
    """
    for word in words:
        key, _, value = word.partition("=")
        if _is_own(key, value) and key != "dtype":  # which a run has, too
            raise ValueError(f"--check measures fixed cases, got {word}: leave {key}= out")


def _is_own(key: str, value: str) -> bool:
    """Return whether a word is of this command; ratio=params is an option of a run."""
    return key in OWN and not (key == "ratio" and not NUMBERS.fullmatch(value))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not found or found[2].lower() not in units or float(found[1]) <= 0:
        raise ValueError(
            f"memory must be a number > 0 with a unit of {', '.join(UNITS)}, got {text!r}: say memory=24GiB (a card "
            "sold as 24 GB has 24 GiB)"
        )
    return int(float(found[1]) * units[found[2].lower()])


def _count(key: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError(f"{key} must be a whole number >= 1, got {text!r}")
    return int(text)


def _positive(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{key} must be a number > 0, got {text!r}")
    return number


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
        raise ValueError(f"ratio must be fractions in [0, 1), such as 0.25,0.5, got {text!r}")
    return tuple(dict.fromkeys(ratios))
