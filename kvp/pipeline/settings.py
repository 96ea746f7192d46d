"""Plain values of a configuration: which keys there are, seeds, device, dtype, names, places."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvp.types import DEVICES, DTYPES

# Where results go and when they are made, not what they are.
NOT_INPUTS = ("store", "runs", "tracker", "hydra", "rows", "force", "since", "trusted", "short_of_memory")
NODES = (
    "model",
    "corpora",
    "strategy",
    "ratio",
    "widths",
    "calibration",
    "evaluation",
    "tracker",
)  # never none
EVALUATIONS = ("perplexity", "zero_shot", "needles")
OPTIONAL = ("cache", "recovery", "measure", *(f"evaluation.{part}" for part in EVALUATIONS))  # may be none
PLAIN = ("seed", "device", "dtype", "store", "runs", "rows", "force", "since", "trusted", "short_of_memory")
KEYS = (*NODES, *OPTIONAL[:3], *PLAIN, "hydra")

SHORT_OF_MEMORY = ("refuse", "warn")
NAME = re.compile(r"[\w+-][\w.+-]*")  # of a directory, whatever the system
LONGEST_NAME, LONGEST_PART = 255, 100  # bytes of a directory's name, characters of what a user adds to it
SEEDS = 2**32  # numpy's


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse keys that are not there or mean nothing, and plain values out of bounds.

    Args:
        config: The resolved configuration as plain data.

    Raises:
        ValueError: The message names the key, its bound and its value.
    """
    for key in config:
        if key not in KEYS:
            raise ValueError(
                f"there is no option {key!r}: it would change the identity of the run and nothing else. Leave it out"
            )
    for key in (*NODES, *PLAIN):
        if key not in config:
            raise ValueError(f"{key} is not set: leave it as conf/config.yaml has it")
    for key in NODES:
        if not isinstance(config[key], Mapping):
            raise ValueError(
                f"{key} must be an option of its group or a mapping, got {config[key]!r}: see --help"
            )
    for group, parts in (
        ("evaluation", ("perplexity", "zero_shot", "needles")),
        ("widths", ("multiple_of", "free")),
    ):
        for key in config[group]:
            if key not in parts:
                raise ValueError(f"there is no option '{group}.{key}': {group} has {', '.join(parts)}")
    _check_numbers(config)
    if not isinstance(config["device"], str) or config["device"] not in DEVICES:
        raise ValueError(
            f"device must be one of {', '.join(DEVICES)}, got {config['device']!r}{_gpu(config['device'])}"
        )
    if config["short_of_memory"] not in SHORT_OF_MEMORY:
        raise ValueError(
            f"short_of_memory must be {' or '.join(SHORT_OF_MEMORY)}, got {config['short_of_memory']!r}: what to do "
            "where a phase is estimated to take more than is free"
        )
    if config["dtype"] not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {config['dtype']!r}: set model.dtype instead"
        )
    for key, name in (
        ("model.name", config["model"].get("name")),
        *(("corpora", name) for name in config["corpora"]),
    ):
        if isinstance(name, str):
            check_name(key, name)


def _check_numbers(config: Mapping[str, Any]) -> None:
    for key, value in config["widths"].items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"widths.{key} must be a whole number >= 1, got {value!r}: widths are multiples of it"
            )
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} must be a finite number, got {value}")
        if key.rpartition(".")[2] == "seed":
            _check_seed(key, value)
    if not isinstance(config["force"], list):
        raise ValueError(
            f"force must be a list of stages to compute again, such as [prune], got {config['force']!r}"
        )
    since = config["since"]
    if since is not None and (isinstance(since, bool) or not isinstance(since, int | float) or since < 0):
        raise ValueError(f"since must be seconds since 1970, a number >= 0, or null, got {since!r}")


def leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value with its dotted key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from leaves(value, f"{where}.{number}")
    else:
        yield where, node


def _check_seed(key: str, value: Any) -> None:
    """Refuse what some library does not take as a seed."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} must be a whole number, got {value!r}: it seeds random draws")
    if not 0 <= value < SEEDS:
        raise ValueError(f"{key} must be in [0, 2**32), got {value}: it seeds random draws")


def _gpu(device: Any) -> str:
    """Return the way out for a numbered GPU."""
    numbered = re.fullmatch(r"cuda:(\d+)", device) if isinstance(device, str) else None
    return f": choose a GPU by CUDA_VISIBLE_DEVICES={numbered[1]} and device=cuda" if numbered else ""


def check_name(key: str, name: str) -> None:
    """Refuse a name that would be another directory, or that no directory can have."""
    if NAME.fullmatch(name) and len(name) <= LONGEST_PART:
        return
    nearest = re.sub(r"[^\w.+-]+", "-", name).strip("-.")[:LONGEST_PART] or "mine"
    shown = name if len(name) <= LONGEST_PART else f"{name[:20]}... of {len(name)} characters"
    raise ValueError(
        f"{key} must be letters, digits and . _ + -, at most {LONGEST_PART}, because directories bear it; got "
        f"{shown!r}: {key}={nearest} would do"
    )


def check_places(store: Any, runs: Any) -> tuple[Path, Path]:
    """Return where stages and runs go, as absolute paths; make nothing.

    Raises:
        ValueError: A place is no path, or the two lie inside each other.
        OSError: A place is a file, or cannot be written.
    """
    places = {}
    for key, value in (("store", store), ("runs", runs)):
        if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
            raise ValueError(f"{key} must be a directory such as outputs/{key}, got {value!r}")
        places[key] = Path(os.path.abspath(value))
    one, other = places.values()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"store={store} and runs={runs} lie inside each other: give each a directory of its own, such as "
            "store=outputs/store runs=outputs/runs"
        )
    for key, place in places.items():
        _check_writable(key, place)
    return one, other


def _check_writable(key: str, place: Path) -> None:
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
    except OSError as error:  # such as a name that is too long
        raise OSError(
            f"{key}={place} cannot be a directory ({error.strerror}): choose another with {key}=DIR"
        ) from error
    if not there.is_dir():
        raise NotADirectoryError(
            f"{key}={place}: {there} is no directory; choose another place with {key}=DIR"
        )
    try:
        tempfile.TemporaryFile(
            dir=there
        ).close()  # leaves nothing; rights alone say little on a read-only disk
    except OSError as error:
        raise OSError(
            f"{key}={place}: {there} cannot be written ({error.strerror}); choose another place with {key}=DIR"
        ) from error
