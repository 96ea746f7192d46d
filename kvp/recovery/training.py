"""The training of a LoRA recipe, by peft and the transformers Trainer.

A process of its own per GPU may run it; imported only when something is to be trained.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kvp.data.corpora import Corpus
from kvp.recovery.base import Example
from kvp.recovery.batches import collate, mean_loss
from kvp.recovery.journal import Journal, newest_checkpoint
from kvp.recovery.lora import Lora
from kvp.recovery.merge import merge, probe_of

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # a name that PEFT still reads


def train(
    recipe: Lora, checkpoint: Path, directory: Path, *, corpora: Mapping[str, Corpus], seed: int, device: str
) -> dict[str, Any]:
    """What `Lora.recover` promises."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    held_out, examples = _split(recipe, recipe.data.examples(tokenizer, corpora), seed)
    result = _fit(recipe, checkpoint, directory, examples, held_out, seed, device)
    merged, agreement = merge(checkpoint, directory / "adapter", probe_of(examples))
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


def _fit(
    recipe: Lora,
    checkpoint: Path,
    directory: Path,
    examples: list[Example],
    held_out: list[Example],
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Trains the adapter and saves it."""
    model = _model(recipe, checkpoint, seed)
    journal = Journal(directory / "losses.jsonl")
    arguments = _arguments(recipe, directory / "trainer", seed, device)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[journal]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=newest_checkpoint(directory / "trainer"))
    _check_trained(model)
    model.save_pretrained(str(directory / "adapter"), save_embedding_layers=False)
    (directory / "adapter" / "README.md").unlink()
    rows = [json.loads(line) for line in journal.path.read_text().splitlines()]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "first_loss": rows[0]["loss"],
        "final_loss": fmean(row["loss"] for row in rows[-10:]),
        "validation": _validate(recipe, model, held_out) if held_out else None,
        "seconds_per_step": median(row["seconds"] for row in rows),
    }


def _model(recipe: Lora, checkpoint: Path, seed: int) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=recipe.dtype)
    if recipe.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    set_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT reads a renamed attribute
        return get_peft_model(base, config, autocast_adapter_dtype=True)


def _arguments(recipe: Lora, directory: Path, seed: int, device: str) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory),
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        num_train_epochs=recipe.epochs or 1,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer spreads a batch over every GPU it sees
    return arguments


def _validate(recipe: Lora, model: PeftModel, held_out: list[Example]) -> dict[str, float]:
    """Loss of the held out examples per target token, without the adapter and with it."""
    with model.disable_adapter():
        before = mean_loss(model, held_out, recipe.micro_batch_size)
    after = mean_loss(model, held_out, recipe.micro_batch_size)
    return {"examples": len(held_out), "loss_before": before, "loss_after": after}


def _check_trained(model: PeftModel) -> None:
    norms = [p.detach().norm() for name, p in model.named_parameters() if "lora_B" in name]
    if not sum(norms) > 0:
        raise ArithmeticError("The adapter did not move from 0: raise learning_rate or max_steps")
