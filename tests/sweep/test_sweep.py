"""Sweeps: what is told, what a failure leaves, what is found again, and more than one process at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from transformers import AutoModelForCausalLM

from kvp.__main__ import CONF, main
from kvp.hints import DRY_RUN
from kvp.models.load import byte_tokenizer
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import foretell
from kvp.pipeline.runfile import finished_before
from kvp.sweep.jobs import expand
from kvp.sweep.status import look
from kvp.sweep.sweep import Outcome, SweepFailed, sweep
from kvp.sweep.words import read
from kvp.sweep.worker import gpu_of
from tests.process import start_kvp

ROOT = Path(__file__).parents[2]
LIGHT = ("tracker=none", "measure=none", "evaluation.zero_shot=null", "evaluation.perplexity.corpora=[squad]")


def places(tmp_path):
    return "debug=smoke", f"store={tmp_path}/store", f"runs={tmp_path}/runs", *LIGHT


def kvp_here(monkeypatch, capsys, *words):
    """`python -m kvp words` in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["kvp", *words])
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    try:
        main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return Experiment.compose(compose("config", overrides=list(words), return_hydra_config=True))


def records(tmp_path):
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/run.json"))]


def perplexities(tmp_path):
    """What must not depend on how often a sweep was interrupted."""
    return {
        record["name"]: {
            name: record[name]["evaluation"]["perplexity"]["squad"]["value"]
            for name in ("dense", "pruned", "recovered")
        }
        for record in records(tmp_path)
    }


def test_a_record_from_before_a_sweep_says_nothing_of_it(swept):
    x = composed(*(word.replace("0.25,0.9,0.5", "0.25") for word in swept[1][1:]))
    record = read(x.directory)
    began = datetime.fromisoformat(record.provenance.started).timestamp()
    assert Outcome.of(x, None, began).status == "finished"
    assert Outcome.of(x, None, began + 60).status == "not run"


def test_a_name_beyond_ascii_is_a_group_of_a_tracker(tmp_path):
    words = [*places(tmp_path), "tracker=wandb", "model.name='modèle'"]
    launched = []
    with pytest.raises(SweepFailed):
        sweep(
            [[*words, "strategy=random"], [*words, "strategy=none"]],
            [composed(*words, "strategy=random"), composed(*words, "strategy=none")],
            lambda jobs, initial_job_idx: launched.extend(jobs) or [None, None],
        )
    assert [composed(*job).group for job in launched] == ["modèle-none+random"] * 2


@pytest.mark.parametrize(
    ("rows", "words", "jobs"),
    [
        (None, ["seed=0,1", "ratio.value=0.2,0.5"], 4),
        (["strategy=none", "strategy=random ratio.value=0.2,0.5"], ["seed=0,1"], 6),
        (["ratio.value=0.2", "ratio.value=0.5"], [], 2),
        (["ratio.value=0.2", "ratio.value=0.5"], ["ratio.value=0.3"], 1),  # the command line wins
    ],
)
def test_jobs_are_rows_times_comma_separated_values(rows, words, jobs):
    expanded = expand(rows, words)
    assert len(expanded) == jobs
    assert len({tuple(job) for job in expanded}) == jobs
    assert all(("rows=null" in job) == bool(rows) for job in expanded)


