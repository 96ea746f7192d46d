"""Memory and arithmetic that the phases of a run take on its device, from its options and a config alone."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvp.estimate.kept import Adapter
from kvp.estimate.passes import (
    FLOAT32,
    Parts,
    evaluation_bytes,
    nll_bytes,
    slice_bytes,
    weights_bytes,
    with_total,
)
from kvp.estimate.serving import measured_bytes
from kvp.estimate.training import training_bytes
from kvp.measurement.count import macs
from kvp.models.shapes import itemsize, layer_shapes
from kvp.pipeline.experiment import Experiment
from kvp.recovery.lora import Lora

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REQUEST = 256  # tokens of a zero-shot request; the tasks' longest are about as long


@dataclass(frozen=True, kw_only=True)
class Need:
    """The needs of one phase.

    Attributes:
        phase: Its kind, as `force` names it; "score" stands for every step up to the plan.
        size: The size of the work, in words.
        memory: Bytes on the device, by part, with their total.
        macs: Multiply-accumulates; None: the options do not say how much work there is.
        steps: Decode steps, each of which reads weights and cache once.
    """

    phase: str
    size: str
    memory: Parts
    macs: float | None = None
    steps: int = 0


def needs(x: Experiment, dense: PretrainedConfig) -> list[Need]:
    """Return what each phase of a run takes, in order; a pruned model counts like the dense one, which is larger."""
    config = copy(x.strategy.recast_config(dense))
    config.dtype = x.dtype
    return [*_planning(x, config), *_examining(x, config), *_recovering(x, config, dense)]


def peak(x: Experiment, dense: PretrainedConfig) -> Need | None:
    """Return the phase of a run that takes most memory; None if it has none."""
    return max(needs(x, dense), key=lambda need: need.memory["total"], default=None)


def need_of(x: Experiment, dense: PretrainedConfig, phase: str) -> Need:
    """Return what one phase of a run takes; "plan" and "refit" are steps of the phase "score"."""
    kind = "score" if phase in ("plan", "refit") else phase
    return next(need for need in needs(x, dense) if need.phase == kind)


def _planning(x: Experiment, config: PretrainedConfig) -> Iterator[Need]:
    if x.untouched:
        return
    data, reads = x.calibration, x.reads_calibration
    memory = x.strategy.peak_bytes(
        config,
        samples=data.num_samples,
        batch_size=data.batch_size,
        length=data.length,
        on_cpu=x.device == "cpu",
    )
    if not reads:
        yield Need(phase="score", size="weights alone", memory=memory, macs=0)
        return
    one = forward_macs(config, data.length) * data.num_samples
    passes, known = 1.0, not x.strategy.searches and x.strategy.compensation is None
    if (backward := x.strategy.backward()) is not None:
        passes += 1 + bool(backward["gradients"]) + getattr(x.strategy, "gradient_checkpointing", False)
    if x.strategy.probes:
        passes += (
            1 + len(layer_shapes(config)) / 2
        )  # a removal in layer n leaves those before it as they were
    size = f"{data.num_samples} windows of {data.length} tokens, {data.batch_size} at a time"
    yield Need(phase="score", size=size, memory=memory, macs=passes * one if known else None)


def _examining(x: Experiment, config: PretrainedConfig) -> Iterator[Need]:
    width = itemsize(config)
    if data := x.perplexity:
        tokens = None if data.max_tokens is None else data.max_tokens * len(data.corpora)
        read = data.batch_size * data.window
        logits = slice_bytes(config, tokens=read, width=width)
        yield Need(
            phase="perplexity",
            size=f"windows of {data.window} tokens, {data.batch_size} at a time",
            memory=evaluation_bytes(config, tokens=read, width=width, logits=logits),
            macs=None if tokens is None else forward_macs(config, data.window) * tokens / data.window,
        )
    if (tasks := x.zero_shot) and tasks.decodes:  # prompts as long as the model allows
        longest = config.max_position_embeddings
        yield Need(
            phase="zero_shot",
            size=f"prompts of up to {longest} tokens, {tasks.batch_size} at a time",
            memory=measured_bytes(
                config,
                batch_size=tasks.batch_size,
                prompt_length=longest - 1,
                new_tokens=1,
                width=width,
            ),
        )
    elif tasks:
        read = tasks.batch_size * REQUEST
        # lm-eval holds all logits of the requests whose prompts are not shared
        logits = nll_bytes(config, tokens=read, width=width)
        yield Need(
            phase="zero_shot",
            size=f"requests of up to {REQUEST} tokens, {tasks.batch_size} at a time",
            memory=evaluation_bytes(config, tokens=read, width=width, logits=logits),
        )
    if needles := x.needles:
        positions = config.max_position_embeddings
        lengths = [positions if length == "longest" else length for length in needles.lengths]
        texts, last = needles.samples * len(needles.tasks), config.vocab_size * width
        yield Need(
            phase="needles",
            size=f"texts of up to {max(lengths)} tokens, one at a time",
            memory=evaluation_bytes(config, tokens=max(lengths), width=width, logits=last),
            macs=texts * sum(forward_macs(config, length) for length in lengths),
        )
    if protocol := x.protocol:
        runs = protocol.warmup + protocol.runs
        yield Need(
            phase="measure",
            size=f"{protocol.batch_size} x ({protocol.prompt_length} + {protocol.new_tokens}) tokens, {runs} runs",
            memory=measured_bytes(
                config,
                batch_size=protocol.batch_size,
                prompt_length=protocol.prompt_length,
                new_tokens=protocol.new_tokens,
                width=width,
            ),
            macs=runs * protocol.batch_size * forward_macs(config, protocol.prompt_length),
            steps=runs * protocol.new_tokens,
        )


def _recovering(x: Experiment, config: PretrainedConfig, dense: PretrainedConfig) -> Iterator[Need]:
    recipe = x.recovery
    if recipe is None:
        return
    length, width = recipe_length(recipe), 2 if recipe.dtype == "bfloat16" else FLOAT32
    memory = training_bytes(
        config,
        batch_size=recipe.micro_batch_size,
        length=length,
        width=width,
        adapter=Adapter(
            rank=recipe.rank,
            modules=recipe.modules,
            dropout=recipe.dropout > 0,
            mask_bytes=FLOAT32 if x.device == "cpu" else 1,
        ),
        checkpointing=recipe.gradient_checkpointing,
        teacher=dense if recipe.distillation else None,
    )
    passes = 2 + recipe.gradient_checkpointing + bool(recipe.distillation)  # frozen weights get no gradient
    steps = recipe.max_steps
    size = f"{recipe.batch_size} x {length} tokens a step, {recipe.micro_batch_size} at a time"
    work = None if steps is None else passes * steps * recipe.batch_size * forward_macs(config, length)
    yield Need(phase="recover", size=f"{steps} steps of {size}" if steps else size, memory=memory, macs=work)


def recipe_length(recipe: Lora) -> int:
    """Return the most tokens of a training example."""
    return getattr(recipe.data, "length", None) or getattr(recipe.data, "cutoff", None) or REQUEST


def forward_macs(config: PretrainedConfig, length: int) -> int:
    """Return the multiply-accumulates of one forward pass over a sequence."""
    return macs(config, layer_shapes(config), prompt_length=length)


def host_bytes(x: Experiment, dense: PretrainedConfig) -> Parts:
    """Return the main memory that cutting and merging take, whatever the device: both work on the CPU.

    Cutting holds the model in its stored dtype twice. Merging an adapter holds it in float32 and once more as stored.
    """
    stored = weights_bytes(dense, itemsize(dense))
    parts = {} if x.untouched else {"prune": 2 * stored}
    if x.recovery is not None:
        parts["merge"] = weights_bytes(dense, FLOAT32) + stored
    return with_total(parts) if len(parts) == 1 else {**parts, "total": max(parts.values(), default=0)}
