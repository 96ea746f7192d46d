"""What a number was measured under: facts by name, and how to say them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Facts = dict[str, Any]

WORDS = {
    "corpus": "{}",
    "part": "{} part",
    "join": "joined by {!r}",
    "bos": "BOS {}",
    "max_tokens": "first {} tokens",
    "metrics": "{}",
    "limit": "first {} documents",
    "num_fewshot": "{}-shot",
    "version": "task version {}",
    "lm_eval": "lm-eval {}",
    "split": "{} split",
    "source": "{} data",
    "dtype": "{}",
    "device": "{}",
    "threads": "{} threads",
    "batch_size": "batch {}",
    "prompt_length": "prompt of {}",
    "new_tokens": "{} new tokens",
    "warmup": "{} warm-up",
    "runs": "median of {}",
    "attention": "{} attention",
    "method": "memory by {}",
    "kv_bytes": "{} bytes per value",
}
WITHOUT = {"max_tokens": "all tokens", "limit": "all documents", "add_bos_token": "BOS by the tokenizer"}


def facts(record: Mapping[str, Any], metric: str) -> Facts:
    """What a number of a record was measured under."""
    model, *path = metric.split(" - ")[0].split(".")
    origin = record.get("provenance", {})
    device = {"device": origin.get("device")}
    if model == "pruning":
        return {"dtype": record["config"].get("dtype"), **device, "threads": origin.get("threads")}
    match path:
        case ["evaluation", "perplexity", corpus, *_]:
            result = record[model]["evaluation"]["perplexity"][corpus]
            protocol = result["protocol"]
            of = {f: protocol.get(f) for f in ("part", "window", "stride", "join", "bos", "max_tokens")}
            return {"corpus": _corpus(protocol["corpus"]), **of, "dtype": _dtype(result), **device}
        case ["evaluation", "zero_shot", task, *_]:
            results = record[model]["evaluation"]["zero_shot"]
            metrics = results["average"]["metrics"] if task == "average" else {task: path[-1]}
            named = ", ".join(f"{name} {kind}" for name, kind in metrics.items())
            return {"metrics": named, **_merge({name: _task(results[name]) for name in metrics}), **device}
        case ["measure", *_]:
            result = record[model]["measure"]
            protocol = {
                f: value for f, value in result["protocol"].items() if f != "seed"
            }  # of random tokens
            machine = {f: result.get(f) for f in ("device", "threads", "attention")}
            return {**protocol, "dtype": _dtype(result), "method": result["memory"].get("method"), **machine}
        case ["size", "kv_bytes_per_token"]:
            size = record[model]["size"]
            width = sum(
                x["num_key_value_heads"] * (x["qk_head_dim"] + x["v_head_dim"]) for x in size["layers"]
            )
            return {"kv_bytes": size["kv_bytes_per_token"] / width if width else None}
    return {}


def phrases(of: Facts, leave_out: Collection[str] = ()) -> list[str]:
    """Facts in words, without those that were not recorded."""
    told = {name: value for name, value in of.items() if value is not None or name in WITHOUT}
    return [phrase(name, value) for name, value in told.items() if name not in leave_out]


def phrase(name: str, value: Any) -> str:
    """One fact in words."""
    if value is None:
        return WITHOUT.get(name, f"no {name}")
    return WORDS.get(name, f"{name} {{}}").format(f"{value:g}" if isinstance(value, float) else value)


def _corpus(identity: Mapping[str, Any]) -> str:
    version = identity.get("distribution") or (identity.get("revision") or identity.get("sha256") or "")[:8]
    return f"{identity['name']} ({version})" if version else identity["name"]


def _dtype(result: Mapping[str, Any]) -> str:
    return str(result.get("dtype")).removeprefix("torch.")


def _task(result: Mapping[str, Any]) -> Facts:
    names = ("limit", "num_fewshot", "add_bos_token", "version", "lm_eval", "source", "split")
    return {name: result.get(name) for name in names} | {"dtype": _dtype(result)}


def _merge(tasks: Mapping[str, Facts]) -> Facts:
    """One value per fact; where the tasks differ, all of them."""
    merged: Facts = {}
    for name in next(iter(tasks.values()), {}):
        values = {task: its[name] for task, its in tasks.items()}
        alike = len(set(values.values())) == 1
        merged[name] = (
            next(iter(values.values())) if alike else ", ".join(f"{v} ({t})" for t, v in values.items())
        )
    return merged
