"""Tune a model that is in memory by LoRA, and merge."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.api.chosen import check_given, check_memory, chosen, experiment
from kvp.api.given import GIVEN, GivenTexts
from kvp.api.memory import check_in_memory, check_tokenizer, weights_digest, written
from kvp.code import edits
from kvp.models.linears import linear_names
from kvp.models.load import load_model, save
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_lengths, check_modules, check_sources
from kvp.pipeline.session import origin_of
from kvp.pipeline.stages import Recover


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
    seed: int = 0,
    store: str | Path | None = None,
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
        seed: The seed of every draw.
        store: Directory where a finished training is kept and found, and a killed one resumes; None keeps nothing.
        options: Options of the recipe, such as `max_steps=100` or `rank=16`.

    Raises:
        ValueError: An option is out of its bounds, or the text makes no example; nothing was trained.
        FloatingPointError: A loss is not finite.
    """
    check_in_memory(model)
    check_tokenizer(tokenizer)
    check_given(seed=seed)
    if teacher is not None:
        check_in_memory(teacher, "teacher")
    words, values = chosen("recovery", recipe, options)
    if texts is not None:
        values["recovery.data.corpora"] = [GIVEN]
    x = experiment(model, [*words, "strategy=none"], {**values, "seed": seed}, store=store)
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
    check_modules(x, linear_names(model.config, model))
    check_memory(x, model)
    with tempfile.TemporaryDirectory(prefix="kvp-recover-") as place:
        work = partial(_trained, x, {"given": model, "teacher": teacher}, tokenizer, Path(place))
        if store is None:
            done = Path(place) / "work"
            done.mkdir()
            figures = work(done)
        else:
            stage, before = Recover(), {"model": weights_digest(model)}
            if teacher is not None:
                before["teacher"] = weights_digest(teacher)
            inputs = {**before, "recovery": x.recovery.identity(x.corpora), "seed": seed}
            inputs |= {"code": changed} if (changed := edits(stage.modules(x))) else {}
            found = x.store.once(
                stage.name,
                inputs,
                work,
                version=stage.version,
                resumable=True,
                origin=lambda: origin_of(x, stage),
            )
            done, figures = found.path, found.result
        losses = [json.loads(line) for line in (done / "losses.jsonl").read_text().splitlines()]
        tuned = load_model(done / "model", dtype=model.dtype, device=str(model.device))
    return Recovered(tuned, losses, figures)


def _trained(
    x: Experiment,
    models: Mapping[str, PreTrainedModel | None],
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    directory: Path,
) -> dict[str, Any]:
    """Train in a directory on copies of the models that lie in `place`, and return the figures."""
    from kvp.recovery.training import train  # imports seconds of peft and Trainer

    assert x.recovery is not None
    for name, each in models.items():
        if each is not None:
            save(each, tokenizer, place / name)
    with torch.inference_mode(False), torch.enable_grad():
        return train(
            x.recovery,
            place / "given",
            directory,
            corpora=x.corpora,
            seed=x.node["seed"],
            device=x.device,
            teacher=place / "teacher" if models["teacher"] is not None else None,
        )
