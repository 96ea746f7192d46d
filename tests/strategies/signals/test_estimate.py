"""The estimate of scoring agrees with what a process really takes within 10 %."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, re, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from kvp.models.spaces import find_spaces
from kvp.strategies.target import Target
from kvp.strategies.signals.importance import score_spaces
from kvp.strategies.signals.estimate import scoring_bytes

def memory(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

config = LlamaConfig(vocab_size=8000, hidden_size=512, intermediate_size=1376, num_hidden_layers=12,
                     num_attention_heads=8, num_key_value_heads=4, dtype="float32")
model = LlamaForCausalLM(config).eval()
ids = torch.randint(8000, (4, 256))
score_spaces(Target(model, ids[:1, :8], 1, 0), find_spaces(config, ["qk"]), sys.argv[1])  # warm-up
Path("/proc/self/clear_refs").write_text("5")
before, checkpointing = memory("VmRSS"), sys.argv[2] == "True"
score_spaces(Target(model, ids, 4, 0), find_spaces(config, ["qk", "vo"]), sys.argv[1], checkpointing)
gates, kv = sys.argv[1] == "taylor_gate", ("attention",)
estimate = scoring_bytes(config, batch_size=4, length=256, gradient_checkpointing=checkpointing,
                         gradients=() if gates else kv, watched=kv if gates else ())
print(json.dumps([memory("VmHWM") - before, estimate["total"] - estimate["weights"]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("importance", "checkpointing"),
    [("taylor_gate", True), ("taylor_element", False), ("taylor_gate", False), ("taylor_element", True)],
)
def test_scoring_takes_what_is_estimated(importance, checkpointing):
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what lives, not what the heap keeps of freed blocks
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, importance, str(checkpointing)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | mapped,
    )
    taken, estimate = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * estimate < taken < 1.1 * estimate
