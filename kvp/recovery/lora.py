"""LoRA (arXiv:2106.09685): low-rank updates of frozen projections, merged into the weights at the end.

LLM-Pruner (arXiv:2305.11627) made it the usual way to recover a pruned model.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from kvp.data.corpora import Corpus
from kvp.recovery.base import Example, Examples, Recovery
from kvp.recovery.batches import collate, mean_loss
from kvp.recovery.journal import Journal, newest_checkpoint

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # a name that PEFT still reads

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("bfloat16", "float32")
PROBE = (1, 32)  # sequences and tokens on which the merged model must agree with the adapter
MERGE_TOLERANCE = 1e-3  # of the norm of the logits


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
        warmup_steps: Of linear growth to the peak, before the `scheduler` takes it to 0.
        scheduler: "linear" or "cosine".
        weight_decay: Of AdamW.
        dtype: Of the frozen model, "bfloat16" or "float32".
        save_steps: A killed run loses at most so many steps.
        gradient_checkpointing: Less memory for a third more time.
        validation: Examples held out, whose loss is told before and after.
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
    warmup_steps: int = 100
    scheduler: Literal["linear", "cosine"] = "linear"
    weight_decay: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    save_steps: int = 200
    gradient_checkpointing: bool = False
    validation: int = 0

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
            "save_steps",
        ):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        for name in ("warmup_steps", "weight_decay", "validation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.batch_size < 1 or self.batch_size % self.micro_batch_size:
            sizes = f"batch_size={self.batch_size}, micro_batch_size={self.micro_batch_size}"
            raise ValueError(f"batch_size must be a multiple of micro_batch_size, got {sizes}")
        if self.scheduler not in ("linear", "cosine"):
            raise ValueError(f"scheduler must be linear or cosine, got {self.scheduler!r}")

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Every option but `save_steps`, which changes no number, and which bytes the data stand for."""
        options = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("data", "save_steps")
        }
        return {**options, "target_modules": list(self.target_modules), "data": self.data.identity(corpora)}

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Fails at once where the data is unknown or out of reach."""
        self.data.check(corpora)

    def recover(
        self, checkpoint: Path, directory: Path, *, corpora: Mapping[str, Corpus], seed: int, device: str
    ) -> dict[str, Any]:
        """Writes `adapter/`, the merged `model/` in the checkpoint's dtype, and `losses.jsonl`.

        On a CPU, a run that was killed and started again ends with the same bits as one that was not.
        Every model of one tokenizer sees the same batches. In the result "tokens_seen" counts padding,
        "final_loss" is the mean of the last ten steps, and "validation" is None without examples held out.

        Raises:
            FloatingPointError: The loss or a gradient is not finite.
            ValueError: No example is left to train on.
        """
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        held_out, examples = self._split(self.data.examples(tokenizer, corpora), seed)
        result = self._train(checkpoint, directory, examples, held_out, seed, device)
        merged, agreement = merge(checkpoint, directory / "adapter", _probe(examples))
        merged.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
        shutil.rmtree(directory / "trainer")
        return {**result, **agreement, "adapter": "adapter", "model": "model"}

    def _split(self, examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
        """The examples held out, drawn at random, and the others."""
        if len(examples) <= self.validation:
            found = f"{len(examples)} examples with validation={self.validation}"
            raise ValueError(f"{found} leave none to train on: add some, or lower validation")
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [examples[i] for i in order]
        return shuffled[: self.validation], shuffled[self.validation :]

    def _train(
        self,
        checkpoint: Path,
        directory: Path,
        examples: list[Example],
        held_out: list[Example],
        seed: int,
        device: str,
    ) -> dict[str, Any]:
        """Trains the adapter and saves it."""
        model = self._model(checkpoint, seed)
        journal = Journal(directory / "losses.jsonl")
        arguments = self._arguments(directory / "trainer", seed, device)
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
            "validation": self._validate(model, held_out) if held_out else None,
            "seconds_per_step": median(row["seconds"] for row in rows),
        }

    def _model(self, checkpoint: Path, seed: int) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self.dtype)
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        set_seed(seed)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings(
            action="ignore", category=FutureWarning
        ):  # PEFT reads a renamed attribute
            return get_peft_model(base, config, autocast_adapter_dtype=True)

    def _arguments(self, directory: Path, seed: int, device: str) -> TrainingArguments:
        arguments = TrainingArguments(
            output_dir=str(directory),
            seed=seed,
            data_seed=seed,
            use_cpu=device == "cpu",
            num_train_epochs=self.epochs or 1,
            max_steps=self.max_steps or -1,
            per_device_train_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.batch_size // self.micro_batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.scheduler,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="all",
            save_steps=self.save_steps,
            save_total_limit=2,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer spreads a batch over every GPU it sees
        return arguments

    def _validate(self, model: PeftModel, held_out: list[Example]) -> dict[str, float]:
        """Loss of the held out examples per target token, without the adapter and with it."""
        with model.disable_adapter():
            before = mean_loss(model, held_out, self.micro_batch_size)
        after = mean_loss(model, held_out, self.micro_batch_size)
        return {"examples": len(held_out), "loss_before": before, "loss_after": after}


def merge(checkpoint: Path, adapter: Path, probe: Tensor) -> tuple[PreTrainedModel, dict[str, float]]:
    """The checkpoint with the adapter added to its weights in float32, then rounded once to its own dtype.

    Starts from the weights on disk, not from those that were trained over, which may have been rounded.

    Args:
        checkpoint: The model the adapter was trained on.
        adapter: Its directory.
        probe: Token ids of shape (sequences, tokens) on which the two forms are compared.

    Returns:
        The model, on the CPU, and the largest difference of a logit between the two in float32.

    Raises:
        ArithmeticError: They differ by more than rounding explains.
    """
    stored = AutoConfig.from_pretrained(checkpoint).dtype
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    updated = PeftModel.from_pretrained(base, adapter)
    expected = _logits(updated, probe)
    merged = updated.merge_and_unload()
    difference = _logits(merged, probe) - expected
    relative = (difference.norm() / expected.norm()).item()
    if not relative <= MERGE_TOLERANCE:
        raise ArithmeticError(
            f"The merged model's logits differ from the adapter's by {relative:.2%} of their norm, rounding "
            f"explains {MERGE_TOLERANCE:.2%}: lower learning_rate or alpha, the update is too large"
        )
    return merged.to(stored), {"merge_max_diff": difference.abs().max().item()}


def _check_trained(model: PeftModel) -> None:
    norms = [p.detach().norm() for name, p in model.named_parameters() if "lora_B" in name]
    if not sum(norms) > 0:
        raise ArithmeticError("The adapter did not move from 0: raise learning_rate or max_steps")


def _probe(examples: Sequence[Example]) -> Tensor:
    sequences, tokens = PROBE
    shortened = [{key: ids[:tokens] for key, ids in example.items()} for example in examples[:sequences]]
    return collate(shortened)["input_ids"]


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()
