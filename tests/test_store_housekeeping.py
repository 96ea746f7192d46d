"""`python -m kvp.store`: what it shows, what goes, what always stays, and that a kill leaves nothing half."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvp.store import Store, __main__, housekeeping
from kvp.store.contents import entries, runs_in
from kvp.store.housekeeping import discard, sizes
from kvp.store.locks import alone

ROOT = Path(__file__).parents[1]
DAY = 86400
MIB = 2**20


def write(size: int):
    def work(directory: Path) -> dict:
        (directory / "model").mkdir()
        (directory / "model" / "weights").write_bytes(bytes(size))
        return {"loss": 1.0}

    return work


class House:
    """A store, runs, and the command over both."""

    def __init__(self, home: Path) -> None:
        self.store, self.runs = home / "store", home / "runs"
        self.runs.mkdir()

    def stage(self, kind: str, seed: int = 0, size: int = MIB, **options) -> Path:
        return Store(self.store).once(kind, {"seed": seed}, write(size), **options).path

    def run(self, name: str, *stages: Path, status: str = "finished", **more) -> Path:
        named = [
            {"name": str(path.parent.relative_to(self.store)), "fingerprint": path.name * 4}
            for path in stages
        ]
        file = self.runs / name / "run.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"schema": 3, "status": status, "stages": named, **more}))
        return file

    def unfinished(self, kind: str, seed: int = 0) -> Path:
        def die(directory: Path) -> None:
            (directory / "checkpoint").write_bytes(bytes(MIB))
            raise RuntimeError

        with pytest.raises(RuntimeError):
            Store(self.store).once(kind, {"seed": seed}, die, resumable=True)
        return next(path for path in (self.store / kind).glob(".*.partial"))

    def __call__(self, command: str, *words: str) -> None:
        __main__.main([command, *words, "--store", str(self.store), "--runs", str(self.runs)])

    def left(self) -> set[Path]:
        return {entry.path for entry in entries(self.store)}


@pytest.fixture
def house(tmp_path, monkeypatch) -> House:
    """A house away from the clone, whose own outputs/runs the command would read."""
    monkeypatch.chdir(tmp_path)
    return House(tmp_path)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for each in [path, *path.rglob("*")]:
        os.utime(each, (then, then))


def test_ls_shows_state_bytes_age_and_runs_of_every_stage(house, capsys):
    shared, own, idle = (
        house.stage("score"),
        house.stage("evaluate/perplexity/squad", 1),
        house.stage("prune", 2),
    )
    house.run("first", shared, own)
    house.run("second", shared)
    house.stage("score", since=time.time() + 9)  # computed again
    (idle / "model" / "weights").unlink()
    partial = house.unfinished("recover")
    age(partial, 3 * DAY)
    house("ls")
    lines = capsys.readouterr().out.splitlines()

    def line(name: str) -> str:
        return next(line for line in lines if name in line)

    assert "finished" in line(f"score/{shared.name}") and "first, second" in line(f"score/{shared.name}")
    assert "1.0" in line(f"evaluate/perplexity/squad/{own.name}")
    assert "replaced" in line(".replaced-1")
    assert "corrupt: model/weights cannot be read" in line(f"prune/{idle.name}")
    assert "unfinished" in line(partial.name) and "3 d" in line(partial.name)
    assert "5 stages" in lines[0]


def test_sizes_by_run_are_own_and_shared_bytes_and_what_is_missing(house):
    shared, own, lost = (
        house.stage("score", size=2 * MIB),
        house.stage("prune", 1, size=MIB),
        house.stage("plan", 2),
    )
    house.run("first", shared, own, lost)
    house.run("second", shared)
    shutil.rmtree(lost)
    found = {entry.key: entry for entry in entries(house.store)}
    first, second = runs = runs_in([house.runs])
    own_bytes, shared_bytes, missing = sizes(first, runs, found)
    assert MIB <= own_bytes < 1.1 * MIB and 2 * MIB <= shared_bytes < 2.1 * MIB and missing == 1
    assert sizes(second, runs, found)[0] == 0


def test_whole_finds_damage_that_sizes_do_not_show(house, capsys):
    stage = house.stage("score")
    (stage / "model" / "weights").write_bytes(b"x" * MIB)
    house("ls")
    assert "corrupt" not in capsys.readouterr().out
    house("ls", "--whole")
    assert "corrupt: model/weights was changed" in capsys.readouterr().out


def test_gc_shows_and_with_yes_removes_what_nobody_needs(house, capsys):
    needed, idle = house.stage("score"), house.stage("prune", 1)
    house.run("one", needed)
    house.stage("score", since=time.time() + 9)
    damaged = house.stage("plan", 2)
    (damaged / "result.json").write_text("{")
    house.run("two", house.stage("plan", 2))
    fresh, stale = house.unfinished("recover"), house.unfinished("refit")
    age(stale, 8 * DAY)
    before = house.left()
    house("gc")
    shown = capsys.readouterr().out
    assert house.left() == before and "nothing was removed: --yes does it" in shown
    assert "would remove: 4 stages" in shown
    house("gc", "--yes")
    assert house.left() == {needed, damaged, fresh}
    assert "removed: 4 stages" in capsys.readouterr().out
    assert not idle.parent.exists()
    house("gc", "--yes")  # nothing is left to do
    assert house.left() == {needed, damaged, fresh}


def test_gc_obeys_ages_and_keeps_what_it_is_asked_to_keep(house):
    needed, idle = house.stage("score"), house.stage("prune", 1)
    house.run("one", needed)
    partial = house.unfinished("recover")
    age(idle, 3 * DAY)
    age(partial, 3 * DAY)
    house("gc", "--yes", "--older-than", "4d")
    assert house.left() == {needed, idle, partial}
    house("gc", "--yes", "--older-than", "2d", "--keep-unreferenced")
    assert house.left() == {needed, idle}
    house("gc", "--yes", "--older-than", "48h")
    assert house.left() == {needed}


def test_a_stage_from_the_future_is_never_old(house):
    house.run("one", house.stage("score"))
    idle, partial = house.stage("prune", 1), house.unfinished("recover")
    for path in (idle, partial):
        age(path, -400 * DAY)
    assert {entry.age for entry in entries(house.store) if entry.path in (idle, partial)} == {None}
    house("gc", "--yes", "--older-than", "0s")
    assert {idle, partial} <= house.left()


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "finished"}', '{"stages": [{"name": 3}]}'])
def test_a_run_that_cannot_be_read_may_need_any_stage(house, capsys, text):
    house.run("one", house.stage("score"))
    idle = house.stage("prune", 1)
    file = house.run("two")
    file.write_text(text)
    house("gc", "--yes")
    assert idle in house.left() and f"{file} cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"cannot be read .* nobody knows which stages it needs"):
        house("rm", "one", "--yes")
    house("rm", "two", "one", "--yes")
    assert house.left() == {idle}


def test_what_a_process_computes_or_may_have_found_stays(house, capsys):
    """The process that computes is this one: its store is open, and its stage is locked."""
    house.run("one", house.stage("score"))
    idle = house.stage("prune", 1)

    def work(directory: Path) -> dict:
        (directory / "half").touch()
        age(directory, 30 * DAY)
        house("gc", "--yes", "--older-than", "0s")
        assert idle.exists() and (directory / "half").exists()
        with pytest.raises(SystemExit, match="a process computes recover/"):
            house("rm", f"recover/{directory.name}", "--yes", "--force")
        with pytest.raises(SystemExit, match=r"a process uses .* wait until it has ended"):
            house("rm", f"prune/{idle.name}", "--yes")
        return {}

    Store(house.store).once("recover", {}, work)
    shown = capsys.readouterr().out
    assert "1 stay: a process computes it" in shown and "a process uses the store" in shown
    house("gc", "--yes")
    assert not idle.exists()


def test_rm_of_a_run_takes_what_only_it_needs(house):
    shared, own, idle = house.stage("score"), house.stage("prune", 1), house.stage("plan", 2)
    first, second = house.run("first", shared, own), house.run("second", shared)
    house("rm", "first")
    assert first.exists() and own.exists()
    house("rm", "first", "--yes", "--keep-record")
    assert first.exists() and house.left() == {shared, idle}
    house("rm", str(first.parent), "--yes")
    assert not first.parent.exists() and second.exists() and house.left() == {shared, idle}
    house("rm", "second", "--yes")
    assert house.left() == {idle} and not list(house.runs.iterdir())


def test_rm_of_runs_together_takes_what_they_share(house):
    shared = house.stage("score")
    house.run("first", shared), house.run("second", shared)
    house("rm", "first", "second", "--yes")
    assert not house.left()


def test_rm_of_a_stage_that_runs_need_is_refused_unless_forced(house, capsys):
    stage = house.stage("score")
    house.run("first", stage), house.run("second", stage)
    for words in ([f"score/{stage.name}"], [stage.name], [str(stage)], ["first", stage.name]):
        with pytest.raises(SystemExit, match=r"score/\w+ is needed by (first and 1 more|second): .*--force"):
            house("rm", *words, "--yes")
        assert stage.exists() and (house.runs / "first").exists()
    house("rm", stage.name, "--yes", "--force")
    assert not house.left()
    house("ls")
    assert "stages missing" in capsys.readouterr().out


def test_rm_of_a_run_that_works_is_refused(house):
    house.run("here", status="running", host=socket.gethostname(), pid=os.getpid())
    house.run("elsewhere", status="running", host="other", pid=1)
    house.stage("score")
    for name in ("here", "elsewhere"):
        with pytest.raises(SystemExit, match=f"{name} runs, as .* pid .*--force"):
            house("rm", name, "--yes")
    house("rm", "elsewhere", "--yes", "--force")
    assert [path.name for path in house.runs.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rm", "frist"], "there is no run or stage 'frist'. Did you mean first"),
        (["rm", "zzz"], "there is no run or stage 'zzz'. python -m kvp.store ls"),
        (["rm", "../../etc"], "there is no run or stage"),
        (["rm", "/"], "there is no run or stage"),
        (["gc", "--runs", "/nowhere"], "there is no directory /nowhere: --runs names"),
        (["ls", "--store", "/nowhere"], "there is no store /nowhere: --store names"),
        (["gc", "--yes", "--store", "/dev/shm"], "/dev/shm is no store: kvp never wrote there"),
    ],
)
def test_bad_words_are_one_clear_error_and_nothing_goes(house, words, message):
    house.run("first", house.stage("score"))
    before = house.left()
    command, *more = words
    named = {"--store": str(house.store), "--runs": str(house.runs)}
    rest = [word for name, value in named.items() if name not in more for word in (name, value)]
    with pytest.raises(SystemExit, match=message):
        __main__.main([command, *more, *rest])
    assert house.left() == before


@pytest.mark.parametrize(
    "words", [["gc", "--older-than", "seven"], ["gc", "--older-than", "-1d"], ["rm"], []]
)
def test_words_that_cannot_be_parsed_end_with_usage(words, capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(words)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_gc_without_any_run_would_remove_all_and_is_refused(house):
    house.stage("score")
    with pytest.raises(SystemExit, match=r"no run.json .*--runs DIR.*--keep-unreferenced"):
        house("gc", "--yes")
    assert len(house.left()) == 1


def test_gc_by_the_runs_of_another_store_is_refused(house):
    house.stage("score")
    house.run("other", house.store / "plan" / ("f" * 16))
    with pytest.raises(SystemExit, match=r"none of the 1 runs found names a stage of .*--runs DIR"):
        house("gc", "--yes")
    assert len(house.left()) == 1


def test_a_directory_that_looks_like_stages_is_no_store(tmp_path):
    """Sixteen hexadecimal digits name many directories of this world."""
    (tmp_path / "cache" / "0123456789abcdef").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is no store"):
        __main__.main(["gc", "--yes", "--store", str(tmp_path), "--runs", str(tmp_path)])
    assert (tmp_path / "cache" / "0123456789abcdef").exists()


@pytest.mark.parametrize("command", [("gc", "--yes"), ("rm", "old", "--yes")])
def test_what_a_process_wrote_before_it_ended_is_seen(house, monkeypatch, command):
    """It writes its record after the store was listed, and ends before the store is locked."""
    shared, own = house.stage("score"), house.stage("recover", 1)
    house.run("old", shared)

    @contextmanager
    def locked(store):
        house.run("new", shared, own)
        with alone(store) as unused:
            yield unused

    monkeypatch.setattr(__main__, "alone", locked)
    house(*command)
    assert own.exists() and shared.exists()


def test_a_run_that_is_a_link_needs_its_stages(house, tmp_path):
    needed = house.stage("score")
    house.run("here", house.stage("score", 1))
    house.run("moved", needed)
    (house.runs / "moved").rename(tmp_path / "elsewhere")
    (house.runs / "moved").symlink_to(tmp_path / "elsewhere")
    (house.runs / "round").symlink_to(house.runs)
    house("gc", "--yes")
    assert needed.exists()


def test_a_link_goes_and_not_where_it_leads(house, tmp_path):
    stage = house.stage("score")
    house.run("one", house.stage("prune", 1))
    moved = tmp_path / "bigger disk"
    stage.rename(moved)
    stage.symlink_to(moved)
    (house.store / "loop").symlink_to(house.store)
    house("gc", "--yes")
    assert not stage.is_symlink() and (moved / "model" / "weights").exists()


@pytest.mark.parametrize("after", ["rename", "half"])
def test_a_killed_removal_leaves_nothing_that_looks_whole(house, monkeypatch, after):
    stage = house.stage("score")
    record = house.run("one", stage)
    house.run("two")

    def killed(path: Path) -> None:
        if after == "half":
            (path / "model" / "weights").unlink() if (path / "model").exists() else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(housekeeping, "_delete", killed)
        with pytest.raises(KeyboardInterrupt):
            house("rm", "one", "--yes")
        assert not record.exists() and stage.exists()  # the record first
        with pytest.raises(KeyboardInterrupt):
            discard(stage, stage)
    assert [entry.state for entry in entries(house.store)] == ["removed"]
    assert [run.name for run in runs_in([house.runs])] == ["two"]
    house("gc", "--yes")
    assert not house.left() and [path.name for path in house.runs.iterdir()] == ["two"]
    assert not [path for path in house.store.rglob("*") if path.name != ".in-use"]


def test_a_process_that_begins_while_housekeeping_removes_waits_for_its_end(house):
    house.run("one", house.stage("score"))
    house.stage("prune", 1)
    code = f"""
