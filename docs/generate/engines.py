"""The table of forms and engines in the guide to serving, from the records of experiments/engines.

    python -m docs.generate.engines

Each record says what an engine of a version did with one export: `python -m experiments.scripts.engines` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from docs.generate.settings import ROOT
from kvp.serving.forms import FORMS
from kvp.tables import markdown

RECORDS = ROOT / "experiments" / "engines" / "results.json"
PAGE = ROOT / "docs" / "guides" / "serving.md"
BEGIN, END = "<!-- drawn by docs/generate/engines.py -->\n", "<!-- end -->"
NAMES = {"llama_cpp": "llama.cpp", "vllm": "vLLM"}

Record = Mapping[str, Any]


def table(records: Sequence[Record]) -> str:
    """Return the table: a row per form, a column per engine and version, and below it why a form was refused."""
    columns = sorted({(record["engine"], record["version"]) for record in records})
    heads = ["form", *(f"{NAMES.get(engine, engine)} {version}" for engine, version in columns)]
    whys: list[str] = []
    rows = []
    for form in FORMS:
        row = [f"`{form}`"]
        for column in columns:
            here = [r for r in records if (r["form"], (r["engine"], r["version"])) == (form, column)]
            row.append(_cell(here, whys))
        rows.append(row)
    notes = [f"{number}. {why}" for number, why in enumerate(whys, 1)]
    return "\n".join([markdown(heads, rows, labels=len(heads)), "", *notes]).strip() + "\n"


def _cell(records: Sequence[Record], whys: list[str]) -> str:
    """Return what one engine did with the exports of one form; reasons are numbered in `whys`."""
    run = [record for record in records if record["status"] == "run"]
    refused = [record for record in records if record["status"] == "refused"]
    if run:
        largest = max(record["rms"] for record in run)
        models = f", {len(run)} of {len(records)} models" if len(records) > 1 else ""
        text = f"run {max(record['date'] for record in run)}: {largest:.1g} nats{models}"
    elif refused:
        text = f"refused {max(record['date'] for record in refused)}"
    else:
        return "not run"
    for why in dict.fromkeys(record["why"] for record in refused if not run):
        if why not in whys:
            whys.append(why)
        text += f" ({whys.index(why) + 1})"
    return text


def page() -> str:
    """Return the guide with the table of the records that are there."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + BEGIN + "\n" + table(json.loads(RECORDS.read_text())) + "\n" + end + after


if __name__ == "__main__":
    PAGE.write_text(page())
