"""Speed and memory of a checkpoint under one protocol, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvp import children
from kvp.options import options
from kvp.threads import briefly
from kvp.types import DTYPES

STDERR_LINES = 20


@options
class Measure:
    """Protocol of prefill and decode throughput, peak memory, KV bytes and MACs of a model.

    The tokens of the prompt are drawn uniformly from the vocabulary: speed and memory depend on shapes, not on
    text. Results are the median and interquartile range of the timed runs.
    """

    node: ClassVar[str] = "measure"

    batch_size: int = Field(default=4, ge=1, description="sequences at a time")
    prompt_length: int = Field(default=256, ge=1, description="tokens of the prompt")
    new_tokens: int = Field(
        default=32, ge=1, description="greedy decode steps after the prompt, which no end of text stops"
    )
    warmup: int = Field(default=1, ge=0, description="runs of prefill and decode that do not count")
    runs: int = Field(default=5, ge=1, description="runs that count")
    seed: int = Field(default=0, ge=0, description="seed of the prompt")

    def check_positions(self, max_position_embeddings: int) -> None:
        """Refuse a model with fewer positions than the sequences of this protocol have tokens.

        Raises:
            ValueError: The message names both.
        """
        if self.prompt_length + self.new_tokens > max_position_embeddings:
            raise ValueError(
                f"measure.prompt_length + measure.new_tokens must be <= {max_position_embeddings} "
                f"(max_position_embeddings), got {self.prompt_length} + {self.new_tokens}"
            )

    def prompt(self, vocab_size: int) -> Tensor:
        """Return ids (batch_size, prompt_length), the same for every model of a vocabulary."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (self.batch_size, self.prompt_length), generator=generator)

    def measure(self, checkpoint: Path, *, device: str, dtype: str) -> dict[str, Any]:
        """Measure the Hugging Face model in the directory `checkpoint` on `device` ("cpu", "cuda").

        Returns:
            JSON data: "protocol", "prefill" and "decode" ("tokens_per_second" over the batch, its
            "iqr", raw "seconds"; decode also "milliseconds_per_step"), "memory" (bytes: "peak_bytes",
            "weights_bytes", "cache_bytes", "rest_bytes", "baseline_bytes", and "method"),
            "kv_bytes_per_token", "macs" of one prompt, "device", "threads", "dtype", "attention".

        Raises:
            ValueError: `device` or `dtype` cannot be measured.
            RuntimeError: The measuring process failed; the end of its stderr is in the message.
        """
        check_hardware(device, dtype)
        spec = {"checkpoint": str(checkpoint), "device": device, "dtype": dtype, "protocol": asdict(self)}
        command = [sys.executable, "-m", "kvp.measurement.child", json.dumps(spec)]
        child = children.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=briefly(os.environ)
        )
        if child.returncode:
            raise RuntimeError(f"measuring {checkpoint} with {self} on {device} {_failure(child)}")
        return {"protocol": asdict(self), **json.loads(child.stdout.splitlines()[-1])}


def check_hardware(device: str, dtype: str) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: Neither a CPU under Linux nor a GPU, or a dtype that is not one of `DTYPES`.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"measure runs on cpu or cuda, got {device!r}: use measure=none there")
    if kind == "cpu" and sys.platform != "linux":
        raise ValueError(
            "measure reads a CPU process's peak memory from /proc (Linux): use measure=none here"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _failure(child: subprocess.CompletedProcess[str]) -> str:
    """Return how `child` ended, and the end of its stderr."""
    if child.returncode < 0:
        ending = (
            f"was killed by {signal.Signals(-child.returncode).name} (SIGKILL usually means out of memory)"
        )
    else:
        ending = f"failed with exit status {child.returncode}"
    return "\n".join([ending, *child.stderr.splitlines()[-STDERR_LINES:]])