import sys, time; sys.argv = ["kvp"]
from pathlib import Path
from kvp.store import locks
with locks.alone(Path({str(house.store)!r})) as unused:
    print(unused, flush=True)
    time.sleep(600)
"""
    keeper = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert keeper.stdout is not None and keeper.stdout.readline() == "True\n"
    opening = f'import sys; sys.argv = ["kvp"]; from kvp.store import Store; Store({str(house.store)!r})'
    user = subprocess.Popen([sys.executable, "-c", opening], cwd=ROOT)
    with pytest.raises(subprocess.TimeoutExpired):
        user.wait(timeout=1.5)
    keeper.send_signal(signal.SIGKILL)
    assert user.wait(timeout=30) == 0


def test_the_command_imports_nothing_heavy():
    words = [sys.executable, "-X", "importtime", "-m", "kvp.store", "ls", "--store", "/nowhere"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "kvp.store: error: there is no store /nowhere" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kvp.store.contents" in imported and not {"torch", "transformers", "hydra", "pydantic"} & imported


def test_runs_of_the_usual_place_count_beside_those_that_are_named(house, monkeypatch, tmp_path):
    """`gc --runs OTHER` must not take what outputs/runs needs."""
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    assert __main__._directories([other]) == [other]
    (tmp_path / "outputs" / "runs").mkdir(parents=True)
    assert __main__._directories([other]) == [other, Path("outputs/runs")]
    assert __main__._directories(None) == [Path("outputs/runs")]
