"""Tune a model that is in memory by LoRA, and merge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.api.chosen import chosen, experiment
from kvp.api.given import GIVEN, GivenTexts
from kvp.api.memory import check_in_memory, written
from kvp.models.load import load_model, save
from kvp.pipeline.gate import check_lengths, check_modules, check_sources, linear_modules


@dataclass(frozen=True)
class Recovered:
    """A tuned model, and how its training went.

    Attributes:
        model: The model with the update merged into its weights, in the given dtype and on the given device.
        losses: One row per step: "step", "loss" (nats per target token), "learning_rate", "grad_norm", "seconds".
        figures: "steps", "tokens_seen", "trainable_params", "first_loss", "final_loss" and more.
    """

    model: PreTrainedModel
    losses: Sequence[Mapping[str, float]]
    figures: Mapping[str, Any]

    def __str__(self) -> str:
        first, final = self.figures["first_loss"], self.figures["final_loss"]
        return f"{self.figures['steps']} steps; loss {first:.3f}, at the end {final:.3f} nats per token"

    def save(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write the checkpoint whole or not at all, and return its directory.

        Raises:
            FileExistsError: The directory is there already.
        """
        with written(directory, self.model, tokenizer):
            return Path(directory)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: str = "lora_text",
    *,
    texts: Sequence[str] | None = None,
    teacher: PreTrainedModel | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Recovered:
    """Return a tuned model; the given one stays as it is.

        recovered = kvp.recover(pruned.model, tokenizer, max_steps=100, learning_rate=1e-3)

    Compare the result with the dense model tuned alike: tuning on text lowers perplexity by itself. Training reads a
    copy of the model on disk, so a temporary directory holds it meanwhile.

    Args:
        model: A Hugging Face decoder, pruned or not.
        tokenizer: The model's.
        recipe: An option of conf/recovery.
        texts: Documents to train on; None: those that the recipe names.
        teacher: The dense model; with distillation="logits" the model learns from its logits.
        directory: Keeps adapter, losses and checkpoints; a killed training resumes there. None keeps nothing.
        seed: The seed of every draw.
        options: Options of the recipe, such as `max_steps=100` or `rank=16`.

    Raises:
        ValueError: An option is out of its bounds, or the text makes no example; nothing was trained.
        FloatingPointError: A loss is not finite.
    """
    check_in_memory(model)
    words, values = chosen("recovery", recipe, options)
    if texts is not None:
        values["recovery.data.corpora"] = [GIVEN]
    x = experiment(model, [*words, "strategy=none"], {**values, "seed": seed})
    if texts is not None:
        x = replace(x, corpora={**x.corpora, GIVEN: GivenTexts(texts=texts)})
    if x.recovery is None:
        raise ValueError("recipe must be an option that trains, such as lora_text; got 'none'")
    if (x.recovery.distillation is None) != (teacher is None):
        raise ValueError(
            "teacher and distillation go together: give teacher=MODEL distillation='logits', or neither"
        )
    check_sources(x)
    check_lengths(x, model.config)
    check_modules(x, linear_modules(model))
    from kvp.recovery.training import train  # imports seconds of peft and Trainer

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvp-recover-")))
        work = place / "work" if directory is None else Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        for name, each in {"given": model, "teacher": teacher}.items():
            if each is not None:
                save(each, tokenizer, place / name)
        figures = train(
            x.recovery,
            place / "given",
            work,
            corpora=x.corpora,
            seed=seed,
            device=x.device,
            teacher=place / "teacher" if teacher is not None else None,
        )
        losses = [json.loads(line) for line in (work / "losses.jsonl").read_text().splitlines()]
        tuned = load_model(work / "model", dtype=model.dtype, device=str(model.device))
    return Recovered(tuned, losses, figures)
