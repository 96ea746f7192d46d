"""Losses and checkpoints of a training run, written so that a kill cannot spoil them."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from kvp.recovery.distillation import PARTS

COMPLETE = "complete"  # the file that marks a whole checkpoint


def newest_checkpoint(directory: Path) -> str | None:
    """Return the latest complete checkpoint of a killed run, and remove incomplete ones."""
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in checkpoints:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return next((str(path) for path in reversed(checkpoints) if path.exists()), None)


class Journal(TrainerCallback):
    """One line of JSON per step in `path`, and a progress bar; it stops at the first number that is not finite.

    A line holds "step" (from 1), "loss" (nats per target token), "learning_rate", "grad_norm" (before clipping) and
    "seconds". With a teacher it also holds the unweighted parts of the loss: "text_loss", "logits_loss" and so on.
    After a resume the file starts with the steps of the checkpoint. The first of several processes writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the lines of the checkpoint, if any."""
        self.writes = state.is_world_process_zero
        if not self.writes:
            return
        self.path.write_text("".join(map(_line, state.log_history)))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="lora", unit="step")

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip the checkpoint of the last step, from which Trainer would resume with one step too many."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the line of a step, or raise if a number is not finite."""
        row = state.log_history[-1]
        if "loss" not in row:  # the summary at the end
            return
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise FloatingPointError(
                f"Step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate "
                f"{row['learning_rate']:.3g}: lower recovery.learning_rate, or set "
                "recovery.dtype=float32"
            )
        row["seconds"] = time.perf_counter() - self.started
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(_line(row))
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self.bar.update()

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint complete, once every process has written its part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        Path(str(args.output_dir), f"checkpoint-{state.global_step}", COMPLETE).touch()

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writes:
            self.bar.close()


def _line(row: dict[str, Any]) -> str:
    keys = ("step", "loss", *(f"{part}_loss" for part in PARTS), "learning_rate", "grad_norm", "seconds")
    return json.dumps({key: row[key] for key in keys if key in row}) + "\n"
