"""KVPruner+ in the shape of multi-head latent attention: one latent for values and keys, and one rotated key beside it.

All KV heads become one. It caches what DeepSeek models cache (arXiv:2405.04434), and `kvp export --to mla` writes it as
one:

1. keys of pairs that barely turn within `context` tokens stop turning. They and the values are read from one latent
   of `kv_lora_rank` channels (`kvp.strategies.signals.latents`);
2. a frequency that does turn keeps one direction, the best over all heads, in `qk_rope_head_dim` rotated channels. The
   pairs are 0, m, 2m, ..., which default RoPE turns; m and both widths are those that lose least;
3. the layers are refitted one after the other, and each query head's o_proj stays in the directions that it reads
   (`compensation.factored`). So q_proj and o_proj are as small in the export as they were in the dense model.

Formula
-------
Worth is KVPruner+'s, in nats per token, so one sum over all layers decides the widths:

    row j of the latent    s/2 (what a_v and a_k, as w_v and w_k, lose less with it than with the rows before it)
    frequency i            s/2 a_k E_i^2    E_i^2 the mean square that its best direction adds to the logits

s, a_v and a_k are those of `kvp.strategies.methods.kvpruner_plus`.

Faithful or interpreted
-----------------------
The method is ours. TransMLA (arXiv:2502.07864) has the joint latent and one direction per frequency; MHA2MLA
(arXiv:2502.14837) keeps some pairs turning and gives the others up.

Cost
----
As KVPruner+, and three more passes through each layer in each of two walks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from kvp.models.family import family_of
from kvp.models.rope import require_fixed_rope
from kvp.models.shapes import CHANNELS_PER_PAIR, dense_shapes, layer_shapes
from kvp.models.spaces import find_spaces
from kvp.options import options
from kvp.strategies.compensation.compensate import Compensation
from kvp.strategies.compensation.sequential import Sequential
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.heads import Turned, first_folded, slow_pair, turn
from kvp.strategies.signals.latents import Latent, find_latent, still_channels
from kvp.strategies.signals.outputs import lost_per_energy, output_slopes, visits_of_heads
from kvp.strategies.signals.walk import Visit, found_edits
from kvp.strategies.target import Scores, Target
from kvp.strategies.templates.mla import MLAStrategy
from kvp.types import Budget, Plan, Space

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class KVPrunerPlusMLA(MLAStrategy):
    """KVPruner+ that leaves multi-head latent attention.

    Attributes:
        context: Tokens within which keys that stop turning may be off by `angle`; None: all keys turn.
        angle: Radians.
        kv_lora_rank: Channels of the latent; None: what loses least under the budget.
        qk_rope_head_dim: Rotated channels; None: what loses least under the budget.
        gradient_checkpointing: Trade time for activation memory in the backward pass.
    """

    late: ClassVar[tuple[str, ...]] = (*MLAStrategy.late, "qk_rope_head_dim", "gradient_checkpointing")

    compensation: Compensation | None = Sequential(factored=True)
    context: int | None = Field(default=1024, ge=1, description="tokens; null lets all keys turn")
    angle: float = Field(default=0.2, gt=0, lt=1, description="radians")
    kv_lora_rank: int | None = Field(default=None, ge=1, description="null: what loses least")
    qk_rope_head_dim: int | None = Field(
        default=None, ge=2, multiple_of=2, description="null: what loses least"
    )
    gradient_checkpointing: bool = False

    @override
    def check(self, config: PretrainedConfig, budget: Budget) -> None:
        """Check the model as joined.

        Raises:
            ValueError: As of any `MLAStrategy`, or the model's frequencies change with the length.
        """
        if self.context is not None and not family_of(config).qk_norm:  # which is refused for good
            require_fixed_rope(config)
        super().check(config, budget)

    @override
    def backward(self) -> Mapping[str, Collection[str]] | None:
        return {"gradients": ()}

    @override
    def score(self, target: Target) -> dict[Space, Tensor]:
        """Return (1, pairs) and (1, v_head_dim) nats per token: of directions that turn, and of the latent's."""
        slopes, scores = output_slopes(target, self.gradient_checkpointing), {}
        spaces = {(space.layer, space.kind): space for space in find_spaces(target.config, self.kinds())}
        for visit in visits_of_heads(target):
            qk, vo = spaces[visit.layer, "qk"], spaces[visit.layer, "vo"]
            turned, latent, lost = self._found(visit, qk, vo)
            for space, worth in ((qk, turned.qk * lost), (vo, latent.worth[None])):
                scores[space] = (slopes[visit.layer] / 2 * worth).float().cpu()
                require_finite(scores[space].sum(), f"the worth of {space.key}")
        return scores

    @override
    def plan(self, config: PretrainedConfig, scores: Scores, budget: Budget, profile: Tensor) -> Plan:
        """Return the widths and the spacing of pairs that keep the most, alike in all layers."""
        frequencies = dense_shapes(config)[0].qk_head_dim // CHANNELS_PER_PAIR
        latent, turning = (
            torch.stack([score[0].double() for space, score in scores.items() if space.kind == kind]).sum(0)
            for kind in ("vo", "qk")
        )
        best = turning[:frequencies]  # the first slot of a frequency holds its best direction
        still = slow_pair(family_of(config).rotary_class(config).inv_freq, self.context, self.angle)
        moving = frequencies if still is None else still
        choices = {
            (rank, pairs): (latent[:rank].sum() + best[list(pairs)].sum()).item()
            for rank, rotated in self.widths(layer_shapes(config)[0], CHANNELS_PER_PAIR * moving, budget)
            for pairs in _spacings(rotated // CHANNELS_PER_PAIR, moving)
        }
        rank, pairs = max(choices, key=choices.__getitem__)
        keep = {"qk": torch.tensor([pairs]), "vo": torch.arange(rank)[None]}
        return Plan({space: keep[space.kind] for space in scores})

    @override
    def search(
        self, target: Target, scores: Scores, budget: Budget, profile: Tensor, directory: Path
    ) -> Plan:
        plan = self.plan(target.config, scores, budget, profile)
        here = {(space.layer, space.kind): space for space in plan.keep}

        def make(visit: Visit) -> dict[str, Tensor]:
            qk, vo = here[visit.layer, "qk"], here[visit.layer, "vo"]
            return self._edits(visit, qk, vo, plan.keep[vo].shape[-1])

        return replace(plan, edits=found_edits(visits_of_heads(target), make, directory))

    def _found(self, visit: Visit, qk: Space, vo: Space) -> tuple[Turned, Latent, float]:
        """Return the heads by rank, the latent, and what the output loses per energy of a logit."""
        first = first_folded(visit.model, self.context, self.angle)
        turned = turn(visit, values=True, folded=first)
        lost = lost_per_energy(visit, turned, {qk: turned.qk, vo: turned.vo}, first)
        return turned, find_latent(visit, still_channels(visit, first), lost[vo], lost[qk]), lost[qk]

    def _edits(self, visit: Visit, qk: Space, vo: Space, rank: int) -> dict[str, Tensor]:
        turned, latent, _ = self._found(visit, qk, vo)
        return {**turned.edits, **latent.edits(rank)}


def _spacings(pairs: int, frequencies: int) -> Iterator[tuple[int, ...]]:
    """Yield 0, m, 2m, ... for each m that stays among the frequencies that turn; pairs are few, so m is small."""
    for step in range(1, frequencies + 1):
        if (pairs - 1) * step < frequencies:
            yield tuple(range(0, pairs * step, step))
        if pairs == 1:
            return
