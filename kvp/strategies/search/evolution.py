"""Evolution of subnets: the search of "Search for Efficient Large Language Models" (arXiv 2409.17372)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from kvp.strategies.search.subnets import Subnet, Subnets, name_of

log = logging.getLogger(__name__)

Resize = Literal["random", "importance"]


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Generations of mutated, crossed and fresh subnets; the parents are the best so far.

    The defaults are the paper's. Probabilities are per mask (a layer's attention, its MLP).

    Attributes:
        generations: How many.
        population: Subnets per generation; those neither mutated nor crossed are fresh: the start, mutated
            with the initial probabilities. The first generation is the start itself and fresh ones.
        parents: So many of the best are mutated and crossed.
        mutated: Per generation.
        crossed: Per generation.
        mask_probability: Of other units.
        ratio_probability: Of another width.
        initial_mask_probability: The same, of fresh subnets.
        initial_ratio_probability: The same, of fresh subnets.
        overlap: Least part of a mask's units that a mutation leaves.
        resize: A mask of another width draws its units at "random" (the paper), or loses those of the
            lowest "importance" and gets back those of the highest.
        samples: Calibration samples that measure a subnet, the first ones; None: all. The paper says "a few".
    """

    generations: int = 50
    population: int = 100
    parents: int = 10
    mutated: int = 50
    crossed: int = 30
    mask_probability: float = 0.3
    ratio_probability: float = 0.1
    initial_mask_probability: float = 0.6
    initial_ratio_probability: float = 0.3
    overlap: float = 0.8
    resize: Resize = "random"
    samples: int | None = 8

    def __post_init__(self) -> None:
        counts = {"generations": 1, "population": 1, "parents": 1, "mutated": 0, "crossed": 0, "samples": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"strategy.evolution.{name} must be >= {least}, got {value}")
        if self.mutated + self.crossed > self.population:
            raise ValueError(
                f"strategy.evolution: {self.mutated} mutated and {self.crossed} crossed subnets are more than "
                f"a population of {self.population}"
            )
        for name in (
            "mask_probability",
            "ratio_probability",
            "initial_mask_probability",
            "initial_ratio_probability",
            "overlap",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"strategy.evolution.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.resize not in get_args(Resize):
            raise ValueError(
                f"strategy.evolution.resize must be one of {', '.join(get_args(Resize))}, got {self.resize!r}"
            )

    @property
    def trials(self) -> int:
        """Subnets measured in all."""
        return self.generations * self.population

    def search(self, subnets: Subnets, start: Subnet, loss: Callable[[Subnet], float]) -> Subnet:
        """The subnet of the lowest loss that was met; all is drawn by `subnets`."""
        best: dict[str, tuple[float, Subnet]] = {}
        for generation in range(1, self.generations + 1):
            for child in self._children(subnets, start, [parent for _, parent in best.values()]):
                best[name_of(child)] = loss(child), child
            best = dict(sorted(best.items(), key=lambda item: item[1][0])[: self.parents])
            least = next(iter(best.values()))
            log.info("generation %d of %d: best %.4f nats per token", generation, self.generations, least[0])
        return least[1]

    def _children(self, subnets: Subnets, start: Subnet, parents: Sequence[Subnet]) -> Iterator[Subnet]:
        mutate = partial(subnets.mutate, overlap=self.overlap, redraw=self.resize == "random")
        if parents:
            for _ in range(self.mutated):
                yield mutate(subnets.pick(parents), self.mask_probability, self.ratio_probability)
            for _ in range(self.crossed):
                yield subnets.cross(subnets.pick(parents), subnets.pick(parents))
        else:
            yield start
        fresh = self.population - (self.mutated + self.crossed if parents else 1)
        for _ in range(fresh):
            yield mutate(start, self.initial_mask_probability, self.initial_ratio_probability)
