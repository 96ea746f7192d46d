"""The examples and the notebook run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import kvp
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def example(name, *words, cwd):
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_custom_method_is_the_energy_of_its_channels():
    spec = spec_from_file_location("custom_method", ROOT / "examples" / "custom_method.py")
    module = module_from_spec(spec)
    sys.modules["custom_method"] = module
    spec.loader.exec_module(module)
    model = tiny_model("llama", "gqa")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    strategy = module.OutputEnergy(allocator=kvp.Uniform(multiple_of=2))
    pruned = kvp.prune(model, strategy=strategy, ratio=0.25, calibration=ids)
    assert pruned.achieved["kv_cache"] == pytest.approx(0.25)
    kept = next(keep for space, keep in sorted(pruned.plan.keep.items()) if space.layer == 0)
    caught = []
    attention = model.get_submodule("model.layers.0.self_attn.o_proj")
    with attention.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])), torch.no_grad():
        model(ids)
    energy = caught[0].square().sum((0, 1)) * attention.weight.square().sum(0)
    by_channel = energy.view(2, 3, 8).sum(1)  # KV heads, their query heads, channels
    assert kept.tolist() == [sorted(row.topk(kept.shape[1]).indices.tolist()) for row in by_channel]


def test_every_notebook_holds_the_output_of_all_its_cells():
    for path in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
        assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


@pytest.mark.slow
def test_prune_and_compare(tmp_path):
    out = example(
        "prune.py", "--model", "tiny", "--ratio", "0.3333", "--steps", "8", "--out", "pruned", cwd=tmp_path
    )
    assert re.search(r"asked 33.33 % of kv_cache; achieved kv_cache 32.50 %", out)
    assert len(re.findall("perplexity squad", out)) == 4
    assert (tmp_path / "pruned" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_custom_method_beats_random_channels(tmp_path):
    out = example("custom_method.py", cwd=tmp_path)
    squad = {name: float(value) for name, value in re.findall(r"(\w+): perplexity squad ([\d.]+)", out)}
    assert squad["dense"] < squad["mine"] < squad["random"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install 'kvp[gguf]'")
def test_llama_cpp_answers(tmp_path):
    assert "llama.cpp says:" in example("serve_llama_cpp.py", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs_and_says_what_it_holds(path):
    notebook = nbformat.read(path, 4)
    held = achieved(notebook)
    NotebookClient(notebook, timeout=3000, kernel_name="python3").execute()
    assert achieved(notebook) == held != []


def achieved(notebook):
    texts = [out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ())]
    return re.findall(r"achieved .*", "\n".join(texts))
