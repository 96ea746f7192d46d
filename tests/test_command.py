"""Manners of the command: version, hints, own options, what a bug shows, the end by Ctrl-C or a closed pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from kvp import __version__
from kvp.__main__ import main, worded
from kvp.sweep.status import look
from tests.helpers.bad_options import TINY
from tests.helpers.runs import ROOT

OWN = """
from typing import ClassVar

import torch

from kvp.options import options
from kvp.strategies.templates.scored import ScoreStrategy


@options
class Own(ScoreStrategy):
    needs_calibration: ClassVar[bool] = False

    def kinds(self):
        return ("ffn",)

    def score(self, target):
        return {space: torch.arange(space.shape[0], dtype=torch.float64) for space in self.spaces(target.config)}
"""
YAML = "defaults: [allocator: uniform, compensation: none, _self_]\n_target_: gt_mine.own.Own\n"


def kvp_here(monkeypatch, capsys, *words):
    """`kvp words` in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["kvp", *words])
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    try:
        main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with a strategy of its own, as the console script finds it: not on Python's path."""
    for name, text in {
        "gt_mine/__init__.py": "",
        "gt_mine/own.py": OWN,
        "conf/strategy/mine.yaml": YAML,
        "conf/strategy/theirs.yaml": YAML.replace("gt_mine.own.Own", "pandas.DataFrame"),
        "conf/strategy/torn.yaml": "a: [1\n",
        "conf/experiment/hostile.yaml": "# @package _global_\ntrusted: [pandas]\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("gt_")]:
        del sys.modules[name]


def test_version_is_kvps(monkeypatch, capsys):
    assert kvp_here(monkeypatch, capsys, "--version") == (0, f"kvp {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy=mien"], "there is no strategy=mien. Did you mean mine?"),
        (["strategy=torn"], "a configuration file is no YAML: while parsing a flow sequence"),
        (["ratio.value=0.25,0.5"], "several values: `kvp sweep ratio.value=0.25,0.5` runs each"),
        (["strategy=theirs"], "names code of pandas, which kvp does not trust"),
        (["experiment=hostile"], "a file may not trust itself"),
        (["strategy=mine", "strategy.powr=2"], "there is no option 'strategy.powr'. Did you mean"),
        (
            ["strategy=mine", "strategy.allocator.multiple_off=2"],
            "Did you mean strategy.allocator.multiple_of",
        ),
    ],
)
def test_own_options_are_known_and_checked(words, message, project, monkeypatch, capsys):
    code, _, stderr = kvp_here(monkeypatch, capsys, "--config-dir", "conf", *TINY, *words)
    assert code == 1
    assert message in stderr
    assert "Traceback" not in stderr
    assert not (project / "outputs").exists()


def test_an_own_strategy_of_this_directory_runs_and_can_be_retried(project, monkeypatch, capsys):
    words = [
        "--config-dir",
        "conf",
        *TINY,
        "strategy=mine",
        "ratio=params",
        "recovery=none",
        "evaluation=none",
    ]
    code, stdout, stderr = kvp_here(monkeypatch, capsys, *words)
    assert code == 0, stderr
    assert "-mine-params0.25-" in stdout
    (record,) = project.glob("outputs/runs/*/run.json")
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    assert look(record).retry == f"python -m kvp --config-dir {project}/conf {' '.join(words[2:])}"


def test_a_bug_of_kvp_shows_its_traceback():
    for bug in (
        TypeError,
        IndexError,
        AssertionError,
        ImportError,
        ZeroDivisionError,
        NotImplementedError,
        KeyError,
    ):
        with pytest.raises(bug), worded():
            raise bug("a bug")


def test_what_a_user_can_mend_is_a_line_unless_the_traceback_is_asked_for(monkeypatch, capsys):
    for error in (ValueError, FileNotFoundError, FloatingPointError, MemoryError, RuntimeError):
        with pytest.raises(SystemExit) as exit_, worded():
            raise error("why")
        assert exit_.value.code == 1
        assert capsys.readouterr().err.startswith("kvp: error: why")
    monkeypatch.setenv("KVP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"), worded():
        raise ValueError("why")


def command(*words, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "kvp", *words], env=environment, text=True, **more)


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)  # nobody reads
    process = command("--help", cwd=tmp_path, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate()[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.2, 0.5, 1, 1.5, 2, 3, 5])
def test_an_interrupt_before_the_run_is_one_line(seconds, tmp_path):
    process = command(
        *TINY, "store=s", "runs=r", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "_yaml" not in maps.read_text():  # one of the first things that kvp imports
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert stderr.strip().splitlines()[-1].startswith("interrupted; finished stages stay")
    assert "Traceback" not in stderr
