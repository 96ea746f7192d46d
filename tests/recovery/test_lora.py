from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
)

from kvp.data.instructions import Instructions
from kvp.data.tokens import IGNORE
from kvp.estimate.kept import Adapter
from kvp.models.joined import joined
from kvp.models.load import save
from kvp.recovery import fit
from kvp.recovery.batches import collate, mean_loss
from kvp.recovery.journal import newest_checkpoint
from kvp.recovery.lora import PROJECTIONS
from kvp.recovery.merge import merge
from tests.helpers.recovery import (
    adapter,
    make,
    recover,
    save_checkpoint,
    train_until_killed,
)

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@dataclass
class Recovered:
    path: Path
    result: dict[str, Any]
    before: dict[str, str]


@pytest.fixture(scope="module")
def recovered(checkpoint, corpora, tmp_path_factory) -> Recovered:
    path, before = tmp_path_factory.mktemp("recovered"), digests(checkpoint)
    return Recovered(path, recover(make(validation=6), checkpoint, path, corpora), before)


def test_the_loss_goes_down_also_on_what_was_held_out(recovered):
    result = recovered.result
    assert result["final_loss"] < 0.8 * result["first_loss"]
    assert result["validation"]["loss_after"] < 0.8 * result["validation"]["loss_before"]
    assert result["steps"] == 25 and result["tokens_seen"] == 25 * 4 * 16
    assert json.loads(json.dumps(result)) == result


def test_every_step_has_its_line(recovered):
    rows = [json.loads(line) for line in (recovered.path / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 26))
    assert rows[0]["learning_rate"] == 0 and rows[2]["learning_rate"] == pytest.approx(3e-2)  # warmed up
    assert rows[0]["loss"] == recovered.result["first_loss"]


