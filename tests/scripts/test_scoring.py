"""What pruning costs: steps, peaks, a failing method beside one that works, and the table."""

from __future__ import annotations

import json
import math
import re

import pytest

from experiments.scripts import scoring
from experiments.scripts.meter import measure
from experiments.scripts.scoring import COMMON, METHODS, parse, run

LINE = {
    "model": "tiny",
    "ratio": {"value": 0.2, "of": "kv_cache"},
    "calibration": {"samples": 4, "length": 64, "batch_size": 4},
    "dtype": "float32",
    "steps": {"score": {"seconds": 1.0}},
    "cpu_seconds": 1.0,
    "weights_bytes": 100,
    "peak_bytes": 200,
    "failed": None,
    "provenance": {"device": "cpu", "threads": 1},
}
SMOKE = (*COMMON, "debug=smoke")


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["strategy=kvpruner"], {"score", "sensitivity", "plan"}),
        (["strategy=flap"], {"score", "plan", "refit"}),
        (["strategy=adapruner", "strategy.trials=2"], {"score", "plan"}),
    ],
)
def test_cost_of_a_method_step_by_step(words, steps, tmp_path):
    line = measure([*SMOKE, f"store={tmp_path}", *words])
    assert line["failed"] is None and line["model"] == "tiny"
    assert line["steps"].keys() == steps
    for unit in ("seconds", "cpu_seconds"):
        assert line[unit] == pytest.approx(math.fsum(step[unit] for step in line["steps"].values()))
        assert line[unit] > 0
    assert line["peak_bytes"] == max(step["peak_bytes"] for step in line["steps"].values())
    assert line["peak_bytes"] > line["weights_bytes"] == 3279104  # the weights are in the peak
    assert line["calibration"] == {"samples": 4, "length": 64, "batch_size": 4}
    assert line["dtype"] == "float32" and {"commit", "versions", "threads"} <= line["provenance"].keys()


@pytest.mark.slow
def test_a_method_that_fails_does_not_stop_the_others(tmp_path):
    out, common = tmp_path / "out", [*SMOKE, f"store={tmp_path / 'store'}"]
    earlier = {"strategy": "random", "model": "other", "failed": "killed by signal 9, see above"}
    out.mkdir()
    (out / "cost.jsonl").write_text(json.dumps(earlier) + "\n")
    lines = run({"slicegpt": [], "magnitude": ["strategy.norm=l1"]}, common, out, "the command")
    assert [bool(line["failed"]) for line in lines] == [True, False]
    assert "narrower" in lines[0]["failed"] and lines[0]["provenance"]["command"] == "the command"
    assert [json.loads(line) for line in (out / "cost.jsonl").read_text().splitlines()] == [earlier, *lines]
    text = re.sub(" +", " ", (out / "cost.md").read_text())
    assert "| magnitude | strategy.norm=l1 |" in text and "batches of 4; float32" in text
    assert "- slicegpt failed: ValueError" in text and "- random failed: killed" in text


def test_a_killed_command_goes_on_after_its_last_method(tmp_path, monkeypatch):
    """The kill comes while the third method is measured; it alone is measured again, and later all of them."""
    measured = []

    def in_a_process(words, directory):
        measured.append(words[-1])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return LINE | {"seconds": float(len(measured))}

    monkeypatch.setattr(scoring, "_in_a_process", in_a_process)
    strategies = {"flap": [], "random": [], "magnitude": []}
    with pytest.raises(KeyboardInterrupt):
        run(strategies, [], tmp_path, "the command")
    lines = run(strategies, [], tmp_path, "the command")
    assert [line["seconds"] for line in lines] == [1, 2, 4]
    assert [line["seconds"] for line in run(strategies, [], tmp_path, "the command")] == [5, 6, 7]
    assert len((tmp_path / "cost.jsonl").read_text().splitlines()) == 3


def test_machines_have_tables_of_their_own_and_a_killed_method_makes_way(tmp_path, monkeypatch):
    killed = {"model": None, "failed": "killed by signal 9, see above"}
    lines = [killed | {"strategy": name} for name in ("flap", "random")]
    (tmp_path / "cost.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    other = LINE | {"strategy": "think", "options": [], "seconds": 1.0}
    machines = [{"device": "cpu (x86_64)", "device_name": name, "threads": 1} for name in ("One", "Other")]
    monkeypatch.setattr(
        scoring, "_in_a_process", lambda *args: LINE | {"seconds": 1.0, "provenance": machines[0]}
    )
    run({"flap": []}, [], tmp_path, "the command")
    kept = [json.loads(line) for line in (tmp_path / "cost.jsonl").read_text().splitlines()]
    assert [(line["strategy"], bool(line["failed"])) for line in kept] == [("random", True), ("flap", False)]
    scoring.write([kept[1], other | {"provenance": machines[1]}], tmp_path)
    text = (tmp_path / "cost.md").read_text()
    assert "float32, One, 1 threads" in text and "float32, Other, 1 threads" in text


def test_a_strategy_brings_its_options_or_takes_the_small_budget():
    asked = parse("flap,adapruner strategy.trials=50 strategy.parts=2,search_llm")
    assert asked["flap"] == [] and asked["search_llm"] == METHODS["search_llm"]
    assert asked["adapruner"] == ["strategy.trials=50", "strategy.parts=2"]
