"""Budgets in bytes: how much is cut follows from what must fit, with the format of the cache known.

    ratio=cache_bytes ratio.value=0.75 cache=int4   # a quarter of the dense model's bytes per token, scales included
    ratio=memory ratio.gib=4 ratio.context=32768    # weights and cache of a batch fit into 4 GiB

A strategy removes a fraction of what it can count (`kvp.types.Budget`). The least fraction whose plan stays within the
limit is found by bisection over plans, which cost little once scores are known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from typing_extensions import override

from kvp.estimate.passes import weights_bytes
from kvp.models.cache_formats import CacheFormat
from kvp.models.caches import mean_bytes_per_token, stored_bytes
from kvp.models.shapes import itemsize
from kvp.options import options
from kvp.strategies.base import PlannedStrategy, Strategy
from kvp.strategies.shape import expected_shape
from kvp.types import Budget, Denominator

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HALVINGS = 12  # of the interval of ratios: steps of 0.0002
MOST = 0.999  # of a ratio
GIB = 2**30

Shape = Callable[[Budget], "PretrainedConfig"]


@options
class Limit(Budget, ABC):
    """A budget of bytes.

    Attributes:
        context: Tokens per sequence.
        cut: What the strategy removes a fraction of, until the bytes fit.
    """

    of: Any
    value: Any = None
    context: int = Field(default=4096, ge=1, description="tokens per sequence")
    cut: Denominator

    @abstractmethod
    def count(self, config: PretrainedConfig) -> int:
        """Return the bytes of a model whose config says how its cache is stored."""

    @abstractmethod
    def most(self, dense: PretrainedConfig) -> float:
        """Return the bytes that may stay of a dense model."""

    @abstractmethod
    def words(self, dense: PretrainedConfig, count: float) -> str:
        """Return a number of bytes as the option that asks for it."""

    def ratio(self, dense: PretrainedConfig, cache: CacheFormat | None, shape: Shape) -> Budget:
        """Return the least fraction of `cut` whose shape stays within the limit.

        Args:
            dense: The config of the model before the cut.
            cache: The format of the cache after it; None: the config's own.
            shape: Returns the config after a cut under a budget, or the nearest that can be reached.

        Raises:
            ValueError: The limit holds without a cut, or no cut meets it; names what would.
        """
        most = self.most(dense)

        def left(value: float) -> int:
            cut = shape(Budget(value=value, of=self.cut, tolerance=1))
            return self.count(stored_as(cut, cache))

        whole, least = self.count(stored_as(dense, cache)), left(MOST)
        if whole <= most:
            raise ValueError(
                f"ratio.{self.words(dense, most)} holds without a cut: the uncut model has "
                f"ratio.{self.words(dense, whole)}. Ask for fewer bytes than that, or choose strategy=none"
            )
        if least > most:
            raise ValueError(
                f"ratio.{self.words(dense, most)} cannot be met by a cut of {self.cut}: the most that can be cut "
                f"leaves ratio.{self.words(dense, least)}. Ask for that, or change ratio.cut, ratio.context, cache or "
                "strategy.allocator.max_ratio"
            )
        low, high = 0.0, MOST
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if left(middle) <= most else (middle, high)
        self.check_count(dense, left(high))
        return Budget(value=high, of=self.cut, tolerance=1)

    def check_count(self, dense: PretrainedConfig, count: int) -> None:
        """Refuse a plan that leaves too many bytes, or fewer than the tolerance allows.

        Raises:
            ValueError: Names what the plan reaches.
        """
        most = self.most(dense)
        if count > most or count < self.fewest(dense):
            raise ValueError(
                f"ratio.{self.words(dense, most)} cannot be met in the steps of this strategy's widths: the plan has "
                f"ratio.{self.words(dense, count)}. Ask for that, or change ratio.tolerance or "
                "strategy.allocator.multiple_of"
            )

    def fewest(self, dense: PretrainedConfig) -> float:
        """Return the bytes that have to stay."""
        return 0

    def removed(self, dense: PretrainedConfig, count: float) -> float:
        """Return the fraction that `count` bytes leave out of those of the dense model with a cache as it makes it."""
        return 1 - count / self.count(plain(dense))


@options
class CacheBytes(Limit):
    """A fraction of the bytes that the dense model's cache takes per token, in its own dtype."""

    of: Literal["cache_bytes"] = "cache_bytes"
    value: float = Field(ge=0, lt=1, description="it is the fraction of the dense model's bytes that goes")
    cut: Denominator = "kv_cache"

    @override
    def count(self, config: PretrainedConfig) -> int:
        return mean_bytes_per_token(config, itemsize(config), self.context)

    @override
    def most(self, dense: PretrainedConfig) -> float:
        return (1 - self.value) * self.count(plain(dense))

    @override
    def fewest(self, dense: PretrainedConfig) -> float:
        return (1 - self.value - self.tolerance) * self.count(plain(dense))

    @override
    def words(self, dense: PretrainedConfig, count: float) -> str:
        return f"value={self.removed(dense, count):.4f}"


@options
class Memory(Limit):
    """The bytes of weights and cache for a batch of sequences.

    Attributes:
        gib: What they may take, in GiB.
        batch_size: Sequences at a time.
    """

    of: Literal["memory"] = "memory"
    gib: float = Field(gt=0, description="GiB that weights and cache may take")
    batch_size: int = Field(default=1, ge=1, description="sequences at a time")
    cut: Denominator = "params"

    def __post_init__(self) -> None:
        if self.value is not None:
            raise ValueError(f"ratio=memory has no option value, got {self.value!r}: set ratio.gib")

    @property
    @override
    def amount(self) -> str:
        return f"{self.gib:g}GiB"

    @override
    def count(self, config: PretrainedConfig) -> int:
        width = itemsize(config)
        return weights_bytes(config, width) + self.batch_size * stored_bytes(config, width, self.context)

    @override
    def most(self, dense: PretrainedConfig) -> float:
        if self.context > dense.max_position_embeddings:
            raise ValueError(
                f"ratio.context must be <= {dense.max_position_embeddings} (max_position_embeddings), got "
                f"{self.context}: the model knows no further positions"
            )
        return self.gib * GIB

    @override
    def words(self, dense: PretrainedConfig, count: float) -> str:
        return f"gib={count / GIB:.4f}"


def stored_as(config: PretrainedConfig, cache: CacheFormat | None) -> PretrainedConfig:
    """Return a config whose cache has a format; None: its own."""
    return config if cache is None else _with(config, asdict(cache))


def plain(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config whose cache holds keys and values as the model makes them."""
    return _with(config, None)


def _with(config: PretrainedConfig, cache: dict[str, Any] | None) -> PretrainedConfig:
    other: Any = copy(config)
    other.kvp_cache = cache
    return other


def expected_ratio(
    budget: Budget, strategy: Strategy, config: PretrainedConfig, cache: CacheFormat | None
) -> Budget:
    """Return the fraction that a budget of bytes will take, on shapes under random scores; another budget as it is.

    Raises:
        ValueError: No fraction meets it, or the strategy plans with the model at hand only.
    """
    if not isinstance(budget, Limit) or not strategy.prunes:
        return budget
    before = strategy.recast_config(config)

    def shape(asked: Budget) -> PretrainedConfig:
        left = expected_shape(strategy, before, asked)
        if left is None or not isinstance(strategy, PlannedStrategy):
            raise ValueError(
                f"{type(strategy).__name__} must see the model to plan, so no ratio can be found for "
                f"ratio={budget.of}: choose ratio=kv_cache, params or block_params"
            )
        return left

    return budget.ratio(config, cache, shape)
