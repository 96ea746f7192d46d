"""Opening a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvp.models.load import load_model
from kvp.strategies.signals.walk import walk
from tests.conftest import tiny_model
from tests.process import start


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    tiny_model("llama", "gqa").save_pretrained(tmp_path)
    assert not load_model(tmp_path, dtype=torch.float32, device="cpu").training
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights.*k_proj"):
        load_model(tmp_path, dtype=torch.float32, device="cpu")


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, so that it cannot be dropped and read again."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


def walk_through(path: Path, out: Path) -> None:
    """Open a model in the dtype of its files, walk through it, and write the most memory that it held."""
    before = anonymous_bytes()
    model = load_model(path, dtype=torch.bfloat16, device="cpu")
    most = 0
    for visit in walk(model, [torch.arange(8)[None]], "walk"):
        visit.outputs()
        most = max(most, anonymous_bytes() - before)
    out.write_text(str(most))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
def test_weights_in_the_dtype_of_their_files_stay_on_the_disk(tmp_path):
    wide = tiny_model(hidden_size=576, intermediate_size=1536, num_hidden_layers=24, dtype=torch.bfloat16)
    wide.save_pretrained(tmp_path / "model")
    process = start(walk_through, tmp_path / "model", tmp_path / "bytes", log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    weights = sum(each.nbytes for each in wide.parameters())
    assert weights > 100 * 2**20 and int((tmp_path / "bytes").read_text()) < 0.3 * weights
