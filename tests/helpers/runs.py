"""Whole runs on the tiny model, in this process."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from kvp.__main__ import CONF
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.run import run

ROOT = Path(__file__).parents[2]

LIGHT = ("tracker=none", "measure=none", "evaluation.zero_shot=null")


def overrides(tmp_path, *more):
    return ["debug=smoke", f"store={tmp_path}/store", f"runs={tmp_path}/runs", *more]


def compose_here(tmp_path, *more):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides(tmp_path, *more), return_hydra_config=True)


def run_here(tmp_path, *more):
    """Run and return the record as JSON data."""
    return run(Experiment.compose(compose_here(tmp_path, *more))).data()
