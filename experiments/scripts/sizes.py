"""Fit what pruning costs against the size of a model, and check the fit on a size that it has not seen.

    python -m experiments.scripts.sizes [--out DIR] [--models NAME,...] [--unseen NAME] [--whole NAME] [--work NAME]

Models are shapes of conf/model with random weights, which cost the same as trained ones. Each work is one batch in a
process of its own (`kvp.fit.check`): CPU seconds of all threads, which other processes disturb less than the clock,
and the peak without the interpreter, beside the estimate that `kvp fit` gives.

The fit is a line per work: CPU seconds per token = a + b * multiply-accumulates per token, by least squares of relative
errors. Those of a forward pass are counted from the shapes, and those of the whole work where its passes are known. The
line predicts the unseen shape, which is measured too, and the shapes of 7B, 8B and 70B, which are not.

`--whole LLaMA-7B` measures one of those in bfloat16, which needs room for its weights on the disk and
again in memory.

Writes sizes.jsonl (with provenance) after every work, and sizes.md. A killed command goes on after its last work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvp.tables import markdown
from kvp.whole import write_whole

if TYPE_CHECKING:
    from kvp.fit.check import Case
    from kvp.pipeline.experiment import Experiment

SEEN = ("smollm2_135m_shape", "qwen25_05b_shape", "tinyllama_shape")
UNSEEN = "smollm2_360m_shape"
LARGE = {  # hidden and intermediate size, layers, query heads, KV heads, vocabulary
    "LLaMA-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
CASES = (
    ("perplexity", "perplexity", ()),
    ("score", "scoring, kvpruner", ("strategy=kvpruner",)),
    ("score", "scoring, kvpruner_plus", ("strategy=kvpruner_plus",)),
    ("plan", "search, kvpruner_plus", ("strategy=kvpruner_plus",)),
    ("refit", "refit, kvpruner_plus", ("strategy=kvpruner_plus",)),
    ("recover", "LoRA", ()),
)
WORKS = tuple(work for _, work, _ in CASES)
ONE_WINDOW = ("calibration.batch_size=1", "evaluation.perplexity.batch_size=1", "recovery.micro_batch_size=1")
MEASURED = "float32"  # files hold it too: a conversion would map the whole file beside the weights
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
    parser.add_argument("--work", action="append", choices=WORKS, help="only this one; repeat it for more")
    parser.add_argument("--whole", choices=LARGE, help="a large shape to measure too, in bfloat16")
    args = parser.parse_args()
    seen = args.models.split(",")
    if len(set(seen)) < 2:
        parser.error(f"a line needs two sizes, got --models {args.models}: name another shape")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "sizes.jsonl"
    lines = [json.loads(each) for each in file.read_text().splitlines()] if file.exists() else []
    for name in [*seen, args.unseen, *([args.whole] if args.whole else [])]:
        done = {each["work"] for each in lines if each["model"] == name}
        if not (asked := set(args.work or WORKS) - done):
            continue
        print(name, file=sys.stderr, flush=True)
        for each in measure(name, [case for case in CASES if case[1] in asked]):
            lines.append(each)
            write_whole(file, "".join(f"{json.dumps(line)}\n" for line in lines))
    (args.out / "sizes.md").write_text(tables(lines, seen, args.unseen))
    print((args.out / "sizes.md").read_text())


def measure(name: str, cases: Sequence[Case] = CASES) -> Iterator[Line]:
    """Yield one line per work of a model, the cheapest first; those of `LARGE` read single windows, in bfloat16."""
    from kvp.fit.check import check
    from kvp.provenance import provenance

    words = [*shape(name, "bfloat16"), *ONE_WINDOW] if name in LARGE else shape(name, MEASURED)
    foreseen = {each["work"]: each for each in foresee(words)}
    made = provenance("cpu")
    for row in check(words, sorted(cases, key=lambda case: foreseen[case[1]]["macs"])):
        yield {"model": name, **foreseen[row.work], **asdict(row), "provenance": made}


def shape(name: str, dtype: str) -> list[str]:
    """Return the options of a shape of conf/model or of `LARGE`, stored and computed in `dtype`."""
    large = LARGE.get(name)
    sizes = [f"model.config.{key}={value}" for key, value in zip(SIZES, large, strict=True)] if large else []
    named = "tinyllama_shape" if large else name
    return [f"model={named}", f"model.config.dtype={dtype}", f"model.dtype={dtype}", f"dtype={dtype}", *sizes]


def foresee(words: Sequence[str]) -> list[Line]:
    """Return parameters, multiply-accumulates per token and the estimated peak of each work; nothing is loaded.

    Where the passes of a work are unknown, multiply-accumulates are those of one forward pass.
    """
    from kvp.composing import compose
    from kvp.models.shapes import layer_shapes, size
    from kvp.pipeline.experiment import Experiment
    from kvp.pipeline.needs import forward_macs, need_of

    lines = []
    for phase, work, options in CASES:
        x = Experiment.compose(compose([*words, *options]), [*words, *options])
        config, length = x.source.expected(), x.calibration.length
        need = need_of(x, config, phase)
        params = size(config, layer_shapes(config)).params
        macs = forward_macs(config, length) / length if need.macs is None else need.macs / _tokens(x, phase)
        lines.append({"work": work, "params": params, "macs": macs, "estimate": need.memory["total"]})
    return lines


def _tokens(x: Experiment, phase: str) -> int:
    """Return how many tokens a phase of a run reads, each once."""
    from kvp.pipeline.needs import recipe_length

    assert x.perplexity is not None
    assert x.recovery is not None
    if phase == "perplexity":
        assert x.perplexity.max_tokens is not None
        return x.perplexity.max_tokens * len(x.perplexity.corpora)
    if phase == "recover":
        assert x.recovery.max_steps is not None
        return x.recovery.max_steps * x.recovery.batch_size * recipe_length(x.recovery)
    return x.calibration.num_samples * x.calibration.length


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (a, b) of y = a + b * x for points (x, y), by least squares of (a + b * x) / y - 1."""
    rows = torch.tensor([[1 / y, x / y] for x, y in points], dtype=torch.float64)
    a, b = (
        torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten().tolist()
    )
    return a, b


