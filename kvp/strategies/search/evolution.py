"""Evolution of subnets: the search of "Search for Efficient Large Language Models" (arXiv 2409.17372)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from kvp.options import options
from kvp.strategies.search.subnets import Subnet, Subnets, name_of

log = logging.getLogger(__name__)

Resize = Literal["random", "importance"]


@options
class Evolution:
    """Generations of mutated, crossed and fresh subnets; the parents are the best so far.

    The defaults are the paper's. Probabilities are per mask (a layer's attention, its MLP).

    Attributes:
        generations: Number of generations.
        population: Subnets per generation; those neither mutated nor crossed are fresh: the start, mutated
            with the initial probabilities. The first generation is the start itself and fresh ones.
        parents: Number of the best subnets, which are mutated and crossed.
        mutated: Mutated subnets per generation.
        crossed: Crossed subnets per generation.
        mask_probability: Probability that a mutation draws other units of a mask.
        ratio_probability: Probability that a mutation draws another width of a mask.
        initial_mask_probability: `mask_probability` of fresh subnets.
        initial_ratio_probability: `ratio_probability` of fresh subnets.
        overlap: Least part of a mask's units that a mutation leaves.
        resize: A mask of another width draws its units at "random" (the paper), or loses those of the
            lowest "importance" and gets back those of the highest.
        samples: Calibration samples that measure a subnet, the first ones; None: all. The paper says "a few".
    """

    node: ClassVar[str] = "strategy.evolution"

    generations: int = Field(default=50, ge=1)
    population: int = Field(default=100, ge=1)
    parents: int = Field(default=10, ge=1)
    mutated: int = Field(default=50, ge=0)
    crossed: int = Field(default=30, ge=0)
    mask_probability: float = Field(default=0.3, ge=0, le=1)
    ratio_probability: float = Field(default=0.1, ge=0, le=1)
    initial_mask_probability: float = Field(default=0.6, ge=0, le=1)
    initial_ratio_probability: float = Field(default=0.3, ge=0, le=1)
    overlap: float = Field(default=0.8, ge=0, le=1, description="least part of a mask that a mutation leaves")
    resize: Resize = "random"
    samples: int | None = Field(
        default=8, ge=1, description="null measures a subnet on all calibration samples"
    )

    def __post_init__(self) -> None:
        if self.mutated + self.crossed > self.population:
            raise ValueError(
                f"strategy.evolution: {self.mutated} mutated and {self.crossed} crossed subnets are more than "
                f"a population of {self.population}: lower them, or raise strategy.evolution.population"
            )

    @property
    def trials(self) -> int:
        """Return how many subnets are measured in all."""
        return self.generations * self.population

    def search(self, subnets: Subnets, start: Subnet, loss: Callable[[Subnet], float]) -> Subnet:
        """Return the subnet of the lowest loss that was met; `subnets` draws everything."""
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
