"""The data that crosses a stage border: spaces, budgets, plans and shapes.

Everything here is frozen and knows nothing of torch modules, Hydra or the disk layout, so that any
part of `kvp` may import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

Kind = Literal["block", "attention", "mlp", "kv_group", "qk", "vo", "ffn"]
Denominator = Literal["kv_cache", "params", "block_params", "blocks", "sparsity"]

KINDS: tuple[Kind, ...] = get_args(Kind)
DENOMINATORS: tuple[Denominator, ...] = get_args(Denominator)


@dataclass(frozen=True, order=True)
class Space:
    """One axis along which a decoder can be made smaller.

    `layer` is None for the spaces that lie across layers (block, attention, mlp). `shape` is
    `(layers,)` for those, `(groups,)` for kv_group, `(groups, pairs)` for qk (a pair is two
    channels rotated together), `(groups, v_head_dim)` for vo and `(intermediate_size,)` for ffn.
    """

    kind: Kind
    layer: int | None
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """Name of this space in files: "qk.3", "block"."""
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much to remove: the fraction `value` of the denominator `of`.

    Attributes:
        value: Fraction removed, in [0, 1).
        of: "kv_cache" (bytes of keys and values per token), "params" (all parameters),
            "block_params" (parameters inside the decoder blocks), "blocks" (number of blocks), "sparsity"
            (linear weights of the decoder blocks: those that are zero, in matrices of the same shape).
        tolerance: Largest absolute distance between the asked and the achieved fraction; widths come
            in steps, and a budget that no step comes this near to is refused.
    """

    value: float
    of: Denominator
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ValueError(f"ratio.value must be in [0, 1), got {self.value}: it is the fraction removed")
        if self.of not in DENOMINATORS:
            raise ValueError(f"ratio.of must be one of {', '.join(DENOMINATORS)}, got {self.of!r}")
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"ratio.tolerance must be in [0, 1], got {self.tolerance}")


@dataclass(frozen=True)
class Plan:
    """Which indices stay, per space, and which parameters are rewritten before the cut.

    `keep` holds sorted int64 indices: shape `(kept,)`, or for "qk" and "vo" `(groups, kept)`, one
    row per KV group of the *given* model. Indices always refer to the model the plan was made for.
    A space without an entry is kept whole. `edits` maps a parameter's name to its new value.
    `bases` slices the residual stream: before the attention and before the MLP of every layer that stays,
    the orthonormal directions (hidden_size, width) that are left of it; none, if it stays whole.
    `folded`: the slow rope pairs, from this one on, all turn at the slowest frequency; None: each at its own.
    """

    keep: Mapping[Space, Tensor]
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Sequence[Tensor] = ()
    folded: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """The widths of one decoder layer; an absent sublayer has width 0.

    `o_bias` and `down_bias` say that a compensation gave o_proj or down_proj a bias that the family has not.
    `rope_pairs` lists, per KV group, the rotary frequencies of its pairs (indices into the dense model's
    `head_dim // 2`, one of them several times where pairs are folded); None stands for all of them, in order.
    `stream` is what slicing left of the residual stream before the attention, before the MLP and after the layer;
    None: hidden_size, and no shortcut matrices.
    """

    num_attention_heads: int
    num_key_value_heads: int
    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int
    rope_pairs: tuple[tuple[int, ...], ...] | None = None
    o_bias: bool = False
    down_bias: bool = False
    stream: tuple[int, int, int] | None = None

    @property
    def kv_width(self) -> int:
        """Channels of keys and values that the cache holds per token of this layer."""
        return self.num_key_value_heads * (self.qk_head_dim + self.v_head_dim)


@dataclass(frozen=True)
class Size:
    """What a model weighs, from its shapes alone."""

    params: int
    block_params: int
    blocks: int
    kv_bytes_per_token: int

    def count(self, of: Denominator) -> int:
        """The amount that a ratio of denominator `of` refers to.

        Raises:
            ValueError: It refers to zeros, which take part in no size.
        """
        if of == "sparsity":
            others = ", ".join(other for other in DENOMINATORS if other != of)
            raise ValueError(
                f"ratio=sparsity is for strategies that zero single weights; this one makes the model smaller: "
                f"choose ratio={others}"
            )
        return self.kv_bytes_per_token if of == "kv_cache" else getattr(self, of)
