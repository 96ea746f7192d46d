"""The answer from a config alone: what serving takes, dense and cut, and what each phase of a run takes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvp.composing import compose
from kvp.estimate.serving import (
    BLOCK,
    CACHES,
    FLOAT32_CACHE,
    CacheType,
    largest_batch,
    serving_bytes,
    token_bytes,
)
from kvp.fit.words import Question
from kvp.measurement.memory import available_bytes
from kvp.models.caches import bytes_per_token, cache_format
from kvp.models.published import config_of
from kvp.models.shapes import layer_shapes, size
from kvp.pipeline.clock import Clock
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.needs import host_bytes, needs
from kvp.strategies.limits import Limit
from kvp.strategies.shape import expected_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTEXT = 4096  # tokens, where the question names none


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A model with one way to store its cache.

    Attributes:
        model: "dense", or the fraction removed.
        weights, cache, activations, total: Bytes at the batch and the context asked about.
        batch: Sequences of this context that fit.
        context: Tokens that fit at this batch.
    """

    model: str
    cache_type: str
    bytes_per_token: int
    weights: int
    cache: int
    activations: int
    total: int
    fits: bool
    batch: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of a run: its peak in bytes, and its seconds; None: nobody can say."""

    phase: str
    size: str
    weights: int
    rest: int
    total: int
    fits: bool
    seconds: float | None
    known_by: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Everything that is said about one model; bytes, tokens, seconds."""

    model: str
    origin: str
    params: int
    layers: int
    positions: int
    device: str
    dtype: str
    memory: int
    context: int
    batch: int
    serving: tuple[Serving, ...]
    phases: tuple[Phase, ...]
    host: int
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """Return the answer as JSON data."""
        return asdict(self)


def answer(asked: Question) -> Answer:
    """Return what a question's model takes; reads a config, writes nothing.

    Raises:
        ValueError: An option is out of its bounds, or the strategy cannot reach a ratio on this model.
        FileNotFoundError: The config is out of reach.
    """
    x = Experiment.compose(compose(asked.options), asked.options)
    config, origin = config_of(x.source)
    config = copy(config)
    context = asked.context or min(CONTEXT, config.max_position_embeddings)
    if context > config.max_position_embeddings:
        raise ValueError(
            f"context must be <= {config.max_position_embeddings} (max_position_embeddings of {x.source.name}), got "
            f"{context}: the model knows no further positions"
        )
    if asked.ratios and isinstance(x.budget, Limit):
        raise ValueError(
            f"kvp fit shows what fractions leave, ratio={x.budget.of} looks for one: choose ratio=kv_cache or params "
            "here, or kvp run --dry-run for the limit"
        )
    memory = _memory(x, asked)
    models, notes = {"dense": config}, []
    for ratio in asked.ratios:
        cut = expected_shape(
            x.strategy,
            x.strategy.recast_config(config),
            replace(x.budget, value=ratio),
        )
        if cut is None:
            notes.append(
                f"strategy={x.chosen('strategy')} leaves no shape to tell before it has seen the model: no rows of cuts"
            )
            break
        models[f"-{100 * ratio:.4g}% {x.budget.of}"] = cut
    clock = Clock(x, config, asked.tflops)
    serving = [
        row for name, each in models.items() for row in _serving(name, each, x, asked, context, memory)
    ]
    phases = list(_phases(x, config, memory, clock))
    return Answer(
        model=x.source.name,
        origin=origin,
        params=size(config, layer_shapes(config)).params,
        layers=config.num_hidden_layers,
        positions=config.max_position_embeddings,
        device=x.device,
        dtype=str(x.dtype).removeprefix("torch."),
        memory=memory,
        context=context,
        batch=asked.batch,
        serving=tuple(serving),
        phases=tuple(phases),
        host=host_bytes(x, config)["total"],
        notes=(*notes, *_notes(x, config, context), *clock.words()),
    )


def _memory(x: Experiment, asked: Question) -> int:
    if asked.memory is not None:
        return asked.memory
    if x.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "memory is not set, and there is no GPU here to ask: say how much it has, memory=24GiB"
        )
    return available_bytes(torch.device(x.device))


def _serving(
    name: str, config: PretrainedConfig, x: Experiment, asked: Question, context: int, memory: int
) -> Iterator[Serving]:
    width = x.dtype.itemsize
    caches: tuple[CacheType, ...] = CACHES if width == 2 else (FLOAT32_CACHE, *CACHES[1:])
    blocks = range(BLOCK, config.max_position_embeddings + 1, BLOCK)
    for cache in caches:
        parts_of = partial(serving_bytes, config, width=width, cache=cache, device=x.device)
        parts, per_token = parts_of(batch_size=asked.batch, context=context), token_bytes(config, cache)
        most = largest_batch(memory - parts["weights"], length=context, per_token=per_token)
        batch = bisect(
            range(1, most + 1), memory, key=lambda n: parts_of(batch_size=n, context=context)["total"]
        )
        longest = bisect(blocks, memory, key=lambda n: parts_of(batch_size=asked.batch, context=n)["total"])
        yield Serving(
            model=name,
            cache_type=cache.name,
            bytes_per_token=per_token,
            **parts,
            fits=parts["total"] <= memory,
            batch=batch,
            context=BLOCK * longest,
        )


def _phases(x: Experiment, config: PretrainedConfig, memory: int, clock: Clock) -> Iterator[Phase]:
    for need in needs(x, config):
        total, weights = need.memory["total"], need.memory["weights"]
        seconds, known_by = clock.seconds(need)
        yield Phase(
            phase=need.phase,
            size=need.size,
            weights=weights,
            rest=total - weights,
            total=total,
            fits=total <= memory,
            seconds=seconds,
            known_by=known_by,
        )


def _notes(x: Experiment, config: PretrainedConfig, context: int) -> Iterator[str]:
    yield (
        "fp8, q8_0 and q4_0 are arithmetic of what engines store, scales included; weights stay in "
        + str(x.dtype).removeprefix("torch.")
    )
    if packed := cache_format(config):
        kind, stored = type(packed).__name__, bytes_per_token(config, x.dtype.itemsize)
        yield f"rows are of a plain cache: this checkpoint packs its own ({kind}), {stored:,} bytes per token"
    if x.cache is not None:
        yield f"rows are of a plain cache: cache={x.chosen('cache')} is not counted here"
    yield "activations: a prompt is read in slices of at most 8,192 tokens on a GPU, 1,024 on a CPU, or one prompt"
    yield "not counted: the CUDA context (0.3 to 0.6 GiB), or the interpreter and its libraries on a CPU (0.4 GiB)"
    window = getattr(config, "sliding_window", None)
    if window and window < context and getattr(config, "use_sliding_window", True):
        yield f"this model attends to {window} tokens: an engine that drops the others stores fewer than shown"
