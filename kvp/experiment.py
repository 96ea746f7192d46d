"""An experiment: the instantiated nodes of a configuration, and what all its stages share.

`kvp.run` tells the story, `kvp.steps` does what its sentences say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kvp.data.calibration import Calibration
from kvp.data.corpora import Corpus, find
from kvp.evaluation.perplexity import Perplexity
from kvp.evaluation.zeroshot import ZeroShot
from kvp.measurement.measure import Measure
from kvp.models.load import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from kvp.recovery.lora import Lora
from kvp.stage import Stage, Store
from kvp.strategies.base import Strategy, Target
from kvp.strategies.none import NoPruning
from kvp.tracking import Tracker
from kvp.types import Budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

VERSIONS = {  # raised in the commit that changes a stage's numbers
    "model": 1,
    "score": 1,
    "sensitivity": 1,
    "prune": 1,
    "recover": 1,
    "perplexity": 1,
    "zero_shot": 1,
    "measure": 1,
}
NOT_INPUTS = ("store", "runs", "tracker", "hydra")  # where results go, not what they are

Record = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory, and the fingerprint of what made it."""

    path: Path
    fingerprint: str

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its config; no weights are read."""
        return load_config(self.path)


@lru_cache(maxsize=1)
def _loaded(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return load_model(path, dtype=dtype, device=device)


@dataclass
class Experiment:
    """The instantiated nodes of a configuration, the stages run so far, and the model in memory."""

    node: dict[str, Any]
    source: ModelSource
    corpora: Mapping[str, Corpus]
    strategy: Strategy
    budget: Budget
    calibration: Calibration
    recovery: Lora | None
    perplexity: Perplexity | None
    zero_shot: ZeroShot | None
    protocol: Measure | None
    tracker: Tracker
    store: Store
    runs: Path
    device: str
    dtype: torch.dtype
    stages: list[Stage] = field(default_factory=list)
    profile: list[float] | None = None
    recovery_result: Record | None = None
    losses: list[Record] = field(default_factory=list)

    @classmethod
    def compose(cls, config: DictConfig) -> Experiment:
        """Build every node; a value out of range is refused here, before anything is read."""

        def build(name: str) -> Any:
            node = OmegaConf.select(config, name)
            if node is None or "_target_" not in node:  # measure=none, or what a preset adds to it
                return None
            try:
                return instantiate(node, _convert_="all")
            except InstantiationException as error:
                if isinstance(error.__cause__, TypeError):
                    raise ValueError(f"{name} has a value of the wrong type: {error.__cause__}") from error
                raise

        node = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(node, dict)
        source, device = build("model"), resolve_device(config.device)
        return cls(
            node={str(key): value for key, value in node.items() if key not in NOT_INPUTS},
            source=source,
            corpora=instantiate(config.corpora, _convert_="all"),
            strategy=build("strategy"),
            budget=build("ratio"),
            calibration=build("calibration"),
            recovery=build("recovery"),
            perplexity=build("evaluation.perplexity"),
            zero_shot=build("evaluation.zero_shot"),
            protocol=build("measure"),
            tracker=build("tracker"),
            store=Store(Path(config.store)),
            runs=Path(config.runs).absolute(),
            device=device,
            dtype=getattr(torch, config.dtype),
        )

    @property
    def hash(self) -> str:
        """One per configuration: names the run's directory and its W&B run."""
        return sha256(json.dumps(self.node, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Readable, unique with the hash: model-strategy-ratio-recovery-seed-hash."""
        strategy = type(self.strategy).__name__.lower()
        ratio = "dense" if self.unpruned else f"{strategy}-{self.budget.of}{self.budget.value:g}"
        recovery = "none" if self.recovery is None else type(self.recovery).__name__.lower()
        return f"{self.source.name}-{ratio}-{recovery}-s{self.node['seed']}-{self.hash[:8]}"

    @property
    def group(self) -> str:
        """Runs of one model and strategy belong together in a tracker."""
        return f"{self.source.name}-{type(self.strategy).__name__.lower()}"

    @property
    def unpruned(self) -> bool:
        """Whether the pruned model is the dense one."""
        return isinstance(self.strategy, NoPruning)

    def check_sources(self) -> None:
        """Refuse missing data before anything expensive."""
        if self.strategy.needs_calibration:
            self.calibration.check(self.corpora)
        if self.recovery is not None:
            self.recovery.check(self.corpora)
        for name in self.perplexity.corpora if self.perplexity else ():
            assert self.perplexity is not None
            find(self.corpora, name).check(self.perplexity.part)
        if self.zero_shot is not None:
            self.zero_shot.check()

    def check_model(self, config: PretrainedConfig) -> None:
        """Refuse a budget, a space or a protocol that this model cannot offer; reads no weights."""
        self.strategy.check(config, self.budget)
        if self.protocol is not None:
            self.protocol.check_positions(config.max_position_embeddings)

    def once(
        self, name: str, kind: str, inputs: Mapping[str, Any], work: Any, *, resumable: bool = False
    ) -> Stage:
        """Run a stage or find it finished, and note it for the record."""
        stage = self.store.once(name, inputs, work, version=VERSIONS[kind], resumable=resumable)
        log.info("%s %s (%.1f s)", stage.name, "found" if stage.found else "computed", stage.seconds)
        self.stages.append(stage)
        return stage

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The model of a checkpoint; the last one stays in memory."""
        return _loaded(checkpoint.path, self.dtype, self.device)

    @staticmethod
    def unload() -> None:
        """Let go of the model in memory, before another process or the Trainer loads its own."""
        _loaded.cache_clear()

    def target(self, dense: Checkpoint) -> Target:
        """What the strategy may look at."""
        calibration = self.sample(dense) if self.strategy.needs_calibration else None
        return Target(self.load(dense), calibration, self.calibration.batch_size, self.node["seed"])

    def sample(self, dense: Checkpoint) -> Tensor:
        """(num_samples, length) calibration ids."""
        return self.calibration.sample(self.corpora, load_tokenizer(dense.path))

    def calibration_identity(self) -> dict[str, Any] | None:
        """Which text the strategy reads, None if it reads none."""
        return self.calibration.identity(self.corpora) if self.strategy.needs_calibration else None

    def calibration_facts(self, dense: Checkpoint) -> dict[str, Any]:
        """The hash of the calibration ids."""
        if not self.strategy.needs_calibration:
            return {}
        return {"calibration_hash": sha256(self.sample(dense).numpy().tobytes()).hexdigest()}
