"""KVPruner: prune KV channels, block by block as much as perplexity allows (arXiv 2409.11057).

What the paper says (abstract, figures 2 and 3): (A) a global, perplexity-based sensitivity analysis
gives each block its pruning ratio; (B) local channel importance, aggregated over the Q, K, V and O
channels, decides which channels go; (C) LoRA recovers. Its formulas are in no text we could read: the
rule of (A) in `kvp.strategies.allocation.allocate.Sensitivity` and the importances of (B) in
`kvp.strategies.signals.importance` are our reconstruction.
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
