"""Second moments of the queries, keys and values of a layer on calibration text, per KV group."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvp.models.family import family_of
from kvp.models.shapes import CHANNELS_PER_PAIR, layer_shapes, projected, projections, turning_pairs
from kvp.strategies.signals.gradients import require_finite
from kvp.strategies.signals.logits import observed_attention, pair_interactions
from kvp.strategies.signals.walk import Visit


@dataclass
class Statistics:
    """Means over samples and tokens, float64; `queries` and `values` are sums over the query heads of a group.

    Attributes:
        pairs: (groups, pairs) mean square of each pair's term in the logits.
        turning_queries, turning_keys: (groups, pairs, pairs) Hermitian second moments of the pairs, keys centred after
            rotation.
        queries, keys: (groups, width, width) second moments before rotation, keys centred.
        values: (groups, v width, v width) second moment of what attention makes of the values.
    """

    samples: int = 0
    pairs: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    turning_queries: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.complex128))
    turning_keys: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.complex128))
    queries: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    keys: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    values: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, samples: int, **means: Tensor) -> None:
        """Add the means over `samples` more samples."""
        self.samples += samples
        for name, mean in means.items():
            before = getattr(self, name).to(mean.device)
            setattr(self, name, before + (mean.to(before.dtype) - before) * (samples / self.samples))


def statistics(visit: Visit) -> Statistics:
    """Return the statistics of the heads of the layer visited, in one pass of the layer."""
    heads, found = Heads(visit), Statistics()
    shape = layer_shapes(visit.model.config)[visit.layer]
    width = projected(visit.model.config, shape)
    work = torch.promote_types(visit.model.dtype, torch.float32)
    whole = (
        projections(visit.model.config, shape)[1] == heads.groups * width
    )  # else their rows are not by group
    query, key = (heads.rows(part).to(work).flatten(0, 2) for part in "qk") if whole else (None, None)
    entry, output = heads.name("q"), heads.name("o")
    seen: list[tuple[Tensor, Tensor]] = []
    with observed_attention(visit.model, lambda module, q, k: seen.append((q, k))):
        for states, inputs in zip(visit.states, visit.through(entry, output), strict=True):
            rotated_query, rotated_key = (each[..., : shape.qk_head_dim] for each in seen.pop())
            samples, length = states.shape[:2]
            centred = rotated_key - rotated_key.mean(2, keepdim=True)
            still = {}
            if query is not None and key is not None:
                x = heads.extended(inputs[entry].to(work))
                k = (x @ key.T).view(samples, length, -1)
                still["queries"] = heads.second_moment(x @ query.T, width)
                still["keys"] = heads.second_moment((k - k.mean(1, keepdim=True)).flatten(0, 1), width)
            found.add(
                samples,
                pairs=pair_interactions(rotated_query, centred),
                turning_queries=heads.turning_moment(rotated_query),
                turning_keys=heads.turning_moment(centred),
                values=heads.second_moment(inputs[output].to(work), shape.v_head_dim),
                **still,
            )
    for name in ("pairs", "queries", "keys", "values"):
        require_finite(getattr(found, name).sum(), f"the {name} of layer {visit.layer}")
    return found


def output_columns(visit: Visit) -> Tensor:
    """Return o_proj as (groups, queries per group, hidden_size, v_head_dim), float64."""
    heads = Heads(visit)
    weight = visit.model.get_parameter(f"{heads.name('o')}.weight").detach().double()
    return weight.unflatten(1, (heads.groups, heads.queries, -1)).permute(1, 2, 0, 3).contiguous()


def rope_gains(visit: Visit, channels: Tensor) -> Tensor:
    """Return what RoPE multiplies the logit of each channel by: the square of yarn's scaling of cosine and sine.

    1 without such a scaling, in a layer without RoPE, and for pairs that never turn. Keys that stop turning are to
    keep it.

    Args:
        visit: The layer, whose KV groups have the same pairs.
        channels: Channels of a head.
    """
    config, family = visit.model.config, family_of(visit.model.config)
    attention = visit.model.get_submodule(f"{visit.name}.{family.attention}")
    shape = layer_shapes(config)[visit.layer]
    count = shape.qk_head_dim // CHANNELS_PER_PAIR
    pairs = torch.tensor(shape.rope_pairs[0] if shape.rope_pairs else range(count))[channels.cpu() % count]
    scaling: float = getattr(visit.model.get_submodule(family.rotary), "attention_scaling", 1.0)
    turns = (pairs < turning_pairs(config)) & bool(getattr(attention, "use_rope", True))
    gains = torch.ones(len(channels), dtype=torch.float64).masked_fill(turns, scaling**2)
    return gains.to(next(attention.parameters()).device)


class Heads:
    """The projections of the layer visited, head by head; a bias is the last column."""

    def __init__(self, visit: Visit) -> None:
        self.model, self.family = visit.model, family_of(visit.model.config)
        self.prefix = f"{visit.name}.{self.family.attention}"
        shape = layer_shapes(visit.model.config)[visit.layer]
        self.groups, self.queries = (
            shape.num_key_value_heads,
            shape.num_attention_heads // shape.num_key_value_heads,
        )
        self.biased = f"{self.name('q')}.bias" in dict(visit.model.named_parameters())

    def name(self, part: str) -> str:
        """Return the name of the module of q, k, v or o."""
        return f"{self.prefix}.{getattr(self.family, part)}"

    def extended(self, inputs: Tensor) -> Tensor:
        """Return (tokens, in) inputs, with the 1 that a bias is multiplied by as a last column."""
        return torch.nn.functional.pad(inputs, (0, int(self.biased)), value=1.0)

    def second_moment(self, states: Tensor, width: int) -> Tensor:
        """Return (groups, width, width) of states (tokens, heads * width): mean over tokens, sum over heads."""
        rows = states.unflatten(1, (self.groups, -1, width)).transpose(0, 1).flatten(1, 2)
        return rows.transpose(1, 2) @ rows / len(states)

    def turning_moment(self, states: Tensor) -> Tensor:
        """Return (groups, pairs, pairs) the same of rotated states (batch, heads, tokens, width) as complex numbers."""
        turning = torch.complex(*states.float().chunk(2, dim=-1))
        rows = turning.unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(1, 3)
        return rows.mT @ rows.conj() / (len(states) * states.shape[2])

    def rows(self, part: str) -> Tensor:
        """Return a projection as (groups, heads per group, width, in), float64; "v" as (groups, width, in)."""
        weight = self.model.get_parameter(f"{self.name(part)}.weight").detach().double()
        if self.biased:
            bias = self.model.get_parameter(f"{self.name(part)}.bias").detach().double()
            weight = torch.cat([weight, bias[:, None]], dim=1)
        if part == "v":
            return weight.unflatten(0, (self.groups, -1)).clone()
        return weight.unflatten(0, (self.groups, self.queries if part == "q" else 1, -1)).clone()

    def edits(self, part: str, rows: Tensor) -> dict[str, Tensor]:
        """Return the parameters, by name, that such rows make."""
        rows = rows.flatten(0, -2)
        if not self.biased:
            return {f"{self.name(part)}.weight": self.stored(rows)}
        return {
            f"{self.name(part)}.weight": self.stored(rows[:, :-1]),
            f"{self.name(part)}.bias": self.stored(rows[:, -1]),
        }

    def stored(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the CPU, in the model's dtype."""
        return tensor.to("cpu", self.model.dtype).contiguous()
