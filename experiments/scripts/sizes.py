"""Fit what pruning costs against the size of a model, and check the fit on a size that it has not seen.

    python -m experiments.scripts.sizes [--out DIR] [--models NAME,NAME,...] [--unseen NAME]

Models are shapes of conf/model with random weights, which cost the same as trained ones. Each work is one batch in a
process of its own (`kvp.fit.check`): CPU seconds of all threads, which other processes disturb less than the clock,
and the peak without the interpreter, beside the estimate that `kvp fit` gives.

The fit is a power law per work, seconds per token = c * parameters ** e, by least squares on logarithms. It predicts
the unseen shape, which is measured too, and the shapes of 7B, 8B and 70B, which are not.

Writes sizes.jsonl (with provenance) after every model, and sizes.md. A killed command goes on after its last model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvp.tables import markdown

SEEN = ("smollm2_135m_shape", "qwen25_05b_shape", "tinyllama_shape")
UNSEEN = "smollm2_360m_shape"
LARGE = {"LLaMA-7B": 6.74e9, "Llama-3-8B": 8.03e9, "Llama-3-70B": 70.6e9}
WORKS = ("perplexity", "scoring, kvpruner", "scoring, kvpruner_plus", "LoRA")
COMMON = ("model.dtype=float32",)
CASES = (
    ("perplexity", WORKS[0], ()),
    ("score", WORKS[1], ("strategy=kvpruner",)),
    ("score", WORKS[2], ("strategy=kvpruner_plus",)),
    ("recover", WORKS[3], ()),
)
HEADS = ("model", "parameters (M)", "work", "tokens")

Line = dict[str, Any]


def main() -> None:
    """Measure every model that sizes.jsonl does not hold, and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scripts.sizes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/sizes"), metavar="DIR")
    parser.add_argument("--models", default=",".join(SEEN), metavar="NAMES", help="at least two sizes")
    parser.add_argument("--unseen", default=UNSEEN, metavar="NAME")
    args = parser.parse_args()
    seen = args.models.split(",")
    if len(set(seen)) < 2:
        parser.error(f"a power law needs two sizes, got --models {args.models}: name another shape")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "sizes.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in [*seen, args.unseen]:
        if name not in {line["model"] for line in lines}:
            print(name, file=sys.stderr, flush=True)
            lines += measure(name)
            file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (args.out / "sizes.md").write_text(tables(lines, seen, args.unseen))
    print((args.out / "sizes.md").read_text())


def measure(name: str) -> list[Line]:
    """Return one line per work of a model."""
    from kvp.bench.models import find_subjects
    from kvp.fit.check import check
    from kvp.models.shapes import layer_shapes, size
    from kvp.provenance import provenance

    config = find_subjects(name)[0].config
    params, made = size(config, layer_shapes(config)).params, provenance("cpu")
    rows = check([f"model={name}", *COMMON], CASES)
    return [{"model": name, "params": params, **asdict(row), "provenance": made} for row in rows]


def power_law(points: Mapping[float, float]) -> tuple[float, float]:
    """Return (c, e) of seconds = c * parameters ** e, by least squares on logarithms."""
    xs, ys = ([math.log(value) for value in values] for values in (points.keys(), points.values()))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    e = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    return math.exp(y - e * x), e


def tables(lines: Sequence[Line], seen: Sequence[str], unseen: str) -> str:
    """Return what was measured, and the fit of it, as Markdown."""
    measured = [line for line in lines if line["model"] in {*seen, unseen}]
    rows = [
        [
            *[line["model"], f"{line['params'] / 1e6:,.0f}", line["work"], f"{line['tokens']:,}"],
            f"{1e3 * line['cpu_seconds'] / line['tokens']:.1f}",
            *(f"{line[key] / 2**20:,.0f}" for key in ("estimate", "measured")),
            f"{line['measured'] / line['estimate']:.3f}",
        ]
        for line in sorted(measured, key=lambda line: (line["params"], WORKS.index(line["work"])))
    ]
    heads = [*HEADS, "CPU ms per token", "estimate (MiB)", "peak (MiB)", "peak / estimate"]
    parts = [markdown(heads, rows, labels=1), _fits(measured, unseen)]
    return "\n\n".join(parts) + "\n"


def _fits(lines: Sequence[Line], unseen: str) -> str:
    """Return a row per work: the fit, the unseen model as predicted and measured, and the large shapes predicted."""
    rows = []
    for work in WORKS:
        per_token = {
            line["model"]: (line["params"], line["cpu_seconds"] / line["tokens"])
            for line in lines
            if line["work"] == work
        }
        params, seconds = per_token.pop(unseen)
        c, e = power_law(dict(per_token.values()))
        predicted = c * params**e
        rows.append(
            [
                *[work, f"{e:.2f}", f"{1e3 * predicted:.1f}", f"{1e3 * seconds:.1f}"],
                f"{predicted / seconds:.2f}",
                *(f"{c * large**e:.2f}" for large in LARGE.values()),
            ]
        )
    heads = ["work", "exponent", f"{unseen}: predicted", "measured (ms)", "predicted / measured"]
    return markdown([*heads, *(f"{name}: CPU s per token" for name in LARGE)], rows)


if __name__ == "__main__":
    main()
