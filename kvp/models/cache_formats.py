"""The format of a cache as options, which the config of a checkpoint carries (`kvp_cache`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import transformers
from pydantic import Field

from kvp.models.codecs import Codec
from kvp.models.shapes import layer_shapes
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@options
class CacheFormat(ABC):
    """Base of the options of a cache that does not store keys and values as they are.

    Attributes:
        window: Newest tokens that stay whole.
    """

    node: ClassVar[str] = "cache"

    window: int = Field(default=0, ge=0, description="newest tokens that stay whole")

    @abstractmethod
    def codecs(self, qk_head_dim: int, v_head_dim: int, attention: int = 0) -> tuple[Codec, Codec]:
        """Return how the keys and the values of heads of these widths are stored, in which attention of the model."""

    @property
    def whole(self) -> int:
        """Return how many tokens may be stored before any of them is packed."""
        codecs = self.codecs(8, 8)
        return min(codec.window + codec.block - 1 for codec in codecs)

    def check(self, config: PretrainedConfig) -> None:
        """Refuse a model whose cache cannot be stored so; no weights are read.

        Raises:
            ValueError: The attention of a layer slides or caches latents, or as the format says.
        """
        self.check_attention(config)

    def check_attention(self, config: PretrainedConfig) -> None:
        """Refuse attention whose keys and values no format stores; no weights are read.

        Raises:
            ValueError: The attention of a layer slides or caches latents.
        """
        for index, shape in enumerate(layer_shapes(config)):
            if shape.k_latents:
                raise ValueError(
                    f"layer {index} caches latents, and a {type(self).__name__} cache stores keys and values of heads: "
                    "choose cache=none"
                )
        if any(transformers.DynamicCache(config=config).is_sliding):
            raise ValueError(
                f"{config.model_type} has layers of sliding attention, whose cache forgets tokens by itself: a "
                f"{type(self).__name__} cache is for full attention; choose cache=none"
            )
