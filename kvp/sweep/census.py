"""The header of a sweep: what stands already, what is to be computed, and what that takes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvp.models.load import load_config
from kvp.models.shapes import itemsize, layer_shapes, size
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import Foretold, foretell
from kvp.pipeline.needs import peak
from kvp.pipeline.runfile import finished_before
from kvp.pipeline.stages import KINDS
from kvp.sweep.ahead import time_left

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def census(experiments: Sequence[Experiment], chains: list[list[Foretold]]) -> Iterator[str]:
    """Line by line; a stage that several jobs share is counted once. `chains` gets the stages of each job."""
    before = sum(finished_before(x.directory) is not None for x in experiments)
    yield f"{len(experiments)} jobs, {before} of them finished before"
    for runs, store in sorted({(str(x.runs), str(x.place)) for x in experiments}):
        yield f"runs in {runs}, stages in {store}"

    stages: dict[str, Foretold] = {}
    configs: dict[Path, PretrainedConfig] = {}
    checkpoints: dict[str, int] = {}
    memory, unknown = 0, 0
    for x in experiments:
        try:
            chain, dense = foretell(x)
            missing = [stage for stage in chain if not stage.stands]
            if missing:
                if dense not in configs:
                    there = (dense / "config.json").exists()
                    configs[dense] = load_config(dense) if there else x.source.expected()
                config = x.strategy.recast_config(configs[dense])
                weights = size(config, layer_shapes(config)).params * itemsize(config)
                made = [stage for stage in missing if stage.writes_model]
                checkpoints |= {stage.fingerprint: weights for stage in made}
                most = peak(x, configs[dense])
                memory = max(memory, most.memory["total"] if most else weights)
        except (
            OSError,
            ValueError,
            RuntimeError,
            AssertionError,
        ):  # the latter of a GPU that only the nodes have
            unknown += 1
            chains.append([])
        else:
            chains.append(chain)
            for stage in chain:
                stages.setdefault(stage.fingerprint, stage)
    yield from _stages(list(stages.values()), unknown)
    if memory:
        place = experiments[0].place
        free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
        many = f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}"
        added = (
            f"at most {in_bytes(sum(checkpoints.values()))} for {many}" if checkpoints else "no checkpoint"
        )
        yield (
            f"memory: about {in_bytes(memory)} at the peak of a job. Disk: {added} to write, {in_bytes(free)} are free"
        )
    if left := time_left(stages.values(), experiments[0]):
        yield f"time: {left}"


def _stages(stages: Sequence[Foretold], unknown: int) -> Iterator[str]:
    missing = Counter(stage.kind for stage in stages if not stage.stands)
    kinds = ", ".join(f"{missing[kind]} {kind}" for kind in KINDS if missing[kind])
    counts = f"{len(stages)} stages: {len(stages) - missing.total()} stand, {missing.total()} to compute"
    yield f"{counts} ({kinds})" if missing else counts
    if unknown:
        yield f"of {unknown} jobs the model, a text or the GPU is out of reach here: their stages are not counted"


def in_bytes(count: int) -> str:
    """Return a size as a person says it: "1.5 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
