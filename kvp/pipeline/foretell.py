"""The stages of a run from their fingerprints, before any of them is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvp.pipeline import inputs
from kvp.pipeline.experiment import VERSIONS, Experiment
from kvp.store import fingerprint


@dataclass(frozen=True)
class Foretold:
    """A stage of a run: its kind, its fingerprint, whether it is there."""

    name: str
    kind: str
    fingerprint: str
    stands: bool


def foretell(x: Experiment) -> tuple[list[Foretold], Path]:
    """The stages of a run in their order, and where its dense model is or will be; computes none.

    Raises:
        OSError, ValueError: The model or a text is not to be had.
    """
    chain: list[Foretold] = []

    def stage(name: str, kind: str, given: Mapping[str, Any]) -> str:
        digest = fingerprint(name, VERSIONS[kind], given)
        forced = x.is_forced(kind, given)
        if forced:
            x.forced.add(digest)
        stands = x.store.stands(name, digest, x.since if forced else None)
        chain.append(Foretold(name, kind, digest, stands))
        return digest

    def examine(model: str) -> None:
        if x.strategy.sparsifies:
            stage("sparsity", "sparsity", inputs.sparsity(model))
        for name in x.perplexity.corpora if x.perplexity else ():
            stage(f"evaluate/perplexity/{name}", "perplexity", inputs.perplexity(x, model, name))
        for task in x.zero_shot.tasks if x.zero_shot else ():
            stage(f"evaluate/zero_shot/{task}", "zero_shot", inputs.zero_shot(x, model, task))
        if x.protocol:
            stage("measure", "measure", inputs.measure(x, model))

    identity, located = x.source.identity(), x.source.locate()
    if located:
        dense, directory = inputs.identity_hash(identity), located
    else:
        dense = stage("model", "model", inputs.model(x, identity))
        directory = x.store.root / "model" / dense[:16]
    examine(dense)
    pruned = dense
    if not x.untouched:
        whole = stage("join", "join", inputs.join(x, dense)) if x.strategy.joins else dense
        scored = stage("score", "score", inputs.score(x, whole))
        given = inputs.sensitivity(x, whole, scored) if x.strategy.probes else None
        sensed = stage("sensitivity", "sensitivity", given) if given else None
        given = inputs.search(x, whole, scored, sensed) if x.strategy.searches else None
        found = stage("search", "search", given) if given else None
        pruned = stage("prune", "prune", inputs.prune(x, whole, scored, sensed, found))
        examine(pruned)
    if x.recovery:
        examine(stage("recover", "recover", inputs.recover(x, dense, pruned)))
    return chain, directory
