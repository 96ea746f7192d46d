"""LoRA (arXiv:2106.09685) as a recipe: low-rank updates of frozen projections, merged into the weights at the end.

LLM-Pruner (arXiv:2305.11627) made LoRA the usual way to recover a pruned model. A recipe is data; `training.train`
follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, InstanceOf

from kvp.data.corpora import Corpus
from kvp.options import options
from kvp.recovery.distillation import Distillation
from kvp.recovery.examples import Examples

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@options
class Lora:
    """A recipe for an update `alpha / rank * B A` of each projection, in float32, over the frozen model in `dtype`.

    With several processes, each on a GPU of its own, a step sees the examples that one process would see. Only the last
    step of an epoch differs: it is filled up from the epoch's beginning.
    """

    node: ClassVar[str] = "recovery"
    data: Examples = Field(description="the text or the instructions to train on")
    rank: int = Field(default=8, gt=0, description="it is the width of the update")
    alpha: int = Field(default=16, gt=0, description="it scales the update, as alpha / rank")
    dropout: float = Field(ge=0, lt=1, description="it drops inputs of the update")
    target_modules: Sequence[str] = Field(
        default=PROJECTIONS, min_length=1, description="names of linear modules to update, such as [q_proj]"
    )
    learning_rate: float = Field(gt=0, description="it is AdamW's peak")
    epochs: float | None = Field(
        default=None, gt=0, description="passes over the data; null: max_steps decides"
    )
    max_steps: int | None = Field(default=None, gt=0, description="optimizer steps; null: epochs decides")
    batch_size: int = Field(gt=0, description="examples per step, over all processes")
    micro_batch_size: int = Field(gt=0, description="examples per pass; memory and speed depend on it")
    num_processes: int = Field(default=1, gt=0, description="processes, one GPU each")
    warmup_steps: int = Field(
        ge=0, description="steps of linear growth to the peak, before the scheduler's decay"
    )
    scheduler: Literal["linear", "cosine"] = Field(
        description="it takes the learning rate from its peak to 0"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="it is AdamW's")
    dtype: Literal["bfloat16", "float32"] = Field(
        description="the frozen model's; in float16 Llama-2 and later diverge (LLM-Pruner issues 13 and 81)"
    )
    save_steps: int = Field(gt=0, description="a killed run loses at most this many steps")
    gradient_checkpointing: bool = Field(
        default=False, description="it saves memory and costs a third more time"
    )
    validation: int = Field(ge=0, description="examples held out, to measure their loss before and after")
    keep_zeros: bool = Field(
        default=False,
        description="drop the merged update where the weight is zero, so a sparse model stays sparse",
    )
    distillation: InstanceOf[Distillation] | None = Field(
        default=None,
        description="choose recovery/distillation=logits before its options; null: learn from text alone",
    )

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"set exactly one of recovery.epochs and recovery.max_steps and leave the other null, got "
                f"{self.epochs} and {self.max_steps}"
            )
        if self.max_steps == 1 and self.warmup_steps:
            raise ValueError(
                f"recovery.max_steps must be >= 2 with recovery.warmup_steps={self.warmup_steps}, got 1: a warmup's "
                "first step has a learning rate of 0, so nothing would be learnt; raise it, or set warmup_steps to 0"
            )
        if self.batch_size % (self.micro_batch_size * self.num_processes):
            sizes = f"{self.batch_size}, {self.micro_batch_size} and {self.num_processes}"
            raise ValueError(
                "recovery.batch_size must be a multiple of recovery.micro_batch_size * recovery.num_processes, got "
                f"{sizes}"
            )

    @property
    def modules(self) -> list[str]:
        """Return the names to update: a latent layer's queries of its latent go with its other queries."""
        latent = ["q_latent_proj"] if "q_proj" in self.target_modules else []
        return [*self.target_modules, *latent]

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Return every option that changes numbers, and which bytes the data stand for."""
        apart = ("data", "save_steps", "num_processes", "keep_zeros", "distillation")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        if self.num_processes > 1:
            options["num_processes"] = self.num_processes
        if self.keep_zeros:
            options["keep_zeros"] = True
        if self.distillation:
            options["distillation"] = asdict(self.distillation)
        return {**options, "target_modules": list(self.target_modules), "data": self.data.identity(corpora)}

    def check(self, corpora: Mapping[str, Corpus], device: str) -> None:
        """Raise at once if the data is unknown or out of reach, or there are too few GPUs."""
        self.data.check(corpora)
        if device == "cuda" and self.num_processes > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"recovery.num_processes={self.num_processes} needs as many GPUs; this machine has {gpus}"
            )
