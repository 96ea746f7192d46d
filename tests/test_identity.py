"""A fingerprint and a run's hash name classes and options, never the file that a class stands in."""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kvp.__main__ import CONF
from kvp.identity import chosen_options, class_name, named
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import foretell
from kvp.report.records.runs import read_runs
from kvp.upgrade import SCHEMA
from tests.helpers.runs import LIGHT, compose_here
from tests.report.sample_records import make_record

ROOT = Path(__file__).parents[1]


def test_names_of_classes():
    node = {
        "_target_": "kvp.strategies.methods.flap.FLAP",
        "allocator": [{"_target_": "mine.deep.module.Mine"}],
    }
    assert named(node) == {"class": "FLAP", "allocator": [{"class": "mine.deep.module.Mine"}]}
    assert named(named(node)) == named(node)


def test_choices_are_told_by_node_and_only_of_nodes():
    choices = {
        "strategy": "chain",
        "strategy@strategy.first": "flap",
        "strategy/allocator@strategy.first.allocator": "threshold",
        "experiment": None,
        "hydra/launcher": "basic",
    }
    assert chosen_options(choices, {"strategy": {}}) == {
        "strategy": "chain",
        "strategy.first": "flap",
        "strategy.first.allocator": "threshold",
    }


def test_no_two_classes_of_conf_share_a_name():
    """Class names stand for classes in fingerprints, so a name may belong to one class only."""
    paths = defaultdict(set)
    for file in CONF.rglob("*.yaml"):
        for line in file.read_text().splitlines():
            if line.strip().startswith("_target_: "):
                target = line.split()[1]
                paths[class_name(target)].add(target)
    assert len(paths) > 20
    assert {name: targets for name, targets in paths.items() if len(targets) > 1} == {}


def fingerprints(config):
    x = Experiment.compose(config)
    return x.hash, [stage.fingerprint for stage in foretell(x)[0]]


def test_moving_the_file_of_a_class_changes_no_fingerprint(tmp_path, monkeypatch):
    config = compose_here(tmp_path, "strategy=magnitude", *LIGHT)
    here = fingerprints(config)
    target = config.strategy._target_
    module, _, name = target.rpartition(".")
    source = Path(
        sys.modules[module].__file__ if module in sys.modules else ROOT / f"{module.replace('.', '/')}.py"
    )
    moved = tmp_path / "kvp_moved"
    moved.mkdir()
    shutil.copy(source, moved / "elsewhere.py")
    import kvp

    monkeypatch.setattr(kvp, "__path__", [*kvp.__path__, str(moved)])
    OmegaConf.set_struct(config, False)
    config.strategy._target_ = f"kvp.elsewhere.{name}"
    assert fingerprints(config) == here
    config.strategy.norm = "l2" if config.strategy.norm == "l1" else "l1"
    assert fingerprints(config) != here


def test_the_record_names_what_was_chosen_and_the_run_is_called_so(tmp_path):
    words = ("strategy=kvpruner_stock", "strategy.allocator.max_ratio=0.8", *LIGHT)
    x = Experiment.compose(compose_here(tmp_path, *words))
    assert x.choices["strategy"] == "kvpruner_stock"
    assert x.choices["strategy.allocator"] == "uniform"
    assert {"experiment", "debug", "launcher", "tracker"}.isdisjoint(x.choices)
    assert "-kvpruner_stock-" in x.name and "-lora_text-" in x.name
    assert x.node["strategy"]["class"] == "KVPruner"
    assert "kvp." not in str(x.node["strategy"])


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_old_records_read_as_new_ones(tmp_path, schema):
    import json

    record = make_record(schema=schema)
    old = record
    if schema < 3:
        del record["choices"]
        target = '"_target_": "kvp.strategies.methods.kvpruner.KVPruner"'
        old = json.loads(json.dumps(record).replace('"class": "KVPruner"', target))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(old))
    (run,) = read_runs([path])
    assert run.record.schema_version == SCHEMA
    assert run.record.origins(run.record.stages) == list(run.record.provenance.origins), (
        "computed by that command"
    )
    assert run.record.provenance.origins[0].commit == "f574f8d"
    assert run.record.config["strategy"]["class"] == "KVPruner"
    assert run.record.choices["strategy"] == "kvpruner"
