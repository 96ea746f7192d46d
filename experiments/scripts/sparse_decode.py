"""Time decode steps over a sparse cache: read as it is stored, expanded, and beside dense caches.

    python -m experiments.scripts.sparse_decode [--model NAME] [--batch N] [--tokens N,N] [--steps N] [--out FILE]

    dense eager    transformers' own cache, which a step copies
    dense static   a cache of fixed size
    packed 50 %    Mustafar's, half of the channels of every key and value dropped, read as it is stored
    packed 70 %    the same with 70 %
    expanded 50 %  half of the channels, expanded in every step

The models are one shape with the same random weights, and their caches are filled with random states, because the time
of a step depends on shapes alone. All are in one process and take turns step by step, forth and back. A ratio is the
median over the turns of the first model's time by the other's, so more is faster. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch is imported: see kvp/threads.py

import torch
from transformers import PreTrainedModel

from kvp.bench.models import find_subjects
from kvp.bench.rounds import ratio
from kvp.measurement.count import cache_bytes
from kvp.measurement.grouped import GROUPED
from kvp.measurement.paths import Decoder, Eager, Static
from kvp.measurement.speed import quartiles
from kvp.models.mustafar import Mustafar
from kvp.models.packed_cache import cache_for
from kvp.models.shapes import layer_shapes
from kvp.models.sparse_attention import readable
from kvp.models.surgery import apply
from kvp.provenance import provenance
from kvp.tables import markdown
from kvp.types import Plan

WARMUP = 3  # turns that do not count
UNITS = ("seconds", "cpu_seconds")


def main() -> None:
    """Measure every length, write the record and print its table."""
    args = parser("sparse_decode", __doc__).parse_args()
    dense, batch = find_subjects(args.model)[0], args.batch
    rows = []
    for tokens in args.tokens:
        if tokens + WARMUP + args.steps > dense.config.max_position_embeddings:
            raise SystemExit(
                f"--tokens {tokens} and --steps {args.steps} are more than {args.model} has positions, "
                f"{dense.config.max_position_embeddings}: use fewer"
            )
    model = dense.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)
    for tokens in args.tokens:
        rows += measure(model, batch_size=batch, tokens=tokens, steps=args.steps)
        print(table(rows), file=sys.stderr, flush=True)
    record = {
        "model": args.model,
        "as_stored": readable(model.device, model.dtype),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "ratios": ratios(rows),
        "provenance": {
            **provenance("cpu"),
            "command": " ".join(["python -m experiments.scripts.sparse_decode", *sys.argv[1:]]),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


def parser(script: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of the options of a script that times steps."""
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.scripts.{script}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", default="smollm2_135m_shape", metavar="NAME", help="a shape of conf/model")
    made.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at a time")
    made.add_argument(
        "--tokens",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(512, 2048),
        metavar="N,N",
        help="tokens in the cache at the first step",
    )
    made.add_argument("--steps", type=int, default=20, metavar="N", help="steps that count")
    made.add_argument("--out", type=Path, default=Path(f"outputs/{script}.json"), metavar="FILE")
    return made


