"""A stock export in an environment of its own, with transformers 4.57: it reads the older of the two RoPE schemas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvp.models.load import byte_tokenizer, save
from kvp.serving.check import check
from kvp.serving.sample import Sample
from kvp.serving.verify import ask, compare
from kvp.serving.write import export
from tests.helpers.stock import stock_model

VERSION = "4.57.6"
HOME = os.environ.get("KVP_OLD_TRANSFORMERS", "~/.cache/kvp/transformers-" + VERSION)  # made once, 150 MB

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of a venv with that transformers, and the torch of this one."""
    home = Path(HOME).expanduser()
    interpreter = home / "bin" / "python"
    if not (home / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(home)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
        subprocess.run([*pip, f"transformers=={VERSION}"], check=True)
        packages = subprocess.run(
            [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True,
            capture_output=True,
            text=True,
        )
        Path(packages.stdout.strip(), "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
        (home / "done").touch()
    said = [str(interpreter), "-I", "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(said, capture_output=True, text=True).stdout.strip() == VERSION
    return str(interpreter)


@pytest.mark.parametrize(
    ("family", "rope"), [("llama", "default"), ("mistral", "llama3"), ("qwen2", "yarn"), ("llama", "linear")]
)
def test_the_same_logits(family, rope, python, tmp_path):
    save(stock_model(family, "gqa", rope, vocab_size=259), byte_tokenizer(), tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "out", "stock")
    report = check(tmp_path / "out", python=python)
    assert report["passed"], report["why"]
    assert report["greedy_tokens_equal"]


def test_without_the_older_schema_it_would_be_silently_wrong(python, tmp_path):
    save(stock_model("llama", "gqa", vocab_size=259), byte_tokenizer(), tmp_path / "pruned")
    serving = export(tmp_path / "pruned", tmp_path / "out", "stock")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "original_max_position_embeddings"):
        del config[name]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    sample = Sample(**serving["sample"])
    report = compare(sample, ask(tmp_path / "out", sample, "transformers", python=python), exact=True)
    assert report["logprobs_rms_difference"] > 0.05
