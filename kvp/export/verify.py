"""The proof of an export: the same logits in a process that never imports kvp."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvp.models.load import load_model

TEXT_LENGTH, NEW_TOKENS = 64, 16
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the norm of the logits
ROUNDED = 3e-2  # where a weight was rounded again, to 16 bits, by the folded scale

STRANGER = f"""
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
directory, work = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
ids = load_file(work + "/ids.safetensors")["ids"]
with torch.no_grad():
    logits = model(ids).logits
    greedy = model.generate(ids[:1], max_new_tokens={NEW_TOKENS}, do_sample=False)
assert "kvp" not in sys.modules
save_file(dict(logits=logits.contiguous(), greedy=greedy), work + "/answer.safetensors")
"""


def verify(checkpoint: Path, exported: Path, python: str = sys.executable) -> dict[str, Any]:
    """Compare logits on random tokens and greedy continuations, both computed in float32.

    Args:
        checkpoint: What was exported.
        exported: Directory of the export.
        python: Interpreter with transformers to open the export; kvp is not imported there.

    Raises:
        ArithmeticError: The logits differ by more than rounding explains.
        RuntimeError: The export cannot be opened; the end of what was said is in the message.
    """
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    length = min(TEXT_LENGTH, model.config.max_position_embeddings - NEW_TOKENS)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    with torch.no_grad():
        expected = model(ids).logits
        greedy = model.generate(  # type: ignore[operator]
            ids[:1], max_new_tokens=NEW_TOKENS, do_sample=False
        )
    answer = _ask(exported, ids, python)
    relative = ((answer["logits"] - expected).norm() / expected.norm()).item()
    stored = json.loads((exported / "config.json").read_text())["dtype"]
    tolerance = TOLERANCE.get(getattr(torch, stored), ROUNDED)
    if not relative <= tolerance:
        raise ArithmeticError(
            f"the export's logits differ from the checkpoint's by {relative:.2%} of their norm, rounding to "
            f"{stored} explains {tolerance:.2%}: the export was removed; please report the checkpoint's config.json"
        )
    same = answer["greedy"].shape == greedy.shape and bool((answer["greedy"] == greedy).all())
    return {
        "logits_relative_difference": relative,
        "logits_max_difference": (answer["logits"] - expected).abs().max().item(),
        "greedy_tokens_equal": same,
        "dtype": stored,
        "tokens": ids.numel(),
    }


def _ask(exported: Path, ids: torch.Tensor, python: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as work:
        save_file({"ids": ids}, f"{work}/ids.safetensors")
        command = [python, "-I", "-c", STRANGER, str(exported.absolute()), work]
        stranger = subprocess.run(command, capture_output=True, text=True, cwd=work)
        if stranger.returncode:
            tail = "\n".join(stranger.stderr.splitlines()[-5:])
            raise RuntimeError(f"a stock transformers cannot open {exported}:\n{tail}")
        return load_file(f"{work}/answer.safetensors")
