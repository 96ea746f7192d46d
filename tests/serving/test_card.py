"""The model card of a checkpoint: a header that the hub reads, the numbers of its run, a block per engine."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from kvp.record import RunRecord
from kvp.serving.card import OPEN, card
from kvp.serving.forms import FORMS
from kvp.serving.made import Made, checkpoint_of, made_by
from kvp.store.locks import IN_USE
from tests.conftest import tiny_config
from tests.report.sample_records import make_record

HUB = {"class": "HubModel", "name": "mine", "path": "owner/base-7b", "revision": None}


def made(model="pruned", **options):
    return Made(RunRecord.read(make_record(**options)), model)


def test_the_header_is_what_the_hub_reads():
    data = ModelCard(card(tiny_config(), form="stock", made=made())).data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "tags": ["kvp", "pruned"],
    }


def test_the_numbers_are_those_of_the_run_and_no_path_is_published():
    text = card(tiny_config(), form="stock", made=made("recovered", steps=40, ppl=43.25, recovered=31.5))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| p")
    ]
    assert ["perplexity of squad, 4,064 tokens in windows of 128", "20.00", "43.25", "31.50"] in rows
    assert "asked 25 % of kv_cache; achieved kv_cache 25.00 %" in text
    assert "`recovery=lora`" in text
    assert "commit f574f8d" in text
    assert "**recovered**" in text
    assert "/home" not in text
    assert "recovered" not in card(tiny_config(), form="stock", made=made("pruned", steps=40))


def test_a_packaged_model_says_its_origin_and_licence():
    model = {"class": "PackagedModel", "name": "q", "origin": "owner/q", "licence": "gemma"}
    data = ModelCard(card(tiny_config(), form="stock", made=made(config__model=model))).data
    assert (data.base_model, data.license) == ("owner/q", "gemma")


def test_a_licence_comes_from_the_card_of_the_base_model_or_is_said_to_hold(tmp_path):
    options = {"config__model": HUB, "dense__checkpoint": str(tmp_path)}
    unknown = ModelCard(card(tiny_config(), form="stock", made=made(**options)))
    assert unknown.data.license is None
    assert unknown.data.base_model == "owner/base-7b"
    assert "The licence of the model that was pruned holds" in unknown.content
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n# Base\n")
    assert ModelCard(card(tiny_config(), form="stock", made=made(**options))).data.license == "llama2"
    options["config__model"] = HUB | {"path": "/home/someone/base"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: owner/other\n---\n")
    local = ModelCard(card(tiny_config(), form="stock", made=made(**options)))
    assert (local.data.license, local.data.base_model) == ("mit", "owner/other")
    assert "/home" not in local.content


@pytest.mark.parametrize("form", FORMS)
def test_a_form_has_a_block_for_each_of_its_engines(form):
    text = card(tiny_config(), form=form)
    ways = {engine: way.strip().splitlines()[-2].partition("{")[0] for engine, way in OPEN.items()}
    assert {engine for engine, way in ways.items() if way in text} == {*FORMS[form].engines}
    assert ("trust_remote_code=True" in text) == (form == "remote_code")


def test_a_run_names_its_checkpoint_and_a_checkpoint_its_run(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / IN_USE).touch()
    checkpoint = tmp_path / "store" / "recover" / "0123456789abcdef" / "model"
    checkpoint.mkdir(parents=True)
    assert made_by(checkpoint) is None
    for name, content in (
        ("other", make_record()),
        ("this", make_record(steps=4, recovered__checkpoint=f"/elsewhere/{'/'.join(checkpoint.parts[-3:])}")),
        ("damaged", {"schema": 4}),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(content))
    found = made_by(checkpoint)
    assert found is not None
    assert (found.model, found.record.choices["recovery"]) == ("recovered", "lora")
    assert str(checkpoint_of(tmp_path / "runs" / "this")).endswith("recover/0123456789abcdef/model")
    assert checkpoint_of(checkpoint) == checkpoint
    with pytest.raises(ValueError, match="not the record of a run"):
        checkpoint_of(tmp_path / "runs" / "damaged" / "run.json")
