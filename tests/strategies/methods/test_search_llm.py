"""Search-LLM: scores against a naive loop, subnets within the budget, and a search that survives a kill."""

from __future__ import annotations

import json
import math
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvp.models.shapes import cut, layer_shapes, size
from kvp.strategies.allocation.allocate import Uniform
from kvp.strategies.compensation.compensate import LeastSquares
from kvp.strategies.methods.search_llm import SearchLLM
from kvp.strategies.search.evolution import Evolution
from kvp.strategies.search.subnets import name_of, resize
from kvp.strategies.search.trials import Trials, masked_loss
from kvp.strategies.signals.moments import Moments
from kvp.strategies.signals.walk import caught_inputs
from kvp.strategies.target import Target
from kvp.types import Budget
from tests.conftest import tiny_config, tiny_model
from tests.helpers.runs import overrides, run_here
from tests.process import start_kvp

QUICK = Evolution(generations=4, population=10, parents=3, mutated=5, crossed=3)
STRATEGY = SearchLLM(allocator=Uniform(multiple_of=2), evolution=QUICK)
BUDGETS = [
    Budget(value=0.25, of="kv_cache", tolerance=0.1),
    Budget(value=0.2, of="block_params", tolerance=0.1),
    Budget(value=0.3, of="params", tolerance=0.1),
]


def make_target(heads="gqa", **changes):
    ids = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(3))
    model = tiny_model("llama", heads, dtype=torch.float64, num_hidden_layers=2, **changes)
    return Target(model, ids, batch_size=2, seed=1)


@pytest.fixture
def target():
    return make_target()


def test_scores_match_a_naive_loop(heads):
    target = make_target(heads)
    model, shape = target.model, layer_shapes(target.config)[1]
    dim, half = shape.qk_head_dim, shape.qk_head_dim // 2
    names = {
        name: f"model.layers.1.{part}.{name}"
        for part, group in {
            "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        }.items()
        for name in group
    }
    with torch.no_grad(), caught_inputs(model, list(names.values())) as caught:
        model(target.calibration)
    phi = {}
    for name, path in names.items():
        x = caught[path].flatten(0, 1)
        hessian = 2 * x.T @ x
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        phi[name] = model.get_submodule(path).weight.detach() ** 2 / torch.linalg.inv(hessian).diagonal()
    scores = {s.kind: score for s, score in STRATEGY.score(target).items() if s.layer == 1}
    groups = shape.num_key_value_heads
    per_group = shape.num_attention_heads // groups
    for g in range(groups):
        queries = range(g * per_group, (g + 1) * per_group)
        for i in range(half):
            rows = [i, i + half]
            expected = sum(phi["k_proj"][g * dim + r].sum() for r in rows)
            expected += sum(phi["q_proj"][h * dim + r].sum() for h in queries for r in rows)
            assert scores["qk"][g, i].item() == pytest.approx(expected.item())
        for j in range(dim):
            expected = phi["v_proj"][g * dim + j].sum() + sum(
                phi["o_proj"][:, h * dim + j].sum() for h in queries
            )
            assert scores["vo"][g, j].item() == pytest.approx(expected.item())
    for n in range(shape.intermediate_size):
        expected = phi["gate_proj"][n].sum() + phi["up_proj"][n].sum() + phi["down_proj"][:, n].sum()
        assert scores["ffn"][n].item() == pytest.approx(expected.item())


def removed(config, plan, of):
    shapes = layer_shapes(config)
    return 1 - size(config, cut(shapes, plan)).count(of) / size(config, shapes).count(of)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.of)
