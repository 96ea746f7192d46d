"""What a training run leaves behind as it goes: its losses, and checkpoints that a kill cannot spoil."""

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

from kvp.recovery.distillation import PARTS

COMPLETE = "complete"  # the file that says that a checkpoint was written to its end


def newest_checkpoint(directory: Path) -> str | None:
    """The latest complete checkpoint of a killed run; what it was writing when it died is removed."""
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in checkpoints:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    return next((str(path) for path in reversed(checkpoints) if path.exists()), None)


class Journal(TrainerCallback):
    """Writes one line of JSON per step to `path`, shows a bar, and stops at the first number not finite.

    A line: "step" (from 1), "loss" (nats per target token), "learning_rate", "grad_norm" (before
    clipping), "seconds"; with a teacher also the loss's parts before they are weighted, "text_loss" and so on.
    After a resume the file holds the steps of the checkpoint and goes on there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path  # the first of several processes writes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes over the lines of the checkpoint, if any."""
        self.writes = state.is_world_process_zero
        if not self.writes:
            return
        self.path.write_text("".join(map(_line, state.log_history)))
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="lora", unit="step")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self.begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves no checkpoint of the last step: Trainer resumes from it with one step too many."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the line of a step, or stops."""
        row = state.log_history[-1]
        if "loss" not in row:  # the summary at the end
            return
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise FloatingPointError(
                f"Step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}, learning rate "
                f"{row['learning_rate']:.3g}: lower learning_rate, or set dtype to float32"
            )
        row["seconds"] = time.perf_counter() - self.begun
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(_line(row))
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self.bar.update()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Marks the checkpoint complete, once every process has written its part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        Path(str(args.output_dir), f"checkpoint-{state.global_step}", COMPLETE).touch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self.writes:
            self.bar.close()


def _line(row: dict[str, Any]) -> str:
    keys = ("step", "loss", *(f"{part}_loss" for part in PARTS), "learning_rate", "grad_norm", "seconds")
    return json.dumps({key: row[key] for key in keys if key in row}) + "\n"