def tables(lines: Sequence[Line], seen: Sequence[str], unseen: str) -> str:
    """Return what was measured, the fit of it, and what large shapes would take, as Markdown."""
    measured = [each for each in lines if each["model"] in {*seen, unseen}]
    parts = [_costs(measured), _fits(measured, unseen), _large(measured, unseen)]
    whole = [each for each in lines if each["model"] in LARGE]
    return "\n\n".join([*parts, _costs(whole)] if whole else parts) + "\n"


def _costs(lines: Sequence[Line]) -> str:
    """Return a row per model and work: what was measured, and the estimate of its peak."""
    rows = [
        [
            *[each["model"], f"{each['params'] / 1e6:,.0f}", each["work"], f"{each['tokens']:,}"],
            f"{1e3 * each['cpu_seconds'] / each['tokens']:.1f}",
            *(f"{each[key] / 2**20:,.0f}" for key in ("estimate", "measured")),
            f"{each['measured'] / each['estimate']:.3f}",
        ]
        for each in sorted(lines, key=lambda each: (each["params"], WORKS.index(each["work"])))
    ]
    heads = [*HEADS, "CPU ms per token", "estimate (MiB)", "peak (MiB)", "peak / estimate"]
    return markdown(heads, rows, labels=1)


def fits(lines: Sequence[Line], unseen: str) -> dict[str, tuple[float, float]]:
    """Return (a, b) of every work that was measured, without the unseen model."""
    points = {
        work: [
            (each["macs"], each["cpu_seconds"] / each["tokens"])
            for each in lines
            if each["work"] == work and each["model"] != unseen
        ]
        for work in WORKS
    }
    return {work: line(those) for work, those in points.items() if those}


def _fits(lines: Sequence[Line], unseen: str) -> str:
    """Return a row per work: the fit, and the unseen model as predicted and measured."""
    rows = []
    for work, (a, b) in fits(lines, unseen).items():
        left_out = next((each for each in lines if (each["model"], each["work"]) == (unseen, work)), None)
        if left_out is None:
            continue
        predicted, seconds = a + b * left_out["macs"], left_out["cpu_seconds"] / left_out["tokens"]
        rows.append(
            [
                *[
                    work,
                    f"{1e3 * a:.1f}",
                    f"{1e-9 / b:.1f}",
                    f"{1e3 * predicted:.1f}",
                    f"{1e3 * seconds:.1f}",
                ],
                f"{predicted / seconds:.2f}",
            ]
        )
    heads = ["work", "a (ms)", "1 / b (G multiply-accumulates / s)", f"{unseen}: predicted", "measured (ms)"]
    return markdown([*heads, "predicted / measured"], rows)


def _large(lines: Sequence[Line], unseen: str) -> str:
    """Return a row per large shape and work: CPU seconds per token by the fit, and the estimated peak in bfloat16."""
    rows, fitted = [], fits(lines, unseen)
    for name in LARGE:
        timed, stored = foresee(shape(name, MEASURED)), foresee(shape(name, "bfloat16"))
        for each, small in zip(timed, stored, strict=True):
            if each["work"] not in fitted:
                continue
            a, b = fitted[each["work"]]
            rows.append(
                [
                    *[name, f"{each['params'] / 1e6:,.0f}", each["work"]],
                    *[f"{a + b * each['macs']:.2f}", f"{small['estimate'] / 2**30:.1f}"],
                ]
            )
    heads = ["model", "parameters (M)", "work", "CPU s per token, by the fit", "estimate in bfloat16 (GiB)"]
    return markdown(heads, rows, labels=1)


if __name__ == "__main__":
    main()
