"""Protocols of the bench: grids of `kvp.measurement.measure.Measure`, the protocol of one row.

shortened_llm  12 tokens in, 128 or 512 out, batches of 1 to 256, 30 runs of which the first 10 do not count
               (arXiv:2402.02834, whose script samples and times a whole `generate`)
long_context   prompts of 512, 2048 and 8192, 128 out, batches of powers of two up to what fits
prefill        prompts of 128, 512 and 2048, batches of 1, 8 and 32, one token out
quick          a first look: 32 tokens in, 8 out, batches of 1 and 8, one run
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvp.measurement.measure import Measure


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A grid of batches, prompts and lengths; without `batches`, powers of two as far as memory goes."""

    prompts: tuple[int, ...]
    new_tokens: tuple[int, ...]
    batches: tuple[int, ...] | None
    warmup: int
    runs: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.points(most=1)  # each checks its bounds

    def changed(self, **options: Any) -> Protocol:
        """Return the protocol with every option that is not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Pairs of prompt length and new tokens, shortest first."""
        return [(prompt, new) for prompt in self.prompts for new in self.new_tokens]

    def points(self, most: int) -> list[Measure]:
        """Return the rows of all shapes; `most` bounds batches that the protocol leaves open."""
        return [point for shape in self.shapes for point in self.points_of(*shape, most)]

    def points_of(self, prompt: int, new: int, most: int) -> list[Measure]:
        """Return the rows of one shape, batch by batch."""
        batches = self.batches or tuple(2**n for n in range(most.bit_length()))
        return [
            Measure(
                batch_size=batch,
                prompt_length=prompt,
                new_tokens=new,
                warmup=self.warmup,
                runs=self.runs,
                seed=self.seed,
            )
            for batch in batches
        ]


PROTOCOLS = {
    "shortened_llm": Protocol(
        prompts=(12,), new_tokens=(128, 512), batches=(1, 8, 16, 32, 64, 128, 256), warmup=10, runs=20
    ),
    "long_context": Protocol(prompts=(512, 2048, 8192), new_tokens=(128,), batches=None, warmup=1, runs=5),
    "prefill": Protocol(prompts=(128, 512, 2048), new_tokens=(1,), batches=(1, 8, 32), warmup=2, runs=10),
    "quick": Protocol(prompts=(32,), new_tokens=(8,), batches=(1, 8), warmup=1, runs=1),
}
