"""A GGUF in fewer bits, by llama.cpp's own quantiser, and how far its answer is from the checkpoint's."""

from __future__ import annotations

import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from kvp import children
from kvp.serving.gguf_file import FILE, matrix_types
from kvp.serving.sample import Sample, token_logprobs
from kvp.serving.verify import ask, has

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")  # of llama.cpp's, those that need no importance matrix


def require_quantizer(to: str, quantize: str) -> None:
    """Refuse what cannot be quantised, before any work.

    Raises:
        ValueError: The form is no GGUF, or llama.cpp has no such type.
        ModuleNotFoundError: llama.cpp is not here.
    """
    if to != "gguf":
        raise ValueError(f"--quantize is for --to gguf, got --to {to}: leave one of them out")
    if quantize not in TYPES:
        raise ValueError(f"--quantize must be one of {', '.join(TYPES)}, got {quantize!r}")
    if not has("llama_cpp"):
        raise ModuleNotFoundError(
            "--quantize needs llama.cpp, which is not installed here: pip install 'kvp[gguf]'"
        )


def quantize_gguf(directory: Path, kind: str, sample: Sample) -> dict[str, Any]:
    """Replace `directory`/model.gguf by one of this type, and return what that saved and changed.

    Raises:
        RuntimeError: llama.cpp cannot write or read it.
    """
    whole, small = directory / FILE, directory / f"quantized.{FILE}"
    script = Path(__file__).with_name("quantize_llama_cpp.py")
    words = [sys.executable, "-I", str(script), str(whole), str(small), kind]
    done = children.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"llama.cpp cannot quantise to {kind}:\n" + "\n".join(done.stderr.splitlines()[-5:])
        )
    before = whole.stat().st_size
    small.replace(whole)
    return {
        "type": kind,
        "bytes": whole.stat().st_size,
        "bytes_before": before,
        "matrices": matrix_types(whole),
        **distance(sample, ask(directory, sample, "llama_cpp")),
    }


def distance(sample: Sample, answer: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return how far an answer that is meant to differ lies from the sample.

    "logprobs_mean_difference" is what the text costs more, in nats per token.
    """
    said = torch.tensor(token_logprobs(answer["logits"], sample.ids))
    difference = torch.tensor(sample.logprobs).double() - said.double()
    pairs = zip(answer["greedy"].tolist(), sample.greedy, strict=True)
    return {
        "tokens": len(sample.ids),
        "logprobs_rms_difference": difference.square().mean().sqrt().item(),
        "logprobs_mean_difference": difference.mean().item(),
        "greedy_tokens_equal": sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)),
    }
