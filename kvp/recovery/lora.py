"""LoRA (arXiv:2106.09685): low-rank updates of frozen projections, merged into the weights at the end.

LLM-Pruner (arXiv:2305.11627) made it the usual way to recover a pruned model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from kvp.data.corpora import Corpus
from kvp.recovery.base import Examples, Recovery
from kvp.recovery.distillation import Distillation

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Lora(Recovery):
    """Trains an update `alpha / rank * B A` of each projection in float32, over the frozen model in `dtype`.

    Attributes:
        data: What to train on.
        rank: Width of the update.
        alpha: Its scale, times the rank.
        dropout: On the input of the update.
        target_modules: Names of the linear modules to update; a dropped sublayer has none, which is fine.
        learning_rate: Peak of AdamW's.
        epochs: Passes over the data, or
        max_steps: optimizer steps; exactly one of the two.
        batch_size: Examples per step.
        micro_batch_size: Examples per pass; memory and speed hang on it.
        num_processes: Trains in so many processes, one GPU each. Every step sees the examples that one
            process would see, but for the last of an epoch, which is filled up from the epoch's beginning.
        warmup_steps: Of linear growth to the peak, before the `scheduler` takes it to 0.
        scheduler: "linear" or "cosine".
        weight_decay: Of AdamW.
        dtype: Of the frozen model, "bfloat16" or "float32".
        save_steps: A killed run loses at most so many steps.
        gradient_checkpointing: Less memory for a third more time.
        validation: Examples held out, whose loss is told before and after.
        keep_zeros: The merged update is dropped where the weight is zero, so that a sparse model stays sparse. It
            is trained dense, and loses what it does there.
        distillation: What it learns from the dense model; None: from the text alone.
    """

    data: Examples
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: Sequence[str] = PROJECTIONS
    learning_rate: float = 1e-4
    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int = 4
    num_processes: int = 1
    warmup_steps: int = 100
    scheduler: Literal["linear", "cosine"] = "linear"
    weight_decay: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    save_steps: int = 200
    gradient_checkpointing: bool = False
    validation: int = 0
    keep_zeros: bool = False
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            reason = "in float16 Llama-2 and later diverge (LLM-Pruner issues 13 and 81)"
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}: {reason}")
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(f"Set exactly one of epochs={self.epochs} and max_steps={self.max_steps}")
        for name in (
            "rank",
            "alpha",
            "learning_rate",
            "epochs",
            "max_steps",
            "micro_batch_size",
            "num_processes",
            "save_steps",
        ):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        for name in ("warmup_steps", "weight_decay", "validation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.batch_size < 1 or self.batch_size % (self.micro_batch_size * self.num_processes):
            sizes = f"{self.batch_size}, {self.micro_batch_size} and {self.num_processes}"
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size * num_processes, got {sizes}"
            )
        if self.scheduler not in ("linear", "cosine"):
            raise ValueError(f"scheduler must be linear or cosine, got {self.scheduler!r}")
        if not isinstance(self.distillation, Distillation | None):
            raise ValueError(
                f"distillation is chosen by recovery/distillation=logits before it has options, got {self.distillation}"
            )

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Every option that changes numbers, and which bytes the data stand for."""
        apart = ("data", "save_steps", "num_processes", "keep_zeros", "distillation")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        if self.num_processes > 1:
            options["num_processes"] = self.num_processes
        if self.keep_zeros:
            options["keep_zeros"] = True
        if self.distillation:
            options["distillation"] = {k: float(value) for k, value in asdict(self.distillation).items()}
        return {**options, "target_modules": list(self.target_modules), "data": self.data.identity(corpora)}

    def check(self, corpora: Mapping[str, Corpus], device: str) -> None:
        """Fails at once where the data is unknown or out of reach, or there are too few GPUs."""
        self.data.check(corpora)
        if device == "cuda" and self.num_processes > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"recovery.num_processes={self.num_processes} needs as many GPUs, here are {gpus}"
            )

    def recover(
        self,
        checkpoint: Path,
        directory: Path,
        *,
        corpora: Mapping[str, Corpus],
        seed: int,
        device: str,
        teacher: Path | None = None,
    ) -> dict[str, Any]:
        """Writes `adapter/`, the merged `model/` in the checkpoint's dtype, and `losses.jsonl`.

        On a CPU, a run that was killed and started again ends with the same bits as one that was not.
        Every model of one tokenizer sees the same batches. In the result "tokens_seen" counts padding,
        "final_loss" is the mean of the last ten steps, and "validation" is None without examples held out.

        Raises:
            FloatingPointError: The loss or a gradient is not finite.
            ValueError: No example is left to train on, or the teacher has another vocabulary.
        """
        from kvp.recovery.training import train  # imports seconds of peft and Trainer

        return train(self, checkpoint, directory, corpora=corpora, seed=seed, device=device, teacher=teacher)
