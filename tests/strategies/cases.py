"""A case of every option of conf/strategy: the YAML, with what makes it small enough for a tiny model.

A case is the words that follow `strategy=` on a command line; words in other groups carry their group. A new YAML
needs a line in `CUTS` if its plan keeps indices, in `ZEROS` if it zeroes single weights, else in `OTHERS`. A case of
`CUTS` or `ZEROS` is held to its contract, and each of the three to its golden plan.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from kvp.__main__ import CONF
from kvp.strategies.base import Strategy
from kvp.strategies.target import Target
from kvp.types import Budget

OPTIONS = sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))
BUDGET = Budget(value=0.25, of="kv_cache", tolerance=0.15)
NARROW = "strategy.allocator.multiple_of=2"
FOLDED = "strategy.context=40 strategy.angle=0.9"
BARE = "strategy.protect_first=0 strategy.protect_last=0"

CUTS = {
    "kvpruner": f"kvpruner {NARROW}",
    "kvpruner_partial_probe": f"kvpruner {NARROW} strategy.allocator.probe=partial strategy.allocator.epsilon=0.001",
    "kvpruner_coupled": f"kvpruner strategy/allocator=uniform {NARROW} strategy.grouping=coupled",
    "kvpruner_layer": f"kvpruner strategy/allocator=global {NARROW} strategy.scope=layer",
    "kvpruner_model": f"kvpruner_stock {NARROW} strategy.importance=second_order",
    "kvpruner_groups": "kvpruner strategy.grouping=kv_group strategy.importance=mixed",
    "kvpruner_vo": f"kvpruner strategy/allocator=uniform {NARROW} strategy.grouping=vo strategy.importance=activation",
    "kvpruner_plus": f"kvpruner_plus {NARROW} {FOLDED}",
    "kvpruner_plus_stock": f"kvpruner_plus_stock {NARROW} {FOLDED} strategy.importance=taylor_gate",
    "kvpruner_plus_joined": f"kvpruner_plus {NARROW} {FOLDED} strategy.num_key_value_heads=1",
    "kvpruner_plus_mla": f"kvpruner_plus_mla {NARROW} strategy.context=null",
    "mha2mla": f"mha2mla {NARROW} strategy.qk_rope_head_dim=4",
    "mha2mla_high": f"mha2mla {NARROW} strategy.qk_rope_head_dim=4 strategy.selection=high",
    "transmla": f"transmla {NARROW} strategy.qk_rope_head_dim=8",
    "olica": f"olica {NARROW}",
    "kvpruner_plus_vo": f"kvpruner_plus strategy/allocator=uniform {NARROW} strategy.grouping=vo",
    "clover": f"clover {NARROW}",
    "palu": f"palu {NARROW}",
    "palu_heads": f"palu {NARROW} strategy.key_heads=2 strategy.value_heads=1 strategy.damping=0.01",
    "care": f"care {NARROW}",
    "care_uniform": f"care strategy/allocator=uniform {NARROW}",
    "svd_llm_v2": f"svd_llm_v2 {NARROW}",
    "recalkv": f"recalkv {NARROW} strategy.key_heads=2",
    "random": f"random {NARROW}",
    "magnitude": f"magnitude {NARROW} strategy.norm=l1",
    "shortened_llm": f"shortened_llm {BARE}",
    "shortened_llm_taylor": "shortened_llm strategy.protect_first=1 strategy.protect_last=0 strategy.criterion=taylor",
    "shortened_llm_magnitude": "shortened_llm strategy.protect_first=0 strategy.protect_last=1 "
    "strategy.criterion=magnitude",
    "shortgpt": "shortgpt",
    "sleb": f"sleb {BARE}",
    "flap": "flap",
    "numerical": "numerical",
    "wanda_sp": "wanda_sp",
    "adapruner": f"adapruner {BARE} strategy.trials=6 strategy.parts=2",
    "llm_pruner": "llm_pruner strategy.protect_first=0 strategy.protect_last=1",
    "llm_pruner_threshold": f"llm_pruner strategy/allocator=threshold {BARE} strategy.importance=second_order "
    "strategy.group_reduction=prod",
    "llm_pruner_steps": f"llm_pruner {BARE} strategy.iterative_steps=2",
    "think": f"think {NARROW} strategy.window=8",
    "llm_bip": "llm_bip",
    "nirvana": "nirvana strategy.allocator.multiple_of=1 strategy.draws=2",
    "regrow": "regrow strategy.first.allocator.multiple_of=2 strategy.first.norm=l1 strategy.growth=0.3",
    "search_llm": f"search_llm {NARROW} strategy.allocator.max_ratio=0.75 strategy.evolution.generations=2 "
    "strategy.evolution.population=5 strategy.evolution.parents=2 strategy.evolution.mutated=2 "
    "strategy.evolution.crossed=2",
}
ZEROS = {
    "magnitude_sparse": "magnitude_sparse",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt strategy.block_size=16",
    "alps": "alps strategy.max_steps=30",
    "mosaic": "mosaic strategy.block_size=16 strategy.outlier=2.0",
}
OTHERS = {
    "none": "none",
    "chain": "chain strategy.first.allocator.multiple_of=2 strategy.second.block_size=16",
    "mosaic_composite": "mosaic_composite strategy.second.block_size=16 strategy.second.outlier=2.0",
    "slicegpt": "slicegpt",
}
CASES = {**CUTS, **ZEROS, **OTHERS}


@cache
def strategy(name: str) -> Strategy:
    return composed(CASES[name])


def composed(words: str, widths: str = "method") -> Strategy:
    option, *overrides = words.split()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(None, [f"+strategy={option}", f"+widths={widths}", *overrides]).strategy
    return instantiate(node, _convert_="all")


def make_plan(strategy: Strategy, model, budget: Budget = BUDGET):
    """The plan that a run would make, on random calibration data."""
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(6))
    target = Target(model, ids if strategy.needs_calibration else None, batch_size=2, seed=1)
    scores = strategy.score(target)
    profile = strategy.sensitivity(target, scores) if strategy.probes else torch.zeros(3)
    with TemporaryDirectory() as directory:
        return strategy.search(target, scores, budget, profile, Path(directory))


def whole(strategy: Strategy, model):
    """The model as the strategy finds it: with KV heads joined or latents, if it asks for that."""
    return strategy.recast(model)
