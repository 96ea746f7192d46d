"""An experiment: the instantiated nodes of a configuration, and what all its stages share.

`kvp.pipeline.run` tells the story, `kvp.pipeline.stages` does what its sentences say.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
from kvp.identity import chosen_options, named
from kvp.measurement.measure import Measure
from kvp.models.load import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from kvp.models.mustafar import Mustafar
from kvp.models.shapes import require_whole_stream
from kvp.recovery.lora import Lora
from kvp.store import Stage, Store
from kvp.strategies.base import Strategy
from kvp.strategies.methods.none import NoPruning
from kvp.strategies.target import Target
from kvp.tracking import Tracker
from kvp.types import Budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

VERSIONS = {  # raised in the commit that changes a stage's numbers
    "model": 1,
    "join": 1,
    "score": 1,
    "sensitivity": 1,
    "search": 2,
    "prune": 1,
    "recover": 1,
    "sparsity": 1,
    "perplexity": 1,
    "zero_shot": 1,
    "measure": 1,
}
# Where results go and when they are made, not what they are.
NOT_INPUTS = ("store", "runs", "tracker", "hydra", "rows", "force", "since")
OPTIONAL = ("cache", "recovery", "measure", "evaluation.perplexity", "evaluation.zero_shot")  # may be none

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


def _kinds(force: Any) -> tuple[str, ...]:
    unknown = [str(kind) for kind in force if kind not in VERSIONS] if OmegaConf.is_list(force) else [force]
    if unknown:
        raise ValueError(
            f"force is a list of stages to compute again, such as [prune], of {', '.join(VERSIONS)}; got "
            f"{', '.join(unknown)}"
        )
    return tuple(force)


def _without_presets(config: DictConfig) -> DictConfig:
    """The configuration without what presets add to a choice of none: recovery=none is null, whatever debug= says."""
    chosen = deepcopy(config)
    OmegaConf.set_readonly(chosen, False)
    OmegaConf.set_struct(chosen, False)
    for name in OPTIONAL:
        if "_target_" not in (OmegaConf.select(chosen, name) or {}):
            OmegaConf.update(chosen, name, None)
    return chosen


@lru_cache(maxsize=1)
def _loaded(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return load_model(path, dtype=dtype, device=device)


@dataclass
class Experiment:
    """The instantiated nodes of a configuration, the stages run so far, and the model in memory.

    Attributes:
        node: The resolved configuration, without what changes no number; classes by name.
        choices: The option chosen for each node: {"strategy": "kvpruner", "strategy.allocator": "sensitivity"}.
        overrides: The words that composed it; None if they are not known.
        force: Kinds of stages to compute again, and what follows from them,
        since: where they were finished before this moment (seconds since 1970).
        forced: Fingerprints of those met so far.
        watch: Told the name of each stage before it is computed or found.
    """

    node: dict[str, Any]
    choices: dict[str, str]
    source: ModelSource
    corpora: Mapping[str, Corpus]
    strategy: Strategy
    budget: Budget
    calibration: Calibration
    cache: Mustafar | None
    recovery: Lora | None
    perplexity: Perplexity | None
    zero_shot: ZeroShot | None
    protocol: Measure | None
    tracker: Tracker
    store: Store
    runs: Path
    device: str
    dtype: torch.dtype
    overrides: Sequence[str] | None = None
    force: Sequence[str] = ()
    since: float = 0.0
    forced: set[str] = field(default_factory=set)
    watch: Callable[[str], None] = lambda stage: None
    stages: list[Stage] = field(default_factory=list)
    profile: list[float] | None = None
    recovery_result: Record | None = None
    losses: list[Record] = field(default_factory=list)

    @classmethod
    def compose(
        cls,
        config: DictConfig,
        overrides: Sequence[str] | None = None,
        choices: Mapping[str, Any] | None = None,
    ) -> Experiment:
        """Build every node; a value out of range is refused here, before anything is read.

        Args:
            config: What Hydra composed.
            overrides: The words of the command line.
            choices: Hydra's `runtime.choices`; by default those in the configuration's own hydra node, if it has one.
        """
        choices = choices or OmegaConf.select(config, "hydra.runtime.choices") or {}
        if config.rows:
            raise ValueError(
                f"this configuration lists {len(config.rows)} rows: sweep over them with python -m kvp -m "
                "..., or choose one: rows=null and its options"
            )

        def build(name: str) -> Any:
            if (node := OmegaConf.select(chosen, name)) is None:
                return None
            try:
                return instantiate(node, _convert_="all")
            except InstantiationException as error:
                if isinstance(error.__cause__, TypeError):
                    raise ValueError(f"{name} has a value of the wrong type: {error.__cause__}") from error
                raise

        chosen = _without_presets(config)
        OmegaConf.set_struct(chosen, False)
        chosen.pop("hydra", None)
        resolved = named(OmegaConf.to_container(chosen, resolve=True, throw_on_missing=True))
        node = {key: value for key, value in resolved.items() if key not in NOT_INPUTS}
        source, device = build("model"), resolve_device(config.device)
        return cls(
            node=node,
            choices=chosen_options(choices, node),
            source=source,
            corpora=instantiate(config.corpora, _convert_="all"),
            strategy=build("strategy"),
            budget=build("ratio"),
            calibration=build("calibration"),
            cache=build("cache"),
            recovery=build("recovery"),
            perplexity=build("evaluation.perplexity"),
            zero_shot=build("evaluation.zero_shot"),
            protocol=build("measure"),
            tracker=build("tracker"),
            store=Store(Path(config.store)),
            runs=Path(config.runs).absolute(),
            device=device,
            dtype=getattr(torch, config.dtype),
            overrides=overrides,
            force=_kinds(config.force),
            since=config.since or time.time(),
        )

    @property
    def hash(self) -> str:
        """One per configuration: names the run's directory and its W&B run."""
        identity = {"config": self.node, "choices": self.choices}
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Readable, unique with the hash: model-strategy-ratio-cache-recovery-seed-hash."""
        ratio = (
            "dense" if self.unpruned else f"{self.chosen('strategy')}-{self.budget.of}{self.budget.value:g}"
        )
        cache = "" if self.cache is None else f"-{self.chosen('cache')}"
        recovery = self.chosen("recovery")
        return f"{self.source.name}-{ratio}{cache}-{recovery}-s{self.node['seed']}-{self.hash[:8]}"

    def chosen(self, node: str) -> str:
        """What a reader calls a node: the option chosen for it, else its class, "none" if there is none."""
        value = self.node[node]
        return "none" if value is None else self.choices.get(node) or value["class"].lower()

    @property
    def group(self) -> str:
        """The tracker's; if it names none, runs of one model and strategy belong together."""
        own = f"{self.source.name}-{self.chosen('strategy')}"
        return getattr(self.tracker, "group", None) or own

    @property
    def unpruned(self) -> bool:
        """Whether the pruned model has the weights of the dense one."""
        return isinstance(self.strategy, NoPruning)

    @property
    def untouched(self) -> bool:
        """Whether the pruned model is the dense one, its cache too."""
        return self.unpruned and self.cache is None

    @property
    def reads_calibration(self) -> bool:
        """Whether pruning looks at calibration text."""
        return self.strategy.needs_calibration or self.strategy.compensation is not None

    def check_sources(self) -> None:
        """Refuse missing data before anything expensive."""
        if self.reads_calibration:
            self.calibration.check(self.corpora)
        if self.recovery is not None:
            self.recovery.check(self.corpora, self.device)
        for name in self.perplexity.corpora if self.perplexity else ():
            assert self.perplexity is not None
            find(self.corpora, name).check(self.perplexity.part)
        if self.zero_shot is not None:
            self.zero_shot.check()

    def check_model(self, config: PretrainedConfig) -> None:
        """Refuse a budget, a space or a protocol that this model cannot offer; reads no weights."""
        if not self.unpruned:
            require_whole_stream(config)
        self.strategy.check(config, self.budget)
        if self.recovery is not None and self.strategy.sparsifies and not self.recovery.keep_zeros:
            raise ValueError(
                "LoRA's update is dense: merged into the weights, it leaves none of this strategy's zeros. Choose "
                "recovery=none, or recovery.keep_zeros=true to drop the update where the weight is zero"
            )
        distillation = self.recovery and self.recovery.distillation
        if self.unpruned and distillation and not distillation.text_weight:
            raise ValueError(
                "the dense model has nothing to learn from itself alone: set recovery.distillation.text_weight above "
                "0, or choose recovery/distillation=none for the control"
            )
        if self.protocol is not None:
            self.protocol.check_positions(config.max_position_embeddings)
        if cache := self.cache or Mustafar.of(config):
            cache.check(config)
            self._check_decoding(cache)

    def _check_decoding(self, cache: Mustafar) -> None:
        """Refuse numbers that a sparse cache would have no part in."""
        if self.zero_shot is not None:
            raise ValueError(
                "zero-shot tasks are scored in one forward pass, which reads no cache: their accuracy would be "
                "that of the dense cache. Choose evaluation.zero_shot=null, or cache=none"
            )
        decoded = {"evaluation.perplexity.window": self.perplexity.window} if self.perplexity else {}
        if protocol := self.protocol:
            decoded["measure.prompt_length + measure.new_tokens"] = (
                protocol.prompt_length + protocol.new_tokens
            )
        for name, tokens in decoded.items():
            if tokens < cache.window + 3:  # the first token out of the window is read two predictions later
                raise ValueError(
                    f"{name} must be >= {cache.window + 3}, got {tokens}: cache.window={cache.window} would keep "
                    "all of these tokens whole"
                )

    def once(
        self, name: str, kind: str, inputs: Mapping[str, Any], work: Any, *, resumable: bool = False
    ) -> Stage:
        """Run a stage or find it finished, and note it for the record."""
        self.watch(name)
        since = self.since if self.is_forced(kind, inputs) else None
        version = VERSIONS[kind]
        stage = self.store.once(name, inputs, work, version=version, resumable=resumable, since=since)
        if since:
            self.forced.add(stage.fingerprint)
        log.info("%s %s (%.1f s)", stage.name, "found" if stage.found else "computed", stage.seconds)
        self.stages.append(stage)
        return stage

    def is_forced(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Whether `force` names the kind of a stage, or of one whose fingerprint is among its inputs."""
        return kind in self.force or any(parent in json.dumps(inputs) for parent in self.forced)

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The model of a checkpoint; the last one stays in memory."""
        return _loaded(checkpoint.path, self.dtype, self.device)

    @staticmethod
    def unload() -> None:
        """Let go of the model in memory, before another process or the Trainer loads its own."""
        _loaded.cache_clear()

    def target(self, dense: Checkpoint) -> Target:
        """What the strategy may look at."""
        calibration = self.sample(dense) if self.reads_calibration else None
        return Target(self.load(dense), calibration, self.calibration.batch_size, self.node["seed"])

    def sample(self, dense: Checkpoint) -> Tensor:
        """(num_samples, length) calibration ids."""
        return self.calibration.sample(self.corpora, load_tokenizer(dense.path))

    def calibration_identity(self) -> dict[str, Any] | None:
        """Which text the strategy reads, None if it reads none."""
        return self.calibration.identity(self.corpora) if self.reads_calibration else None

    def calibration_facts(self, dense: Checkpoint) -> dict[str, Any]:
        """The hash of the calibration ids."""
        if not self.reads_calibration:
            return {}
        return {"calibration_hash": sha256(self.sample(dense).numpy().tobytes()).hexdigest()}
