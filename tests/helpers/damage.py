"""Damages to a checkpoint directory, drawn from a seed.

A damage returns its words and what must come of it: REFUSED, SAME (accepted with the original's logits, or refused),
or ANY (accepted with what the files say now, or refused).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.helpers.checkpoints import INDEX, VOCABULARY, WEIGHTS, Library, edit_config, edit_weights, shard

REFUSED, SAME, ANY = "refused", "same", "any"
WRONG = ["x", 1.5, -3, 0, True, [], {}, None, 10**7, [1, 2], "64"]
DECISIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL = (
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "num_key_value_heads",
    "head_dim",
)

Damage = Callable[[random.Random, Path, Library], tuple[str, str]]


def fields(d):
    return json.loads((d / "config.json").read_text())


def files(d, *patterns):
    return sorted(file for pattern in patterns for file in d.glob(pattern))


def weights(rng, d):
    return rng.choice(files(d, "*.safetensors"))


# ---- config.json


def retype_decisive(rng, d, library):
    name, value = rng.choice(DECISIVE), rng.choice(WRONG)
    edit_config(d, **{name: value})
    return REFUSED, f"{name}={value!r}"


def retype_any(rng, d, library):
    name, value = rng.choice(sorted(fields(d))), rng.choice(WRONG)
    edit_config(d, **{name: value})
    return ANY, f"{name}={value!r}"


def remove_decisive(rng, d, library):
    name = rng.choice((*DECISIVE, "model_type"))
    edit_config(d, **{name: ...})
    return REFUSED, f"no {name}"


def remove_any(rng, d, library):
    name = rng.choice(sorted(fields(d)))
    edit_config(d, **{name: ...})
    return ANY, f"no {name}"


def misspell(rng, d, library):
    present = [name for name in (*DECISIVE, *OPTIONAL, "rope_parameters") if name in fields(d)]
    name = rng.choice(present)
    at = rng.randrange(len(name) - 1)
    slip = rng.choice(
        [name[:at] + name[at + 1] + name[at] + name[at + 2 :], name + "s", name[:at] + name[at:] * 1 + "_"]
    )
    if slip == name:
        slip += "x"
    edit_config(d, **{name: ..., slip: fields(d)[name]})
    return REFUSED, f"{name} spelt {slip}"


def shift(rng, d, library):
    name = rng.choice(DECISIVE)
    edit_config(d, **{name: fields(d)[name] + rng.choice((-1, 1, 2))})
    return REFUSED, f"{name} shifted"


def tie(rng, d, library):
    tied = not fields(d)["tie_word_embeddings"]
    edit_config(d, tie_word_embeddings=tied)
    return REFUSED, f"tie_word_embeddings={tied}"


def bias(rng, d, library):
    name = rng.choice(("attention_bias", "mlp_bias"))
    edit_config(d, **{name: not fields(d).get(name, False)})
    return ANY, f"{name} turned"


def another_type(rng, d, library):
    own = fields(d)["model_type"]
    other = rng.choice(
        [t for t in ("llama", "mistral", "qwen2", "qwen3", "kvp_llama", "gpt2", "gemma") if t != own]
    )
    edit_config(d, model_type=other)
    return REFUSED, f"model_type={other}"


def rope(rng, d, library):
    now = fields(d)["rope_parameters"]
    change = rng.choice(
        [
            {"rope_type": "unknown"},
            {"rope_type": "longrope"},
            {"rope_type": "llama3", "high_freq_factor": 0.5},
            {"rope_type": 3},
            {"rope_theta": "1e4"},
            {"rope_theta": -1.0},
            {"rope_tetha": 5.0},
            {"factor": "two"},
            {"factor": 0},
            {"partial_rotary_factor": 0.5},
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            {"rope_type": "linear", "factor": None},
        ]
    )
    edit_config(d, rope_parameters=now | change)
    return REFUSED, f"rope_parameters {change}"


def two_ropes(rng, d, library):
    edit_config(d, rope_scaling={"rope_type": "linear", "factor": 3.0})
    return REFUSED, "rope_scaling beside another rope_parameters"


def not_json(rng, d, library):
    file = rng.choice(files(d, "*.json"))
    whole = file.read_bytes()
    broken = rng.choice(
        [
            b"",
            whole[: len(whole) // 2],
            b"[1, 2]",
            b"\xff\xfe" + whole,
            b"\xef\xbb\xbf" + whole,
            b"[" * 100000,
            b"null",
        ]
    )
    file.write_bytes(broken)
    return REFUSED, f"{file.name} is {broken[:8]!r}..."


def not_a_number(rng, d, library):
    name = rng.choice(("rms_norm_eps", "attention_dropout", "hidden_size"))
    edit_config(d, **{name: rng.choice((float("nan"), float("inf")))})
    return REFUSED, f"{name} is no number"


def foreign_fields(rng, d, library):
    change = rng.choice(
        [
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
            {"auto_map": {"AutoConfig": "configuration_evil.Evil"}},
            {"attention_chunk_size": 8},
            {"is_causal": False},
            {"architectures": ["LlamaForSequenceClassification"]},
            {"eos_token_id": VOCABULARY},
            {"bos_token_id": [1, 10**6]},
            {"pad_token_id": -5},
            {"dtype": "int8"},
            {"hidden_act": "swoosh"},
        ]
    )
    edit_config(d, **change)
    return REFUSED, str(change)


def config_of_another(rng, d, library):
    other = library.original(
        rng.choice(("llama-tied", "mistral-window", "qwen2-tied", "qwen3", "gpt2", "pruned-qwen3"))
    )
    if fields(d) == fields(other):
        edit_config(d, hidden_size=64)
    else:
        shutil.copy(other / "config.json", d)
    return ANY, f"config of {other.name}"


# ---- config.json of pruned checkpoints


def widths(rng, d, library):
    layers = fields(d).get("kvp_layers")
    if layers is None:
        edit_config(d, kvp_cache={"window": 4})
        return REFUSED, "kvp_cache of a dense model"
    layer = rng.choice(layers)
    pairs = layer["rope_pairs"]
    change = rng.choice(
        [
            lambda: layer.update(qk_head_dim=layer["qk_head_dim"] + 2),
            lambda: layer.update(v_head_dim=layer["v_head_dim"] - 1),
            lambda: layer.update(intermediate_size="40"),
            lambda: layer.update(num_attention_heads=5),
            lambda: layer.update(num_key_value_heads=0),
            lambda: layer.update(rope_pairs=[[99] * len(row) for row in pairs] if pairs else [[0]]),
            lambda: layer.update(rope_pairs=[[-1] * len(row) for row in pairs] if pairs else [[0]]),
            lambda: layer.update(rope_pairs=pairs[:-1] if pairs else [[0]]),
            lambda: layer.update(o_bias=True),
            lambda: layer.update(stream=[4, 4, 4]),
            lambda: layer.pop("v_head_dim"),
            lambda: layer.update(width=3),
            lambda: layers.pop(),
            lambda: layers.append(dict(layer)),
            lambda: layers.clear(),
        ]
    )
    change()
    edit_config(d, kvp_layers=layers)
    return REFUSED, f"kvp_layers {layer}"


def sparse_cache(rng, d, library):
    options = rng.choice(({"key_sparsity": 2}, {"window": -1}, {"windw": 1}, {"key_sparsity": "x"}, [], 3))
    edit_config(d, kvp_cache=options)
    return REFUSED, f"kvp_cache={options}"


# ---- weights


def truncate(rng, d, library):
    file = weights(rng, d)
    size = file.stat().st_size
    kept = rng.choice((0, 4, 8, size // 2, size - 1))
    file.write_bytes(file.read_bytes()[:kept])
    return REFUSED, f"{file.name} of {kept} bytes"


def garbage(rng, d, library):
    file = weights(rng, d)
    whole = bytearray(file.read_bytes())
    case = rng.randrange(4)
    if case == 0:
        whole[: rng.randrange(1, 8)] = b"\xff"
    elif case == 1:
        whole = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    elif case == 2:
        whole += b"more"
    else:
        whole[8:12] = b"}}}}"
    file.write_bytes(bytes(whole))
    return REFUSED, f"{file.name} is garbage, case {case}"


def tensors(rng, d, library):
    file = weights(rng, d)
    kind = rng.choice(
        ("drop", "rename", "add", "reshape", "transpose", "narrow", "nan", "inf", "prefix", "integer")
    )

    def change(state):
        name = rng.choice(sorted(name for name in state if state[name].dim() > 1))
        value = state[name]
        if kind == "drop":
            del state[name]
        elif kind == "rename":
            state[name.replace("weight", "wieght") if "weight" in name else f"{name}s"] = state.pop(name)
        elif kind == "add":
            state[f"{name.removesuffix('.weight')}.extra"] = value.clone()  # experts have no ".weight"
        elif kind == "reshape":
            state[name] = value.flatten()
        elif kind == "transpose":
            state[name] = value.T if value.shape[0] != value.shape[1] else value[:-1]
        elif kind == "narrow":
            state[name] = value.to(rng.choice((torch.float16, torch.bfloat16, torch.float64)))
        elif kind in ("nan", "inf"):
            value[-1, -1] = float(kind)
        elif kind == "prefix":
            return {f"base_model.model.{name}": value for name, value in state.items()}
        else:
            state[name] = value.to(torch.int8)
        return state

    edit_weights(d, change, file.name)
    return REFUSED, f"{kind} in {file.name}"


def biases(rng, d, library):
    module = rng.choice(("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj", "input_layernorm"))
    name = f"model.layers.0.{module}.bias"
    file = weights(rng, d)
    here = [name in fields_of(file) for file in files(d, "*.safetensors")]
    if any(here):
        edit_weights(
            d,
            lambda state: {n: t for n, t in state.items() if n != name},
            files(d, "*.safetensors")[here.index(True)].name,
        )
        return REFUSED, f"no {name}"
    edit_weights(d, lambda state: state | {name: torch.ones(16)}, file.name)
    return REFUSED, f"{name} beside the others"


def fields_of(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def convert(rng, d, library):
    dtype = rng.choice((torch.float16, torch.bfloat16))
    for file in files(d, "*.safetensors"):
        edit_weights(d, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}, file.name)
    edit_config(d, dtype=rng.choice((..., "float32", str(dtype).removeprefix("torch."))))
    return ANY, f"all in {dtype}"


def old_buffers(rng, d, library):
    edit_weights(
        d,
        lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        weights(rng, d).name,
    )
    return (SAME if (d / WEIGHTS).exists() else ANY), "an inv_freq that old checkpoints store"


def head(rng, d, library):
    if not fields(d)["tie_word_embeddings"]:
        edit_weights(
            d, lambda state: {n: t for n, t in state.items() if n != "lm_head.weight"}, _with_head(d)
        )
        return REFUSED, "no head"
    same = rng.random() < 0.5

    def change(state):
        embedding = state["model.embed_tokens.weight"].clone()
        if not same:
            embedding[-1, -1] += 1
        return state | {"lm_head.weight": embedding}

    edit_weights(d, change)
    return (SAME, "the same head beside the embedding") if same else (REFUSED, "another head, and tied")


def _with_head(d):
    return next(file.name for file in files(d, "*.safetensors") if "lm_head.weight" in fields_of(file))


def weights_of_another(rng, d, library):
    other = library.original(rng.choice(("llama-tied", "mistral", "qwen2", "qwen3", "pruned-qwen2")))
    if not (d / WEIGHTS).exists() or fields(other) == fields(d):
        return tensors(rng, d, library)
    shutil.copy(other / WEIGHTS, d)
    return ANY, f"weights of {other.name}"


def shards(rng, d, library):
    if not (d / INDEX).exists():
        shard(d)
    index = json.loads((d / INDEX).read_text())
    places = index["weight_map"]
    one, two = files(d, "model-*.safetensors")
    name = rng.choice(sorted(places))
    case = rng.choice(
        (
            "whole",
            "swap",
            "missing",
            "twice",
            "misplaced",
            "unnamed",
            "outside",
            "no map",
            "both",
            "stale",
            "no index",
        )
    )
    if case == "swap":
        one.rename(d / "held"), two.rename(one), (d / "held").rename(two)
    elif case == "missing":
        rng.choice((one, two)).unlink()
    elif case == "twice":
        shutil.copy(one, two)
    elif case == "misplaced":
        places[name] = one.name if places[name] == two.name else two.name
    elif case == "unnamed":
        del places[name]
    elif case == "outside":
        places[name] = "../" + places[name]
    elif case == "no map":
        index = {"metadata": {}}
    elif case == "both":
        shutil.copy(library.original("llama") / WEIGHTS, d)
    elif case == "stale":
        shutil.copy(one, d / "model-00003-of-00003.safetensors")
    (d / INDEX).write_text(json.dumps(index))
    if case == "no index":
        (d / INDEX).unlink()
    return (SAME if case == "whole" else REFUSED), f"shards: {case}"


# ---- tokenizer and neighbours


def tokenizer(rng, d, library):
    case = rng.choice(("gone", "larger", "code", "class", "empty", "no vocabulary", "cut"))
    file = d / "tokenizer.json"
    whole = json.loads(file.read_text())
    if case == "gone":
        file.unlink()
    elif case == "larger":
        whole["added_tokens"].append({**whole["added_tokens"][0], "id": VOCABULARY, "content": "<new>"})
        file.write_text(json.dumps(whole))
    elif case == "code":
        edit_config(d, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]})
    elif case == "class":
        edit_config(d, "tokenizer_config.json", tokenizer_class="EvilTokenizer")
        return ANY, "an unknown class of tokenizer"
    elif case == "empty":
        whole["model"]["vocab"], whole["added_tokens"] = {}, []
        file.write_text(json.dumps(whole))
    elif case == "no vocabulary":
        del whole["model"]
        file.write_text(json.dumps(whole))
    else:
        file.write_bytes(file.read_bytes()[: rng.randrange(1, 2000)])
    return REFUSED, f"tokenizer: {case}"


def neighbours(rng, d, library):
    case = rng.choice(
        ("adapter", "pickle", "consolidated", "gguf only", "pickle only", "ids", "sampling", "readme", "code")
    )
    if case == "adapter":
        (d / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    elif case == "pickle":
        (d / "pytorch_model.bin").write_bytes(b"other weights")
        return SAME, "a pickle that nothing opens"
    elif case == "consolidated":
        shutil.copy(files(d, "*.safetensors")[0], d / "consolidated.safetensors")
        return SAME, "another form of the weights, which nothing opens"
    elif case in ("gguf only", "pickle only"):
        for file in files(d, "*.safetensors", "*.index.json"):
            file.unlink()
        (d / ("model.gguf" if case == "gguf only" else "pytorch_model.bin")).write_bytes(b"GGUF")
    elif case == "ids":
        edit_config(d, "generation_config.json", eos_token_id=rng.choice((VOCABULARY, [2, -7], "2")))
    elif case == "sampling":
        edit_config(d, "generation_config.json", temperature=0.9, top_p=0.6)
    elif case == "readme":
        (d / "README.md").write_text("A model.")
        return SAME, "a README"
    else:
        (d / "modeling_evil.py").write_text("raise SystemExit('it ran')")
        return SAME, "Python code that nothing asks for"
    return REFUSED, f"neighbours: {case}"


def links(rng, d, library):
    file = rng.choice(files(d, "config.json", "*.safetensors", "tokenizer.json"))
    case = rng.choice(("broken", "circle", "directory", "whole", "gone"))
    held = file.with_name("held")
    file.rename(held)
    if case == "broken":
        file.symlink_to(d / "nowhere")
        held.unlink()
    elif case == "circle":
        file.symlink_to(file)
    elif case == "directory":
        file.mkdir()
    elif case == "whole":
        shutil.move(held, library.root / f"blob-{d.name}")
        file.symlink_to(library.root / f"blob-{d.name}")
    return (SAME if case == "whole" else REFUSED), f"{file.name} is a link: {case}"


def nothing(rng, d, library):
    return SAME, "nothing"


DAMAGES: tuple[Damage, ...] = (
    retype_decisive,
    retype_any,
    remove_decisive,
    remove_any,
    misspell,
    shift,
    tie,
    bias,
    another_type,
    rope,
    two_ropes,
    not_json,
    not_a_number,
    foreign_fields,
    config_of_another,
    widths,
    sparse_cache,
    truncate,
    garbage,
    tensors,
    tensors,
    biases,
    convert,
    old_buffers,
    head,
    weights_of_another,
    shards,
    tokenizer,
    neighbours,
    links,
    nothing,
)
