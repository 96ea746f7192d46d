"""An experiment: the instantiated nodes of a configuration, and one method per stage.

Every stage is named by a fingerprint of everything that decides its result; one that is there already
is found, not computed. `kvp.run` tells the story; here is what each of its sentences does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvp.data.calibration import Calibration
from kvp.data.corpora import Corpus, find
from kvp.evaluation.perplexity import Perplexity
from kvp.evaluation.zeroshot import ZeroShot, average
from kvp.measurement.measure import Measure
from kvp.models.load import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from kvp.models.load import save as save_checkpoint
from kvp.models.plans import read_scores, write_plan, write_scores
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.provenance import provenance
from kvp.recovery.lora import Lora
from kvp.stage import Stage, Store
from kvp.strategies.base import Scores, Strategy, Target
from kvp.strategies.none import NoPruning
from kvp.tracking import Tracker
from kvp.types import Budget, Plan

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
    """The instantiated nodes of a configuration, and one method per stage."""

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

    def load(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model of a checkpoint; the last one stays in memory."""
        return _loaded(checkpoint.path, dtype or self.dtype, self.device)

    def dense(self) -> Checkpoint:
        """The model to prune, as a Hugging Face directory."""
        identity = self.source.identity()
        if located := self.source.locate():
            return Checkpoint(located, sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest())
        stage = self.once(
            "model",
            "model",
            {"node": self._without(self.node["model"], "dtype", "name")} | {"identity": identity},
            self.source.write,
        )
        return Checkpoint(stage.path, stage.fingerprint)

    def score(self, dense: Checkpoint) -> tuple[Stage, Scores]:
        """Local importance of every unit; knows neither budget nor allocator."""
        inputs = {
            "model": dense.fingerprint,
            "dtype": str(self.dtype),
            "strategy": self._without(self.node["strategy"], *self.strategy.late),
            "calibration": self._calibration_identity(),
            "seed": self.node["seed"],
        }

        def work(directory: Path) -> dict[str, Any]:
            scores = self.strategy.score(self.target(dense))
            write_scores(directory / "scores.safetensors", scores)
            return {"spaces": len(scores), **self._calibration_facts(dense)}

        stage = self.once("score", "score", inputs, work)
        return stage, read_scores(stage.path / "scores.safetensors")

    def sensitivity(self, dense: Checkpoint, scored: Stage, scores: Scores) -> Stage | None:
        """Phase A of KVPruner: what the loss loses with each block's KV. None if nobody asks."""
        if not self.strategy.probes:
            return None
        inputs = {
            "model": dense.fingerprint,
            "dtype": str(self.dtype),
            "calibration": self._calibration_identity(),
            "probe": self.strategy.probe_inputs(scored.fingerprint),
        }

        def work(directory: Path) -> dict[str, Any]:
            return {"nats_per_token": self.strategy.sensitivity(self.target(dense), scores).tolist()}

        return self.once("sensitivity", "sensitivity", inputs, work)

    def prune(self, dense: Checkpoint) -> Checkpoint:
        """Score, allocate the budget, cut."""
        if self.unpruned:
            return dense
        scored, scores = self.score(dense)
        sensed = self.sensitivity(dense, scored, scores)
        inputs = {
            "model": dense.fingerprint,
            "score": scored.fingerprint,
            "sensitivity": sensed.fingerprint if sensed else None,
            "strategy": self.node["strategy"],
            "budget": self.node["ratio"],
        }
        profile = self.profile = sensed.result["nats_per_token"] if sensed else None

        def work(directory: Path) -> dict[str, Any]:
            blank = torch.zeros(len(layer_shapes(dense.config)))
            plan = self.strategy.plan(
                dense.config, scores, self.budget, torch.tensor(profile) if profile else blank
            )
            write_plan(directory, plan)
            self._cut(dense, plan, directory / "model")
            return {"kept": {space.key: list(keep.shape) for space, keep in plan.keep.items()}}

        stage = self.once("prune", "prune", inputs, work)
        return Checkpoint(stage.path / "model", stage.fingerprint)

    def _cut(self, dense: Checkpoint, plan: Plan, directory: Path) -> None:
        stored = load_model(
            dense.path,
            dtype=resolve_dtype(str(dense.config.dtype).removeprefix("torch."), "cpu"),
            device="cpu",
        )
        save_checkpoint(apply(stored, plan), load_tokenizer(dense.path), directory)

    def recover(self, pruned: Checkpoint) -> Checkpoint | None:
        """LoRA on the pruned model, merged."""
        recovery = self.recovery
        if recovery is None:
            return None
        inputs = {
            "model": pruned.fingerprint,
            "recovery": recovery.identity(self.corpora),
            "seed": self.node["seed"],
        }

        def work(directory: Path) -> dict[str, Any]:
            _loaded.cache_clear()
            return recovery.recover(
                pruned.path, directory, corpora=self.corpora, seed=self.node["seed"], device=self.device
            )

        stage = self.once("recover", "recover", inputs, work, resumable=True)
        self.recovery_result = stage.result
        self.losses = [json.loads(line) for line in (stage.path / "losses.jsonl").read_text().splitlines()]
        return Checkpoint(stage.path / "model", stage.fingerprint)

    def evaluate(self, checkpoint: Checkpoint) -> Record:
        """Perplexity per corpus and accuracy per task, each a stage of its own."""
        perplexity = {
            name: self._perplexity(checkpoint, name)
            for name in (self.perplexity.corpora if self.perplexity else ())
        }
        tasks = {
            name: self._zero_shot(checkpoint, name)
            for name in (self.zero_shot.tasks if self.zero_shot else ())
        }
        return {
            "perplexity": perplexity,
            "zero_shot": {**tasks, "average": average(tasks) if tasks else None},
        }

    def _perplexity(self, checkpoint: Checkpoint, name: str) -> Record:
        perplexity, corpus = self.perplexity, find(self.corpora, name)
        assert perplexity is not None
        identity = corpus.identity(perplexity.part)
        inputs = {
            "model": checkpoint.fingerprint,
            "dtype": str(self.dtype),
            "protocol": self._without(asdict(perplexity), "corpora"),
            "corpus": identity,
        }

        def work(directory: Path) -> dict[str, Any]:
            return perplexity.evaluate(self.load(checkpoint), load_tokenizer(checkpoint.path), corpus)

        stage = self.once(f"evaluate/perplexity/{name}", "perplexity", inputs, work)
        return {**stage.result, "dtype": str(self.dtype), "overlap": self.overlap(identity)}

    def _zero_shot(self, checkpoint: Checkpoint, task: str) -> Record:
        zero_shot = self.zero_shot
        assert zero_shot is not None
        inputs = {
            "model": checkpoint.fingerprint,
            "dtype": str(self.dtype),
            "protocol": self._without(asdict(zero_shot), "tasks"),
            "task": task,
        }

        def work(directory: Path) -> dict[str, Any]:
            return zero_shot.evaluate(self.load(checkpoint), load_tokenizer(checkpoint.path), task)

        return {
            **self.once(f"evaluate/zero_shot/{task}", "zero_shot", inputs, work).result,
            "dtype": str(self.dtype),
        }

    def overlap(self, evaluated: Mapping[str, Any]) -> dict[str, str]:
        """Whether calibration or recovery read the evaluated text: "none", "same corpus", "same text"."""
        read = {
            "calibration": (self._calibration_identity() or {}).get("corpora", [])
            if not self.unpruned
            else [],
            "recovery": self.recovery.data.identity(self.corpora).get("corpora", []) if self.recovery else [],
        }

        def kind(other: Mapping[str, Any]) -> int:
            return 2 if other == evaluated else int(other["name"] == evaluated["name"])

        names = ("none", "same corpus", "same text")
        return {reader: names[max(map(kind, sources), default=0)] for reader, sources in read.items()}

    def measure(self, checkpoint: Checkpoint) -> Record | None:
        """Tokens per second and memory, in a process of its own."""
        protocol = self.protocol
        if protocol is None:
            return None
        dtype = str(self.dtype).removeprefix("torch.")
        device = provenance(self.device)
        inputs = {
            "model": checkpoint.fingerprint,
            "protocol": asdict(protocol),
            "dtype": dtype,
            "device": [device["device"], device["threads"]],
        }

        def work(directory: Path) -> dict[str, Any]:
            _loaded.cache_clear()
            return protocol.measure(checkpoint.path, device=self.device, dtype=dtype)

        result = self.once("measure", "measure", inputs, work).result
        width = sum(shape.kv_width for shape in layer_shapes(checkpoint.config))
        if result["kv_bytes_per_token"] != width * self.dtype.itemsize:
            raise RuntimeError(
                f"the cache of {checkpoint.path} holds {result['kv_bytes_per_token']} bytes per token, its shapes "
                f"say {width * self.dtype.itemsize}: the checkpoint and its config disagree"
            )
        return result

    def examine(self, checkpoint: Checkpoint) -> Record:
        """Everything the record says of one model."""
        config, shapes = checkpoint.config, layer_shapes(checkpoint.config)
        widths = [{k: v for k, v in asdict(shape).items() if k != "rope_pairs"} for shape in shapes]
        return {
            "checkpoint": str(checkpoint.path),
            "size": {**asdict(size(config, shapes)), "layers": widths},
            "evaluation": self.evaluate(checkpoint),
            "measure": self.measure(checkpoint),
        }

    def target(self, dense: Checkpoint) -> Target:
        """What the strategy may look at."""
        calibration = self.sample(dense) if self.strategy.needs_calibration else None
        return Target(self.load(dense), calibration, self.calibration.batch_size, self.node["seed"])

    def sample(self, dense: Checkpoint) -> Tensor:
        """(num_samples, length) calibration ids."""
        return self.calibration.sample(self.corpora, load_tokenizer(dense.path))

    def _calibration_identity(self) -> dict[str, Any] | None:
        return self.calibration.identity(self.corpora) if self.strategy.needs_calibration else None

    def _calibration_facts(self, dense: Checkpoint) -> dict[str, Any]:
        if not self.strategy.needs_calibration:
            return {}
        return {"calibration_hash": sha256(self.sample(dense).numpy().tobytes()).hexdigest()}

    @staticmethod
    def _without(node: Mapping[str, Any], *names: str) -> dict[str, Any]:
        return {key: value for key, value in node.items() if key not in names}
