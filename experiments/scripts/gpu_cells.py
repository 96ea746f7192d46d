"""Cells of the study on a GPU: what each measures, with the benchmarks that there are.

| kind     | measures                                                                | with               |
| -------- | ----------------------------------------------------------------------- | ------------------ |
| `tests`  | the tests marked gpu                                                    | pytest             |
| `kernel` | attention over one layer's cache: packed and expanded beside dense      | `kvp.models`       |
| `sparse` | a whole step over a sparse cache beside dense caches                    | `sparse_decode`    |
| `decode` | prompt and steps of the dense model and another, in turns               | `kvp.bench.rounds` |
| `prune`  | seconds and peak of scoring, and of a refit                             | `meter`            |
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel

from experiments.scripts import sparse_decode
from experiments.scripts.scoring import COMMON
from kvp.bench.models import Subject, find_subjects
from kvp.bench.plans import KVPRUNER, RIVALS, cut_config
from kvp.bench.ratios import of_rows
from kvp.bench.rounds import Series, in_turns, ratio
from kvp.bench.rows import make_rows
from kvp.estimate.serving import room
from kvp.measurement.measure import Measure
from kvp.measurement.memory import available_bytes
from kvp.measurement.roofline import copy_bandwidth
from kvp.measurement.speed import quartiles
from kvp.models.joined import joined_config
from kvp.models.mustafar import kept, pack, unpack
from kvp.models.shapes import layer_shapes
from kvp.models.sparse_attention import attend, readable
from kvp.strategies.base import Strategy
from kvp.strategies.methods.kvpruner_plus_mla import KVPrunerPlusMLA

Result = dict[str, Any]
Shape = Callable[[PretrainedConfig], PretrainedConfig]

TURNS, WARMUP = 10, 2  # of a kernel
LAYERS = 4  # caches that a kernel reads one after the other, so that none stays in the GPU's own cache
SPARE = 0.92  # fraction of the free memory that a cell may take, from bytes


@dataclass(frozen=True)
class Cell:
    """One measurement. Cells of a group share their models, and a process.

    Attributes:
        kind: What is measured, see the module.
        shape: A shape of conf/model.
        model: Name of the other model or method.
        path: Path of decoding.
        batch: Sequences.
        tokens: Tokens in the cache before the first step.
    """

    kind: str
    shape: str = ""
    model: str = ""
    path: str = ""
    batch: int = 0
    tokens: int = 0

    @property
    def group(self) -> str:
        """Return the name of the cells that are measured in one process."""
        return "/".join(filter(None, (self.kind, self.shape, self.model, self.path)))

    @property
    def name(self) -> str:
        """Return the name of the cell."""
        return f"{self.group}/{self.batch}x{self.tokens}" if self.batch else self.group


@dataclass(frozen=True)
class Scale:
    """Size of the cells, which is small where only the code is tried.

    Attributes:
        device: Where everything is measured.
        dtype: Dtype of weights and caches.
        new_tokens: Steps after a prompt.
        warmup: Rounds that do not count.
        runs: Rounds that count.
        rehearsal: Whether only the code is tried.
    """

    device: torch.device
    dtype: torch.dtype
    new_tokens: int
    warmup: int
    runs: int
    rehearsal: bool


def _cut(*ways: tuple[Strategy, float], join: int = 1) -> Shape:
    """Return the first of some cuts of the KV cache that a model reaches, after `join` KV heads have become one."""

    def shape(config: PretrainedConfig) -> PretrainedConfig:
        heads = layer_shapes(config)[0].num_key_value_heads // join if join > 1 else None
        before, refused = joined_config(config, heads), ""
        for method, value in ways:
            try:
                return cut_config(before, method, "kv_cache", value)
            except ValueError as error:
                refused = str(error)
        raise ValueError(refused)

    return shape


LATENT = KVPrunerPlusMLA(kv_lora_rank=512, qk_rope_head_dim=64)  # as wide as DeepSeek's
OTHERS: dict[str, Shape] = {  # what 7B and 8B reach, and then what the tiny shape does
    "KVPruner 50%": _cut((KVPRUNER, 0.5)),
    "KVPruner 25%": _cut((KVPRUNER, 0.25)),
    "joined by two, KVPruner 50%": _cut((KVPRUNER, 0.5), join=2),
    "MLA-shaped": _cut((LATENT, 1 - 576 / 8192), (LATENT, 1 - 576 / 2048), (KVPrunerPlusMLA(), 0.5)),
    **{name: _cut((method, 0.5), (method, 0.4), (method, 0.2)) for name, method in RIVALS.items()},
}
PRUNED = ("kvpruner", "kvpruner_plus")  # methods that are weighed; the second refits


def measure(cell: Cell, scale: Scale) -> Result:
    """Return what a cell measures, with its `ratios` by name.

    Raises:
        ValueError: It cannot be measured here: too large, or a shape that the method does not reach.
        RuntimeError: The tests failed.
    """
    kinds = {"tests": _tests, "kernel": _kernel, "sparse": _sparse, "decode": _decode, "prune": _prune}
    return kinds[cell.kind](cell, scale)


def _tests(cell: Cell, scale: Scale) -> Result:
    only = ["--collect-only"] if scale.rehearsal else []
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", *only]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    if done.returncode:
        raise RuntimeError(
            "; ".join([line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:])
        )
    return {"said": lines[-1]}


@cache
def _dense(shape: str, scale: Scale) -> tuple[Subject, PreTrainedModel]:
    subject = find_subjects(shape)[0]
    return subject, subject.load(device=scale.device, dtype=scale.dtype, seed=0)


@cache
def _other(shape: str, model: str, scale: Scale) -> tuple[Subject, PreTrainedModel]:
    subject = Subject(name=model, config=OTHERS[model](find_subjects(shape)[0].config))
    return subject, subject.load(device=scale.device, dtype=scale.dtype, seed=0)


@cache
def _bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device)


def _decode(cell: Cell, scale: Scale) -> Result:
    both = [_dense(cell.shape, scale), _other(cell.shape, cell.model, scale)]
    point = Measure(
        batch_size=cell.batch,
        prompt_length=cell.tokens,
        new_tokens=scale.new_tokens,
        warmup=scale.warmup,
        runs=scale.runs,
    )
    length = room(cell.tokens + scale.new_tokens)
    torch.cuda.empty_cache()
    free = SPARE * available_bytes(scale.device)
    needs = {
        subject.name: cell.batch * length * subject.cache_bytes_per_token(scale.dtype) for subject, _ in both
    }
    fit = {subject.name: model for subject, model in both if needs[subject.name] <= free}
    if not fit:
        raise ValueError(
            f"no model's cache fits: {min(needs.values()) / 2**30:.1f} of {free / 2**30:.1f} GiB"
        )
    series = in_turns(fit, cell.path, point)  # type: ignore[arg-type]
    absent = Series(failed="does not fit the memory beside the other model")
    subjects = [subject for subject, _ in both]
    every = [series.get(subject.name, absent) for subject in subjects]
    rows = make_rows(subjects, every, cell.path, point, dtype=scale.dtype, bandwidth=_bandwidth(scale.device))
    sizes = {
        subject.name: {
            "weights_bytes": subject.weights_bytes(scale.dtype),
            "kv_bytes_per_token": subject.cache_bytes_per_token(scale.dtype),
            "widths": sorted(
                {(s.num_key_value_heads, s.qk_head_dim, s.v_head_dim) for s in layer_shapes(subject.config)}
            ),
        }
        for subject in subjects
    }
    return {"rows": rows, "sizes": sizes, "ratios": of_rows(rows)}


def _sparse(cell: Cell, scale: Scale) -> Result:
    _, model = _dense(cell.shape, scale)
    rows = sparse_decode.measure(
        model, batch_size=cell.batch, tokens=cell.tokens, steps=scale.new_tokens * scale.runs
    )
    return {"rows": rows, "ratios": _named(cell, sparse_decode.ratios(rows))}


def _named(cell: Cell, ratios: dict[str, Any]) -> dict[str, Any]:
    return {f"{cell.shape}, {name}": found for name, found in ratios.items()}


def _prune(cell: Cell, scale: Scale) -> Result:
    from experiments.scripts.meter import measure as meter

    model = "debug=smoke" if scale.rehearsal else f"model={cell.shape}"
    line = meter([*COMMON, model, f"strategy={cell.model}", "ratio.value=0.5"])
    if line["failed"]:
        raise ValueError(line["failed"])
    line["pruning_seconds"] = line.pop("seconds")
    return {key: value for key, value in line.items() if key not in ("failed", "provenance")}


@torch.inference_mode()
def _kernel(cell: Cell, scale: Scale) -> Result:
    """Time attention of one token over `LAYERS` caches, as a captured graph where there is a GPU."""
    if not readable(scale.device, scale.dtype):
        raise ValueError(f"no kernel reads sparse caches of {scale.dtype} on {scale.device}")
    shape = layer_shapes(find_subjects(cell.shape)[0].config)[0]
    width, groups = shape.qk_head_dim, shape.num_key_value_heads
    free = SPARE * available_bytes(scale.device)
    need = 4 * LAYERS * cell.batch * groups * cell.tokens * 2 * width * scale.dtype.itemsize
    if need > free:
        raise ValueError(f"its caches take {need / 2**30:.1f} of {free / 2**30:.1f} GiB")
    generator = torch.Generator(scale.device).manual_seed(0)
    states = partial(torch.randn, generator=generator, device=scale.device, dtype=scale.dtype)
    query = states(cell.batch, shape.num_attention_heads, width)
    dense = [[states(cell.batch, groups, cell.tokens, width) for _ in "kv"] for _ in range(LAYERS)]
    ways = {"dense": [partial(_read, query, *layer) for layer in dense]}
    window, differences = min(32, cell.tokens - 1), {}
    for sparsity in (0.5, 0.7):
        older = [[states_[:, :, :-window] for states_ in layer] for layer in dense]
        recent = [[states_[:, :, -window:] for states_ in layer] for layer in dense]
        packed = [[pack(states_, kept(width, sparsity)) for states_ in layer] for layer in older]
        ways[f"packed {sparsity:.0%}"] = [
            partial(attend, query, [(*k, *v)], new[0], new[1], None, width**-0.5)
            for (k, v), new in zip(packed, recent, strict=True)
        ]
        ways[f"expanded {sparsity:.0%}"] = [
            partial(_expand, query, k, v, *new) for (k, v), new in zip(packed, recent, strict=True)
        ]
        one, other = (ways[f"{way} {sparsity:.0%}"][0]() for way in ("packed", "expanded"))
        differences[f"{sparsity:.0%}"] = (one - other).abs().max().item()
    steps = {name: _captured(calls, scale.device) for name, calls in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARMUP + TURNS):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            begun = sparse_decode.now(scale.device)
            steps[name]()
            seconds[name].append((sparse_decode.now(scale.device) - begun) / LAYERS)
    counted = {name: own[WARMUP:] for name, own in seconds.items()}
    place = f"batch {cell.batch}, {cell.tokens} tokens"
    ratios = {
        f"kernel {n} / dense, {place}": ratio(s, counted["dense"]) for n, s in counted.items() if n != "dense"
    }
    return {
        "captured": {name: step.__name__ == "replay" for name, step in steps.items()},
        "seconds_per_layer": {name: quartiles(own)[1] for name, own in counted.items()},
        "max_difference": differences,
        "ratios": _named(cell, ratios),
    }


def _read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return what the heads of a group read of whole keys and values."""
    queries = query.unflatten(1, (keys.shape[1], -1))
    return scaled_dot_product_attention(queries, keys, values).flatten(1, 2)


def _expand(query: Tensor, keys: Any, values: Any, new_keys: Tensor, new_values: Tensor) -> Tensor:
    older = unpack(*keys), unpack(*values)
    return _read(query, *(torch.cat(both, 2) for both in zip(older, (new_keys, new_values), strict=True)))


def _captured(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], Any]:
    """Return the calls one after the other; on a GPU as one graph, unless they cannot be captured."""

    def all_of_them() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return all_of_them
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            all_of_them()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            all_of_them()
    except RuntimeError:  # an operator that waits for the host
        torch.cuda.synchronize(device)
        return all_of_them
    return graph.replay
