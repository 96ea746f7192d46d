"""Train an adapter by peft and the transformers Trainer, in one process or in each of several."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from kvp.models.unfused import unfused
from kvp.recovery.batches import collate, lose_without_logits, mean_loss
from kvp.recovery.distillation import PARTS
from kvp.recovery.distiller import Distiller
from kvp.recovery.examples import Example
from kvp.recovery.journal import Journal
from kvp.recovery.lora import Lora

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # a name that PEFT still reads


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a training needs besides its recipe and examples.

    Attributes:
        checkpoint: Directory of the model to train on.
        directory: Where adapter, losses and the Trainer's checkpoints go.
        seed: Seed of the adapter's first values and of the order of examples.
        device: "cpu" or "cuda".
        resume: Checkpoint of a killed attempt to resume from.
        teacher: Directory of the dense model, if the recipe learns from it.
    """

    checkpoint: str
    directory: str
    seed: int
    device: str
    resume: str | None
    teacher: str | None


def fit(recipe: Lora, job: Job, examples: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """Train the adapter and save it; only the first of several processes writes and returns figures."""
    model = _model(recipe, job)
    if not recipe.distillation:  # which compares logits
        lose_without_logits(model.get_base_model())  # type: ignore[arg-type]
    directory = Path(job.directory)
    journal = Journal(directory / "losses.jsonl")
    options: dict[str, Any] = {
        "model": model,
        "args": _arguments(recipe, job),
        "train_dataset": examples,
        "data_collator": collate,
        "callbacks": [journal],
    }
    if recipe.distillation:
        options |= {"distillation": recipe.distillation, "teacher": job.teacher, "dtype": recipe.dtype}
    trainer = (Distiller if recipe.distillation else Trainer)(**options)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=job.resume)
    _check_trained(model)
    if not trainer.is_world_process_zero():
        return {}
    model.save_pretrained(str(directory / "adapter"), save_embedding_layers=False)
    (directory / "adapter" / "README.md").unlink()
    rows = [json.loads(line) for line in journal.path.read_text().splitlines()]
    result = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "first_loss": rows[0]["loss"],
        "final_loss": fmean(row["loss"] for row in rows[-10:]),
        "num_processes": recipe.num_processes,
        "validation": _validate(recipe, model, held_out) if held_out else None,
        "seconds_per_step": median(row["seconds"] for row in rows),
    }
    if recipe.distillation:
        result["distillation"] = asdict(recipe.distillation) | _parts(rows)
    return result


def _parts(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the first and final value of each part of the loss, as "first_logits_loss" and the like."""
    names = [f"{part}_loss" for part in PARTS if f"{part}_loss" in rows[0]]
    return {f"first_{name}": rows[0][name] for name in names} | {
        f"final_{name}": fmean(row[name] for row in rows[-10:]) for name in names
    }


def _model(recipe: Lora, job: Job) -> PeftModel:
    base = unfused(
        AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=recipe.dtype, trust_remote_code=False)
    )
    if recipe.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    set_seed(job.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.modules,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT reads a renamed attribute
        return get_peft_model(base, config, autocast_adapter_dtype=True)


def _arguments(recipe: Lora, job: Job) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=f"{job.directory}/trainer",
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=job.device == "cpu",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if job.device == "cpu" and recipe.num_processes > 1 else None,
        num_train_epochs=recipe.epochs or 1,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // (recipe.micro_batch_size * recipe.num_processes),
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
    # Trainer spreads a batch over every GPU that it sees. `n_gpu` is read-only, so its private field is set.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _validate(recipe: Lora, model: PeftModel, held_out: Sequence[Example]) -> dict[str, float]:
    """Return the loss of the held-out examples per target token, without the adapter and with it."""
    with model.disable_adapter():
        before = mean_loss(model, held_out, recipe.micro_batch_size)
    after = mean_loss(model, held_out, recipe.micro_batch_size)
    return {"examples": len(held_out), "loss_before": before, "loss_after": after}


def _check_trained(model: PeftModel) -> None:
    """Raise if every B of the adapter is still 0."""
    norms = [p.detach().norm() for name, p in model.named_parameters() if "lora_B" in name]
    if not sum(norms) > 0:
        raise ArithmeticError(
            "The adapter did not move from 0: raise recovery.learning_rate or recovery.max_steps"
        )
