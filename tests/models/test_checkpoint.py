"""Files of a checkpoint that disagree are refused before anything is computed, in words that name the file."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kvp.models.checkpoint.check import Checked, check_checkpoint
from kvp.models.load import byte_tokenizer, load_config, load_model, load_tokenizer, save
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from tests.conftest import random_plan, tiny_model
from tests.helpers.checkpoints import VOCABULARY, WEIGHTS, Library, edit_config, edit_weights, shard

ROOT = Path(__file__).parents[2]
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def path(library, tmp_path):
    return library.copy("llama-plain", tmp_path / "model")


def refused(path, message, error=ValueError):
    """Expect a refusal that names the directory and says `message`."""
    with pytest.raises(error, match=message) as raised:
        check_checkpoint(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def opened(path):
    check_checkpoint(path)
    return load_model(path, dtype=torch.float32, device="cpu")


def test_the_facts_of_a_whole_checkpoint(path):
    checked = check_checkpoint(path)
    assert isinstance(checked, Checked)
    assert (checked.vocabulary, checked.positions, checked.dtype) == (VOCABULARY, 128, torch.float32)
    assert checked.params == sum(p.numel() for p in opened(path).parameters())
    assert {f"{Q}", "lm_head"} <= set(checked.linears)
    assert len(checked.linears) == 3 * 7 + 1


# ---- config against tensors


def test_another_head_beside_tied_embeddings_is_refused(path):
    edit_config(path, tie_word_embeddings=True)
    refused(path, r"tie_word_embeddings=true.*lm_head\.weight that differs.*set tie_word_embeddings to false")
    with pytest.raises(ValueError, match="that differs"):
        load_model(path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("form", ["sharded", "pruned", "bfloat16"])
def test_another_head_is_seen_in_every_form(form, library, tmp_path):
    path = library.copy("pruned-llama" if form == "pruned" else "llama-plain", tmp_path / "model")
    if form == "sharded":
        shard(path)
    if form == "bfloat16":
        edit_weights(path, lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    edit_config(path, tie_word_embeddings=True)
    refused(path, "lm_head.weight that differs")


def test_a_tied_model_keeps_the_same_head_that_is_stored_twice(library, tmp_path):
    path = library.copy("llama-tied", tmp_path / "model")
    edit_weights(path, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    model = opened(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert size(model.config, layer_shapes(model.config)).params == sum(p.numel() for p in model.parameters())


def test_an_untied_model_without_a_head_is_refused(library, tmp_path):
    path = library.copy("llama-tied", tmp_path / "model")
    edit_config(path, tie_word_embeddings=False)
    refused(path, r"holds no lm_head\.weight.*tie_word_embeddings=false: set it to true")


def test_surgery_refuses_a_head_that_tying_would_lose():
    model = tiny_model()
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="lm_head differs from its embedding"):
        apply(model, random_plan(model, ["ffn"]))


@pytest.mark.parametrize(
    "name", [f"{Q}.bias", "model.layers.0.mlp.down_proj.bias", "lm_head.bias", "model.extra"]
)
def test_tensors_that_the_config_does_not_ask_for_are_refused(name, path):
    edit_weights(path, lambda state: state | {name: torch.ones(4)})
    refused(path, f"holds {name}, which config.json does not ask for")


def test_rotary_buffers_of_old_checkpoints_are_not_missed(path):
    edit_weights(
        path, lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4).half()}
    )
    assert check_checkpoint(path).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != f"{Q}.weight"}, r"lacks 1 of the weights.*q_proj"),
        (lambda s: s | {f"{Q}.weight": s[f"{Q}.weight"][:8]}, r"q_proj.weight of shape \(8, 48\).*asks for \(48, 48\)"),
        (lambda s: {n.replace("model.", "module."): t for n, t in s.items()}, r"and holds module\.embed_tokens"),
        (lambda s: s | {f"{Q}.weight": s[f"{Q}.weight"].half()}, r"mixes dtypes: .*q_proj\.weight as F16"),
        (lambda s: {n: t.double() for n, t in s.items()}, "as F64, kvp reads BF16, F16, F32"),
        (lambda s: s | {f"{Q}.weight": s[f"{Q}.weight"].to(torch.int8)}, "q_proj.weight as I8"),
        (lambda s: s | {"model.layers.3.input_layernorm.weight": torch.ones(48)}, "=3, .*layers up to 3"),
    ],
)  # fmt: skip
def test_tensors_of_another_config_are_refused(change, message, path):
    edit_weights(path, change)
    refused(path, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, path):
    def change(state):
        state[f"{Q}.weight"][3, 4] = value
        return state

    edit_weights(path, change)
    with pytest.raises(ValueError, match=r"q_proj\.weight with values that are not finite"):
        load_model(path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("said", [..., "float16", "float32", None])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_that_of_the_tensors(said, stored, path):
    edit_weights(path, lambda state: {name: tensor.to(stored) for name, tensor in state.items()})
    edit_config(path, dtype=said)
    assert load_config(path).dtype == stored


# ---- shards


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "model-00001-of-00002.safetensors cannot be opened as safetensors"),
        ("pointer", "pointer of Git LFS, run git lfs pull"),
        ("gone", "model-00002-of-00002.safetensors is missing"),
        ("twice", "lies in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"),
        ("stale", "two sets of weights.*model-00003-of-00003"),
        ("whole beside", "two sets of weights: model.safetensors, and model-00001"),
        ("outside", "must name a safetensors file beside it"),
        ("no map", "has no weight_map"),
        ("no index", "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_shards_that_are_not_one_checkpoint_are_refused(case, message, library, path):
    shard(path)
    one, two = sorted(path.glob("model-*"))
    index = path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    if case == "truncated":
        one.write_bytes(one.read_bytes()[:-9])
    elif case == "pointer":
        one.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4976698672\n")
    elif case == "gone":
        two.unlink()
    elif case == "twice":
        shutil.copy(one, two)
    elif case == "stale":
        shutil.copy(two, path / "model-00003-of-00003.safetensors")
    elif case == "whole beside":
        shutil.copy(library.original("llama-plain") / WEIGHTS, path)
    elif case == "outside":
        places["weight_map"]["lm_head.weight"] = "../model.safetensors"
    elif case == "no map":
        places = {}
    index.write_text(json.dumps(places))
    if case == "no index":
        index.unlink()
    refused(path, message, (ValueError, OSError))


# ---- config.json alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be greater than 0, got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, the files hold layers up to 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads must divide num_attention_heads=6, got 4"),
        ({"head_dim": 0}, "head_dim must be greater than 0, got 0"),
        ({"head_dim": 7}, "head_dim must be even.*got 7"),
        ({"vocab_size": -1}, "vocab_size must be greater than 0, got -1"),
        ({"hidden_size": "48"}, "hidden_size must be a valid integer, got '48'"),
        ({"intermediate_size": True}, "intermediate_size must be a valid integer, got True"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"sliding_window": 16}, "sliding_window=16, and llama models have no sliding attention"),
        ({"rms_norm_epsilon": 1e-5, "rms_norm_eps": ...}, "nothing reads 'rms_norm_epsilon'; rms_norm_eps is meant"),
        ({"rope_parameters": {"rope_type": "yarnn"}}, "rope_type must be 'default', 'linear'.*got 'yarnn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type=linear needs factor"),
        ({"rope_parameters": {"rope_tetha": 1e6}}, "rope_tetha=1000000.0: nothing reads such a field"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta must be a valid number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling factor=2.0: remove the one"),
        ({"rope_theta": 5e5}, "rope_theta=500000.0 stands beside rope_theta=10000.0"),
        ({"model_type": "mistral"}, "architectures is .*Llama.*model_type 'mistral'"),
        ({"model_type": "gemma"}, "'gemma' is not supported; known families: llama"),
        ({"model_type": 3}, "model_type must be one of llama"),
        ({"hidden_act": "swoosh"}, "transformers makes no model of it, KeyError: 'swoosh'"),
        ({"eos_token_id": [2, VOCABULARY]}, f"eos_token_id must be below vocab_size={VOCABULARY}, got {VOCABULARY}"),
        ({"is_causal": False}, "is_causal must be"),
        ({"dtype": "int8"}, "dtype.*must be .*got 'int8'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised.*dequantise it once"),
        ({"kvp_layers": []}, "kvp_layers belongs to model_type=kvp_llama"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(changes, message, path):
    edit_config(path, **changes)
    refused(path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b'{"model_type": "lla', "Unterminated string"),
        (b"[]", "must hold a JSON object, got list"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff\xfe{\x00}\x00", "can't decode"),
        (b'{"rms_norm_eps": NaN}', "NaN is no number"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", SETTINGS, GENERATION])
def test_a_file_that_is_no_json_is_named(file, text, message, path):
    (path / file).write_bytes(text)
    refused(path, f"{file}.*{message}")


def test_biases_that_a_family_does_not_read_are_not_counted():
    for family in ("mistral", "qwen2", "qwen3", "llama"):
        model = tiny_model(family, attention_bias=True, mlp_bias=True)
        assert size(model.config, layer_shapes(model.config)).params == sum(
            p.numel() for p in model.parameters()
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_head_dim": 3}, r"o_proj.weight of shape"),
        ({"rope_pairs": [[9, 9], [9, 9]]}, r"kvp_layers\.1: rope_pairs must"),
        ({"rope_pairs": [[0, 1]]}, r"kvp_layers\.1: rope_pairs must have 1 rows of 1"),
        ({"num_attention_heads": 0}, r"kvp_layers\.1: num_key_value_heads=1 must divide"),
        ({"qk_head_dim": "4"}, r"kvp_layers\.1\.qk_head_dim must be a valid integer"),
        ({"stream": [4, 4, 4]}, "every stream must be three widths"),
        ({"colour": 1}, r"kvp_layers\.1\.colour=1: nothing reads such a field"),
    ],
)
def test_widths_that_no_cut_leaves_are_refused(change, message, library, tmp_path):
    path = library.copy("pruned-llama", tmp_path / "model")
    layers = load_config(path).kvp_layers
    layers[1] |= change
    edit_config(path, kvp_layers=layers)
    refused(path, message)


@pytest.mark.parametrize("options", [{"key_sparsity": 2}, {"windw": 8}, {"window": "all"}])
def test_a_bad_sparse_cache_is_refused(options, library, tmp_path):
    path = library.copy("pruned-llama", tmp_path / "model")
    edit_config(path, kvp_cache=options)
    refused(path, r"config\.json: cache")


# ---- tokenizer and neighbours


def larger(path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer, such as tokenizer.json"),
        (larger, f"has ids up to {VOCABULARY}, the embedding {VOCABULARY} rows"),
        (lambda p: (p / "tokenizer.json").write_text('{"version": "1.0"}'), "cannot be opened"),
        (lambda p: edit_config(p, SETTINGS, auto_map={"AutoTokenizer": ["evil.E", None]}), "auto_map asks for Python"),
        (lambda p: edit_config(p, GENERATION, eos_token_id=VOCABULARY), "generation_config.json: eos_token_id"),
        (lambda p: edit_config(p, GENERATION, temperature=0.9), "generation_config.json: .*temperature"),
        (lambda p: (p / "adapter_config.json").write_text("{}"), "adapter that is not merged: merge it"),
        (lambda p: shutil.copy(p / WEIGHTS, p / "model-00003-of-00003.safetensors"), "two sets.*model-00003"),
        (lambda p: (p / WEIGHTS).rename(p / "model.gguf"), "only a GGUF"),
        (lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"), "kvp opens no pickles"),
    ],
)  # fmt: skip
def test_tokenizer_and_neighbours_that_do_not_fit_are_refused(damage, message, path):
    damage(path)
    refused(path, message, (ValueError, OSError))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.safetensors"]
)
def test_other_forms_of_published_weights_are_not_opened(path, name):
    (path / name).write_bytes(b"PK")
    assert check_checkpoint(path).params


def test_a_published_snapshot_may_hold_its_weights_twice(path, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    shutil.copytree(path, snapshot)
    shutil.copy(snapshot / WEIGHTS, snapshot / "model-00003-of-00003.safetensors")
    assert check_checkpoint(snapshot).params


def test_a_token_that_only_the_family_adds_is_left_out(tmp_path):
    save(tiny_model("qwen2", vocab_size=VOCABULARY), byte_tokenizer(), tmp_path / "model")
    assert load_tokenizer(tmp_path / "model")("Héllo 12").input_ids == byte_tokenizer()("Héllo 12").input_ids
    assert check_checkpoint(tmp_path / "model").vocabulary == VOCABULARY


@pytest.mark.parametrize("file", ["config.json", WEIGHTS, "tokenizer.json"])
def test_links_are_followed_and_broken_ones_are_refused(file, path, tmp_path):
    (path / file).rename(tmp_path / "elsewhere")
    (path / file).symlink_to(tmp_path / "elsewhere")
    assert check_checkpoint(path).params
    (tmp_path / "elsewhere").unlink()
    refused(path, "is a link to .*elsewhere, which is not there|no tokenizer", (ValueError, OSError))
    (path / file).unlink()
    (path / file).mkdir()
    refused(path, "no ordinary file", (ValueError, OSError))


# ---- code of the checkpoint


@pytest.mark.parametrize("file", ["config.json", SETTINGS])
def test_no_code_of_a_checkpoint_runs_whatever_is_answered(file, path, monkeypatch, capsys):
    """Transformers asks [y/N] where it is not given False, and runs the code on a y."""
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit_config(path, file, auto_map=dict.fromkeys(classes, "evil.Evil"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    refused(path, f"{file}: auto_map asks for Python code of the checkpoint, and kvp runs none")
    opening = {
        "config.json": lambda: load_model(path, dtype=torch.float32, device="cpu"),
        SETTINGS: lambda: load_tokenizer(path),
    }
    with pytest.raises(ValueError, match="auto_map"):
        opening[file]()
    assert not (path / "ran").exists()
    assert "[y/N]" not in "".join(capsys.readouterr())


def test_every_opening_says_that_no_remote_code_runs():
    """The Auto classes would ask on a terminal where they are not given False; one runs the code that kvp wrote."""
    found, own = 0, []
    for file in sorted((ROOT / "kvp").rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name.split(".")[-1] in ("from_pretrained", "from_config") and not name.startswith("PeftModel"):
                said = {word.arg: ast.unparse(word.value) for word in call.keywords}
                if said.get("trust_remote_code") == "ask['own_code']":
                    own.append(file.name)
                else:
                    safe = said.get("trust_remote_code") == "False" or said.get(None) == "options"
                    assert safe, f"{file}: {name}"
                found += 1
    assert found > 10
    assert own == ["engine_transformers.py"]
