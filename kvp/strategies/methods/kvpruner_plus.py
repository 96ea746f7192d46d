"""KVPruner+: drop directions, not channels, and spend every byte of the cache where it is worth the most.

KVPruner drops channels as they come. Here

1. every KV group is first turned into another basis (`kvp.strategies.signals.heads`). There its values, and the keys
   that barely rotate, are sorted by what they are worth, so that the least of them is dropped;
2. all directions of all layers are compared in one currency, nats per token;
3. the budget is one ranking over rope pairs and value channels of all layers (`grouping=apart`, `allocator=global`);
4. the layers are refitted one after the other to what really arrives there (`compensation=sequential`).

Before all that, `num_key_value_heads` joins KV heads to fewer and wider ones (`kvp.models.joined`). What several heads
have in common is then cached once; q_proj and o_proj get larger. Each part is an option of its own.
`scope=model grouping=separate strategy/allocator=uniform` keeps one width and one set of pairs in the whole model,
which stock engines serve.

Formula
-------
If an attention's output moves by e, the loss rises by about 1/2 e^T H e. H is replaced by s I, and s is the mean
square of the loss's derivative by that output. A direction of energy E^2, the mean square it adds, is worth

    values          s/2 a_v E^2    E singular values of S^(1/2) [O_1^T ... O_n^T]
    folded pairs    s/2 a_k E^2    E singular values of S_q^(1/2) S_k^(1/2)
    other pairs     s/2 a_k E^2    E root mean square of the pair's term in the logits

S, S_q and S_k are second moments of the values, queries and keys; O_h are the columns of o_proj of query head h.

a_v and a_k bring energies to the output's scale, by one measurement per layer: what the refitted output loses without
the lower half of the directions, divided by their energy. A pair is folded if it turns at most `angle` radians against
the slowest pair within `context` tokens.

Faithful or interpreted
-----------------------
The method is ours. The Fisher information stands for the curvature in step 2. Its nearest relatives:

* CLOVER (arXiv:2411.17426) and Olica (arXiv:2506.08436) take the SVD of values times o_proj, head by head. Olica adds
  a linear calibration of the MLP.
* ReCalKV (arXiv:2505.24357) refits latents of values by least squares, and CARE (arXiv:2603.17946) divides ranks by
  whitened spectra. ASVD and SVD-LLM whiten as step 1 does. Palu, CARE and ReCalKV expand keys before RoPE.
* TransMLA (arXiv:2502.07864) mixes pairs of one frequency across heads, by real principal components. MHA2MLA
  (arXiv:2502.14837) gives up the rotation of pairs, head by head.

Most of these are strategies here. So the SVD of values, and a refit behind it, are not new. New are: keys cut where
RoPE turns them, by a complex SVD per frequency over joined heads and by folding; and one price in nats for keys and
values of all layers.

Cost
----
One forward and backward pass gives the slopes, and three walks through the layers give scores, edits and the refit. A
walk has one layer at a time at work. Weights, the activations of a batch and gradients are in memory in the first
pass. Joined heads make q_proj and o_proj larger.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.joined import joined_config
from kvp.models.linears import Linear, named_linears
from kvp.models.masks import edited, masked
from kvp.models.rope import require_fixed_rope
from kvp.models.spaces import find_spaces
from kvp.options import options
from kvp.strategies.allocation.allocate import Allocator, Global
from kvp.strategies.compensation.compensate import Compensation
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.signals.estimate import SUBLAYERS
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.heads import Turned, first_folded, turn
from kvp.strategies.signals.importance import Importance, score_spaces
from kvp.strategies.signals.outputs import lost_per_energy, output_slopes, visits_of_heads
from kvp.strategies.signals.walk import Visit, found_edits
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.channels import ChannelStrategy
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Basis = Literal["rank", "channels"]
Worth = Literal["output", Importance]


@options
class KVPrunerPlus(ChannelStrategy):
    """KVPruner+, with each of its parts as an option.

    Attributes:
        values: "rank": value channels are turned into directions sorted by worth; "channels": they stay.
        context: Tokens over which folded pairs hold; None: no pair is folded. For a theta of 10,000 and 64 pairs,
            1024 tokens fold the slowest 5; for 100,000 and 32 pairs the slowest 8.
        angle: Radians by which a folded pair may be off at that distance.
        num_key_value_heads: KV heads per layer before the cut, a divisor of the model's; None: as many as it has.
        importance: "output": worth in nats per token, as above; or one of `kvp.strategies.signals.importance`,
            in the new basis.
    """

    allocator: Allocator = Global()
    compensation: Compensation | None = Sequential()
    values: Basis = "rank"
    grouping: Literal["apart", "separate", "vo"] = "apart"
    context: int | None = Field(default=1024, ge=1, description="tokens; null folds no pair")
    angle: float = Field(default=0.2, gt=0, lt=1, description="radians")
    num_key_value_heads: int | None = Field(default=None, ge=1, description="null: as many as the model has")
    importance: Worth = "output"

    @property
    @override
    def prices(self) -> bool:
        return self.importance == "output" and self.kinds() == ("qk", "vo")

    @property
    @override
    def joins(self) -> int | None:
        return self.num_key_value_heads

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Check the model as joined. Joining adds parameters, so no budget of parameters goes with it.

        Raises:
            ValueError: As any strategy, heads are joined under a budget of parameters or blocks, or pairs are folded
                whose frequencies change with the length.
        """
        if self.joins and budget.of in ("params", "block_params", "blocks"):
            raise ValueError(
                f"strategy.num_key_value_heads={self.joins} adds parameters, so it goes with ratio=kv_cache only; "
                f"got ratio.of={budget.of}, for which leave it null"
            )
        if self.context is not None and "qk" in self.kinds():
            if family_of(config).qk_norm:
                raise ValueError(
                    f"{config.model_type} norms queries and keys, so no rope pairs can be mixed before the cut: set "
                    "strategy.context=null, which cuts the pairs as they are"
                )
            require_fixed_rope(config)
        super().check(joined_config(config, self.joins), budget)

    @property
    @override
    def searches(self) -> bool:
        return self.values == "rank" or self.context is not None

    @override
    def backward(self) -> Mapping[str, Collection[str]] | None:
        return {"gradients": () if self.importance == "output" else SUBLAYERS}

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return (groups, pairs) and (groups, v_head_dim) scores in the new basis: by "output", nats per token."""
        spaces = find_spaces(target.config, self.kinds())
        if self.importance != "output":
            edits = {name: edit for _, turned in self._turned(target) for name, edit in turned.edits.items()}
            with (
                edited(target.model, edits),
                masked(target.model, Plan({}, folded=self._folded(target.model))),
            ):
                return score_spaces(target, spaces, self.importance, self.gradient_checkpointing)
        slopes, scores = output_slopes(target, self.gradient_checkpointing), {}
        for visit, turned in self._turned(target):
            energies = {"qk": turned.qk, "vo": turned.vo}
            here = {space: energies[space.kind] for space in spaces if space.layer == visit.layer}
            for space, lost in lost_per_energy(visit, turned, here, self._folded(visit.model)).items():
                scores[space] = (slopes[visit.layer] / 2 * lost * here[space]).float().cpu()
        for space, score in scores.items():
            require_finite(score.sum(), f"the worth of {space.key}")
        return scores

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        plan = self.plan(target.config, scores, budget, profile)
        edits = found_edits(visits_of_heads(target), self._edits, directory)
        return replace(plan, edits=edits, folded=self._folded(target.model))

    @override
    def rewritten(self, config: PretrainedConfig) -> list[Linear]:
        kinds = self.kinds()
        turned = named_linears(config, "q", "k") if self.context is not None and "qk" in kinds else []
        return turned + (named_linears(config, "v", "o") if self.values == "rank" and "vo" in kinds else [])

    def _turned(self, target: Target) -> Iterator[tuple[Visit, Turned]]:
        return ((visit, self._turn(visit)) for visit in visits_of_heads(target))

    def _turn(self, visit: Visit) -> Turned:
        return turn(visit, values=self.values == "rank", folded=self._folded(visit.model))

    def _edits(self, visit: Visit) -> dict[str, Tensor]:
        return self._turn(visit).edits

    def _folded(self, model: PreTrainedModel) -> int | None:
        return first_folded(model, self.context if "qk" in self.kinds() else None, self.angle)
