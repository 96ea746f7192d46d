"""Any set of rope pairs in stock terms.

transformers, vLLM and SGLang read "longrope" as inv_freq_j = 1 / (factor_j * theta^(2j / d')). With
factor_j = 1 / (w_j * theta^(2j / d')), in float64, it gives any frequencies w_j, scaled ones (llama3, linear,
yarn) included. Short and long factors are the same list, so that no engine's switch between them matters. Only a model
that switches itself gets two. Frequencies that grow with the text (dynamic) have no such form.
A set {s, s + m, s + 2m, ...} needs no factors: it is the rope of another theta, which every engine has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvp.serving.layout import Layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_fixed_factors(config: PretrainedConfig) -> None:
    """Refuse kept pairs of a RoPE that no fixed factors express.

    Raises:
        ValueError: Its frequencies grow with the text.
    """
    if config.rope_parameters.get("rope_type") == "dynamic":
        raise ValueError(
            "RoPE of type 'dynamic' computes new frequencies beyond max_position_embeddings="
            f"{config.max_position_embeddings}, and the factors of a stock form are fixed: use --to padded or custom, "
            "or prune without cutting rope pairs"
        )


def longrope(layout: Layout, rope: dict[str, Any], rotary: Any) -> dict[str, Any]:
    """Return `rope_parameters` that give the kept frequencies of the dense model's rotary embedding.

    A model that switches between short and long factors goes on to, at the same length.

    Raises:
        ValueError: Its frequencies grow with the text, which no fixed factors express.
    """
    config = rotary.config
    require_fixed_factors(config)
    theta, width = float(rope["rope_theta"]), layout.head_dim

    def factors(inv_freq: Tensor) -> list[float]:
        kept = [inv_freq.double()[pair].item() for pair in layout.pairs]
        return [1 / (w * theta ** (2 * j / width)) for j, w in enumerate(kept)]

    original = config.max_position_embeddings  # else engines guess, and scale the logits
    short = long = factors(rotary.inv_freq)
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        initial = ROPE_INIT_FUNCTIONS["longrope"]
        short, long = (factors(initial(config, seq_len=length)[0]) for length in (1, original + 1))
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": original,
        "short_factor": short,
        "long_factor": long,
    }


def arithmetic(layout: Layout, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of an arithmetic progression of pairs: theta' = theta^(m d' / d).

    Raises:
        ValueError: The pairs are no arithmetic progression, or start late in a rope that is scaled.
    """
    start, step = layout.pairs[0], _step(layout.pairs)
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if step is None:
        raise ValueError(
            f"the kept rope pairs {list(layout.pairs)} are no arithmetic progression: use --to stock, whose "
            "factors express any set"
        )
    if kind not in ("default", "llama3") or (start and kind != "default"):
        raise ValueError(
            f"pairs from {start} on of a rope of type {kind!r} have no arithmetic form: use --to stock"
        )
    moved = {**rope, "rope_theta": theta ** (step * layout.head_dim / layout.dense_head_dim)}
    if start:
        moved |= {"rope_type": "linear", "factor": theta ** (2 * start / layout.dense_head_dim)}
    return moved


def with_unit_yarn(rope: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Return default RoPE as yarn of factor 1, which turns all pairs by the same angles.

    vLLM 0.32 hands the default one to an operator that on a CPU takes all heads of a query for one. Its class for
    yarn of DeepSeek models has none, and every DeepSeek checkpoint has yarn.
    """
    return {
        "rope_type": "yarn",
        "rope_theta": rope["rope_theta"],
        "factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
    }


def _step(pairs: Sequence[int]) -> int | None:
    if len(pairs) < 2:
        return 1
    steps = {after - before for before, after in pairwise(pairs)}
    return steps.pop() if len(steps) == 1 and min(steps) > 0 else None


def query_scale(layout: Layout, attention_scaling: float) -> float:
    """Return what q_proj is multiplied by: stock code divides logits by sqrt(d'), the dense model by sqrt(d).

    yarn's scaling of cosine and sine goes in too, squared: not every engine reads `attention_factor`.
    """
    return math.sqrt(layout.head_dim / layout.dense_head_dim) * attention_scaling**2


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Return rows of q or k with pairs (2 i, 2 i + 1), where transformers' Llama has (i, i + head_dim / 2)."""
    rows, *columns = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, *columns).transpose(1, 2).reshape(tensor.shape)
