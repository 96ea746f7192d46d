from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvp.tracking import Jsonl, Null, Wandb, upload_command
from tests.helpers.tracking import PNG, records

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from pathlib import Path
from kvp.tracking import Wandb

def use(log):
    print(log.location)
    log.metrics({"loss": 2.5}, step=10)
    log.metrics({"loss": 1.5, "ppl/squad": float("inf")}, step=5)
    log.metrics({"tokens": 7})
    log.metrics({"wide/ppl": 9.5}, step=0, axis="stage")
    log.metrics({"wide/ppl": 8.5}, step=1, axis="stage")
    log.config({"commit": "f00", "dirty": None})
    log.summary({"ppl": {"squad": 3.5, "drop": {"dense": 4}}, "ratio": 0.25})
    log.table("results", ["method", "ppl"], [["kvpruner", 3.5], ["none", None], ["depth", "-"]])
    log.bar("importance", ["block 0", "block 1"], [0.1, 0.9], "Importance of blocks")
    log.image("ratio", picture)
    log.artifact(model, "model", "model")
    log.artifact(plan, "plan", "plan")

directory = Path(sys.argv[1])
model, plan, picture = directory / "model", directory / "plan.json", directory / "ratio.png"
model.mkdir()
(model / "weights").write_bytes(b"12345")
plan.write_text("{}")
picture.write_bytes(bytes.fromhex(sys.argv[2]))
config = {"seed": 1, "strategy": {"ratio": 0.25, "layers": [1, 2]}}
assert "wandb" not in sys.modules
info = dict(name="kvpruner", group="study", job_type="prune", tags=["a", "b"], config=config)
with Wandb().run(run_id="good", directory=directory / "good", **info) as log:
    use(log)
try:
    with Wandb(group="mine").run(run_id="bad", directory=directory / "bad", **info) as log:
        print(log.location)
        raise RuntimeError("diverged")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Path, list[str], str]:
    """Two real W&B runs, without a network where it can be taken away: their directory, output, errors."""
    directory = tmp_path_factory.mktemp("wandb")
    alone = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    python = [*(["unshare", "-rn"] if alone else []), sys.executable, "-c", SCRIPT, str(directory), PNG.hex()]
    home = {"WANDB_DATA_DIR": str(directory / "data"), "WANDB_CACHE_DIR": str(directory / "cache")}
    asked_otherwise = {"WANDB_MODE": "online", "WANDB_PROJECT": "other", "WANDB_RUN_ID": "other"}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | home | asked_otherwise
    done = subprocess.run(python, env=env, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout.splitlines(), done.stderr


def items(entries) -> dict:
    return {"/".join(e.nested_key) or e.key: json.loads(e.value_json) for e in entries}


def test_wandb_offline_run_reads_back(offline):
    directory, printed, errors = offline
    found = list(records(directory / "good"))
    (run,) = (r.run for r in found if r.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == ("good", "kvp", "kvpruner")
    assert (run.run_group, run.job_type, list(run.tags)) == ("study", "prune", ["a", "b"])
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["strategy"] == {"ratio": 0.25, "layers": [1, 2]} and config["seed"] == 1

    history = [items(r.history.item) for r in found if r.HasField("history")]
    assert [(row["step"], row["loss"]) for row in history if "loss" in row] == [(10, 2.5), (5, 1.5)]
    assert [row["ppl/squad"] for row in history if "ppl/squad" in row] == [float("inf")]
    assert [row["tokens"] for row in history if "tokens" in row] == [7]
    assert any(row.get("results/nrows") == 3 for row in history)
    assert [(row["stage"], row["wide/ppl"]) for row in history if "wide/ppl" in row] == [(0, 9.5), (1, 8.5)]
    axes = {r.metric.name: r.metric.step_metric for r in found if r.HasField("metric")}
    assert axes == {"loss": "step", "ppl/squad": "step", "wide/ppl": "stage", "step": "", "stage": ""}
    hidden = {r.metric.name for r in found if r.HasField("metric") and r.metric.options.hidden}
    assert hidden == {"step", "stage"}  # an x-axis is no chart
    later = {u.key: json.loads(u.value_json) for r in found for u in r.config.update if u.key}
    assert (later["commit"], later["dirty"]) == ("f00", None)

    summary: dict = {}
    for record in found:
        summary |= items(record.summary.update)
    assert (summary["ppl/squad"], summary["ppl/drop/dense"], summary["ratio"]) == (3.5, 4, 0.25)
    assert not {"step", "stage"} & summary.keys()
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]
    assert (Path(printed[0]).parent, errors) == (directory / "good" / "wandb", "")


def test_wandb_keeps_table_chart_and_artifacts_without_copying_them(offline):
    directory, _, _ = offline
    found = list(records(directory / "good"))
    artifacts = {r.artifact.name: r.artifact for r in found if r.HasField("artifact")}
    (weights,), (plan,) = artifacts["model"].manifest.contents, artifacts["plan"].manifest.contents
    assert (weights.path, weights.size) == ("weights", 5)
    assert weights.local_path == str(directory / "model" / "weights")
    assert plan.local_path == str(directory / "plan.json")
    (file,) = directory.glob("good/wandb/offline-run-*/files/media/table/results*")
    table = json.loads(file.read_text())
    assert table["columns"] == ["method", "ppl"]
    assert table["data"] == [["kvpruner", 3.5], ["none", None], ["depth", "-"]]
    (chart,) = (u for r in found for u in r.config.update if "importance" in u.nested_key)
    assert "Importance of blocks" in chart.value_json
    (picture,) = directory.glob("good/wandb/offline-run-*/files/media/images/ratio*.png")
    assert picture.read_bytes() == PNG


def test_wandb_run_that_fails_ends_with_exit_code_1(offline):
    directory, printed, _ = offline
    found = list(records(directory / "bad"))
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [1]
    assert next(r.run for r in found if r.HasField("run")).run_group == "mine"
    assert printed[-1] == "diverged"


def test_wandb_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="tracker=none"):
        Wandb(mode="disabled")