def test_a_row_that_is_no_list_of_options_is_refused():
    with pytest.raises(ValueError, match="rows must be a list of options"):
        expand("strategy=none", [])


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Where a sweep of three jobs ran of which the second is refused, its command, stdout, stderr, exit code."""
    tmp_path = tmp_path_factory.mktemp("sweep")
    words = ["-m", *places(tmp_path), "ratio.value=0.25,0.9,0.5", "ratio.tolerance=0.05", "recovery=none"]
    command = [sys.executable, "-m", "kvp", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return tmp_path, words, done.stdout, done.stderr, done.returncode


def test_a_sweep_has_a_header_lines_a_table_and_an_exit_code(swept):
    _, _, stdout, stderr, code = swept
    assert code == 1
    lines = stdout.splitlines()
    assert lines[0].startswith("refused: 1 of 3 jobs: ratio.value=0.9 of kv_cache cannot be reached")
    assert "the nearest is" in lines[0]
    assert lines[0].endswith("(ratio.value=0.9)")
    assert lines[1] == "2 jobs, 0 of them finished before"
    assert lines[3] == (
        "10 stages: 0 stand, 10 to compute (1 model, 1 score, 1 sensitivity, 2 plan, 2 prune, 3 perplexity)"
    )
    assert lines[4].startswith("memory: about ")  # the model is not written yet
    assert re.search(r"Disk: at most [\d.]+ MiB for 3 checkpoints to write, [\d.]+ GiB are free", lines[4])
    assert lines[5] == "time: 10 stages of unknown time left"
    told = [line for line in lines if line.startswith("[")]
    assert [line.split()[:2] for line in told] == [
        [f"[{job}/2]", word] for job in (1, 2) for word in ("started", "finished")
    ]
    (left,) = [line.rpartition("; ")[2] for line in told if "left of the sweep" in line]
    assert re.fullmatch(r"about \d+ s left of the sweep", left)
    told = told[1::2]
    assert "25.0 % of kv_cache; perplexity squad" in told[0]
    assert "4 found, 3 computed" in told[1]  # scores, profile and the dense baseline are shared
    assert stdout.count("the nearest is") == 2  # before the jobs and after the table
    assert "2 of 3 jobs finished" in stdout
    assert stdout.count("│ tiny-kvpruner") == 3
    failed = "kvp: error: 1 of 3 jobs failed, 1 of them refused before they started"
    assert stderr.strip().splitlines()[-1].startswith(failed)
    assert "Traceback" not in stdout + stderr


def test_a_refused_job_leaves_nothing_and_a_log_holds_what_the_others_printed(swept):
    tmp_path, *_ = swept
    assert [record["status"] for record in records(tmp_path)] == ["finished", "finished"]
    for record in records(tmp_path):
        assert "pruned · prune  computed (" in Path(record["directory"], "run.log").read_text()


def test_the_same_command_finds_what_is_finished_and_tries_the_rest_again(swept, monkeypatch, capsys):
    tmp_path, words, *_ = swept
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("store/**/manifest.json")}
    code, stdout, _ = kvp_here(monkeypatch, capsys, *words)
    assert code == 1
    assert "2 jobs, 2 of them finished before" in stdout
    assert "10 stages: 10 stand, 0 to compute" in stdout
    assert "│ tiny-kvpruner-kv_cache0.9" in stdout
    assert stdout.count("7 found, 0 computed") == 4  # two lines, two rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("store/**/manifest.json")} == written


def test_stages_are_foretold_as_they_are_computed(swept):
    tmp_path, *_ = swept
    for record in records(tmp_path):
        x = composed(*record["overrides"])
        chain, dense = foretell(x)
        assert (dense / "config.json").exists()
        if record["status"] == "finished":
            run = [(stage["name"], stage["fingerprint"]) for stage in record["stages"]]
            assert [(stage.name, stage.fingerprint) for stage in chain] == run
            assert all(stage.stands for stage in chain)
            chain, _ = foretell(composed(*record["overrides"], "force=[sensitivity]"))
            again = [stage.name for stage in chain if not stage.stands]
            assert again == ["sensitivity", "plan", "prune", "evaluate/perplexity/squad"]


def test_force_computes_once_what_it_names_and_what_follows(swept, monkeypatch, capsys):
    tmp_path, words, *_ = swept
    two = [word.replace("0.25,0.9,0.5", "0.25,0.5") for word in words]
    code, stdout, _ = kvp_here(monkeypatch, capsys, *two, "force=[score]")
    assert code == 0
    assert (
        "3 stand, 7 to compute (1 score, 2 plan, 2 prune, 2 perplexity)" in stdout
    )  # the probe needs no scores
    assert "3 found, 4 computed" in stdout
    assert "4 found, 3 computed" in stdout  # the second job finds the new scores of the first
    assert len(list(tmp_path.glob("store/score/.*.replaced-1"))) == 1
    code, stdout, _ = kvp_here(monkeypatch, capsys, *two)
    assert stdout.count("7 found, 0 computed") == 4
    monkeypatch.setenv(DRY_RUN, "")  # so that the option's mark goes with this test
    code, stdout, _ = kvp_here(monkeypatch, capsys, *two, "evaluation.perplexity.window=16", "--dry-run")
    assert code == 0 and "Disk: no checkpoint to write, " in stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "ratio.value=0.2,1.5"], "ratio.value must be in [0, 1), got 1.5"),
        (["-m", "ratio.valu=0.2,0.5"], "Did you mean ratio.value"),
        (["-m", "force=[prun]"], "force is a list of stages to compute again"),
        (["-m", "launcher=submitit_slrm"], "Did you mean submitit_slurm?"),
        (["rows=['seed=0']"], "lists 1 rows: sweep over them with python -m kvp -m"),
        (["-m", "rows='seed=0'"], "rows must be a list of options"),
        (["-m", "rows=5"], "rows must be a list of options"),
        (["-m", "rows=['trusted=[os]']"], "a file may not trust itself"),
        (["-m", "ratio.value=1.5", "seed=0,1,2,3"], "all 4 jobs: ratio.value must be in [0, 1), got 1.5"),
        (["-m", "ratio.value=0.2,1.5,2.5"], "1 of 3 jobs: ratio.value must be in [0, 1), got 2.5"),
        (["-m", "device=cuda", "seed=0,1"], "all 2 jobs: device must be cpu or auto here"),
        (
            ["-m", "recovery.target_modules=[foo]", "seed=0,1,2,3,4"],
            "all 5 jobs: recovery.target_modules must name",
        ),
        (
            ["-m", "model=local", "model.path=/nowhere", "seed=0,1,2"],
            "all 3 jobs: model.path=/nowhere is no directory here",
        ),
    ],
)
def test_a_sweep_of_bad_options_launches_nothing(tmp_path, monkeypatch, capsys, words, message):
    code, _, stderr = kvp_here(monkeypatch, capsys, *words, *places(tmp_path))
    assert code == 1
    (error,) = [line for line in stderr.splitlines() if line.startswith("kvp: error:")]
    assert message in error
    assert error.count(message.partition(": ")[2] or message) == 1  # once for all that fail alike
    assert not list(tmp_path.iterdir())


def test_rows_of_an_experiment_times_the_command_line(swept, tmp_path, monkeypatch, capsys):
    first, *_ = swept
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "experiment" / "table.yaml").write_text(
        "# @package _global_\nrows:\n  - strategy=none\n  - strategy=random ratio.value=0.25,0.5\n"
    )
    words = ["experiment=table", *places(first), f"runs={tmp_path}/runs", "recovery=none"]
    code, stdout, _ = kvp_here(monkeypatch, capsys, "-m", "--config-dir", str(conf), *words, "seed=0,1")
    assert code == 0
    assert "6 of 6 jobs finished" in stdout
    asked = Counter((str(r["ratio"]["asked"]), r["provenance"]["seed"]) for r in records(tmp_path))
    assert len(asked) == 6


def test_the_runs_of_a_sweep_share_a_group_in_wandb(tmp_path):
    words = [*places(tmp_path), "tracker=wandb"]
    jobs = [[*words, "strategy=random"], [*words, "strategy=none"], [*words, "tracker.group=mine"]]
    launched = []

    def launch(jobs, initial_job_idx):
        launched.extend(jobs)
        return [None] * len(jobs)

    with pytest.raises(SweepFailed, match="3 of 3 jobs failed"):
        sweep(jobs, [composed(*job) for job in jobs], launch)
    together = "tiny-kvpruner+none+random"
    assert [composed(*job).group for job in launched] == [together, together, "mine"]


def test_what_a_preset_says_of_a_recovery_is_nothing_without_one(tmp_path):
    node = composed(*places(tmp_path), "recovery=none", "measure=none").node
    assert (node["recovery"], node["measure"], node["evaluation"]["zero_shot"]) == (None, None, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2}', '{"schema": 2, "status": "finished"}'])
def test_a_corrupt_record_is_written_anew(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert finished_before(tmp_path) is None
    assert read(tmp_path) is None


def test_nan_in_one_job_leaves_the_other(swept, tmp_path, monkeypatch, capsys):
    model = AutoModelForCausalLM.from_pretrained(records(swept[0])[0]["dense"]["checkpoint"])
    for name, value in (("good", None), ("broken", float("nan"))):
        if value:
            torch.nn.init.constant_(model.lm_head.weight, value)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    words = [f"model.path={tmp_path}/broken,{tmp_path}/good", "model=local", "recovery=none", "seed=0"]
    code, stdout, _ = kvp_here(monkeypatch, capsys, "-m", *places(tmp_path), *words)
    assert code == 1
    assert "values that are not finite" in stdout
    assert "1 of 2 jobs finished" in stdout
    assert {record["status"] for record in records(tmp_path)} == {"finished", "failed"}
    failed = next(record for record in records(tmp_path) if record["status"] == "failed")
    assert failed["error"]["type"] == "ValueError"
    assert "Traceback" in failed["error"]["traceback"]
    assert f"model.path={tmp_path}/broken" in failed["overrides"]


def stop_in_recovery(pid, how, tmp_path, finished):
    """Send a signal to a process as soon as it tunes the job after so many finished ones."""
    while True:
        told = [(record["status"], record.get("stage"), record.get("pid")) for record in records(tmp_path)]
        if ("running", "recover", pid) in told and len(told) == finished + 1:
            return os.kill(pid, how)
        time.sleep(0.001)


def looks(tmp_path):
    return Counter(look(path).status for path in tmp_path.glob("runs/*/run.json"))


@pytest.mark.slow
def test_a_sweep_killed_twice_and_interrupted_once_ends_with_the_same_table(
    swept, tmp_path, monkeypatch, capsys
):
    longer = "recovery.max_steps=40"  # long enough to be met in it
    words = ["-m", "ratio.value=0.25,0.5", "ratio.tolerance=0.05", longer, *places(tmp_path)]
    for finished in (0, 1):
        process = start_kvp(*words)
        stop_in_recovery(process.pid, signal.SIGKILL, tmp_path, finished)
        process.join()
        assert looks(tmp_path) == Counter(finished=finished, died=1)
    process = start_kvp(*words, log=tmp_path / "printed")
    stop_in_recovery(process.pid, signal.SIGINT, tmp_path, 1)
    while process.join(20) or process.is_alive():  # an interrupt in a finalizer is swallowed: another
        os.kill(process.pid, signal.SIGINT)
    assert process.exitcode == 1
    printed = (tmp_path / "printed").read_text()
    assert "interrupted; finished stages stay, the same command goes on from them" in printed
    assert "1 of 2 jobs finished" in printed
    assert looks(tmp_path) == Counter(finished=1, failed=1)
    assert kvp_here(monkeypatch, capsys, *words)[0] == 0
    undisturbed = [*words[:4], *places(swept[0]), f"runs={tmp_path}/undisturbed/runs"]
    assert kvp_here(monkeypatch, capsys, *undisturbed)[0] == 0
    assert perplexities(tmp_path) == perplexities(tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_sweeps_over_one_store_at_once_compute_every_stage_once(tmp_path):
    words = ["-m", "ratio.value=0.25,0.5,0.75", *places(tmp_path), "tracker=wandb", "recovery=none"]
    processes = [start_kvp(*words, log=tmp_path / "printed") for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "printed").read_text()
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/*/run.log"))
    done = Counter(re.findall(r"^\[ *\d+/\d+\] \w+ · ([\w/]+)  computed", logs, re.MULTILINE))
    there = Counter(
        path.parents[1].relative_to(tmp_path / "store").as_posix()
        for path in tmp_path.glob("store/**/manifest.json")
    )
    assert done == there
    assert {record["status"] for record in records(tmp_path)} == {"finished"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("joblib", "hydra_plugins.hydra_joblib_launcher"),
        ("submitit_local", "submitit"),
        ("ray", "ray"),
    ],
)
def test_launchers_run_the_jobs_in_other_processes(swept, tmp_path, monkeypatch, capsys, launcher, package):
    pytest.importorskip(package)
    first, words, *_ = swept
    options = [word.replace("0.25,0.9,0.5", "0.25,0.9") for word in words if not word.startswith("runs=")]
    stages = set(first.glob("store/**/manifest.json"))
    options += [f"launcher={launcher}", f"runs={tmp_path}/runs"]
    code, stdout, stderr = kvp_here(monkeypatch, capsys, *options)
    assert code == 1, stderr
    assert "1 of 2 jobs finished" in stdout
    assert "the nearest is" in stdout
    pids = {record.get("pid") for record in records(tmp_path)} - {None}
    assert os.getpid() not in pids
    if launcher == "joblib":
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=False)  # its workers would wait for more
    assert set(first.glob("store/**/manifest.json")) == stages


@pytest.mark.parametrize(
    ("process", "visible", "gpu"),
    [
        ("LokyProcess-1", "0,1", "0"),
        ("LokyProcess-2", "0,1", "1"),
        ("LokyProcess-3", "4,6", "4"),
        ("MainProcess", "0,1", "0,1"),
    ],
)
def test_each_joblib_worker_takes_a_gpu_of_its_own(process, visible, gpu):
    assert gpu_of(process, visible) == gpu


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment, tmp_path):
    """Compose the first and the last row; the slow test below composes every word of all rows."""
    jobs = jobs_of(experiment, tmp_path)
    for job in {tuple(job): job for job in (jobs[0], jobs[-1])}.values():
        compose_job(job)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_word_of_every_experiment_composes(experiment, tmp_path):
    seen: set[str] = set()
    for job in jobs_of(experiment, tmp_path):
        if not seen.issuperset(job):
            seen.update(job)
            compose_job(job)


def jobs_of(experiment, tmp_path):
    given = [f"experiment={experiment}", *places(tmp_path)[1:3], "device=cpu"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return expand(compose("config", overrides=given).rows, given)


def compose_job(job):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        Experiment.compose(compose("config", overrides=job))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_on_the_tiny_model(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["-m", f"experiment={experiment}", *places(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "kvp", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for record in records(tmp_path):
        chain, _ = foretell(composed(*record["overrides"]))
        assert {stage.fingerprint for stage in chain} == {stage["fingerprint"] for stage in record["stages"]}
