"""A store that others write to, disks that are full or read-only, and clocks that are wrong."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvp.data.corpora import FileCorpus
from kvp.record import RunRecord
from kvp.recovery.training import train
from kvp.store import StageError, Store
from kvp.store.manifest import _sha256
from tests.helpers.recovery import TEXT, make, save_checkpoint
from tests.process import ROOT
from tests.report.sample_records import make_record

INPUTS = {"seed": 0}


def write(directory: Path) -> dict:
    (directory / "model").mkdir()
    save_file({"a": torch.zeros(10)}, directory / "model" / "model.safetensors")
    (directory / "plan.json").write_text("{}")
    return {"loss": 3.25}


def never(directory: Path) -> dict:
    raise AssertionError("the stage was finished")


@pytest.fixture
def stage(tmp_path) -> Path:
    return Store(tmp_path).once("score", INPUTS, write).path


def again(stage: Path, work=write):
    return Store(stage.parents[1]).once("score", INPUTS, work)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids="{:03o}".format)
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        Store(tmp_path / "store").once("score", INPUTS, write)
    finally:
        os.umask(before)
    paths = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    assert {".in-use", "model.safetensors", "manifest.json"} <= {path.name for path in paths}
    assert any(path.suffix == ".lock" for path in paths)
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def link_to_a_directory(path: Path) -> None:
    path.symlink_to("/etc")


@pytest.mark.parametrize("name", ["model/adapter_config.json", "more", "model/extra/tokenizer.json"])
@pytest.mark.parametrize("add", [Path.touch, os.mkfifo, link_to_a_directory], ids=["file", "pipe", "link"])
def test_an_added_file_is_damage(stage, caplog, name, add):
    """transformers would load an adapter that lies beside a model."""
    (stage / name).parent.mkdir(exist_ok=True)
    add(stage / name)
    assert not again(stage).found
    (message,) = caplog.messages
    assert f"{name} was added" in message and ".corrupt-1" in message
    assert again(stage, never).found


@pytest.mark.parametrize("name", [".DS_Store", "model/.nfs0001", "model/.cache/huggingface/x"])
def test_hidden_names_of_file_managers_and_nfs_are_no_damage(stage, name):
    (stage / name).parent.mkdir(parents=True, exist_ok=True)
    (stage / name).touch()
    assert again(stage, never).found


@pytest.mark.parametrize("name", ["model/model.safetensors", "result.json", "manifest.json"])
@pytest.mark.parametrize("instead", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_a_directory_or_a_device_in_place_of_a_file_is_damage(stage, name, instead):
    """None of them is read: a pipe blocks, a device never ends."""
    (stage / name).unlink()
    instead(stage / name)
    assert again(stage).result == {"loss": 3.25}


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"files": 3},
        {"files": {"a": 1}},
        {"seconds": "x"},
        {"fingerprint": None},
        {"files": {"/etc/passwd": {}}},
    ],
)
def test_a_manifest_that_is_sealed_and_senseless_is_damage(stage, manifest):
    file = stage / "manifest.json"
    whole = json.loads(file.read_text())
    whole.pop("seal")
    senseless = whole | manifest if manifest else {}
    file.write_text(json.dumps(senseless | {"seal": _sha256(senseless)}))
    assert not again(stage).found


@pytest.mark.parametrize("text", ["[" * 100_000, "[1, 2]", '"x"', "\x00", '{"files": NaN}'])
def test_a_manifest_that_is_no_manifest_is_damage(stage, text):
    (stage / "manifest.json").write_text(text)
    assert not again(stage).found


def test_a_stage_that_lies_elsewhere_is_used_if_it_is_whole(stage, tmp_path):
    moved = tmp_path / "bigger disk"
    stage.rename(moved)
    stage.symlink_to(moved)
    assert again(stage, never).found
    (moved / "plan.json").write_text("[]")
    assert not again(stage).found and stage.is_dir() and not stage.is_symlink()
    assert (moved / "plan.json").read_text() == "[]"  # the link was moved aside, nothing behind it


@pytest.mark.parametrize("resumable", [False, True])
def test_links_that_wait_for_a_stage_are_not_followed(tmp_path, resumable):
    """Another user of the store may lay them before the stage is computed."""
    digest = Store(tmp_path / "other").once("score", INPUTS, write).path.name
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("dear")
    folder = tmp_path / "store" / "score"
    folder.mkdir(parents=True)
    (folder / f".{digest}.partial").symlink_to(mine)
    (folder / digest).symlink_to(tmp_path / "nowhere")
    for name in ("holder", "attempts"):
        (folder / f".{digest}.{name}").symlink_to(mine / "file")
    done = Store(tmp_path / "store").once("score", INPUTS, write, resumable=resumable)
    assert not done.path.is_symlink() and Store(tmp_path / "store").once("score", INPUTS, never).found
    assert [path.read_text() for path in mine.iterdir()] == ["dear"]


@pytest.mark.parametrize(
    "lay", [os.mkdir, lambda path: path.symlink_to("/dev/null")], ids=["directory", "link"]
)
def test_a_lock_that_is_no_file_is_one_clear_error(stage, lay):
    shutil.rmtree(stage)
    lock = stage.with_name(f".{stage.name}.lock")
    lock.unlink()
    lay(lock)
    with pytest.raises(StageError, match=r"cannot write .*\.lock: it is no file.* Remove it\."):
        again(stage, never)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"x" * 10_000])
def test_a_holder_file_may_hold_anything(stage, text):
    shutil.rmtree(stage)
    stage.with_name(f".{stage.name}.holder").write_bytes(text)
    assert not again(stage).found
    assert not stage.with_name(f".{stage.name}.holder").exists()


def test_two_hosts_that_compute_one_stage_finish_neither(tmp_path):
    """The other host's process took the lock too, on a file system that does not keep locks."""
    store = Store(tmp_path)

    def work(directory: Path) -> dict:
        directory.with_suffix(".holder").unlink()
        directory.with_suffix(".holder").write_text("other-host pid 7")
        return write(directory)

    with pytest.raises(
        StageError, match=r"other-host pid 7 computed it at the same time.*locks.*Repeat the command"
    ):
        store.once("score", INPUTS, work)
    assert not store.once("score", INPUTS, write).found