def test_wandb_cuts_tags_and_groups_at_its_own_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    info = {"run_id": "long", "config": {}, "tags": ["t" * 200, "", "short"], "group": "g" * 200}
    with Wandb().run(name="n", directory=tmp_path, **info):
        pass
    (run,) = (r.run for r in records(tmp_path) if r.HasField("run"))
    assert ([*run.tags], run.run_group) == (["t" * 64, "short"], "g" * 128)


@pytest.mark.parametrize(
    ("location", "command"),
    [
        (
            "/runs/a/wandb/offline-run-20260101_000000-abc",
            "wandb sync /runs/a/wandb/offline-run-20260101_000000-abc",
        ),
        ("/my runs/offline-run-1", "wandb sync '/my runs/offline-run-1'"),
        ("/runs/offline-run-1;rm x", "wandb sync '/runs/offline-run-1;rm x'"),
        ("https://wandb.ai/me/kvp/runs/abc", None),
        ("/runs/a/metrics.jsonl", None),
        ("/offline-run-x/metrics.jsonl", None),
        ("", None),
        (None, None),
    ],
)
def test_only_what_waits_offline_has_a_command_to_upload_it(location, command):
    assert upload_command(location) == command


def test_wandb_online_without_a_login_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with (
        pytest.raises(RuntimeError, match=r"tracker\.mode must be offline .* got 'online' .*wandb login"),
        Wandb(mode="online").run(name="n", run_id="1", directory=tmp_path, config={}),
    ):
        pass
    assert not list(tmp_path.glob("wandb/*run*"))


def use(tracker, directory: Path, fail: bool = False) -> str:
    info = {"name": "n", "run_id": "1", "directory": directory, "config": {"a": {"b": [1]}}, "tags": ["t"]}
    with tracker.run(**info) as log:
        log.metrics({"loss": 2.5, "nan": float("nan")}, step=3)
        log.metrics({"loss": 1.5})
        log.metrics({"ppl": 3.5}, step=1, axis="stage")
        log.config({"commit": "f00"})
        if fail:
            raise KeyboardInterrupt
        log.summary({"ppl": {"squad": 3.5}})
        log.table("t", ["a", "b"], [(1, "x"), (None, 2)])
        log.bar("b", [0, 1], [0.5, 1.0], "T")
        log.image("p", directory / "p.png")
        log.artifact(directory / "model", "model", "model")
    return log.location


def test_jsonl_round_trip(tmp_path):
    location = use(Jsonl(), tmp_path / "new")
    assert location == str(tmp_path / "new" / "metrics.jsonl")
    lines = [json.loads(line, parse_constant=str) for line in Path(location).read_text().splitlines()]
    assert lines == [
        {"kind": "run", "name": "n", "run_id": "1", "config": {"a": {"b": [1]}}, "tags": ["t"]},
        {"kind": "metrics", "step": 3, "values": {"loss": 2.5, "nan": "NaN"}},
        {"kind": "metrics", "values": {"loss": 1.5}},
        {"kind": "metrics", "stage": 1, "values": {"ppl": 3.5}},
        {"kind": "config", "values": {"commit": "f00"}},
        {"kind": "summary", "values": {"ppl/squad": 3.5}},
        {"kind": "table", "name": "t", "columns": ["a", "b"], "rows": [[1, "x"], [None, 2]]},
        {"kind": "bar", "name": "b", "title": "T", "labels": [0, 1], "values": [0.5, 1.0]},
        {"kind": "image", "name": "p", "path": str(tmp_path / "new" / "p.png")},
        {"kind": "artifact", "name": "model", "type": "model", "path": str(tmp_path / "new" / "model")},
        {"kind": "exit", "exit_code": 0},
    ]


def test_jsonl_keeps_the_lines_of_a_failed_run_and_appends_the_next(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        use(Jsonl(), tmp_path, fail=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [
        "run",
        *["metrics"] * 3,
        "config",
        "exit",
    ]
    assert json.loads(lines[-1])["exit_code"] == 1
    use(Jsonl(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[: len(lines)] == lines


def test_null_accepts_everything_and_writes_nothing(tmp_path):
    assert use(Null(), tmp_path) == ""
    with pytest.raises(KeyboardInterrupt):
        use(Null(), tmp_path, fail=True)
    assert not list(tmp_path.iterdir())


def test_every_tracker_option_instantiates():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    def load(name: str):
        return instantiate(OmegaConf.load(ROOT / "conf" / "tracker" / f"{name}.yaml"))

    assert load("wandb") == Wandb()
    assert isinstance(load("jsonl"), Jsonl) and isinstance(load("none"), Null)
