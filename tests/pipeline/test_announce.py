"""Trackers hold the result as charts and tables, during a run or after it, and once."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from kvp.__main__ import main
from kvp.pipeline.announce import announce
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.run import run
from kvp.pipeline.summary import print_summary
from kvp.pipeline.tracked import TRACKED
from kvp.record import RunRecord
from kvp.tracking import Jsonl, Wandb
from tests.helpers.runs import LIGHT, compose_here, overrides
from tests.helpers.tracking import records
from tests.report.sample_records import make_record, stage

ROWS = ["perplexity/squad", "zero_shot/piqa/acc", "zero_shot/piqa/acc_stderr", "zero_shot/average/acc_stderr"]
ROWS += [
    f"bytes/{part}" for part in ("weights", "cache", "rest", "peak", "kv_per_token", "kv_per_token_measured")
]
ROWS += ["tokens_per_second/prefill", "tokens_per_second/decode", "params"]
QUICK = ("strategy=magnitude", "recovery=none", "evaluation.perplexity.corpora=[squad]", *LIGHT)


def sample(tmp_path, points=3, **changes) -> RunRecord:
    """A finished record, its pruned and tuned stages on disk."""
    record = make_record(steps=points or None, sensitivity=[0.25], **changes)
    record["stages"] = [
        stage("prune", 0.5, 2048),
        *([stage("recover", 60.0) | {"model": "recovered"}] if points else []),
    ]
    for each in record["stages"]:
        each["path"] = str(tmp_path / each["name"])
        Path(each["path"]).mkdir()
    (tmp_path / "prune" / "plan.json").write_text("{}")
    if points:
        lines = [json.dumps({"step": n, "loss": 4 - n, "grad_norm": None}) for n in range(1, points + 1)]
        (tmp_path / "recover" / "losses.jsonl").write_text("\n".join(lines))
    return RunRecord.read(record)


def shown(tracker, record, directory):
    with tracker.run(name=record.name, run_id="abc", directory=directory, config=record.config) as log:
        announce(record, log)


def items(entries) -> dict:
    return {"/".join(e.nested_key) or e.key: json.loads(e.value_json) for e in entries}


def curves(directory) -> dict[str, list]:
    """The numbers of an offline run's history by name, in order."""
    found = defaultdict(list)
    for row in (items(r.history.item) for r in records(directory) if r.HasField("history")):
        tables = {name.rpartition("/")[0] for name in row if name.endswith("/_type")}
        for name, value in row.items():
            if not name.startswith("_") and name.rpartition("/")[0] not in tables:
                found[name].append(value)
    return found


