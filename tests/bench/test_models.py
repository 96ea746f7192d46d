"""Checkpoints, records, shapes and plans as models of a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from kvp.bench.models import Subject, distinct, find_subjects
from kvp.bench.plans import cut_subjects, planned_subject
from kvp.measurement.memory import weights_bytes
from kvp.models.plans import write_plan
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model

CPU, F32 = torch.device("cpu"), torch.float32


def small(**changes):
    fields = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 20}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "dtype": "float32"}
    return Subject(name="small", config=LlamaConfig(**{**fields, **heads, **changes}))


@pytest.fixture(scope="module")
def pruned():
    model = tiny_model()
    return apply(model, random_plan(model, ["kv_group", "qk", "vo"]))


def test_a_checkpoint_keeps_its_weights(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "mine")
    (subject,) = find_subjects(str(tmp_path / "mine"))
    assert subject.name == "mine"
    loaded = subject.load(device=CPU, dtype=F32, seed=0)
    for name, parameter in pruned.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_a_record_gives_its_dense_and_its_pruned_model(pruned, tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    pruned.save_pretrained(tmp_path / "pruned")
    record = {name: {"checkpoint": str(tmp_path / name)} for name in ("dense", "pruned")} | {"name": "run-1"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    found = find_subjects(str(tmp_path / "run.json"))
    assert [subject.name for subject in found] == ["dense", "run-1"]
    assert [s.name for s in find_subjects(str(tmp_path))] == ["dense", "run-1"]
    record |= {"name": "run-2"}
    (tmp_path / "other.json").write_text(json.dumps(record | {"pruned": record["dense"]}))
    others = find_subjects(str(tmp_path / "other.json"))
    assert [s.name for s in distinct([*found, *others])] == ["dense", "run-1"]
    (tmp_path / "other.json").write_text(json.dumps(record | {"pruned": {"checkpoint": "gone"}}))
    with pytest.raises(FileNotFoundError, match="gone, which is not there"):
        find_subjects(str(tmp_path / "other.json"))


@pytest.mark.parametrize("name", ["llama_7b_shape", "llama3_8b_shape", "smollm2_135m_shape"])
def test_shapes_are_those_of_the_models(name):
    """Parameters as published: 6,738,415,616; 8,030,261,248; 134,515,008. No weight is made."""
    published = {
        "llama_7b_shape": (6_738_415_616, 524_288),
        "llama3_8b_shape": (8_030_261_248, 131_072),
        "smollm2_135m_shape": (134_515_008, 23_040),
    }
    (subject,) = find_subjects(name)
    params, per_token = published[name]
    assert size(subject.config, layer_shapes(subject.config)).params == params
    assert subject.weights_bytes(torch.bfloat16) == 2 * params
    assert subject.cache_bytes_per_token(torch.bfloat16) == per_token


def test_random_weights_are_drawn_in_the_dtype_and_from_the_seed():
    (cut,) = cut_subjects(small(), 0.5, rivals=False)
    model = cut.load(device=CPU, dtype=torch.bfloat16, seed=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    again = cut.load(device=CPU, dtype=torch.bfloat16, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert model.lm_head.weight.float().std() > 0.01
    assert weights_bytes(model) - cut.weights_bytes(torch.bfloat16) < 1000  # two buffers of frequencies


def test_rivals_are_as_small_as_ours():
    dense = small()
    first = size(dense.config, layer_shapes(dense.config))
    subjects = cut_subjects(dense, 0.5, rivals=True)
    removed = {}
    for subject in subjects:
        its = size(subject.config, layer_shapes(subject.config))
        removed[subject.name] = (
            1 - its.params / first.params,
            1 - its.kv_bytes_per_token / first.kv_bytes_per_token,
        )
    assert len(removed) == 5
    params, kv_cache = removed.pop("KVPruner 50% KV")
    assert kv_cache == 0.5
    for name, (own_params, own_kv) in removed.items():
        near, of = (own_kv, 0.5) if name.endswith("KV") else (own_params, params)
        assert near == pytest.approx(of, abs=0.05), name
    with pytest.raises(ValueError, match="cannot be reached"):
        cut_subjects(small(num_hidden_layers=8), 0.5, rivals=True)


def test_cuts_that_round_alike_have_names_of_their_own():
    wide = small(head_dim=256, num_hidden_layers=1)
    names = [cut_subjects(wide, value, rivals=False)[0].name for value in (0.5, 0.501)]
    assert names == ["KVPruner 50% KV", "KVPruner 50.1% KV"]


def test_rope_pairs_of_a_cut_differ_between_heads_and_layers():
    (cut,) = cut_subjects(small(), 0.25, rivals=False)
    sets = {row for shape in layer_shapes(cut.config) for row in shape.rope_pairs}
    assert len(sets) > 100


def test_a_plan_is_a_shape(tmp_path):
    model = tiny_model()
    plan = random_plan(model, ["block", "qk", "vo", "ffn"])
    write_plan(tmp_path, plan)
    planned = planned_subject(Subject(name="dense", config=model.config), tmp_path)
    assert layer_shapes(planned.config) == layer_shapes(apply(model, plan).config)
    with pytest.raises(ValueError, match="made for another model"):
        planned_subject(small(), tmp_path)
    with pytest.raises(ValueError, match=r"holds no plan\.json"):
        planned_subject(small(), tmp_path / "nowhere")
    (tmp_path / "identity").mkdir()
    write_plan(tmp_path / "identity", Plan({}))
    same = planned_subject(small(), tmp_path / "identity")
    assert same.weights_bytes(F32) == small().weights_bytes(F32)


def test_no_such_model(tmp_path):
    for word in ("nowhere", str(tmp_path)):
        with pytest.raises(ValueError, match=r"is no model: give a directory.*llama_7b_shape"):
            find_subjects(word)
    with pytest.raises(ValueError, match=r"there is no .*run\.json"):
        find_subjects(str(tmp_path / "run.json"))
    (tmp_path / "run.json").write_text('{"name": "x", "status": "running"}')
    with pytest.raises(ValueError, match="no finished run"):
        find_subjects(str(tmp_path))


@pytest.mark.parametrize(
    "text", ['{"pruned": {}}', "5", '{"name": "x", "pru', '{"pruned": 5, "dense": {}}', "\xff"]
)
def test_a_file_that_is_no_record_is_named(text, tmp_path):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.json is no run\.json: "):
        find_subjects(str(tmp_path))


def test_names_tell_rows_apart():
    with pytest.raises(ValueError, match="two models are called small"):
        distinct([small(), small()])


def test_a_cut_shape_loads_in_a_process_of_its_own(tmp_path):
    """A command registers the pruned classes when it needs them; here nothing else has."""
    command = ["kvp.bench", "tiny", "--cut", "0.5", "--protocol", "quick", "--path", "eager", "--batch", "1"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {row["model"] for row in json.loads((tmp_path / "bench.json").read_bytes())["rows"]} == {
        "tiny",
        "KVPruner 50% KV",
    }
