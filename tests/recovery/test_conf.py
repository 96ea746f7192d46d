from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kvp.data.instructions import Instructions
from kvp.recovery.distillation import Distillation
from kvp.recovery.lora import Lora

CONF = Path(__file__).parents[2] / "conf"


def names(options):
    return {field.name for field in fields(options)}


def load(path):
    """The node as it stands in a whole configuration, whose `dtype` it refers to, without distillation."""
    node = OmegaConf.load(path)
    assert node.pop("defaults") == [{"distillation": "none"}, "_self_"]
    return OmegaConf.create({"dtype": "float32", "recovery": node}).recovery


@pytest.mark.parametrize("path", (CONF / "recovery").glob("lora*.yaml"), ids=lambda path: path.stem)
def test_every_lora_states_every_option(path):
    config = load(path)
    recovery = instantiate(config, _convert_="all")
    assert set(config) == {"_target_"} | names(Lora) - {"distillation"}
    assert set(config.data) == {"_target_"} | names(recovery.data)


def test_the_distillation_states_every_option_at_its_default():
    config = OmegaConf.load(CONF / "recovery" / "distillation" / "logits.yaml")
    assert instantiate(config) == Distillation()
    assert set(config) == {"_target_"} | names(Distillation)


def test_the_alpaca_recipe_is_that_of_llm_pruner():
    recipe = instantiate(load(CONF / "recovery" / "lora_alpaca.yaml"), _convert_="all")
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.learning_rate) == (8, 16, 0.05, 1e-4)
    assert (recipe.epochs, recipe.batch_size, recipe.micro_batch_size, recipe.warmup_steps) == (2, 64, 4, 100)
    assert recipe.data == Instructions(cutoff=256) and recipe.validation == 2000
