"""Follow a LoRA recipe from a checkpoint to a merged one; imports seconds of peft and Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from kvp.data.corpora import Corpus
from kvp.models.load import load_tokenizer
from kvp.recovery.distiller import check_teacher
from kvp.recovery.examples import Example
from kvp.recovery.fit import Job, fit
from kvp.recovery.journal import newest_checkpoint
from kvp.recovery.lora import Lora
from kvp.recovery.merge import merge, probe_of
from kvp.recovery.processes import fit_in_processes


def train(
    recipe: Lora,
    checkpoint: Path,
    directory: Path,
    *,
    corpora: Mapping[str, Corpus],
    seed: int,
    device: str,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Write `adapter/`, `losses.jsonl` and the merged `model/` in the checkpoint's dtype, and return the figures.

    A recovery reads a checkpoint, never the plan behind it, so it serves dense controls too. On a CPU, a run that was
    killed and started again ends with the same bits as one that was not. Every model of one tokenizer sees the same
    batches. In the result "tokens_seen" counts padding, "final_loss" is the mean of the last ten steps, and
    "validation" is None without examples held out.

    Args:
        recipe: What to train, on which data.
        checkpoint: Hugging Face directory with a tokenizer; it is only read.
        directory: Where to work; the files of a killed attempt are resumed.
        corpora: The text that the data may name.
        seed: The seed of every draw.
        device: "cpu" or "cuda".
        teacher: The dense model, for a recipe that learns from it.

    Raises:
        FloatingPointError: The loss or a gradient is not finite.
        ValueError: No example is left to train on, or the teacher has another vocabulary.
    """
    if recipe.distillation:
        check_teacher(checkpoint, teacher)
    tokenizer = load_tokenizer(checkpoint)
    held_out, examples = _split(recipe, recipe.data.examples(tokenizer, corpora), seed)
    job = Job(
        checkpoint=str(checkpoint),
        directory=str(directory),
        seed=seed,
        device=device,
        resume=newest_checkpoint(directory / "trainer"),
        teacher=str(teacher) if recipe.distillation else None,
    )
    try:
        result = (fit if recipe.num_processes == 1 else fit_in_processes)(recipe, job, examples, held_out)
    except UnpicklingError as error:  # torch loads nothing but tensors and numbers
        raise RuntimeError(
            f"{job.resume} is damaged, or no checkpoint that kvp wrote: delete {directory}, then the same command "
            "trains from the beginning"
        ) from error
    merged, agreement = merge(
        checkpoint, directory / "adapter", probe_of(examples), keep_zeros=recipe.keep_zeros
    )
    merged.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    shutil.rmtree(directory / "trainer")
    return {**result, **agreement, "adapter": "adapter", "model": "model"}


def _split(recipe: Lora, examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Return the examples held out, drawn at random, and the others."""
    if len(examples) <= recipe.validation:
        found = f"{len(examples)} examples with recovery.validation={recipe.validation}"
        raise ValueError(f"{found} leave none to train on: add some, or lower it")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [examples[i] for i in order]
    return shuffled[: recipe.validation], shuffled[recipe.validation :]