def test_the_checkpoint_is_untouched_and_no_pickle_is_left(recovered, checkpoint):
    assert digests(checkpoint) == recovered.before
    files = [p for p in recovered.path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"}
    assert {p.name for p in recovered.path.iterdir()} == {"adapter", "model", "losses.jsonl"}


def test_merged_weights_are_the_update_written_out(recovered, checkpoint):
    dense, merged = (load_file(path / "model.safetensors") for path in (checkpoint, recovered.path / "model"))
    updates = adapter(recovered.path)
    assert len(updates) == 2 * 7 * 2
    for name, weight in dense.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in updates:
            weight = weight + 2 * updates[f"{prefix}.lora_B.weight"] @ updates[f"{prefix}.lora_A.weight"]
        torch.testing.assert_close(merged[name], weight)


def test_adapter_and_merged_model_open_as_any_other(recovered, checkpoint):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(recovered.path / "model")(
        "the cow eats the moon", return_tensors="pt"
    )
    updated = PeftModel.from_pretrained(base, recovered.path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(recovered.path / "model").eval()
    torch.testing.assert_close(
        updated(ids["input_ids"]).logits, merged(ids["input_ids"]).logits, atol=1e-4, rtol=1e-4
    )
    assert merged.config.to_dict() | {"_name_or_path": ""} == base.config.to_dict() | {"_name_or_path": ""}


def test_queries_of_a_latent_learn_with_the_other_queries(checkpoint, corpora, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint)
    latent = joined(AutoModelForCausalLM.from_pretrained(checkpoint), 1, latent=True)
    save(latent, AutoTokenizer.from_pretrained(checkpoint), tmp_path / "latent")
    recipe = make(max_steps=4, target_modules=["q_proj"])
    recover(recipe, tmp_path / "latent", tmp_path / "recovered", corpora)
    tuned = adapter(tmp_path / "recovered")
    parts = {name.split(".self_attn.")[1].split(".")[0] for name in tuned}
    assert parts == {"q_proj", "q_latent_proj"} and all(each.any() for each in tuned.values())
    counted = Adapter(rank=recipe.rank, modules=recipe.modules).params(latent.config)
    assert counted == sum(each.numel() for each in tuned.values())
    assert Adapter(rank=8, modules=recipe.modules).params(config) == 2 * 8 * (
        32 + 32
    )  # a dense model has no latent


def test_a_dense_model_with_fused_matrices_learns_as_its_cut_ones_do(checkpoint, corpora, tmp_path):
    """Phi-3: the control would have an update of o_proj and down_proj alone."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    dense = Phi3ForCausalLM(Phi3Config(**sizes, **heads, **dict.fromkeys(IDS, 0)))
    save(dense, AutoTokenizer.from_pretrained(checkpoint), tmp_path / "dense")
    recipe = make(max_steps=4)
    result = recover(recipe, tmp_path / "dense", tmp_path / "recovered", corpora)
    tuned = adapter(tmp_path / "recovered")
    assert {name.split(".")[-3] for name in tuned} == set(PROJECTIONS)
    counted = Adapter(rank=recipe.rank, modules=recipe.modules).params(dense.config)
    assert result["trainable_params"] == counted == sum(each.numel() for each in tuned.values())


def test_an_adapter_of_other_modules_is_not_merged(recovered, checkpoint, tmp_path):
    shutil.copytree(recovered.path / "adapter", tmp_path / "adapter")
    tuned = adapter(tmp_path)
    tuned.pop(min(tuned))
    save_file(tuned, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"do not belong together: .*down_proj.* in one of them alone"):
        merge(checkpoint, tmp_path / "adapter", torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_trained_in_bfloat16_and_stored_as_it_came(stored, corpora, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "pruned", stored)
    result = recover(make(dtype="bfloat16"), checkpoint, tmp_path / "recovered", corpora)
    assert result["final_loss"] < 0.8 * result["first_loss"]
    assert {t.dtype for t in adapter(tmp_path / "recovered").values()} == {torch.float32}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered" / "model")
    assert merged.dtype == stored


def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(checkpoint, corpora, tmp_path):
    killed = tmp_path / "killed"
    train_until_killed(checkpoint, killed, corpora)
    resumed_from = int(str(newest_checkpoint(killed / "trainer")).rpartition("-")[2])
    assert 14 <= resumed_from < 60

    result = recover(make(max_steps=60), checkpoint, killed, corpora, seed=3)
    assert result["steps"] == 60
    recover(make(max_steps=60), checkpoint, tmp_path / "undisturbed", corpora, seed=3)
    found, expected = adapter(killed), adapter(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    rows = [
        [json.loads(x) for x in (tmp_path / d / "losses.jsonl").open()] for d in ("killed", "undisturbed")
    ]
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]


def test_a_checkpoint_that_was_being_written_is_removed(tmp_path):
    for step, complete in {7: True, 14: True, 100: False}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-14")
    assert not (tmp_path / "checkpoint-100").exists()
    assert newest_checkpoint(tmp_path / "absent") is None


def test_seed_decides_and_gradient_checkpointing_does_not(checkpoint, corpora, tmp_path):
    runs = {
        "a": (make(max_steps=4), 0),
        "b": (make(max_steps=4, gradient_checkpointing=True), 0),
        "c": (make(max_steps=4), 1),
    }
    for name, (recovery, seed) in runs.items():
        recover(recovery, checkpoint, tmp_path / name, corpora, seed)
    a, b, c = (adapter(tmp_path / name) for name in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_every_model_sees_the_same_batches(checkpoint, corpora, tmp_path, monkeypatch):
    seen: list[list] = []
    monkeypatch.setattr(fit, "collate", lambda examples: (seen[-1].append(examples), collate(examples))[1])
    for path in (checkpoint, save_checkpoint(tmp_path / "wide", hidden_size=64)):
        seen.append([])
        recover(make(), path, tmp_path / f"{len(seen)}", corpora)
    assert seen[0] == seen[1]
    epoch = len(seen[0]) // 2
    assert seen[0][:epoch] != seen[0][epoch : 2 * epoch]


def test_padding_changes_nothing(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    examples = [{"input_ids": list(range(1, n)), "labels": [IGNORE, *range(2, n)]} for n in (4, 9, 12)]
    batch = collate(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 16)
    logits = model(batch["input_ids"]).logits
    for row, example in zip(logits, examples, strict=True):
        alone = model(torch.tensor([example["input_ids"]])).logits[0]
        torch.testing.assert_close(row[: len(alone)], alone)
    lengths = torch.tensor([len(e["input_ids"]) - 1 for e in examples])
    losses = torch.tensor([mean_loss(model, [e], 1) for e in examples])
    assert mean_loss(model, examples, 2) == pytest.approx((losses * lengths).sum() / lengths.sum())


def test_instructions(checkpoint, tmp_path):
    rows = [
        {"instruction": "the cat sees", "input": "", "output": "the moon"},
        {"instruction": "the dog", "input": "corn", "output": "eats the corn"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 6))
    data = Instructions(path=str(tmp_path / "rows.json"), cutoff=60)
    result = recover(make(data=data, max_steps=None, epochs=2), checkpoint, tmp_path / "recovered", {})
    assert result["steps"] == 6 and result["epochs"] == 2
    assert result["final_loss"] < result["first_loss"]


def test_a_diverging_run_stops_and_says_why(checkpoint, corpora, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"Step \d+: loss .* learning rate 9.6e\+29: lower recovery.learning_rate"
    ):
        recover(make(learning_rate=1e30, warmup_steps=0), checkpoint, tmp_path / "recovered", corpora)


def test_an_adapter_that_did_not_move_is_an_error(checkpoint, corpora, tmp_path):
    with pytest.raises(ArithmeticError, match="did not move from 0"):
        recover(
            make(max_steps=1, warmup_steps=0, learning_rate=1e-60),
            checkpoint,
            tmp_path / "recovered",
            corpora,
        )


def test_holding_everything_out_is_an_error(checkpoint, corpora, tmp_path):
    with pytest.raises(ValueError, match="leave none to train on"):
        recover(make(validation=1000), checkpoint, tmp_path / "recovered", corpora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "Llama-2 and later diverge"),
        ({"epochs": 1}, "exactly one of recovery.epochs and recovery.max_steps .* got 1.0 and 25"),
        ({"max_steps": None}, "exactly one"),
        ({"rank": 0}, "rank must be > 0, got 0"),
        ({"batch_size": 5}, "multiple of recovery.micro_batch_size"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"scheduler": "step"}, "recovery.scheduler must be one of linear, cosine, got 'step'"),
    ],
)
def test_options_out_of_bounds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_identity_names_the_data_and_no_bookkeeping(corpora):
    identity = make().identity(corpora)
    assert json.loads(json.dumps(identity)) == identity
    assert identity == make(save_steps=9).identity(corpora)
    assert identity != make(rank=4).identity(corpora)
    assert identity["data"]["corpora"][0]["name"] == "text"
