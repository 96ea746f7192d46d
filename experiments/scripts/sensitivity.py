"""Seconds of the prefix-reusing sensitivity pass against the naive one, in turns, on one model.

    python -m experiments.scripts.sensitivity [--kind attention|mlp|block] [--rounds 3] [option=value ...]

Options are those of `python -m kvp`; one batch of calibration samples is read unless said. The naive pass runs the
whole model, with its own loss, once per block; ours runs the suffix. Both give the same numbers: the largest
difference, and whether the order of the blocks is the same, are printed beside the ratio of the seconds, and of the
CPU seconds, which other processes on the machine disturb less.
`attention` is what KVPruner probes, `block` what Shortened-LLM ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.scripts.chosen import chosen
from kvp.models.masks import without
from kvp.models.shapes import layer_shapes
from kvp.pipeline.gate import check_sources
from kvp.pipeline.session import Session
from kvp.pipeline.stages import make
from kvp.provenance import provenance
from kvp.strategies.signals.losses import losses_without
from kvp.strategies.templates.blocks import BlockPart


@torch.inference_mode()
def naive_losses(model: PreTrainedModel, batches: Sequence[Tensor], kind: str) -> Tensor:
    """(layers,) mean loss without each layer's part of a kind, by one whole pass per layer."""
    losses = []
    for layer in range(len(layer_shapes(model.config))):
        with without(model, layer, kind):
            losses.append(sum(model(ids, labels=ids).loss.item() for ids in batches))
    return torch.tensor(losses, dtype=torch.float64) / len(batches)


def suffix_losses(model: PreTrainedModel, batches: Sequence[Tensor], kind: str) -> Tensor:
    """Return the same numbers from stored prefixes."""
    layers = range(len(layer_shapes(model.config)))
    removals = [(n, partial(without, model, n, kind)) for n in layers]
    return losses_without(model, batches, removals)[1]


@dataclass(frozen=True)
class Pass:
    """A pass: what it took, on the clock and in CPU seconds of all threads, and its losses."""

    seconds: float
    cpu_seconds: float
    losses: Tensor


def timed(work: Callable[[], Tensor]) -> Pass:
    """Do the work."""
    started, busy = time.perf_counter(), time.process_time()
    losses = work()
    return Pass(time.perf_counter() - started, time.process_time() - busy, losses)


def compare(model: PreTrainedModel, batches: Sequence[Tensor], kind: str, rounds: int) -> dict[str, object]:
    """Medians over rounds in which both take turns, after one of a few tokens that does not count."""
    suffix_losses(model, [batches[0][:1, :16]], kind)
    pairs = [
        (
            timed(partial(suffix_losses, model, batches, kind)),
            timed(partial(naive_losses, model, batches, kind)),
        )
        for _ in range(rounds)
    ]
    return {
        "suffix_seconds": statistics.median(ours.seconds for ours, _ in pairs),
        "naive_seconds": statistics.median(naive.seconds for _, naive in pairs),
        "ratio": statistics.median(ours.seconds / naive.seconds for ours, naive in pairs),
        "cpu_ratio": statistics.median(ours.cpu_seconds / naive.cpu_seconds for ours, naive in pairs),
        "max_difference_nats": max((ours.losses - naive.losses).abs().max().item() for ours, naive in pairs),
        "same_ranking": all(
            torch.equal(ours.losses.argsort(), naive.losses.argsort()) for ours, naive in pairs
        ),
        "kind": kind,
        "layers": len(layer_shapes(model.config)),
        "tokens": sum(ids.numel() for ids in batches),
        "dtype": str(model.dtype),
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scripts.sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=get_args(BlockPart), default="attention")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("options", nargs="*", help="of python -m kvp")
    args = parser.parse_args()
    x = chosen(["calibration.num_samples=4", "recovery=none", *args.options])
    check_sources(x)
    session = Session(x)
    make(session, "dense")
    target = session.target()
    result = compare(target.model, target.batches, args.kind, args.rounds)
    command = " ".join(["python -m experiments.scripts.sensitivity", *sys.argv[1:]])
    print(json.dumps({**result, "provenance": {**provenance(x.device), "command": command}}))


if __name__ == "__main__":
    main()
