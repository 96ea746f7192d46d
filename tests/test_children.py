"""Processes that kvp starts end with it, whatever ends it; so nothing runs, measures or writes beside a rerun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from kvp import children
from kvp.data.corpora import FileCorpus
from kvp.data.text import PackedText
from kvp.measurement.measure import Measure
from kvp.models.load import byte_tokenizer, save
from kvp.serving.sample import make_sample
from kvp.serving.verify import ask
from tests.conftest import tiny_model
from tests.helpers.recovery import TEXT, save_checkpoint, train_here
from tests.process import ROOT, start

ENDS = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP]
ASLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
LONG = Measure(batch_size=1, prompt_length=8, new_tokens=8, warmup=0, runs=1_000_000)
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")


@pytest.fixture(autouse=True)
def hangups():
    """`nohup make test` ignores SIGHUP, and what it starts inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def until(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return found


def below(pid: int, *words: str) -> list[psutil.Process]:
    """Return the processes below one whose command has all words."""
    try:
        found = psutil.Process(pid).children(recursive=True)
        return [one for one in found if all(any(word in part for part in one.cmdline()) for word in words)]
    except psutil.NoSuchProcess:
        return []


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def check_that_they_end(parent: int, how: signal.Signals, *words: str, least: int = 1) -> None:
    """End a process once its children run; they must end too."""
    until(lambda: len(below(parent, *words)) >= least)
    bereft = below(parent)
    os.kill(parent, how)
    until(lambda: all(map(is_gone, bereft)), seconds=10)


def sleeping_parent(code: str) -> subprocess.Popen:
    """Start a process that imports no modelling code and starts a child."""
    head = "import sys; sys.argv = ['kvp']; from kvp import children; "
    return subprocess.Popen([sys.executable, "-c", head + code], cwd=ROOT)


@linux
@pytest.mark.parametrize("how", ENDS, ids=lambda how: how.name)
@pytest.mark.parametrize("call", ["run", "start"])
def test_a_child_ends_with_its_parent(how, call):
    wait = "" if call == "run" else ".wait()"
    parent = sleeping_parent(f"children.{call}({ASLEEP!r}){wait}")
    check_that_they_end(parent.pid, how, "time.sleep(600)")
    assert parent.wait() == -how


@linux
def test_a_child_with_children_of_its_own_is_asked_to_end(tmp_path):
    """SIGTERM instead of SIGKILL: the child has time to end what it started."""
    said = tmp_path / "said"
    tidy = (
        "import signal, sys, time; "
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(said)!r}, 'a').write('tidied'), sys.exit())); "
        f"open({str(said)!r}, 'w').write('ready '); time.sleep(600)"
    )
    parent = sleeping_parent(f"children.start([sys.executable, '-S', '-c', {tidy!r}], ending=15).wait()")
    until(lambda: said.exists() and said.read_text())
    parent.kill()
    parent.wait()
    until(lambda: said.read_text() == "ready tidied", seconds=10)


@linux
def test_a_child_whose_parent_is_gone_never_starts(tmp_path):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    ran = [sys.executable, "-S", "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    asks, kill = [sys.executable, "-I", "-S", "-c", children.PRELUDE], str(int(signal.SIGKILL))
    subprocess.run([*asks, str(gone.pid), kill, *ran], check=True)
    assert not (tmp_path / "ran").exists()
    subprocess.run([*asks, str(os.getpid()), kill, *ran], check=True)
    assert (tmp_path / "ran").exists()


def test_the_child_is_the_command_itself():
    """Exit codes, signals, output and the environment come through."""
    code = "import os, sys; print(os.environ['A'], sys.argv[1:]); sys.exit(7)"
    done = children.run(
        [sys.executable, "-c", code, "", "b c"], env={"A": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (7, "1 ['', 'b c']\n")
    killed = children.run([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize("program", ["/nowhere/python", "no-such-program", os.devnull])
def test_a_program_that_is_not_there_is_one_clear_error(program):
    with pytest.raises(FileNotFoundError, match=f"no program {program}"):
        children.run([program])


def measure_for_ever(checkpoint: Path) -> None:
    LONG.measure(checkpoint, device="cpu", dtype="float32")


def ask_for_ever(directory: Path) -> None:
    sample, _ = make_sample(tiny_model(vocab_size=259), byte_tokenizer())
    ask(directory, sample, "transformers")


@linux
def test_the_measuring_process_ends_with_the_run(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    run = start(measure_for_ever, tmp_path)
    check_that_they_end(run.pid, signal.SIGKILL, "kvp.measurement.child")
    run.join()


@linux
def test_an_engine_ends_with_the_export(tmp_path):
    save(tiny_model(vocab_size=259), byte_tokenizer(), tmp_path)
    run = start(ask_for_ever, tmp_path)
    check_that_they_end(run.pid, signal.SIGTERM, "engine_transformers.py")
    run.join()


@pytest.mark.slow
@linux
def test_processes_that_train_together_end_with_the_run(tmp_path):
    """Also those that torchrun has started and that are not further than their imports."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"num_processes": 2, "dropout": 0.0, "data": PackedText(corpora=["text"], length=4)}
    corpora = {"text": FileCorpus(path=str(tmp_path / "text.txt"))}
    directory = tmp_path / "work"
    directory.mkdir()
    run = start(train_here, save_checkpoint(tmp_path / "model", torch.float32), directory, corpora, options)
    check_that_they_end(
        run.pid, signal.SIGHUP, "kvp.recovery.processes", least=3
    )  # torchrun and two of its own
    run.join()


@linux
@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS, ids=lambda how: how.name)
def test_workers_of_joblib_end_with_the_sweep(tmp_path, how):
    pytest.importorskip("joblib")
    code = f"""
import joblib
def job(number):
    import pathlib, time
    from kvp.sweep.worker import settle
    settle()
    pathlib.Path({str(tmp_path)!r}, str(number)).touch()
    time.sleep(600)
joblib.Parallel(n_jobs=2)(joblib.delayed(job)(number) for number in range(2))
"""
    sweep = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: len(list(tmp_path.iterdir())) == 2, seconds=300)
    check_that_they_end(sweep.pid, how, "popen_loky_posix", least=2)
    sweep.wait()


@linux
def test_a_process_ends_at_once_if_its_parent_has_ended():
    code = f"end_with_parent({os.getpid()}); print('here', flush=True); end_with_parent(1); print('there')"
    head = "import sys; sys.argv = ['kvp']; from kvp.children import end_with_parent; "
    done = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "here\n")
