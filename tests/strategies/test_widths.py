"""`widths=` holds for every strategy that cuts channels; the others have no width."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvp.__main__ import CONF
from kvp.models.shapes import cut, layer_shapes
from kvp.strategies.methods.slicegpt import SliceGPT
from kvp.strategies.templates.scored import ScoreStrategy
from kvp.types import Budget
from tests.conftest import tiny_config
from tests.strategies.cases import OPTIONS, composed

FREE = {
    "flap",
    "llm_pruner",
    "numerical",
    "wanda_sp",
    "llm_bip",
    "adapruner",
    "mosaic_composite",
}  # papers take any
WITHOUT = {
    "none",
    "shortened_llm",
    "shortgpt",
    "sleb",
    "magnitude_sparse",
    "wanda",
    "sparsegpt",
    "alps",
    "mosaic",
}
CONFIG = tiny_config(
    "llama", "mha", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=8, vocab_size=64
)
CHOSEN = [("kernels", 8), ("tensor_cores", 16), ("engines", 32), ("quantized_cache", 64)]


def multiples(node):
    """Every `multiple_of` of a node and the nodes in it."""
    if not isinstance(node, dict):
        return []
    inner = [found for value in node.values() for found in multiples(value)]
    return [node["multiple_of"], *inner] if "multiple_of" in node else inner


def cutter(strategy):
    """What cuts: the strategy, or the first of a wrapper."""
    return getattr(strategy, "first", strategy)


@pytest.mark.parametrize(
    ("widths", "multiple"), [("kernels", 8), ("tensor_cores", 16), ("engines", 32), ("quantized_cache", 64)]
)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_chosen_width_is_every_strategys(option, widths, multiple):
    assert found(option, widths) == ([] if option in WITHOUT else [multiple])


@pytest.mark.parametrize("option", OPTIONS)
def test_by_default_each_method_has_its_papers(option):
    assert found(option, None) == ([] if option in WITHOUT else [1] if option in FREE else [8])


@pytest.mark.parametrize("wrapper", ["chain", "regrow"])
def test_a_strategy_within_another_obeys_too(wrapper):
    assert found(wrapper, "engines", "strategy@strategy.first=flap") == [32]
    assert found(wrapper, None, "strategy@strategy.first=flap") == [1]


def found(option, widths, *more):
    chosen = [] if widths is None else [f"widths={widths}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"strategy={option}", *chosen, *more])
    return multiples(OmegaConf.to_container(config, resolve=True, throw_on_missing=False)["strategy"])


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in WITHOUT])
def test_plans_keep_multiples_of_it(option):
    strategy = cutter(composed(option, "engines"))
    if isinstance(strategy, SliceGPT):
        assert strategy.width(CONFIG, Budget(value=0.1, of="params", tolerance=0.1)) in (160, 192, 224)
        return
    assert isinstance(strategy, ScoreStrategy)
    generator, config = (
        torch.Generator().manual_seed(0),
        strategy.recast_config(CONFIG),
    )
    spaces = strategy.spaces(config)
    scores = {space: torch.rand(space.shape, generator=generator) for space in spaces}
    of = "block_params" if "ffn" in strategy.kinds() else "kv_cache"
    value = 0.5 if strategy.latent else 0.2  # a latent has one head's width of values, and keys that turn
    budget, profile = Budget(value=value, of=of, tolerance=0.2), torch.zeros(8)
    after = cut(layer_shapes(config), strategy.plan(config, scores, budget, profile))
    assert after != layer_shapes(config)
    for shape in after:
        assert [shape.qk_head_dim % 32, shape.v_head_dim % 32, shape.intermediate_size % 32] == [0, 0, 0]
