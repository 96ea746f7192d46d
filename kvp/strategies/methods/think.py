"""ThinK, made static: cut key channels that hardly move a logit (arXiv:2407.21018, SalesforceAIResearch/ThinK).

ThinK keeps, for every prompt and head, the key channels that matter to the last queries. Values stay, so at most half
of the KV cache goes. Here the channels go once, from q_proj and k_proj, so that memory and time are really saved.

Formula
-------
    the code   ||Q[:, j] K[:, j]^T||_F^2 = mean_t q_j^2 mean_t k_j^2     channel j
    here       ||Q[:, p] K[:, p]^T||_F^2                                 the two channels of rope pair p

Q are the last `window` queries and K all keys, both rotated. Every head loses the same fraction.

Faithful or interpreted
-----------------------
The score is as in the code; static, in pairs and per group is ours. There it is `key_pruner_query_driven` in
`kv_pruning_utils.py`.

* There the channels of the cached keys go at run time, prompt by prompt, and the last `recent_size` keys stay whole.
* A rope pair goes together. Its score is what its removal changes in the logits: the sum of both channels' scores and
  their cross term.
* One set serves all text: squares are averaged over calibration samples, queries of the window and keys.
* A KV group adds up the squares of its query heads; the code chooses per query head, on repeated keys.

Cost
----
One forward pass over the calibration text. No gradient. Nothing can compensate for a rope pair.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import override

from kvp.models.family import family_of
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Uniform
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.logits import observed_attention, pair_interactions
from kvp.strategies.target import Target
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Kind, Space


@options
class ThinK(ScoreStrategy):
    """Cut rope pairs by what they add to the logits of the last queries.

    Attributes:
        window: Queries observed, the last ones of each calibration sample.
    """

    allocator: Allocator = Uniform(max_ratio=1.0)
    window: int = Field(default=32, ge=1, description="queries observed, the last ones of each sample")

    def __post_init__(self) -> None:
        if self.compensation is not None:
            raise ValueError(
                "query-key channels enter no projection, so nothing can compensate for them; "
                "use strategy/compensation=none"
            )

    @override
    def kinds(self) -> tuple[Kind, ...]:
        return ("qk",)

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return (groups, pairs) per layer: the mean squared change of a logit without the pair.

        Raises:
            FloatingPointError: A query or key is not finite.
        """
        model, family = target.model, family_of(target.config)
        scores = {space: torch.zeros(space.shape) for space in self.spaces(target.config)}
        space_of = {
            model.get_submodule(f"{family.layers}.{space.layer}.{family.attention}"): space
            for space in scores
        }

        def add(module: nn.Module, query: Tensor, key: Tensor) -> None:
            share = len(query) / len(target.calibration)  # type: ignore[arg-type]
            scores[space_of[module]] += share * pair_interactions(query[:, :, -self.window :], key).cpu()

        with torch.inference_mode(), observed_attention(model, add):
            for ids in tqdm(target.batches, desc="ThinK", unit="batch"):
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
        for space, score in scores.items():
            require_finite(score.sum(), f"a query-key product of layer {space.layer}")
        return scores
