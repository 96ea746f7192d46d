"""The modelling file of `--to remote_code`: kvp's own code, without kvp, and no other code is run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from kvp.models.load import byte_tokenizer, save
from kvp.models.surgery import apply
from kvp.serving.check import check
from kvp.serving.remote_code import MODULE, code, require_own_code, write_code
from kvp.serving.write import export
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model

STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
ids = torch.arange(3, 90)[None]
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)
text = model.generate(ids[:, :9], max_new_tokens=8, do_sample=False)
assert "kvp" not in sys.modules
print(type(again).__name__, text.tolist())
"""
KINDS = {
    "llama": ["qk", "vo", "ffn"],
    "mistral": ["attention", "mlp"],
    "qwen2": ["kv_group", "vo"],
    "qwen3": ["qk", "vo"],
    "smollm3": ["block", "qk"],
    "gemma3_text": ["qk", "vo", "ffn"],
    "olmo2": ["kv_group", "qk", "vo"],
    "olmo3": ["kv_group", "vo", "block"],
    "qwen3_moe": ["qk", "vo", "ffn"],
    "mixtral": ["kv_group", "mlp"],
    "phi3": ["kv_group", "qk", "ffn"],
    "gpt_oss": ["kv_group", "qk", "mlp"],
}


def uneven(family):
    model = tiny_model(family, vocab_size=259)
    return apply(model, random_plan(model, KINDS[family]))


def sliced():
    model = tiny_model("llama", attention_bias=False, mlp_bias=False, vocab_size=259)
    basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q
    return apply(model, Plan({}, bases=[basis[:, :width] for width in (40, 38, 36, 36, 40, 44)]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What an export is, without the proof."""
    directory = tmp_path_factory.mktemp("code")
    model = uneven("llama")
    save(model, byte_tokenizer(), directory)
    write_code(model.config, directory)
    return directory


def test_the_file_computes_what_kvp_computes(family, tmp_path, tokens):
    model = uneven(family)
    (tmp_path / "own.py").write_text(code(family))
    spec = spec_from_file_location("own", tmp_path / "own.py")
    own = module_from_spec(spec)
    spec.loader.exec_module(own)
    prefix = type(model).__name__.removesuffix("ForCausalLM")
    Config, Model = (getattr(own, prefix + suffix) for suffix in ("Config", "ForCausalLM"))
    assert not issubclass(Model, type(model).__mro__[2])
    other = Model(Config(**model.config.to_dict())).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_the_file_needs_torch_and_transformers_only(exported):
    imported = set()
    for node in ast.walk(ast.parse(code("llama"))):
        if isinstance(node, ast.Import):
            imported |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "vllm"}
    demanded = {*get_imports(exported / f"{MODULE}.py")} - sys.stdlib_module_names
    assert demanded == {"torch", "transformers"}


@pytest.mark.parametrize("where", ["file", "auto_map", "no file"])
def test_other_code_is_not_run(where, exported, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    for path in exported.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    require_own_code(directory)
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    if where == "file":
        with (directory / f"{MODULE}.py").open("a") as file:
            file.write(evil)
    elif where == "auto_map":
        (directory / "evil.py").write_text(evil)
        config = json.loads((directory / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "evil.Evil"
        (directory / "config.json").write_text(json.dumps(config))
    else:
        (directory / f"{MODULE}.py").unlink()
    sample = {"text": "", "ids": [1, 2], "logprobs": [-1.0], "greedy": [3], "margins": [1.0]}
    serving = {"form": "remote_code", "dtype": "float32", "sample": sample}
    (directory / "serving.json").write_text(json.dumps(serving))
    with pytest.raises(ValueError, match=r"modeling_kvp\.py.*kvp runs no code of a checkpoint"):
        check(directory)
    assert not (tmp_path / "ran").exists()


def test_with_kvp_it_opens_without_its_code(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__module__ == "kvp.models.pruned"


def test_what_has_no_such_form_is_refused(tmp_path):
    save(tiny_model(vocab_size=259), byte_tokenizer(), tmp_path / "dense")
    with pytest.raises(ValueError, match="an ordinary llama checkpoint: export it --to stock"):
        export(tmp_path / "dense", tmp_path / "out", "remote_code")
    model = tiny_model(vocab_size=259, head_dim=16)
    pruned = apply(model, Plan({}))
    pruned.config.kvp_cache = {"key_sparsity": 0.5, "value_sparsity": 0.5, "window": 8}
    save(pruned, byte_tokenizer(), tmp_path / "sparse")
    with pytest.raises(ValueError, match=r"packed cache \(kvp_cache\), which needs more of kvp"):
        export(tmp_path / "sparse", tmp_path / "out", "remote_code")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "sliced"])
def test_a_stranger_opens_saves_and_opens_it_again(case, tmp_path):
    model = sliced() if case == "sliced" else uneven(case)
    save(model, byte_tokenizer(), tmp_path / "pruned")
    serving = export(tmp_path / "pruned", tmp_path / "out", "remote_code")
    assert serving["check"]["logits_max_difference"] < 1e-5
    assert check(tmp_path / "out")["passed"]
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "out"), str(tmp_path / "again")]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert done.stdout.split(None, 1) == [type(model).__name__, f"{expected.tolist()}\n"]
    assert Path(tmp_path / "again" / f"{MODULE}.py").exists()