def test_subnets_meet_the_budget_and_their_ranges(target, budget):
    config = target.config
    subnets, subnet = STRATEGY._start(config, STRATEGY.score(target), budget, torch.zeros(2), seed=0)
    steps = [
        cost * (widths[1] - widths[0])
        for cost, widths in zip(subnets.costs, subnets.widths, strict=True)
        if len(widths) > 1
    ]
    nearest = max(steps) / 2 / size(config, layer_shapes(config)).count(budget.of)
    other, met = subnet, set()
    for _ in range(40):
        before = subnet
        met.add(name_of(subnet))
        subnet = subnets.mutate(subnet, 0.3, 0.3, overlap=0.8, redraw=True)
        assert abs(removed(config, subnets.plan(subnet), budget.of) - budget.value) <= nearest
        other = subnets.cross(before, other)
        assert abs(removed(config, subnets.plan(other), budget.of) - budget.value) <= nearest
        for mask, widths, pool in zip(subnet, subnets.widths, subnets.pools, strict=True):
            assert len(mask.sum(-1).unique()) == 1
            assert int(mask[0].sum()) in widths
            assert int(mask[0].sum()) >= pool.least
    whole = all(mask.all() for mask, pool in zip(subnet, subnets.pools, strict=True) if pool.units == 40)
    assert whole == (budget.of == "kv_cache")  # the MLP takes no part in it
    assert len(met) > 5


def test_other_units_are_those_of_the_papers_rejection(target):
    """Algorithm 1: draw sets of the same size until enough is common to old and new."""
    subnets, _ = STRATEGY._start(target.config, STRATEGY.score(target), BUDGETS[0], torch.zeros(2), seed=0)
    old, width, overlap = torch.arange(8) < 5, 4, 0.6
    drawn = Counter(tuple(subnets._drawn(old, width, overlap).tolist()) for _ in range(1500))
    accepted = Counter()
    while accepted.total() < 1500:
        row = torch.zeros(8, dtype=torch.bool)
        row[torch.randperm(8, generator=subnets.generator)[:width]] = True
        if (row & old).sum() >= overlap * width:
            accepted[tuple(row.tolist())] += 1
    assert set(drawn) == set(accepted)
    assert max(abs(drawn[row] - accepted[row]) for row in drawn) < 6 * math.sqrt(2 * max(accepted.values()))


def test_resize_follows_the_importance():
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]])
    mask = torch.tensor([[True, True, False, False, True]])
    assert resize(mask, 2, scores).tolist() == [[True, False, False, False, True]]
    assert resize(mask, 3, scores).tolist() == mask.tolist()
    assert resize(mask, 4, scores).tolist() == [[True, True, False, True, True]]


