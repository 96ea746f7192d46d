"""The data that crosses a stage border: spaces, budgets, plans and shapes.

Every class is frozen. None knows torch modules, Hydra or the disk layout, so any part of `kvp` may import this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from pydantic import Field
from torch import Tensor

from kvp.options import options

Dtype = Literal["bfloat16", "float16", "float32"]
Kind = Literal["block", "attention", "mlp", "kv_group", "qk", "vo", "k_latent", "v_latent", "ffn"]
Denominator = Literal["kv_cache", "params", "block_params", "blocks", "sparsity"]

DEVICES = ("auto", "cpu", "cuda")
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
KINDS: tuple[Kind, ...] = get_args(Kind)
DENOMINATORS: tuple[Denominator, ...] = get_args(Denominator)


@dataclass(frozen=True, order=True)
class Space:
    """One axis along which a decoder can be made smaller.

    `layer` is None for a space that lies across layers.

    | kind                  | shape                 | one index is                            |
    | --------------------- | --------------------- | --------------------------------------- |
    | block, attention, mlp | (layers,)             | that part of a layer                    |
    | kv_group              | (groups,)             | a key head, a value head, their queries |
    | qk                    | (groups, pairs)       | two channels that RoPE turns together   |
    | vo                    | (groups, v_head_dim)  | one value channel                       |
    | k_latent, v_latent    | (latents, channels)   | one channel of a latent                 |
    | ffn                   | (intermediate_size,)  | one neuron                              |
    """

    kind: Kind
    layer: int | None
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """Return the name of this space in files: "qk.3", "block"."""
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


@options
class Budget:
    """An amount to remove: the fraction `value` of the denominator `of`.

    | of           | counts                                                                            |
    | ------------ | --------------------------------------------------------------------------------- |
    | kv_cache     | bytes of keys and values per token                                                |
    | params       | all parameters                                                                    |
    | block_params | parameters inside the decoder blocks                                              |
    | blocks       | decoder blocks                                                                    |
    | sparsity     | zeros among the linear weights of the decoder blocks, whose shapes stay           |
    """

    node: ClassVar[str] = "ratio"
    value: float = Field(ge=0, lt=1, description="it is the fraction removed")
    of: Denominator = Field(description="what the fraction is of")
    tolerance: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="widths come in steps; a budget further than this from every step is refused",
    )

    @property
    def amount(self) -> str:
        """Return how much is asked for, in names: "0.25"."""
        return f"{self.value:g}"


@dataclass(frozen=True)
class Plan:
    """The indices that stay, per space, and the parameters that are rewritten before the cut.

    All indices refer to the model that the plan was made for.

    Attributes:
        keep: Sorted int64 indices per space: (kept,), or for a space of two axes (groups, kept). A space without an
            entry stays whole.
        edits: The new value of each rewritten parameter, by name.
        bases: Orthonormal directions (hidden_size, width) of a sliced residual stream. Two per layer that stays:
            before its attention and before its MLP. Empty: the stream stays whole.
        folded: The first of the slow rope pairs that all turn at the slowest frequency. None: each at its own.
    """

    keep: Mapping[Space, Tensor]
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Sequence[Tensor] = ()
    folded: int | None = None


@dataclass(frozen=True)
class LayerShape:
    """The widths of one decoder layer; an absent sublayer has width 0.

    Attributes:
        rope_pairs: The rotary frequencies of the pairs of each KV group, as indices into the dense model's
            `head_dim // 2`. A folded frequency appears several times. None: all frequencies, in order.
        o_bias: Whether a compensation gave o_proj a bias that the family lacks.
        down_bias: The same for down_proj.
        stream: Widths of a sliced residual stream before the attention, before the MLP and after the layer.
            None: hidden_size, and no shortcut matrices.
        latent: Whether queries read the values, too, as keys that never turn. Values are then the latent of MLA.
        normed_groups: The dense model's KV groups that remain, where a norm over all heads together still reads the
            queries and keys of the others (OLMo 2). None: no such norm.
        k_latents: Number and width of the latents that are cached in place of keys, each for as many KV heads. Keys
            are expanded from them before every rotation. None: keys are cached.
        v_latents: The same for values. What a single query reads of a latent is expanded after attention.
        experts: The experts behind the router of the MLP, each of `intermediate_size`. 0: the MLP is one network.
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
    latent: bool = False
    normed_groups: tuple[int, ...] | None = None
    k_latents: tuple[int, int] | None = None
    v_latents: tuple[int, int] | None = None
    experts: int = 0

    @property
    def query_head_dim(self) -> int:
        """Return how many channels of keys a query head reads: those that turn, and the latent's."""
        return self.qk_head_dim + self.latent * self.v_head_dim

    @property
    def kv_width(self) -> int:
        """Return how many channels of keys and values the cache holds per token of this layer."""
        return sum(self.cached)

    @property
    def cached(self) -> tuple[int, int]:
        """Return how many channels of keys, and how many of values, the cache holds per token."""
        heads = self.num_key_value_heads
        keys, values = self.k_latents or (heads, self.qk_head_dim), self.v_latents or (heads, self.v_head_dim)
        return keys[0] * keys[1], values[0] * values[1]


@dataclass(frozen=True)
class Size:
    """The size of a model, from its shapes alone."""

    params: int
    block_params: int
    blocks: int
    kv_bytes_per_token: int

    def count(self, of: Denominator) -> int:
        """Return the amount that a ratio of denominator `of` refers to.

        Raises:
            ValueError: `of` is "sparsity": zeros change no size.
        """
        if of == "sparsity":
            others = ", ".join(other for other in DENOMINATORS if other != of)
            raise ValueError(
                f"ratio=sparsity is for strategies that zero single weights; this one makes the model smaller: "
                f"choose ratio={others}"
            )
        return self.kv_bytes_per_token if of == "kv_cache" else getattr(self, of)

    def removed_from(self, dense: Size) -> dict[str, float]:
        """Return the fraction that is gone of a dense model, under every denominator but zeros."""
        return {of: 1 - self.count(of) / dense.count(of) for of in DENOMINATORS if of != "sparsity"}
