"""From a LoRA recipe to a merged checkpoint; imported only when something is to be trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from kvp.data.corpora import Corpus
from kvp.recovery.base import Example
from kvp.recovery.distiller import check_teacher
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
    teacher: Path | None,
) -> dict[str, Any]:
    """What `Lora.recover` promises."""
    if recipe.distillation:
        check_teacher(checkpoint, teacher)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    held_out, examples = _split(recipe, recipe.data.examples(tokenizer, corpora), seed)
    job = Job(
        checkpoint=str(checkpoint),
        directory=str(directory),
        seed=seed,
        device=device,
        resume=newest_checkpoint(directory / "trainer"),
        teacher=str(teacher) if recipe.distillation else None,
    )
    result = (fit if recipe.num_processes == 1 else fit_in_processes)(recipe, job, examples, held_out)
    merged, agreement = merge(
        checkpoint, directory / "adapter", probe_of(examples), keep_zeros=recipe.keep_zeros
    )
    merged.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    shutil.rmtree(directory / "trainer")
    return {**result, **agreement, "adapter": "adapter", "model": "model"}


def _split(recipe: Lora, examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """The examples held out, drawn at random, and the others."""
    if len(examples) <= recipe.validation:
        found = f"{len(examples)} examples with validation={recipe.validation}"
        raise ValueError(f"{found} leave none to train on: add some, or lower validation")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [examples[i] for i in order]
    return shuffled[: recipe.validation], shuffled[recipe.validation :]
