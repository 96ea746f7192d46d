"""Does a method rank KV groups as the loss does? Every group is removed alone and the rise of the loss is measured.

    python -m experiments.scripts.ranking [--samples 8] [--methods NAME,NAME] [--out DIR] [option=value ...]

Options are those of `python -m kvp`. The rise is read on the first calibration samples; scores read all of them, as
in a run, and both are found again in the store. Per method, over the groups that it scores:

    Spearman        of scores and rises, over all groups: what one ranking over all layers can use
    within layers   the mean over layers of the same: what the same number of groups in every layer can use
    least right     layers whose lowest group by score is the one that the loss misses least
    rise            summed over the groups that go at `ratio.value` (0.2) of the KV cache, each alone: with as many
                    from every layer as come out even, the rest as the strategy rounds; with one ranking over all

Writes ranking.json and ranking.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.scripts.chosen import chosen
from kvp.models.masks import masked
from kvp.models.spaces import find_spaces
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_model
from kvp.pipeline.session import Checkpoint, Session
from kvp.pipeline.stages import Planning, make
from kvp.provenance import provenance
from kvp.strategies.signals.losses import losses_without
from kvp.strategies.steps import Score
from kvp.strategies.target import Scores
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.tables import markdown
from kvp.types import Plan, Space

METHODS = (
    "kvpruner strategy.grouping=kv_group",
    "llm_pruner",
    "flap",
    "numerical",
    "wanda_sp",
    "wanda_sp strategy.by_share=false",
    "llm_bip",
    "llm_bip strategy.by_share=false",
    "magnitude strategy.grouping=kv_group",
    "random strategy.grouping=kv_group",
)
WIDTHS = ("strategy.allocator.max_ratio=1.0", "strategy.allocator.multiple_of=1")

log = logging.getLogger(__name__)

Rises = Mapping[Space, Tensor]  # (groups,) nats per token, per layer


def rises(session: Session, samples: int) -> Rises:
    """Return what the loss gains with each KV group removed alone; a stage of the store per sample."""
    x, model = session.x, session.checkpoint("dense")
    groups = [
        (space, group) for space in find_spaces(model.config, ["kv_group"]) for group in range(*space.shape)
    ]
    ids = session.calibration[:samples]
    total = torch.zeros(len(groups), dtype=torch.float64)
    for number, batch in enumerate(ids.split(1), start=1):

        def work(directory: Path, batch: Tensor = batch) -> dict[str, Any]:
            target = session.load(model)
            plans = [Plan({s: torch.tensor([i for i in range(*s.shape) if i != g])}) for s, g in groups]
            removals = [
                (space.layer or 0, partial(masked, target, plan))
                for (space, _), plan in zip(groups, plans, strict=True)
            ]
            base, losses = losses_without(target, [batch], removals, "loss without a group")
            return {"nats_per_token": (losses - base).tolist()}

        decisive = {"model": model.fingerprint, "dtype": str(x.dtype), "ids": batch.tolist()}
        found = x.store.once("ranking", decisive, work).result["nats_per_token"]
        total += torch.tensor(found, dtype=torch.float64) / len(ids)
        log.info("loss without each group: %d of %d samples", number, len(ids))
    shares = total.split([space.shape[0] for space, group in groups if group == 0])
    return dict(zip([space for space, group in groups if group == 0], shares, strict=True))


def agreement(scores: Scores, rise: Rises) -> dict[str, Any]:
    """Return how scores agree with the rises, over the groups that have both."""
    both = {space: (scores[space].double(), rise[space]) for space in rise if space in scores}
    flat = [torch.cat(column) for column in zip(*both.values(), strict=True)]
    layers = [pair for pair in both.values() if len(pair[0]) > 1]
    return {
        "groups": len(flat[0]),
        "spearman": spearman(*flat),
        "within_layers": sum(spearman(*pair) for pair in layers) / len(layers),
        "least_right": sum(int(a.argmin() == b.argmin()) for a, b in layers) / len(layers),
    }


def planned_rise(x: Experiment, model: Checkpoint, scores: Scores, rise: Rises) -> float:
    """The summed rises of the groups that the strategy's plan removes under the budget."""
    assert isinstance(x.strategy, ScoreStrategy)
    plan = x.strategy.plan(model.config, scores, x.budget, torch.zeros(len(rise)))
    gone = {space: set(range(*space.shape)) - set(keep.tolist()) for space, keep in plan.keep.items()}
    return sum(float(rise[space][group]) for space in rise for group in gone.get(space, ()))


def scores_of(x: Experiment) -> Scores:
    """Return the strategy's scores, from its stage of the store."""
    session = Session(x)
    make(session, "dense")
    session.once(Planning(Score()), "pruned")
    return session.values["score"]


def spearman(first: Tensor, second: Tensor) -> float:
    """The correlation of ranks; ties are broken by place."""
    ranks = torch.stack([values.argsort(stable=True).argsort(stable=True) for values in (first, second)])
    return float(torch.corrcoef(ranks.double())[0, 1])


def compare(methods: Sequence[str], samples: int, options: Sequence[str]) -> dict[str, Any]:
    """All methods against the same rises, with the plans of both allocations."""
    common = ["recovery=none", "measure=none", "evaluation=none", "tracker=none", "ratio.value=0.2"]
    x = chosen([*common, "strategy=none", *options])
    x.calibration.check(x.corpora)
    session = Session(x)
    model = make(session, "dense")
    rise = rises(session, samples)
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        name, *own = method.split()
        row = rows[method] = {}
        for allocator in ("uniform", "global"):
            words = [f"strategy={name}", f"strategy/allocator={allocator}", *own, *WIDTHS]
            tried = chosen([*common, *words, *options])
            check_model(tried, model.config)
            scores = scores_of(tried)
            row |= {**agreement(scores, rise), f"rise_{allocator}": planned_rise(tried, model, scores, rise)}
    best = torch.cat(list(rise.values())).sort().values
    count = round(x.budget.value * len(best))
    return {
        "methods": rows,
        "rises": {space.key: values.tolist() for space, values in rise.items()},
        "least_rise": float(best[:count].sum()),
        "removed": count,
        "samples": samples,
        "provenance": {
            **provenance(x.device),
            "command": " ".join(["python -m experiments.scripts.ranking", *sys.argv[1:]]),
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown, best within layers first."""
    agrees = ("groups scored", "Spearman", "within layers", "least right")
    heads = ("method", *agrees, "rise, uniform", "rise, one ranking")
    rows = [
        [
            name,
            str(row["groups"]),
            f"{row['spearman']:.2f}",
            f"{row['within_layers']:.2f}",
            f"{row['least_right']:.0%}",
            f"{row['rise_uniform']:.2f}",
            f"{row['rise_global']:.2f}",
        ]
        for name, row in sorted(result["methods"].items(), key=lambda item: -item[1]["within_layers"])
    ]
    below = (
        f"Rises in nats per token on {result['samples']} calibration samples, summed over the {result['removed']} "
        f"groups that go; the {result['removed']} least of all groups: {result['least_rise']:.2f}."
    )
    return f"{markdown(heads, rows)}\n\n{below}\n"


def main() -> None:
    """Write the table and its numbers, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scripts.ranking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="each with options of its own, after spaces"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/ranking"), metavar="DIR")
    parser.add_argument("options", nargs="*", help="of python -m kvp")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = compare(args.methods.split(","), args.samples, args.options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ranking.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "ranking.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
