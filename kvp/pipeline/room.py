"""Memory that a run will take: what does not fit is refused first, with the options under which it would fit."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvp.measurement.memory import available_bytes
from kvp.models.shapes import layer_shapes, size
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import Foretold
from kvp.pipeline.needs import need_of, needs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

GIB = 2**30
SMALLER: dict[
    str, tuple[tuple[str, str, Any], ...]
] = {  # by phase: part of a run, its option, a value that takes less
    "score": (("calibration", "batch_size", 1), ("strategy", "gradient_checkpointing", True)),
    "perplexity": (("perplexity", "batch_size", 1),),
    "zero_shot": (("zero_shot", "batch_size", 1),),
    "needles": (("needles", "lengths", [512]),),
    "measure": (("protocol", "batch_size", 1),),
    "recover": (
        ("recovery", "micro_batch_size", 1),
        ("recovery", "gradient_checkpointing", True),
        ("recovery", "dtype", "bfloat16"),
    ),
}
NODES = {
    "perplexity": "evaluation.perplexity",
    "zero_shot": "evaluation.zero_shot",
    "needles": "evaluation.needles",
    "protocol": "measure",
}


def check_weights(x: Experiment, config: PretrainedConfig) -> None:
    """Refuse weights that alone take more than is free.

    A CPU that computes in the dtype of the files maps them, and drops pages when it needs room. So there
    `short_of_memory=warn` reads them from the disk as often as a phase passes through the model.

    Raises:
        ValueError: It names both sizes.
    """
    needed, free = size(config, layer_shapes(config)).params * x.dtype.itemsize, _free(x)
    mapped = x.device == "cpu" and x.dtype == config.dtype
    if needed > free and not (mapped and x.short_of_memory == "warn"):
        smaller = "" if x.dtype.itemsize == 2 else " model.dtype=bfloat16 (half of it),"
        smaller += " short_of_memory=warn (which reads them from the disk again and again)," if mapped else ""
        raise ValueError(
            f"the weights of {x.source.name} take {needed / GIB:.2f} GiB in {str(x.dtype).removeprefix('torch.')}, and "
            f"{free / GIB:.2f} GiB are free on {x.device}: free some, or choose{smaller} another device or a smaller "
            "model"
        )


def check_room(x: Experiment, config: PretrainedConfig, foretold: Sequence[Foretold]) -> None:
    """Refuse a run with a phase that is to do and is estimated to take more than is free, or warn of it.

    Args:
        x: The run; its `short_of_memory` says which.
        config: The config of the dense model.
        foretold: What is known of its stages.

    Raises:
        ValueError: It names the phase, both sizes, and the options under which it would fit.
    """
    done = {stage.kind for stage in foretold} - {stage.kind for stage in foretold if not stage.stands}
    lines = shortage(x, config, done)
    if lines and x.short_of_memory == "refuse":
        raise ValueError(f"{lines}. short_of_memory=warn runs it all the same")
    if lines:
        log.warning(lines)


def shortage(x: Experiment, config: PretrainedConfig, done: Collection[str] = ()) -> str:
    """Return which phases are estimated to take more than is free, both sizes, and what would fit; empty: none."""
    free = _free(x)
    return "; ".join(
        f"{need.phase} is estimated to take {need.memory['total'] / GIB:.2f} GiB ({need.size}), and "
        f"{free / GIB:.2f} GiB are free on {x.device}: {way_out(x, config, need.phase, free)}"
        for need in needs(x, config)
        if need.phase not in done and need.memory["total"] > free
    )


def way_out(x: Experiment, config: PretrainedConfig, phase: str, free: int) -> str:
    """Return the options under which a phase would fit, or what is left if none would."""
    for words, other in _smaller(x, phase):
        if need_of(other, config, phase).memory["total"] <= free:
            return f"{words} would fit"
    return "no smaller batch would fit, so choose another device or a smaller model"


def _smaller(x: Experiment, phase: str) -> Iterator[tuple[str, Experiment]]:
    """Yield runs whose phase takes less and less, with the options that make them."""
    words = []
    for name, option, value in SMALLER[phase]:
        part = getattr(x, name)
        if getattr(part, option, value) == value:  # it has no such option, or is so already
            continue
        x = replace(x, **{name: replace(part, **{option: value})})
        words.append(f"{NODES.get(name, name)}.{option}={str(value).lower()}")
        yield " ".join(words), x
    if x.dtype.itemsize > 2 and phase != "recover":  # which has a dtype of its own
        yield " ".join([*words, "model.dtype=bfloat16"]), replace(x, dtype=torch.bfloat16)


def _free(x: Experiment) -> int:
    return available_bytes(torch.device(x.device))
