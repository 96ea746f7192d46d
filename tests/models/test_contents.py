"""A local checkpoint is its bytes: another place or time is the same model, another byte is another one."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from kvp.models import contents as module
from kvp.models.contents import contents
from kvp.models.sources import HubModel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make every file large, and remember hashes below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LARGE", 1)
    return tmp_path / "cache" / "kvp" / "sha256.json"


def model(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return HubModel(name="mine", dtype="auto", path=str(path), revision=None)


def test_a_copy_is_the_same_model_and_another_byte_is_another(tmp_path):
    one = model(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = HubModel(name="mine", dtype="auto", path=str(tmp_path / "two"), revision=None)
    assert one.identity() == two.identity()
    file = tmp_path / "two" / "model.safetensors"
    before = file.stat()
    file.write_bytes(b"Weights")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync --times and cp -p leave it
    assert file.stat().st_size == before.st_size and one.identity() != two.identity()


def test_a_remembered_hash_serves_until_the_file_is_written(tmp_path, cache, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = contents([file])
    assert list(json.loads(cache.read_text()).values()) == list(first.values())
    monkeypatch.setattr(module.hashlib, "file_digest", None)  # would raise
    assert contents([file]) == first
    monkeypatch.undo()
    before = file.stat()
    file.write_bytes(b"Weights")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents([file]) != first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memory_costs_time_only(tmp_path, cache, text):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = contents([file])
    cache.write_text(text)
    assert contents([file]) == first


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "blocked").write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    monkeypatch.setattr(module, "LARGE", 1)
    assert contents([file]) == contents([file])


def test_others_cannot_write_where_compiled_code_lies(tmp_path, cache):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = os.umask(0o002)
    try:
        contents([tmp_path / "model.safetensors"])
    finally:
        os.umask(before)
    assert cache.is_file() and not cache.parent.stat().st_mode & 0o022


def test_a_vocabulary_in_text_is_part_of_the_model(tmp_path):
    one = model(tmp_path / "one")
    (tmp_path / "one" / "merges.txt").write_text("a b")
    before = one.identity()
    (tmp_path / "one" / "merges.txt").write_text("b a")
    assert one.identity() != before
