"""Trials of a search, whose losses survive a kill.

A search draws everything it tries from a generator under the run's seed, and keeps no state on the disk but
the losses it has measured. Begun again after a kill, it proposes the same trials in the same order and finds
their losses, up to the one that it was at: the plan is that of an undisturbed search.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kvp.models.masks import masked
from kvp.models.nll import next_token_nll
from kvp.types import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Trials:
    """The losses of all trials, a line of JSON each: {"trial": key, "loss": nats per token}.

    A bar shows the best so far. After the first trial, the log says how long all of them will take.

    Attributes:
        best: The lowest loss so far.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.best, self._told = path, math.inf, False
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
        if whole != text:
            os.truncate(path, len(whole.encode()))
        self._losses: dict[str, float] = {}
        for line in map(json.loads, whole.splitlines()):
            self._losses[_key(line["trial"])] = line["loss"]
        if self._losses:
            log.info("search: going on after %d of %d trials", len(self._losses), total)
        self._bar = tqdm(total=total, desc="search", unit="trial")

    def loss(self, trial: Any, measure: Callable[[], float]) -> float:
        """Return the loss of a trial; measure it only if no attempt has.

        Args:
            trial: JSON data that tells it from every other.
            measure: Returns the loss in nats per token; called at most once per trial, over all attempts.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        key = _key(trial)
        if key not in self._losses:
            self._losses[key] = self._measured(trial, measure)
        self.best = min(self.best, self._losses[key])
        self._bar.update()
        self._bar.set_postfix_str(f"best {self.best:.4f} nats per token", refresh=False)
        return self._losses[key]

    def close(self) -> None:
        """Leave the bar as it is; the search is over."""
        self._bar.close()

    def _measured(self, trial: Any, measure: Callable[[], float]) -> float:
        started = time.perf_counter()
        loss = measure()
        if not math.isfinite(loss):
            raise FloatingPointError(
                "the calibration loss of a trial is not finite: check the checkpoint, or search in float32 "
                "(model.dtype=float32)"
            )
        with self.path.open("a") as file:
            file.write(json.dumps({"trial": trial, "loss": loss}) + "\n")
        if not self._told:
            self._told, seconds = True, time.perf_counter() - started
            left = timedelta(seconds=round(seconds * (self._bar.total - self._bar.n)))
            log.info("search: %d trials of about %.1f s, %s to go", self._bar.total, seconds, left)
        return loss


def _key(trial: Any) -> str:
    return json.dumps(trial, sort_keys=True)


@torch.inference_mode()
def masked_loss(model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan) -> float:
    """Return the loss, in nats per token, of a model whose rows and columns outside a plan are zero."""
    total, predictions = 0.0, 0
    with masked(model, plan):
        for ids in batches:
            ids = ids.to(model.device)
            losses = next_token_nll(model, input_ids=ids, labels=ids)
            total, predictions = total + losses.double().sum().item(), predictions + losses.numel()
    return total / predictions
