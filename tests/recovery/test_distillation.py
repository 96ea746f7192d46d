"""Learning from the dense model: the loss, its gradient, and whole recoveries in one process and two, killed or not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from kvp.data.tokens import IGNORE
from kvp.models.surgery import apply
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import foretell
from kvp.recovery import distillation
from kvp.recovery.batches import collate
from kvp.recovery.distillation import Distillation, divergence, hidden_error
from kvp.recovery.distiller import Distiller
from kvp.recovery.journal import newest_checkpoint
from kvp.recovery.training import train
from tests.conftest import random_plan, tiny_model
from tests.helpers.recovery import adapter, make
from tests.helpers.runs import compose_here, run_here

BOTH = Distillation(hidden_weight=0.5, temperature=2.0)
KL = Distillation(text_weight=0)


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint without two fifths of its channels."""
    path = tmp_path_factory.mktemp("pruned")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    apply(model, random_plan(model, ["qk", "vo"])).save_pretrained(path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(path)
    return path


def recover(recipe, student, teacher, directory, corpora, seed=3):
    directory.mkdir(exist_ok=True)
    return train(recipe, student, directory, corpora=corpora, seed=seed, device="cpu", teacher=teacher)


def rows(directory):
    return [json.loads(line) for line in (directory / "losses.jsonl").open()]


def losses(directory):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(directory)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_the_formula_and_so_is_its_gradient(temperature, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 4)  # a last chunk of one
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 7, 11) for _ in range(2))
    student.requires_grad_()
    counts = torch.rand(2, 7) > 0.3
    p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
    naive = (p * (p / q).log()).sum(-1)[counts].sum() * temperature**2
    found = divergence(student, teacher, counts, temperature)
    torch.testing.assert_close(found, naive)
    slopes = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, naive)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slopes[0], temperature * (q - p) * counts[..., None], rtol=1e-4, atol=1e-6)
    assert divergence(teacher, teacher, counts, temperature) == 0


def test_hidden_error_is_relative_and_per_layer():
    teacher = [torch.randn(2, 5, 6), 1000 * torch.randn(2, 5, 6)]
    counts = torch.ones(2, 5, dtype=torch.bool)
    counts[0, 3:] = False
    student = [1.1 * teacher[0], 0.7 * teacher[1]]
    assert hidden_error(student, teacher, counts).item() == pytest.approx(8 * (0.01 + 0.09) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="has 1 layers of 6 channels, the dense one 2 layers of 6"):
        hidden_error(student[:1], teacher, counts)


@pytest.mark.parametrize("options", [KL, BOTH, Distillation(logits_weight=0, hidden_weight=1.0)], ids=str)
def test_only_the_adapter_moves_and_a_batch_costs_what_the_formula_says(options, tmp_path):
    dense = tiny_model()
    dense.save_pretrained(tmp_path / "dense")
    cut = apply(tiny_model(), random_plan(dense, ["qk", "vo"]))
    model = get_peft_model(
        cut, LoraConfig(r=2, target_modules=["o_proj", "up_proj"], init_lora_weights=False)
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Distiller(
        distillation=options, teacher=str(tmp_path / "dense"), dtype="float32", model=model, args=arguments
    )
    ids = torch.randint(3, 96, (2, 12)).tolist()
    batch = collate([{"input_ids": row, "labels": [IGNORE] * 3 + row[3:]} for row in ids])
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=18)
    loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())

    with torch.no_grad():
        found, expected = (m(batch["input_ids"], output_hidden_states=True) for m in (model, dense))
    counts = torch.zeros(2, 16, dtype=torch.bool)
    counts[:, 2:11] = True  # what predicts the tokens 3 to 11
    p, q = ((x.logits / options.temperature).log_softmax(-1)[counts] for x in (expected, found))
    kl = options.temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    text = (
        -found.logits.log_softmax(-1)[:, :-1]
        .gather(-1, batch["input_ids"][:, 1:, None])[counts[:, :-1]]
        .mean()
    )
    layers = zip(found.hidden_states[1:], expected.hidden_states[1:], strict=True)
    error = torch.stack(
        [((s - t).square().sum(-1) / t.square().sum(-1))[counts].mean() for s, t in layers]
    ).mean()
    total = options.text_weight * text + options.logits_weight * kl + options.hidden_weight * error
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_the_teacher_itself_is_at_no_distance_before_it_moves(checkpoint, corpora, tmp_path):
    recover(make(max_steps=3, distillation=BOTH), checkpoint, checkpoint, tmp_path / "x", corpora)
    first, *_, last = rows(tmp_path / "x")
    assert first["logits_loss"] == first["hidden_loss"] == 0
    assert first["loss"] == first["text_loss"] > 0
    assert last["logits_loss"] > 0


