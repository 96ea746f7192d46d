"""Models take turns, their ratios come from single rounds, and one that runs out of memory leaves."""

from __future__ import annotations

import pytest
import torch

from kvp.bench.rounds import OUT_OF_MEMORY, in_turns, ratio
from kvp.measurement import memory
from kvp.measurement.measure import Measure
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.store import Store
from tests.conftest import random_plan, tiny_model

POINT = Measure(batch_size=2, prompt_length=6, new_tokens=4, warmup=1, runs=3)


@pytest.fixture(scope="module")
def models():
    dense = tiny_model()
    return {"dense": dense, "pruned": apply(dense, random_plan(dense, ["qk", "vo"]))}


@pytest.mark.parametrize("path", ["eager", "static"])
def test_models_alternate_and_their_order_reverses(models, path):
    met = []
    series = in_turns(models, path, POINT, watch=met.append)
    assert met == ["dense", "pruned", "pruned", "dense"] * 2  # one warm-up round, three that count
    for name, one in series.items():
        assert len(one.prefill) == len(one.decode) == len(one.whole) == POINT.runs
        assert one.whole[0] == one.prefill[0] + one.decode[0] and one.failed is None
        config, tokens = models[name].config, 10 if path == "eager" else 16
        per_token = size(config, layer_shapes(config)).kv_bytes_per_token
        assert one.memory.cache_bytes == 2 * tokens * per_token
        assert one.memory.weights_bytes == memory.weights_bytes(models[name])
        assert one.memory.peak_bytes >= one.memory.weights_bytes and one.memory.rest_bytes >= 0
    assert series["dense"].kernels == ["flash"]


def test_a_stopped_benchmark_goes_on_after_its_last_round(models, tmp_path):
    """What two rounds left in a store, and the other two, make the series of one process."""
    store, met, rounds = Store(tmp_path), [], []

    def keep(number, work):
        rounds.append(store.once("round", {"number": number}, lambda directory: work()).result)
        return rounds[-1]

    def stop(name):
        met.append(name)
        if len(met) == 6:  # in the midst of the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_turns(models, "eager", POINT, keep=keep, watch=stop)
    assert len(rounds) == 2
    before, met = [one["pruned"]["decode"] for one in rounds], []
    series = in_turns(models, "eager", POINT, keep=keep, watch=met.append)
    assert met == ["dense", "pruned", "pruned", "dense"]  # the third and the fourth
    for one in series.values():
        assert len(one.decode) == len(one.prefill) == POINT.runs and one.memory is not None
    assert series["pruned"].decode[0] == before[1], "the warm-up round does not count"


def test_ratios_are_of_rounds():
    """A round in which the machine was slow slows both, and changes no ratio."""
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == {"median": 2.0, "iqr": [2.0, 2.0]}
    assert ratio([1.0, 1.0, 2.0], [4.0, 2.0, 2.0])["median"] == 2.0


def test_one_without_memory_leaves_the_others_alone(models):
    greedy = tiny_model(seed=1)
    met = []

    def refuse(module, inputs):
        if met.count("greedy") > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    greedy.model.register_forward_pre_hook(refuse)
    series = in_turns({"greedy": greedy, **models}, "eager", POINT, watch=met.append)
    assert series["greedy"].failed == OUT_OF_MEMORY and series["greedy"].decode == []
    assert met.count("greedy") == 2 and met.count("dense") == 4
    assert len(series["pruned"].decode) == POINT.runs
