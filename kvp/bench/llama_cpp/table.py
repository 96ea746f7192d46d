"""Tables of `kvp.bench.llama_cpp` as Markdown: a row per model, and the text that each one writes."""

from __future__ import annotations

from statistics import median
from typing import Any

from kvp.measurement.speed import quartiles
from kvp.tables import markdown

MIB = 2**20


def table(record: dict[str, Any]) -> str:
    """Return results.json as Markdown: a row per model, then a table per speed point, then the texts."""
    models = record["models"]
    corpora = list(next(iter(models.values()))["perplexity"])
    head = ["model", "GGUF MiB", *(f"{corpus}: transformers / llama.cpp" for corpus in corpora), "nats apart"]
    rows = []
    for name, model in models.items():
        known = [model["perplexity"][corpus] for corpus in corpora]
        apart = max(abs(sum(one["window_nll"]) / len(one["window_nll"]) - one["nll"]) for one in known)
        both = [f"{one['transformers']:.3f} / {one['llama_cpp']:.3f}" for one in known]
        rows.append([name, f"{model['gguf_bytes'] / MIB:.1f}", *both, f"{apart:.4f}"])
    lines = [markdown(head, rows)]
    for point, measured in record["speed"].items():
        lines += ["", _speed(point, measured)]
    for name, model in models.items():
        for text in model["texts"]:
            same = f"{text['equal_tokens']} of {text['tokens']} tokens as in transformers"
            lines += ["", f"**{name}**, {same}: {text['prompt']} *{' '.join(text['llama_cpp'].split())}*"]
    return "\n".join(lines) + "\n"


def _speed(point: str, measured: dict[str, Any]) -> str:
    prompt, steps = map(int, point.split("+"))
    seconds, first = measured["seconds"], next(iter(measured["seconds"]))
    clock, threads = measured["clock"], measured["threads"] or "default"
    head = [f"{prompt} tokens, then {steps} ({clock} time, threads: {threads})", "cache B/token"]
    head += ["prefill tokens/s", "of the first's", "decode tokens/s", "of the first's"]
    rows = []
    for name, mine in seconds.items():
        cells = [name, f"{measured['cache_bytes_per_token'][name]:,.0f}"]
        for phase, tokens in (("prefill", prompt), ("decode", steps)):
            low, middle, high = quartiles([tokens / one for one in mine[phase]])
            pairs = zip(mine[phase], seconds[first][phase], strict=True)
            ratio = median(theirs / one for one, theirs in pairs)
            cells += [f"{middle:.1f} [{low:.1f}, {high:.1f}]", f"{ratio:.2f}"]
        rows.append(cells)
    return markdown(head, rows)