def measure(model: PreTrainedModel, *, batch_size: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    """Return a row per way to decode: its steps, and how many times faster they are than the dense ones."""
    with torch.inference_mode():
        decoders = prepared(model, batch_size=batch_size, tokens=tokens, steps=WARMUP + steps)
    series = in_turns({name: decoder.step for name, decoder in decoders.items()}, model.device, steps)
    return [
        {
            "name": name,
            "batch_size": batch_size,
            "tokens": tokens,
            "cache_bytes": cache_bytes(decoders[name].cache),
            **{unit: summary(own[unit]) for unit in UNITS},
            "against": {other: faster(own, series[other]) for other in ("dense eager", "dense static")},
        }
        for name, own in series.items()
    ]


@torch.inference_mode()
def in_turns(
    work: Mapping[str, Callable[[], None]], device: torch.device, turns: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds and CPU seconds of each turn; all take turns, forth and back, after `WARMUP` turns."""
    series: dict[str, dict[str, list[float]]] = {name: {unit: [] for unit in UNITS} for name in work}
    for turn in range(WARMUP + turns):
        for name in list(work)[:: -1 if turn % 2 else 1]:
            begun, busy = now(device), time.process_time()
            work[name]()
            taken = now(device) - begun, time.process_time() - busy
            for unit, seconds in zip(UNITS, taken, strict=True):
                series[name][unit].append(seconds)
    return {name: {unit: own[unit][WARMUP:] for unit in UNITS} for name, own in series.items()}


def faster(own: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return how many times as fast as another one is, by unit: the median over turns, and its spread."""
    return {unit: ratio(own[unit], other[unit]) for unit in UNITS}


def now(device: torch.device) -> float:
    """Return the clock once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def prepared(model: PreTrainedModel, *, batch_size: int, tokens: int, steps: int) -> dict[str, Decoder]:
    """Return the ways to decode by name, each with `tokens` random tokens in its cache."""
    dense = Eager(attending(model, "sdpa"))
    static = Static(attending(apply(model, Plan({})), GROUPED), batch_size=batch_size, length=tokens + steps)
    decoders: dict[str, Decoder] = {"dense eager": dense, "dense static": static}
    for name, sparsity, expanded in (
        ("packed 50 %", 0.5, False),
        ("packed 70 %", 0.7, False),
        ("expanded 50 %", 0.5, True),
    ):
        twin = attending(apply(model, Plan({})), "sdpa")
        twin.config.kvp_cache = asdict(Mustafar(key_sparsity=sparsity, value_sparsity=sparsity))
        packed = decoders[name] = Eager(twin)
        packed.cache = cache_for(twin.config, expanded=expanded)
    static.record(range(tokens + 1, tokens + steps + 1))
    static.cursor.positions, static.cursor.visible = torch.arange(tokens, device=model.device), tokens
    for decoder in decoders.values():
        fill(decoder, layer_shapes(model.config), batch_size=batch_size, tokens=tokens)
    static.seek(tokens)
    return decoders


def attending(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Return the model with this attention."""
    model.set_attn_implementation(implementation)
    return model


def fill(decoder: Any, shapes: Sequence[Any], *, batch_size: int, tokens: int) -> None:
    """Put random keys and values, the same for every decoder, into its cache."""
    device, dtype = decoder.model.device, decoder.model.dtype
    generator = torch.Generator(device).manual_seed(0)
    if not isinstance(decoder, Static):  # which has one, that a captured step reads
        decoder.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    made = {"generator": generator, "device": device, "dtype": dtype}
    for index, shape in enumerate(shapes):
        states = partial(torch.randn, batch_size, shape.num_key_value_heads, tokens, **made)
        decoder.cache.update(states(shape.qk_head_dim), states(shape.v_head_dim), index)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median, the quartiles and the seconds of all steps."""
    low, median, high = quartiles(seconds)
    return {"median": median, "iqr": [low, high], "steps": list(seconds)}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios by what they compare, for `kvp bench compare`."""
    return {
        f"{row['name']} / {other}, batch {row['batch_size']}, {row['tokens']} tokens: {unit}": times[unit]
        for row in rows
        for other, times in row["against"].items()
        for unit in UNITS
        if other != row["name"]
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown: milliseconds, and how many times faster than dense in CPU seconds."""
    heads = ["tokens", "cache", "MiB", "step ms", "CPU ms", "x dense eager", "x dense static"]
    lines = [
        [
            f"{row['tokens']:,}",
            row["name"],
            f"{row['cache_bytes'] / 2**20:,.0f}",
            *(f"{1e3 * row[unit]['median']:.0f}" for unit in UNITS),
            *(spread(row["against"][other]["cpu_seconds"]) for other in ("dense eager", "dense static")),
        ]
        for row in rows
    ]
    return markdown(heads, lines, labels=2)


def spread(times: dict[str, Any]) -> str:
    """Return a ratio with its quartiles."""
    low, high = times["iqr"]
    return f"{times['median']:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
