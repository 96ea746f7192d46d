"""The Trainer of a recovery with a teacher; it adds a forward pass per batch and logs the parts of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from typing_extensions import override

from kvp.data.tokens import IGNORE
from kvp.models.load import load_tokenizer
from kvp.recovery.distillation import PARTS, Distillation, divergence, hidden_error


class Distiller(Trainer):
    """A Trainer whose loss includes the distance to a frozen teacher.

    It needs memory for the teacher's weights and one batch of the teacher's logits.

    Args:
        distillation: The weights of the parts.
        teacher: Directory of the model to learn from.
        dtype: The dtype that the teacher computes in.
        options: The Trainer's own options.
    """

    def __init__(self, *, distillation: Distillation, teacher: str, dtype: str, **options: Any) -> None:
        super().__init__(**options)
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            teacher, dtype=dtype, trust_remote_code=False
        )
        self.teacher = loaded.to(self.args.device).eval().requires_grad_(False)
        self.distillation = distillation
        self.parts: dict[str, Tensor] = {}

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the parts, each per target token of the whole batch, as the Trainer scales."""
        assert num_items_in_batch is not None
        options = self.distillation
        asked = {"output_hidden_states": options.hidden_weight > 0}
        text, found = super().compute_loss(model, {**inputs, **asked}, True, num_items_in_batch)
        with torch.no_grad():
            expected = self.teacher(input_ids=inputs["input_ids"], use_cache=False, **asked)
        counts = functional.pad(inputs["labels"][:, 1:] != IGNORE, (0, 1))
        share = self.accelerator.num_processes / num_items_in_batch
        parts = {"text": text}
        if options.logits_weight:
            parts["logits"] = share * divergence(found.logits, expected.logits, counts, options.temperature)
        if options.hidden_weight:
            states = (found.hidden_states[1:], expected.hidden_states[1:])  # the first are the embeddings
            parts["hidden"] = share * hidden_error(*states, counts)
        for name, part in parts.items():
            self.parts[name] = self.parts.get(name, 0) + part.detach()
        weighted = [
            options.weight(name) * parts[name] for name in PARTS if name in parts and options.weight(name)
        ]
        loss = torch.stack(weighted).sum()
        return (loss, found) if return_outputs else loss

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of a step's loss, unweighted, as "text_loss", "logits_loss" and "hidden_loss"."""
        if "loss" in logs:
            parts = self.accelerator.reduce(self.parts, reduction="mean")
            logs |= {f"{name}_loss": part.item() for name, part in parts.items()}
            self.parts = {}
        super().log(logs, start_time)


def check_teacher(student: Path, teacher: Path | None) -> None:
    """Refuse a teacher that is missing, or has another vocabulary; no weights are read.

    Raises:
        ValueError: No teacher is given, or the vocabularies differ.
    """
    if teacher is None:
        raise ValueError("distillation needs a teacher: the directory of the dense model")
    sizes = [
        AutoConfig.from_pretrained(path, trust_remote_code=False).vocab_size for path in (student, teacher)
    ]
    words = [load_tokenizer(path).get_vocab() for path in (student, teacher)]
    if sizes[0] != sizes[1] or words[0] != words[1]:
        raise ValueError(
            f"the teacher {teacher} predicts {sizes[1]} tokens and names {len(words[1])}; the model to recover "
            f"predicts {sizes[0]} and names {len(words[0])}: both vocabularies must be the same. Choose "
            "recovery/distillation=none, or the dense model that the pruned one was cut from"
        )
