"""Seconds of the prefix-reusing sensitivity pass against the naive one, interleaved, on one model.

    python -m kvp.bench.sensitivity [--kind attention|mlp|block] [--checkpoint DIR] [--batch-size 4]
                                    [--length 128] [--rounds 3]

The naive pass runs the whole model, with its own loss, once per block; ours runs the suffix. Both give
the same numbers: the largest difference, and whether the order of the blocks is the same, are printed
beside the ratio of the seconds. `attention` is what KVPruner probes, `block` what Shortened-LLM ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvp.models.load import PackagedModel, load_model, resolve_device, resolve_dtype
from kvp.models.masks import without
from kvp.models.shapes import layer_shapes
from kvp.stage import Store
from kvp.strategies.losses import losses_without


@torch.inference_mode()
def naive_losses(model: PreTrainedModel, batches: Sequence[Tensor], kind: str) -> Tensor:
    """(layers,) mean loss without each layer's part of a kind, by one whole pass per layer."""
    losses = []
    for layer in range(len(layer_shapes(model.config))):
        with without(model, layer, kind):
            losses.append(sum(model(ids, labels=ids).loss.item() for ids in batches))
    return torch.tensor(losses, dtype=torch.float64) / len(batches)


def suffix_losses(model: PreTrainedModel, batches: Sequence[Tensor], kind: str) -> Tensor:
    """The same numbers from stored prefixes."""
    layers = range(len(layer_shapes(model.config)))
    removals = [(n, partial(without, model, n, kind)) for n in layers]
    return losses_without(model, batches, removals)[1]


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a Hugging Face directory (default: the packaged model)"
    )
    parser.add_argument("--kind", choices=("attention", "mlp", "block"), default="attention")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    packaged, device = PackagedModel(name="smollm2_135m"), resolve_device("auto")
    checkpoint = (
        args.checkpoint
        or Store(Path("outputs/store")).once("model", packaged.identity(), packaged.write).path
    )
    model = load_model(checkpoint, dtype=resolve_dtype("auto", device), device=device)
    batches = [torch.randint(model.config.vocab_size, (args.batch_size, args.length), device=device)]
    suffix_losses(model, batches, args.kind)  # warm-up
    rounds = [
        (
            timed(lambda: suffix_losses(model, batches, args.kind)),
            timed(lambda: naive_losses(model, batches, args.kind)),
        )
        for _ in range(args.rounds)
    ]
    differences = [(ours[1] - naive[1]).abs().max().item() for ours, naive in rounds]
    result = {
        "suffix_seconds": statistics.median(ours[0] for ours, _ in rounds),
        "naive_seconds": statistics.median(naive[0] for _, naive in rounds),
        "ratio": statistics.median(ours[0] / naive[0] for ours, naive in rounds),
        "max_difference_nats": max(differences),
        "same_ranking": all(torch.equal(ours[1].argsort(), naive[1].argsort()) for ours, naive in rounds),
        "kind": args.kind,
        "layers": len(layer_shapes(model.config)),
        "tokens": args.batch_size * args.length,
        "dtype": str(model.dtype),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
