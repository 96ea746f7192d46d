"""KVPruner: prune KV channels, block by block as much as perplexity allows (arXiv 2409.11057).

The paper names three phases. (A) A global, perplexity-based sensitivity analysis gives each block its ratio. (B) Local
importance, aggregated over the Q, K, V and O channels, decides which channels go. (C) LoRA recovers.

Formula
-------
Phase A removes the attention of one block at a time (`probe=attention`), or the lowest-scored half of its units
(`partial`). S_n is the rise of the loss in nats per token. With `rule=inverse`, block n loses the fraction

    r_n = clip(level (S_n + epsilon)^-temperature, 0, max_ratio),   the level meets the budget

Phase B scores a rope pair, channel or group. With `importance=taylor_gate` that is

    mean over samples |dL/dgate|,   a gate scales what the unit carries: keys, values, activations

`kvp.strategies.signals.importance` has the formulas of the other nine importances.

Faithful or interpreted
-----------------------
The phases are the paper's, every formula is our reconstruction. There is no public code, and the paper's formulas are
in no text we could read: the abstract and the captions of figures 2 and 3 are what we know.

Cost
----
One forward and backward pass over the calibration text scores. Weights, the activations of a batch and gradients are
in memory. Phase A adds a forward pass for each block on `probe_samples` samples, from that block on. A sweep over
ratios does both once.
"""

from __future__ import annotations

from typing_extensions import override

from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Sensitivity
from kvp.strategies.signals.importance import Importance
from kvp.strategies.templates.channels import ImportanceStrategy


@options
class KVPruner(ImportanceStrategy):
    """KVPruner, with the open choices of the paper as options.

    Attributes:
        importance: One of `kvp.strategies.signals.importance`.
    """

    allocator: Allocator = Sensitivity(probe_samples=8)
    importance: Importance = "taylor_gate"

    @property
    @override
    def criterion(self) -> Importance:
        return self.importance