@pytest.fixture
def wandb_here(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("wandb_here")
def test_wandb_shows_models_side_by_side_and_no_chart_of_one_point(tmp_path):
    record = sample(tmp_path)
    shown(Wandb(), record, tmp_path)
    found = curves(tmp_path)
    assert {len(found[name]) for name in ROWS} == {3}
    assert found["perplexity/squad"] == [20, 40, 30]
    assert found["stage"] == [0, 1, 2]
    assert (found["recover/loss"], found["step"]) == ([3, 2, 1], [1, 2, 3])
    assert all(len(points) > 1 for points in found.values())
    assert not [name for name in found if "seconds" in name or "stages" in name]

    written = list(records(tmp_path))
    config = {name: value for r in written for name, value in items(r.config.update).items()}
    assert (config["version"], config["commit"], config["dirty"]) == ("0.1.0", "f574f8d", False)
    assert config["checkpoints"]["recovered"] == record.models()["recovered"].checkpoint
    summary: dict = {}
    for r in written:
        summary |= items(r.summary.update)
    assert (summary["ratio/asked/kv_cache"], summary["ratio/achieved/params"]) == (0.25, 0.05)
    assert summary["recovered/zero_shot/piqa/acc_stderr"] == 0.1
    assert summary["dense/bytes/weights"] == 1 << 20
    tables = {
        path.name.partition("_")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")
    }
    assert tables["stages"]["data"] == [
        ["pruned", "prune", 0.5, 2048, False],
        ["recovered", "recover", 60.0, None, False],
    ]
    assert ["piqa % (acc, validation, first 20)", *["50.0 ± 10.0"] * 3] in tables["results"]["data"]
    assert ["piqa dense (± 10.0)", 50.0] in tables["accuracy"]["data"]


@pytest.mark.parametrize(
    ("points", "changes"),
    [
        (0, {}),  # no recovery
        (1, {}),  # a recovery of one step
        (0, {"strategy": "none"}),  # the dense baseline
        (2, {"dense__measure": None, "pruned__measure": None, "recovered__measure": None}),
    ],
)
def test_jsonl_shows_no_curve_of_one_point_either(tmp_path, points, changes):
    record = sample(tmp_path, points, **changes)
    shown(Jsonl(), record, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    count = defaultdict(int)
    for line in lines:
        for name in line["values"] if line["kind"] == "metrics" else ():
            count[name] += 1
    assert min(count.values()) >= 2
    assert count["perplexity/squad"] == len(record.models())
    assert ("recover/loss" in count) == (points > 1)


@pytest.mark.usefixtures("wandb_here")
def test_jsonl_carries_what_wandb_carries(tmp_path):
    record = sample(tmp_path)
    for tracker in (Jsonl(), Wandb()):
        shown(tracker, record, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    points = {name for line in lines if line["kind"] == "metrics" for name in line["values"]}
    assert points == curves(tmp_path).keys() - {"step", "stage"}
    assert {*ROWS} < points
    assert [line["name"] for line in lines if line["kind"] == "table"] == ["results", "stages", "widths"]
    (summary,) = (line["values"] for line in lines if line["kind"] == "summary")
    assert summary["pruned/perplexity/squad"] == 40
    (config,) = (line["values"] for line in lines if line["kind"] == "config")
    assert config["commit"] == "f574f8d"


def test_accuracies_of_one_document_have_no_error_and_are_shown(tmp_path, capsys):
    record = make_record()
    for model in ("dense", "pruned"):
        tasks = record[model]["evaluation"]["zero_shot"]
        tasks["average"]["stderr"] = None
        for task in ("piqa", "hellaswag"):
            del tasks[task]["acc_stderr"], tasks[task]["acc_norm_stderr"]
    record["stages"] = []
    whole = RunRecord.read(record)
    shown(Jsonl(), whole, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    points = [line["values"] for line in lines if line["kind"] == "metrics"]
    assert [point["zero_shot/average/acc"] for point in points] == [0.375, 0.375]
    assert not [name for point in points for name in point if "stderr" in name]
    assert next(line["labels"] for line in lines if line["kind"] == "bar")[0] == "piqa dense"
    print_summary(whole)
    assert re.search(r"zero-shot average % \(2 tasks\) *│ +37\.5 │ +37\.5 │", capsys.readouterr().out)


@pytest.mark.parametrize(("achieved", "warns"), [(0.0, True), (0.25, False)])
def test_a_run_that_removed_nothing_says_so(achieved, warns, capsys):
    print_summary(RunRecord.read(make_record(ratio__achieved={"kv_cache": achieved, "params": 0.0})))
    assert ("warning: nothing was removed" in capsys.readouterr().out) == warns


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where a run finished without a tracker."""
    directory = tmp_path_factory.mktemp("late")
    run(Experiment.compose(compose_here(directory, *QUICK)))
    return directory


@cache
def composed(place, tracker) -> Experiment:
    return Experiment.compose(compose_here(place, *QUICK, f"tracker={tracker}"))


def again(place, caplog, tracker) -> tuple[RunRecord, Path, str]:
    """The run repeated with a tracker: its record, its directory, what it says."""
    caplog.clear()
    x = composed(place, tracker)
    with caplog.at_level("INFO", logger="kvp"):
        return run(x), x.directory, caplog.text


def test_a_finished_run_is_logged_afterwards_once_per_tracker(place, caplog, capsys):
    record, directory, said = again(place, caplog, "jsonl")
    assert all(stage.found for stage in record.stages)
    written = (directory / "metrics.jsonl").read_bytes()
    assert record.tracker == str(directory / "metrics.jsonl")
    assert "logged before" not in said
    kinds = [json.loads(line)["kind"] for line in written.splitlines()]
    assert (kinds[0], kinds[-1], kinds.count("run")) == ("run", "exit", 1)
    about = json.loads(written.splitlines()[0])
    assert about["tags"] == ["tiny", "magnitude", "kv_cache 0.25", "none", "tiny-magnitude"]

    record, _, said = again(place, caplog, "jsonl")
    assert said.count("logged before: ") == 1
    assert f"logged before: {directory}/metrics.jsonl" in said
    assert (directory / "metrics.jsonl").read_bytes() == written

    record, _, said = again(place, caplog, "wandb")
    (offline,) = directory.glob("wandb/offline-run-*")
    assert "logged before" not in said
    assert record == RunRecord.read(directory / "run.json")
    assert curves(directory)["perplexity/squad"] == [
        m.evaluation.perplexity["squad"].value for m in record.models().values()
    ]
    capsys.readouterr()
    print_summary(record)
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"tracker: {offline}; to upload it: wandb sync {offline}"
    )

    for tracker in ("wandb", "jsonl", "none"):
        record, _, said = again(place, caplog, tracker)
        assert ("logged before" in said) == (tracker != "none")
    assert [*directory.glob("wandb/offline-run-*")] == [offline]
    assert record.tracker


def test_a_log_that_is_gone_damaged_or_of_other_numbers_is_made_again(place, caplog):
    _, directory, _ = again(place, caplog, "jsonl")
    remembered = (directory / TRACKED).read_text()
    other_numbers = json.loads(remembered)
    other_numbers["jsonl"]["shows"] = "0" * 64
    damages = ["{", "[]", '{"jsonl": 3}', '{"jsonl": {"location": 3}}', json.dumps(other_numbers), remembered]
    for damage in damages:
        (directory / TRACKED).write_text(damage)
        if damage == remembered:
            (directory / "metrics.jsonl").unlink()
        _, _, said = again(place, caplog, "jsonl")
        assert "logged before" not in said, damage
        assert (directory / "metrics.jsonl").exists()
    assert "logged before" in again(place, caplog, "jsonl")[2]


def test_a_tracker_out_of_reach_loses_nothing(place, caplog, monkeypatch):
    _, directory, _ = again(place, caplog, "none")
    before = (directory / "run.json").read_text()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(place / "no-netrc"))
    x = Experiment.compose(compose_here(place, *QUICK, "tracker=wandb", "tracker.mode=online"))
    with pytest.raises(RuntimeError, match=r"tracker\.mode must be offline"):
        run(x)
    after = RunRecord.read(directory / "run.json")
    assert (after.status, after.models()) == ("finished", RunRecord.read(json.loads(before)).models())


def test_a_sweep_repeated_with_another_tracker_logs_its_finished_runs(place, monkeypatch, capsys):
    for log in place.glob("runs/*/metrics.jsonl"):
        log.unlink()
    words = [*overrides(place, *QUICK), "ratio.value=0.25,0.5", "tracker=jsonl"]
    monkeypatch.setattr(sys, "argv", ["kvp", "-m", *words])
    GlobalHydra.instance().clear()
    main()
    assert "2 jobs, 1 of them finished before" in capsys.readouterr().out
    logs = [*place.glob("runs/*/metrics.jsonl")]
    assert len(logs) == 2
    assert all(log.read_text().splitlines()[-1] == '{"kind": "exit", "exit_code": 0}' for log in logs)