@pytest.mark.parametrize(("written", "found"), [(-30, True), (3600, False), (400 * 86400, False)])
def test_force_computes_what_a_wrong_clock_dated_into_the_future(stage, written, found):
    """Hosts may differ by a minute; a stage an hour ahead was not written after this command began."""
    now = time.time()
    os.utime(stage / "manifest.json", (now + written, now + written))
    assert Store(stage.parents[1]).once("score", INPUTS, write, since=now - 40).found == found


def test_without_force_no_clock_matters(stage):
    for then in (0, time.time() + 1e9):
        os.utime(stage / "manifest.json", (then, then))
        assert again(stage, never).found


def on_a_small_disk(directory: Path, code: str, *, options: str) -> subprocess.CompletedProcess[str]:
    """Run code with a store on a disk of its own, mounted for that process alone."""
    directory.mkdir()
    head = f"""
import sys; sys.argv = ["kvp"]
from pathlib import Path
from kvp.store import Store, StageError
root = Path({str(directory)!r})
"""
    python = shlex.join([sys.executable, "-c", head + code])
    mount = f"mount -t tmpfs -o {options} none {shlex.quote(str(directory))} && exec {python}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=ROOT, capture_output=True, text=True)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("mounting needs user namespaces")
    return done


FULL = """
store = Store(root / "store")
store.once("score", {}, lambda directory: {"loss": 1.0})
def fill(directory, size):
    (directory / "weights").write_bytes(bytes(size))
    return {"text": "x" * 2_000_000}
for size in (2_000_000, 10):
    try:
        store.once("prune", {"size": size}, lambda directory: fill(directory, size))
    except StageError as error:
        print(error)
print(sorted(path.name for path in (root / "store").rglob("*") if path.is_dir() and ".partial" in path.name))
print(Store(root / "store").once("score", {}, None).result)
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux namespaces")
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
    done = on_a_small_disk(tmp_path / "disk", FULL, options="size=1m")
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    for line in lines[:2]:
        assert line.startswith(f"cannot write {tmp_path}/disk/store/prune") and "No space left" in line
        assert "store=DIR" in line
    assert lines[2:] == ["[]", "{'loss': 1.0}"]


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux namespaces")
def test_a_read_only_disk_is_refused_at_once(tmp_path):
    """Root is refused, too."""
    code = """
try:
    Store(root)
except StageError as error:
    print(error)
"""
    done = on_a_small_disk(tmp_path / "disk", code, options="ro")
    assert "Read-only file system" in done.stdout and "store=DIR" in done.stdout, done.stderr


@contextmanager
def files_below(size: int) -> Iterator[None]:
    """Let the disk take no more than `size` bytes of a file, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_that_the_disk_does_not_take_leaves_the_one_before(tmp_path):
    record = RunRecord.model_validate(make_record())
    record.write(tmp_path / "run.json")
    before = (tmp_path / "run.json").read_text()
    with (
        files_below(100),
        pytest.raises(OSError, match=r"File too large: free space .*runs=DIR: '.*run\.json'"),
    ):
        record.write(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == before


def test_a_disk_that_fills_while_lora_writes_its_optimizer_is_one_clear_error(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    checkpoint = save_checkpoint(tmp_path / "model")
    corpora = {"text": FileCorpus(path=str(tmp_path / "text.txt"))}

    def work(directory: Path) -> dict:
        recipe = make(max_steps=10, save_steps=4, rank=32)
        return train(recipe, checkpoint, directory, corpora=corpora, seed=0, device="cpu")

    message = r"store/recover/.* torch could not write a whole file.*store=DIR"
    with (
        files_below(200_000),
        pytest.raises(StageError, match=message) as full,
    ):  # between adapter and optimizer
        Store(tmp_path / "store").once("recover", INPUTS, work, resumable=True)
    assert "inline_container.cc" in str(full.value.__cause__)  # it was the optimizer
    assert not list((tmp_path / "store").rglob("complete"))  # half a checkpoint is none to go on from
