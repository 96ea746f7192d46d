"""Tables of results.json: what the memory holds of each model, and what a client saw of it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from kvp.bench.rounds import ratio
from kvp.bench.table import Block
from kvp.tables import markdown

MIB = 2**20
HEADS = (
    "model",
    "tokens/s",
    "x first",
    "per CPU s",
    "x first",
    "TTFT ms: median, p99",
    "TPOT ms: median, p99",
)
SEEN = ("at once", "cache used", "preempted", "peak MiB")
Record = dict[str, Any]


def table(record: Record) -> str:
    """Return the record as Markdown: a table of the models, one of the loads, and how to read them."""
    kept = [model for model in record["models"] if "refused" not in model["rounds"][0]]
    refused = [f"* {m['name']}: {m['rounds'][0]['refused']}" for m in record["models"] if m not in kept]
    blocks = [_models(record, kept), _loads(record, kept)]
    texts = [markdown(block.heads, block.filled("**{}**".format)) for block in blocks]
    notes = ["The engine refused:\n\n" + "\n".join(refused)] if refused else []
    return "\n\n".join([*texts, *notes, _note(record)]) + "\n"


def _models(record: Record, kept: Sequence[Record]) -> Block:
    longest = max(load["prompt"] + load["new"] for load in record["loads"])
    rows = []
    for model in kept:
        tokens = model["rounds"][0]["cache_tokens"]
        rows.append(
            [
                model["name"],
                f"{model['token_bytes']:,}",
                f"{tokens:,}",
                f"{tokens / longest:.1f}",
                model["cache_dtype"],
            ]
        )
    heads = (
        "model",
        "cache B/token",
        f"tokens in {record['memory_bytes'] / MIB:,.1f} MiB",
        f"sequences of {longest}",
    )
    return Block("models", (*heads, "cache dtype"), rows)


def _loads(record: Record, kept: Sequence[Record]) -> Block:
    rows: list[list[str]] = []
    for number, load in enumerate(record["loads"]):
        rows.append(
            [
                f"{load['prompt']} + {load['new']} tokens, {load['at_once']} at once, {load['requests']} requests"
            ]
        )
        first = [turn["loads"][number] for turn in kept[0]["rounds"]]
        rows += [
            [model["name"], *_seen([turn["loads"][number] for turn in model["rounds"]], first)]
            for model in kept
        ]
    return Block("loads", (*HEADS, *SEEN), rows)


def _seen(own: list[Record], first: list[Record]) -> list[str]:
    cells = []
    for clock in ("seconds", "cpu_seconds"):
        cells.append(f"{median(cell['tokens'] / cell[clock] for cell in own):.1f}")
        cells.append(
            _against(*([cell[clock] / cell["tokens"] for cell in cells_] for cells_ in (own, first)))
        )
    middle = {name: median(cell[name] for cell in own) for name in own[0]}
    return [
        *cells,
        *(f"{middle[f'median_{name}']:,.0f}, {middle[f'p99_{name}']:,.0f}" for name in ("ttft", "tpot")),
        f"{max(cell['most_running'] for cell in own)}",
        f"{middle['cache_usage']:.0%}",
        f"{middle['preemptions']:g}",
        f"{max(cell['peak_bytes'] for cell in own) / MIB:,.0f}",
    ]


def _against(own: list[float], first: list[float]) -> str:
    """Return how many times faster, and the range over the rounds."""
    if own == first:
        return "1"
    spread = [theirs / mine for mine, theirs in zip(own, first, strict=True)]
    return f"{ratio(own, first)['median']:.2f} [{min(spread):.2f}, {max(spread):.2f}]"


def _note(record: Record) -> str:
    turns = [turn for model in record["models"] for turn in model["rounds"] if "loads" in turn]
    loads = [cell["load_before"] for turn in turns for cell in turn["loads"]]
    engine = record["provenance"]["engine"]
    rounds = len(record["models"][0]["rounds"])
    how = "all servers up" if record["together"] else "one server at a time"
    return (
        f"{rounds} round{'s' * (rounds > 1)} in turns, {how}, "
        f"{record['dtype']}, {', '.join(f'{name} {version}' for name, version in engine.items())}, on "
        f"{record['provenance']['device_name']}. Medians over the rounds. x first: over the first model's in the same "
        f"round, with the least and the most. Per CPU s: written tokens per second of processor time of the server. "
        f"At once: most requests seen running. Load of the machine before a measurement: {min(loads):.1f} to "
        f"{max(loads):.1f} on {record['cores']} cores."
    )
