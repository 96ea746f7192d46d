"""Time decode steps of dense and cut models by three paths: what a cut's bytes, and kernels of our own, are worth.

    python -m experiments.scripts.decode_step [--model NAME] [--batch N] [--tokens N,N] [--steps N] [--out FILE]

    static    torch's linear layers and attention over a cache of fixed size
    native    one kernel for all layers, compiled for this CPU: see `kvp.models.decode_layers`
    compiled  a kernel for each linear layer and attention, and torch.compile for what lies between them

    dense             the shape, with random weights
    KVPruner 25 %     a uniform cut of its cache
    KVPruner 50 %     the same with half of the cache
    joined 50 %       one KV head that holds the channels of all, and half of them cut
    Mustafar 50 %     half of the channels of every older key and value dropped, read as it is stored
    Mustafar 70 %     the same with 70 %

Caches are filled with random states, because the time of a step depends on shapes alone. All ways are in one process
and take turns step by step, forth and back. Times as fast is the median over the turns. "By bytes" is what the weights
and caches that a step reads predict.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch is imported: see kvp/threads.py

import torch
from transformers import PreTrainedModel

from experiments.scripts.sparse_decode import (
    UNITS,
    WARMUP,
    attending,
    faster,
    fill,
    in_turns,
    parser,
    ratios,
    spread,
    summary,
)
from kvp.bench.models import Subject, find_subjects
from kvp.bench.plans import KVPRUNER, cut_config
from kvp.measurement.count import cache_bytes
from kvp.measurement.grouped import GROUPED
from kvp.measurement.memory import weights_bytes
from kvp.measurement.native_step import NATIVE, check_native
from kvp.measurement.paths import Native, Static
from kvp.models.caches import stored_bytes
from kvp.models.joined import joined_config
from kvp.models.mustafar import Mustafar
from kvp.models.shapes import layer_shapes
from kvp.models.surgery import apply
from kvp.provenance import provenance
from kvp.tables import markdown
from kvp.types import Plan

CUTS = {"KVPruner 25 %": (None, 0.25), "KVPruner 50 %": (None, 0.5), "joined 50 %": (1, 0.5)}
PATHS = {"static": (Static, GROUPED), "native": (Native, NATIVE), "compiled": (Native, NATIVE)}
SPARSITIES = {"Mustafar 50 %": 0.5, "Mustafar 70 %": 0.7}


@dataclass(frozen=True)
class Way:
    """A model decoded by one path, with its cache filled."""

    name: str
    path: str
    model: PreTrainedModel
    decoder: Static


def main() -> None:
    """Measure every length, write the record and print its table."""
    args = parser("decode_step", __doc__).parse_args()
    dense, longest = find_subjects(args.model)[0], max(args.tokens) + WARMUP + args.steps
    if longest > dense.config.max_position_embeddings:
        raise SystemExit(
            f"--tokens {max(args.tokens)} and --steps {args.steps} need {longest} positions, {args.model} has "
            f"{dense.config.max_position_embeddings}: use fewer"
        )
    check_native(torch.device("cpu"), torch.float32)
    models = {
        name: subject.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)
        for name, subject in _subjects(dense).items()
    }
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows += _measured(models, batch_size=args.batch, tokens=tokens, steps=args.steps)
        print(_table(rows), file=sys.stderr, flush=True)
    record = {
        "model": args.model,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "ratios": ratios(rows),
        "provenance": {
            **provenance("cpu"),
            "command": " ".join(["python -m experiments.scripts.decode_step", *sys.argv[1:]]),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(rows))


def _subjects(dense: Subject) -> dict[str, Subject]:
    """Return the dense shape and its cuts."""
    found = {"dense": dense}
    for name, (heads, value) in CUTS.items():
        config = cut_config(joined_config(dense.config, heads), KVPRUNER, "kv_cache", value)
        found[name] = Subject(name=name, config=config)
    return found


def _measured(
    models: Mapping[str, PreTrainedModel], *, batch_size: int, tokens: int, steps: int
) -> list[dict[str, Any]]:
    """Return a row per way: its steps, and how many times as fast they are as others."""
    with torch.inference_mode():
        ways = _ways(models, batch_size=batch_size, tokens=tokens, steps=WARMUP + steps)
    work = {f"{way.name} {way.path}": way.decoder.step for way in ways}
    series, dense = in_turns(work, torch.device("cpu"), steps), ways[0]
    rows = []
    for way in ways:
        own = series[f"{way.name} {way.path}"]
        others = {f"dense {way.path}", f"{way.name} static", "dense static"} & set(series)
        rows.append(
            {
                "name": f"{way.name} {way.path}",
                "batch_size": batch_size,
                "tokens": tokens,
                "cache_bytes": cache_bytes(way.decoder.cache),
                "by_bytes": _bytes(dense, batch_size, tokens) / _bytes(way, batch_size, tokens),
                **{unit: summary(own[unit]) for unit in UNITS},
                "against": {other: faster(own, series[other]) for other in sorted(others)},
            }
        )
    return rows


def _bytes(way: Way, batch_size: int, tokens: int) -> float:
    """Return the bytes that a step reads: weights once, keys and values of every token."""
    cached = stored_bytes(
        way.model.config, way.model.dtype.itemsize, tokens
    )  # the cache itself has room for more
    return weights_bytes(way.model) + batch_size * cached


def _ways(models: Mapping[str, PreTrainedModel], *, batch_size: int, tokens: int, steps: int) -> list[Way]:
    """Return every way, with `tokens` random tokens in its cache."""
    ways = []
    twins = [(name, path, _twin(model, path)) for name, model in models.items() for path in PATHS]
    for name, sparsity in SPARSITIES.items():
        twin = attending(apply(models["dense"], Plan({})), NATIVE)
        twin.config.kvp_cache = asdict(Mustafar(key_sparsity=sparsity, value_sparsity=sparsity))
        twins.append((name, "native", twin))
    for name, path, twin in twins:
        kind, _ = PATHS[path]
        decoder = kind(twin, batch_size=batch_size, length=tokens + steps, compiled=path == "compiled")
        decoder.record(range(tokens + 1, tokens + steps + 1))
        decoder.cursor.positions, decoder.cursor.visible = torch.arange(tokens), tokens
        fill(decoder, layer_shapes(twin.config), batch_size=batch_size, tokens=tokens)
        decoder.seek(tokens)
        ways.append(Way(name, path, twin, decoder))
    return ways


def _twin(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return the model with the attention of a path and the same parameters."""
    made = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    return attending(made, PATHS[path][1])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown: milliseconds, and how many times as fast as others they are."""
    heads = ["tokens", "step", "ms", "x dense of its path", "by bytes", "x itself static"]
    lines = []
    for row in rows:
        name, _, path = row["name"].rpartition(" ")
        times = {other: spread(found["seconds"]) for other, found in row["against"].items()}
        lines.append(
            [
                f"{row['tokens']:,}",
                row["name"],
                f"{1e3 * row['seconds']['median']:.1f}",
                times[f"dense {path}"],
                f"{row['by_bytes']:.2f}",
                times.get(f"{name} static", ""),
            ]
        )
    return markdown(heads, lines, labels=2)


if __name__ == "__main__":
    main()
