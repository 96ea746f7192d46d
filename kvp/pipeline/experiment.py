"""An experiment: the instantiated nodes of a configuration, and its names. `kvp.pipeline.gate` checks it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kvp.data.calibration import Calibration
from kvp.data.corpora import Corpus
from kvp.evaluation.needles import Needles
from kvp.evaluation.perplexity import Perplexity
from kvp.evaluation.zeroshot import ZeroShot
from kvp.identity import chosen_options, named, targets
from kvp.measurement.measure import Measure
from kvp.models.cache_formats import CacheFormat
from kvp.models.load import resolve_device
from kvp.models.sources import ModelSource
from kvp.pipeline.settings import NOT_INPUTS, OPTIONAL, check_places, check_settings
from kvp.pipeline.targets import check_targets, check_trusted
from kvp.plugins import owner
from kvp.recovery.lora import Lora
from kvp.store import Store
from kvp.strategies.base import Strategy
from kvp.strategies.limits import Limit
from kvp.strategies.steps import Asked
from kvp.tracking import Tracker
from kvp.types import Budget

MEANINGS: dict[str, Any] = {  # the class of each node
    "model": ModelSource,
    "strategy": Strategy,
    "ratio": Budget,
    "calibration": Calibration,
    "cache": CacheFormat,
    "recovery": Lora,
    "evaluation.perplexity": Perplexity,
    "evaluation.zero_shot": ZeroShot,
    "evaluation.needles": Needles,
    "measure": Measure,
    "tracker": Tracker,
}


def _built(name: str, node: Any) -> Any:
    """Return the object of a node; None if there is none.

    Raises:
        ValueError: It is of another class, or an option has the wrong type.
    """
    if node is None:
        return None
    try:
        made = instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, TypeError):
            raise ValueError(f"{name} has a value of the wrong type: {cause}") from error
        raise cause from None
    if not isinstance(made, MEANINGS[name]):
        raise ValueError(
            f"{name} must be a {MEANINGS[name].__name__}, got a {type(made).__name__}: choose an option of {name}"
            f"{owner(type(made).__module__)}"
        )
    return made


def _without_presets(config: DictConfig) -> DictConfig:
    """The configuration without what presets add to a choice of none: recovery=none is null, whatever debug= says."""
    chosen = deepcopy(config)
    OmegaConf.set_readonly(chosen, False)
    OmegaConf.set_struct(chosen, False)
    for name in OPTIONAL:
        node = OmegaConf.select(chosen, name)
        if node == "none":  # as where a group is chosen
            node = None
        if not (node is None or OmegaConf.is_dict(node)):
            raise ValueError(f"{name} must be an option of its group or none, got {node!r}: see --help")
        if "_target_" not in (node or {}):
            OmegaConf.update(chosen, name, None)
    if OmegaConf.select(chosen, "evaluation.needles") is None:
        chosen.evaluation.pop(
            "needles", None
        )  # a run without needles keeps the name it had before there were any
    return chosen


@dataclass(frozen=True)
class Experiment:
    """The instantiated nodes of a configuration; nothing of it changes while it runs.

    Attributes:
        node: The resolved configuration, without what changes no number; classes by name.
        choices: The option chosen for each node: {"strategy": "kvpruner", "strategy.allocator": "sensitivity"}.
        place: The store's directory.
        targets: The class or function that each node names: {"strategy": "kvp.strategies.methods.flap.FLAP"}.
        overrides: The words that composed it; None if they are not known.
        config_dir: The folder of the user's own options, if there is one.
        force: Kinds of stages to compute again, and all that builds on them,
        since: where they were finished before this moment (seconds since 1970).
        short_of_memory: Whether to "refuse" a phase that is estimated not to fit, or to "warn" of it.
    """

    node: dict[str, Any]
    choices: dict[str, str]
    targets: dict[str, str]
    source: ModelSource
    corpora: Mapping[str, Corpus]
    strategy: Strategy
    budget: Budget
    calibration: Calibration
    cache: CacheFormat | None
    recovery: Lora | None
    perplexity: Perplexity | None
    zero_shot: ZeroShot | None
    needles: Needles | None
    protocol: Measure | None
    tracker: Tracker
    place: Path
    runs: Path
    device: str
    dtype: torch.dtype
    overrides: Sequence[str] | None = None
    config_dir: str | None = None
    force: Sequence[str] = ()
    since: float = 0.0
    short_of_memory: str = "refuse"

    @classmethod
    def compose(
        cls,
        config: DictConfig,
        overrides: Sequence[str] | None = None,
        choices: Mapping[str, Any] | None = None,
        config_dir: str | None = None,
    ) -> Experiment:
        """Build every node; a value out of range is refused here, before anything is read.

        Args:
            config: What Hydra composed.
            overrides: The words of the command line.
            config_dir: The folder of --config-dir, where the user keeps own options.
            choices: Hydra's `runtime.choices`; by default those in the configuration's own hydra node, if it has one.
        """
        choices = choices or OmegaConf.select(config, "hydra.runtime.choices") or {}
        if rows := config.get("rows"):
            count = len(rows) if OmegaConf.is_list(rows) else 1
            raise ValueError(
                f"this configuration lists {count} rows: sweep over them with python -m kvp -m ..., or choose one: "
                "rows=null and its options"
            )
        chosen = _without_presets(config)
        chosen.pop("hydra", None)
        plain: Any = OmegaConf.to_container(chosen, resolve=True, throw_on_missing=True)
        check_settings(plain)
        store, runs = check_places(plain["store"], plain["runs"])
        check_targets(plain, check_trusted(plain["trusted"], overrides))
        resolved = named(plain)
        node = {key: value for key, value in resolved.items() if key not in NOT_INPUTS}
        built = {name: _built(name, OmegaConf.select(chosen, name)) for name in MEANINGS}
        corpora = instantiate(chosen.corpora, _convert_="all")
        for name, corpus in corpora.items():
            if not isinstance(corpus, Corpus):
                raise ValueError(f"corpora.{name} must be a Corpus with a _target_, got {corpus!r}")
        return cls(
            node=node,
            choices=chosen_options(choices, node),
            targets=targets({key: plain[key] for key in node}),
            source=built["model"],
            corpora=corpora,
            strategy=built["strategy"],
            budget=built["ratio"],
            calibration=built["calibration"],
            cache=built["cache"],
            recovery=built["recovery"],
            perplexity=built["evaluation.perplexity"],
            zero_shot=built["evaluation.zero_shot"],
            needles=built["evaluation.needles"],
            protocol=built["measure"],
            tracker=built["tracker"],
            place=store,
            runs=runs,
            device=resolve_device(plain["device"]),
            dtype=getattr(torch, plain["dtype"]),
            overrides=overrides,
            config_dir=config_dir,
            force=tuple(map(str, plain["force"])),
            since=plain["since"] or time.time(),
            short_of_memory=plain["short_of_memory"],
        )

    @cached_property
    def store(self) -> Store:
        """Return the store; the first use makes its directory."""
        return Store(self.place)

    @property
    def hash(self) -> str:
        """One per configuration: names the run's directory and its W&B run."""
        identity = {"config": self.node, "choices": self.choices}
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Readable, unique with the hash: model-strategy-ratio-cache-recovery-seed-hash; never a path."""
        ratio = (
            "dense" if self.unpruned else f"{self.chosen('strategy')}-{self.budget.of}{self.budget.amount}"
        )
        cache = "" if self.cache is None else f"-{self.chosen('cache')}"
        recovery = self.chosen("recovery")
        name = f"{self.source.name}-{ratio}{cache}-{recovery}-s{self.node['seed']}-{self.hash[:8]}"
        return name.replace("/", "-")  # an option may lie in a folder of its group

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

    def calibration_identity(self) -> dict[str, Any] | None:
        """Return which text the strategy reads; None if it reads none."""
        return self.calibration.identity(self.corpora) if self.reads_calibration else None

    @property
    def asked(self) -> Asked:
        """Return what decides the plan, as data."""
        cache = {"cache": self.node["cache"]} if isinstance(self.budget, Limit) else {}
        return Asked(
            options=self.node["strategy"],
            ratio=self.node["ratio"] | cache,
            calibration=self.calibration_identity(),
            dtype=str(self.dtype),
            seed=self.node["seed"],
        )

    @property
    def directory(self) -> Path:
        """Where the run keeps its record."""
        return self.runs / self.name
