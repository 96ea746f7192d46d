"""The studies of sparse methods and of plasticity: every row can be had of the packaged model's shape."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, PretrainedConfig

from kvp.__main__ import CONF
from kvp.models.configs import pruned_config
from kvp.models.shapes import cut, layer_shapes
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_model
from kvp.sweep.jobs import expand
from kvp.types import Budget


def experiments(name: str) -> list[Experiment]:
    """The first job of every row."""
    rows = OmegaConf.load(CONF / "experiment" / f"{name}.yaml").rows
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [
            Experiment.compose(
                compose("config", overrides=[f"experiment={name}", *expand([row], [])[0], "tracker=none"])
            )
            for row in rows
        ]


def packaged() -> PretrainedConfig:
    node = OmegaConf.load(CONF / "model" / "smollm2_135m_shape.yaml").config
    return AutoConfig.for_model(**OmegaConf.to_container(node))


@pytest.mark.parametrize("name", ["sparse", "mustafar", "bytes", "plasticity", "plasticity_regrow"])
def test_every_row_fits_the_packaged_model(name):
    for x in experiments(name):
        check_model(x, packaged())


def test_what_was_cut_by_70_percent_can_be_cut_by_70_percent_again():
    strategy = experiments("plasticity")[-1].strategy
    config, budget = packaged(), Budget(value=0.7, of="kv_cache")
    for _ in range(3):
        strategy.check(config, budget)
        scores = {space: torch.zeros(space.shape) for space in strategy.spaces(config)}
        plan = strategy.plan(config, scores, budget, torch.zeros(30))
        shapes = cut(layer_shapes(config), plan)
        if min(shape.qk_head_dim for shape in shapes) < 8:
            return
        config = pruned_config(config, shapes, range(30))
    raise AssertionError("two cuts by 70 % leave less than 8 of 64 channels")
