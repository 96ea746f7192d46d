"""Zeros and bytes of a checkpoint, from its files."""

from __future__ import annotations

import pytest
import torch

from kvp.models.linears import all_linears
from kvp.models.sparsity import count_zeros, is_n_of_m, zeros_of
from kvp.models.surgery import apply
from tests.conftest import NETWORKS, random_plan, tiny_model


@pytest.fixture(params=NETWORKS)
def family(request) -> str:
    return request.param


def test_bytes_of_one_matrix():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 0, 0], [0, 0, 4, 5, 6, 0, 7, 0]], dtype=torch.float16)
    counted = zeros_of(weight)
    assert counted == {"weights": 16, "zeros": 9, "bytes": {"dense": 32, "2:4": 18, "bitmap": 16}}
    weight[0, 1] = 8  # three of four
    assert zeros_of(weight)["bytes"] == {"dense": 32, "2:4": None, "bitmap": 18}
    assert is_n_of_m(weight, 3, 4)
    assert not is_n_of_m(weight[:, :6], 3, 4)


def test_a_checkpoint_is_counted_by_its_decoder_matrices(family, tmp_path):
    model = tiny_model(family)
    pruned = apply(model, random_plan(model, ["kv_group", "vo", "ffn"]))
    linears = all_linears(pruned.config)
    expected = 0
    with torch.no_grad():
        pruned.model.embed_tokens.weight[5:9] = 0  # not counted
        for number, linear in enumerate(linears):
            weight = pruned.get_parameter(linear.weight)
            assert weight.shape == (linear.rows, linear.columns)
            weight[: number % 3] = 0
            expected += number % 3 * linear.columns
    pruned.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    counted = count_zeros(tmp_path, pruned.config)
    assert list(counted["matrices"]) and set(counted["matrices"]) == {linear.weight for linear in linears}
    assert counted["zeros"] == expected
    assert counted["weights"] == sum(linear.rows * linear.columns for linear in linears)
    assert counted["fraction"] == pytest.approx(expected / counted["weights"])
    assert counted["bytes"]["2:4"] is None
    assert counted["bytes"]["dense"] == 4 * counted["weights"]
    stored = sum(parameter.nbytes for parameter in pruned.parameters())
    assert counted["model_bytes"]["dense"] == stored
    saved = counted["bytes"]["dense"] - counted["bytes"]["bitmap"]
    assert counted["model_bytes"]["dense"] - counted["model_bytes"]["bitmap"] == saved
