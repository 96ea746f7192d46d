"""An experiment: the instantiated nodes of a configuration, its names, and what can be refused before it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kvp.data.calibration import Calibration
from kvp.data.corpora import Corpus, find
from kvp.evaluation.perplexity import Perplexity
from kvp.evaluation.zeroshot import ZeroShot
from kvp.identity import chosen_options, named, targets
from kvp.measurement.measure import Measure
from kvp.models.load import resolve_device
from kvp.models.mustafar import Mustafar
from kvp.models.shapes import require_whole_stream
from kvp.models.sources import ModelSource
from kvp.recovery.lora import Lora
from kvp.store import Store
from kvp.strategies.base import Strategy
from kvp.strategies.steps import Asked
from kvp.tracking import Tracker
from kvp.types import Budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Where results go and when they are made, not what they are.
NOT_INPUTS = ("store", "runs", "tracker", "hydra", "rows", "force", "since")
OPTIONAL = ("cache", "recovery", "measure", "evaluation.perplexity", "evaluation.zero_shot")  # may be none


def _listed(force: Any) -> tuple[str, ...]:
    if not OmegaConf.is_list(force):
        raise ValueError(f"force must be a list of stages to compute again, such as [prune], got {force}")
    return tuple(map(str, force))


def _without_presets(config: DictConfig) -> DictConfig:
    """The configuration without what presets add to a choice of none: recovery=none is null, whatever debug= says."""
    chosen = deepcopy(config)
    OmegaConf.set_readonly(chosen, False)
    OmegaConf.set_struct(chosen, False)
    for name in OPTIONAL:
        if "_target_" not in (OmegaConf.select(chosen, name) or {}):
            OmegaConf.update(chosen, name, None)
    return chosen


@dataclass(frozen=True)
class Experiment:
    """The instantiated nodes of a configuration; nothing of it changes while it runs.

    Attributes:
        node: The resolved configuration, without what changes no number; classes by name.
        choices: The option chosen for each node: {"strategy": "kvpruner", "strategy.allocator": "sensitivity"}.
        targets: The class or function that each node names: {"strategy": "kvp.strategies.methods.flap.FLAP"}.
        overrides: The words that composed it; None if they are not known.
        force: Kinds of stages to compute again, and all that builds on them,
        since: where they were finished before this moment (seconds since 1970).
    """

    node: dict[str, Any]
    choices: dict[str, str]
    targets: dict[str, str]
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
        resolved: Any = OmegaConf.to_container(chosen, resolve=True, throw_on_missing=True)
        node = {key: named(value) for key, value in resolved.items() if key not in NOT_INPUTS}
        source, device = build("model"), resolve_device(config.device)
        return cls(
            node=node,
            choices=chosen_options(choices, node),
            targets=targets({key: resolved[key] for key in node}),
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
            force=_listed(config.force),
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

    def named(self, *nodes: str) -> tuple[str, ...]:
        """Return the classes and functions that some nodes of the configuration name, by dotted name."""
        under = tuple(f"{node}." for node in nodes)
        return tuple(name for node, name in self.targets.items() if f"{node}.".startswith(under))

    def chosen(self, node: str) -> str:
        """Return what a reader calls a node: the option chosen for it, else its class, "none" if there is none."""
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
        return not self.strategy.prunes

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

    def calibration_identity(self) -> dict[str, Any] | None:
        """Return which text the strategy reads; None if it reads none."""
        return self.calibration.identity(self.corpora) if self.reads_calibration else None

    @property
    def asked(self) -> Asked:
        """Return what decides the plan, as data."""
        return Asked(
            options=self.node["strategy"],
            ratio=self.node["ratio"],
            calibration=self.calibration_identity(),
            dtype=str(self.dtype),
            seed=self.node["seed"],
        )

    @property
    def directory(self) -> Path:
        """Where the run keeps its record."""
        return self.runs / self.name