def test_the_teacher_alone_brings_a_pruned_model_nearer_to_it(pruned, checkpoint, corpora, tmp_path):
    result = recover(make(max_steps=16, distillation=KL), pruned, checkpoint, tmp_path / "x", corpora)
    told = result["distillation"]
    assert {key: told[key] for key in ("text_weight", "logits_weight", "temperature")} == {
        "text_weight": 0,
        "logits_weight": 1.0,
        "temperature": 1.0,
    }
    assert told["final_logits_loss"] < 0.7 * told["first_logits_loss"]
    for row in rows(tmp_path / "x"):
        assert row["loss"] == pytest.approx(row["logits_loss"])
        assert "hidden_loss" not in row


def test_a_run_that_died_goes_on_with_the_same_losses(
    pruned,
    checkpoint,
    corpora,
    tmp_path,
    monkeypatch,
):
    log = Distiller.log

    def die(self, logs, start_time=None):
        log(self, logs, start_time)
        if self.state.global_step == 10:
            raise KeyboardInterrupt

    recipe = make(max_steps=12, save_steps=4, distillation=BOTH)
    monkeypatch.setattr(Distiller, "log", die)
    with pytest.raises(KeyboardInterrupt):
        recover(recipe, pruned, checkpoint, tmp_path / "died", corpora)
    assert newest_checkpoint(tmp_path / "died" / "trainer").endswith("-8")
    monkeypatch.undo()
    for name in ("died", "undisturbed"):
        recover(recipe, pruned, checkpoint, tmp_path / name, corpora)
    assert losses(tmp_path / "died") == losses(tmp_path / "undisturbed")
    found, expected = adapter(tmp_path / "died"), adapter(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_processes_learn_as_one_does(pruned, checkpoint, corpora, tmp_path):
    recipe = make(max_steps=12, dropout=0.0, distillation=BOTH)  # less than an epoch
    for name, processes in {"one": 1, "two": 2}.items():
        recover(replace(recipe, num_processes=processes), pruned, checkpoint, tmp_path / name, corpora)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, abs=1e-3, rel=1e-3)


def test_another_vocabulary_is_refused_before_weights_are_read(checkpoint, corpora, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "model.safetensors").unlink()
    words = other / "tokenizer.json"
    words.write_text(words.read_text().replace("moon", "noon"))
    recipe = make(distillation=KL)
    with pytest.raises(
        ValueError, match=f"the teacher {other} predicts 64 tokens.*both vocabularies must be the same"
    ):
        recover(recipe, checkpoint, other, tmp_path / "x", corpora)
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        recover(recipe, checkpoint, None, tmp_path / "x", corpora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"text_weight": -1.0}, "text_weight must be >= 0, got -1.0"),
        ({"logits_weight": float("nan")}, "logits_weight must be a finite number, got nan"),
        ({"text_weight": float("inf")}, "text_weight must be a finite number, got inf"),
        (
            {"logits_weight": 0.0},
            "got 0 and 0: nothing is learned from the dense model.*recovery/distillation=none",
        ),
    ],
)
def test_options_out_of_bounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**options)


def test_options_without_a_choice_are_refused():
    with pytest.raises(ValueError, match="recovery/distillation=logits before its options"):
        make(distillation={"temperature": 2.0})


def test_the_identity_is_the_old_one_unless_there_is_a_teacher(corpora):
    assert "distillation" not in make().identity(corpora)
    assert repr(make(distillation=KL).identity(corpora)["distillation"]["text_weight"]) == "0.0"  # not 0
    assert make(distillation=KL).identity(corpora) != make(distillation=BOTH).identity(corpora)


LIGHT = ("evaluation.perplexity.corpora=[squad]", "evaluation.zero_shot=null", "measure=none")
CHOSEN = ("recovery/distillation=logits", "recovery.distillation.temperature=2")


def test_a_run_says_who_taught(tmp_path):
    record = run_here(tmp_path, *LIGHT, "tracker=jsonl", "strategy=magnitude", *CHOSEN)
    result = record["recovery"]
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert result["teacher"] == stages["model"]["fingerprint"]
    assert result["distillation"]["temperature"] == 2
    assert {*result["loss_parts"]} == {"text", "logits"}
    for (step, loss), *parts in zip(result["losses"], *result["loss_parts"].values(), strict=True):
        assert [part[0] for part in parts] == [step, step]
        assert loss == pytest.approx(sum(part[1] for part in parts), rel=1e-4)
    tracked = (Path(record["directory"]) / "metrics.jsonl").read_text()
    assert "recover/logits_loss" in tracked
    manifest = json.loads(Path(stages["recover"]["path"], "manifest.json").read_text())
    assert manifest["inputs"]["teacher"] == result["teacher"]
    foretold, _ = foretell(Experiment.compose(compose_here(tmp_path, *LIGHT, "strategy=magnitude", *CHOSEN)))
    assert all(stage.stands for stage in foretold)


def test_the_dense_model_alone_has_nothing_to_learn_from_itself(tmp_path):
    words = ("strategy=none", *CHOSEN, "recovery.distillation.text_weight=0")
    with pytest.raises(ValueError, match="nothing to learn from itself alone"):
        run_here(tmp_path, *LIGHT, "tracker=none", *words)


def test_a_configuration_without_a_teacher_is_the_old_one(tmp_path):
    assert "distillation" not in compose_here(tmp_path).recovery
