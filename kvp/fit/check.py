"""Estimates beside measured peaks: each phase runs in a process of its own, on random tokens.

Every block above 64 KiB is mapped by itself, so that a peak on a CPU holds what lives, not what the heap keeps of
freed blocks. The last row shows what the heap adds where its blocks are small and many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from kvp import children
from kvp.composing import compose
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.needs import need_of, recipe_length
from kvp.tables import markdown

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
HEADS = ("work", "size", "estimate (MiB)", "measured (MiB)", "measured / estimate")
Case = tuple[str, str, tuple[str, ...]]  # a phase, its name in the table, and the options of its run
CASES: tuple[Case, ...] = (
    ("measure", "decode", ("measure.batch_size=1", "measure.prompt_length=256", "measure.new_tokens=16")),
    ("measure", "decode", ("measure.batch_size=4", "measure.prompt_length=512", "measure.new_tokens=16")),
    ("measure", "decode", ("measure.batch_size=8", "measure.prompt_length=512", "measure.new_tokens=16")),
    ("measure", "decode", ("measure.batch_size=2", "measure.prompt_length=2048", "measure.new_tokens=16")),
    ("score", "scoring, kvpruner", ("strategy=kvpruner",)),
    ("score", "scoring, weight gradients", ("strategy=kvpruner", "strategy.importance=taylor_element")),
    ("score", "scoring, checkpointing", ("strategy=kvpruner", "strategy.gradient_checkpointing=true")),
    ("recover", "LoRA", ()),
    ("recover", "LoRA, twice the tokens", ("recovery.data.length=256",)),
    # below so many tokens the file that is read takes more, whose pages the system may drop
    ("recover", "LoRA, checkpointing", ("recovery.data.length=2048", "recovery.gradient_checkpointing=true")),
    ("recover", "LoRA, a teacher", ("recovery/distillation=logits",)),
    ("perplexity", "perplexity", ()),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One phase: its estimate and its measured peak, in bytes, without the interpreter.

    Attributes:
        cpu_seconds: Of all threads, that one batch adds to a small one; None: not measured.
        tokens: By which that batch is larger; None: not measured.
    """

    work: str
    size: str
    estimate: int
    measured: int
    cpu_seconds: float | None = None
    tokens: int | None = None

    def cells(self) -> list[str]:
        """Return the row of a table."""
        sizes = [f"{count / 2**20:,.0f}" for count in (self.estimate, self.measured)]
        return [self.work, self.size, *sizes, f"{self.measured / self.estimate:.3f}"]


def check(model: Sequence[str], cases: Sequence[Case] = CASES) -> Iterator[Row]:
    """Measure phases of runs on a model of conf/model; a case longer than its positions is left out, and says so.

    Args:
        model: Options that choose the model, such as ["model=smollm2_135m"].
        cases: What is measured.

    Raises:
        RuntimeError: A process failed; the message holds the end of what it printed.
    """
    with TemporaryDirectory() as directory:
        plain = [*model, "tracker=none", "measure.warmup=1", "measure.runs=1"]
        source = Experiment.compose(compose(plain), plain).source
        checkpoint = source.locate() or Path(directory) / "model"
        if source.locate() is None:
            source.write(checkpoint)
        for phase, work, options in tqdm(cases, desc="measuring", unit="work"):
            words = [*plain, *options]
            x, config = Experiment.compose(compose(words), words), source.expected()
            if (length := _length(x, phase)) > (positions := config.max_position_embeddings):
                note = f"{work} of {length:,} tokens is left out: the model has {positions:,} positions"
                tqdm.write(note, file=sys.stderr)
                continue
            need = need_of(x, config, phase)
            yield Row(
                work=work,
                size=need.size,
                estimate=need.memory["total"],
                **_measured(x, phase, words, checkpoint),
            )


def _length(x: Experiment, phase: str) -> int:
    """Return the tokens of a sequence in a phase; windows of a perplexity end at the positions themselves."""
    if phase == "measure":
        assert x.protocol is not None
        return x.protocol.prompt_length + x.protocol.new_tokens
    if phase == "recover":
        assert x.recovery is not None
        return recipe_length(x.recovery)
    return 0 if phase == "perplexity" else x.calibration.length


def _measured(x: Experiment, phase: str, words: Sequence[str], checkpoint: Path) -> dict[str, Any]:
    if phase == "measure":
        assert x.protocol is not None
        os.environ |= MAPPED
        dtype = str(x.dtype).removeprefix("torch.")
        memory = x.protocol.measure(checkpoint, device=x.device, dtype=dtype)["memory"]
        return {"measured": memory["peak_bytes"] - memory["baseline_bytes"]}
    spec = {"phase": phase, "words": list(words), "checkpoint": str(checkpoint)}
    command = [sys.executable, "-m", "kvp.fit.child", json.dumps(spec)]
    done = children.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, **MAPPED}
    )
    if done.returncode:
        raise RuntimeError("\n".join([f"{phase} failed:", *done.stderr.splitlines()[-20:]]))
    found = json.loads(done.stdout.splitlines()[-1])
    return {"measured": found.pop("bytes"), **found}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    return markdown(HEADS, [row.cells() for row in rows], labels=2)