def test_the_limit_of_the_papers_admm_is_least_squares_without_a_bias():
    x, weight = (
        torch.randn(rows, 9, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
        for rows in (60, 5)
    )
    x[:, 1:] += x[:, :-1]  # removed columns can be told from kept ones in part
    keep = torch.tensor([True, False, True, True, False, True, True, False, True])
    moments = Moments(9, covariance=True)
    moments.add(x)
    gram, rho = x.T @ x, 1.0
    solve = torch.linalg.inv(gram + rho * torch.eye(9))
    z, dual = weight.T * keep[:, None], torch.zeros_like(weight.T)
    for _ in range(5000):
        w = solve @ (gram @ weight.T + rho * (z - dual))
        z = (w + dual) * keep[:, None]
        dual = dual + w - z
    columns, bias = LeastSquares(ridge=1e-12, intercept=False).solve(weight, keep, moments)
    torch.testing.assert_close(columns, z[keep].T, rtol=1e-6, atol=1e-6)
    assert bias is None


@pytest.mark.parametrize("resize_by", ["random", "importance"])
def test_the_search_finds_better_than_its_start_and_the_best_it_met(target, tmp_path, resize_by):
    strategy = replace(STRATEGY, evolution=replace(QUICK, resize=resize_by))
    budget, scores = BUDGETS[1], STRATEGY.score(target)
    before = {name: p.clone() for name, p in target.model.named_parameters()}
    plan = strategy.search(target, scores, budget, torch.zeros(2), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert 10 < len(losses) <= QUICK.trials
    start = strategy.plan(target.config, scores, budget, torch.zeros(2))
    assert masked_loss(target.model, target.batches, start) == losses[0]
    assert masked_loss(target.model, target.batches, plan) == min(losses) < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in target.model.named_parameters())


def test_trials_are_measured_once_and_a_torn_line_again(tmp_path):
    path, calls = tmp_path / "trials.jsonl", []

    def trial(trials, key, loss):
        return trials.loss(key, lambda: calls.append(key) or loss)

    first = Trials(path, total=3)
    assert [trial(first, {"n": 1}, 2.0), trial(first, {"n": 2}, 1.0), trial(first, {"n": 1}, 9.0)] == [
        2,
        1,
        2,
    ]
    path.write_text(path.read_text()[:-5])
    again = Trials(path, total=3)
    assert [trial(again, {"n": 1}, 9.0), trial(again, {"n": 2}, 3.0)] == [2.0, 3.0]
    assert again.best == 2.0
    assert calls == [{"n": 1}, {"n": 2}, {"n": 2}]
    with pytest.raises(FloatingPointError, match="not finite"):
        trial(again, "nan", math.nan)


@pytest.mark.slow
def test_kill_in_the_middle_of_the_search_gives_the_same_plan(tmp_path):
    options = [
        "tracker=none",
        "measure=none",
        "evaluation=none",
        "recovery=none",
        "strategy=search_llm",
        "strategy/evolution=quick",
        "strategy.evolution.samples=1",
        "strategy.evolution.generations=5",
        "calibration.length=16",
        "strategy.allocator.multiple_of=2",
        "ratio=block_params",
    ]
    process = start_kvp(*overrides(tmp_path / "killed", *options))
    deadline, killed = time.time() + 120, ""
    while killed.count("\n") < 30 and process.is_alive() and time.time() < deadline:
        partial = list((tmp_path / "killed" / "store" / "plan").glob(".*.partial/trials.jsonl"))
        killed = partial[0].read_text() if partial else ""
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the search was over before it could be killed"
    resumed, undisturbed = run_here(tmp_path / "killed", *options), run_here(tmp_path / "whole", *options)

    def written(record, stage, name):
        return Path(next(s["path"] for s in record["stages"] if s["name"] == stage), name).read_bytes()

    trials = written(resumed, "plan", "trials.jsonl")
    assert trials.startswith(killed[: killed.rfind("\n") + 1].encode())  # found, not measured again
    assert trials == written(undisturbed, "plan", "trials.jsonl")
    for stage, name in [
        ("plan", "plan.json"),
        ("prune", "plan.json"),
        ("prune", "model/model.safetensors"),
    ]:
        assert written(resumed, stage, name) == written(undisturbed, stage, name)
    other = run_here(tmp_path / "whole", *options, "strategy/compensation=none")
    assert next(s["found"] for s in other["stages"] if s["name"] == "plan")
    assert not next(s["found"] for s in other["stages"] if s["name"] == "prune")


def test_refusals():
    with pytest.raises(ValueError, match="cannot be reached"):
        STRATEGY.check(tiny_config(), Budget(value=0.5, of="blocks"))
    with pytest.raises(ValueError, match=r"mlp_least=0\.9"):
        replace(STRATEGY, mlp_least=0.9).check(tiny_config(), BUDGETS[1])
    with pytest.raises(ValueError, match="more than a population of 10"):
        replace(QUICK, mutated=9)
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\], got 2"):
        replace(QUICK, overlap=2)
    with pytest.raises(ValueError, match="generations must be >= 1, got 0"):
        replace(QUICK, generations=0)
    with pytest.raises(ValueError, match="resize must be one of"):
        replace(QUICK, resize="all")
    with pytest.raises(ValueError, match="attention_least must be"):
        replace(STRATEGY, attention_least=1.5)
    with pytest.raises(ValueError, match="damping must be > 0"):
        replace(STRATEGY, damping=0)
