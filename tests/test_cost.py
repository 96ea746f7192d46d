"""A device has one name, which decides whether speed is measured anew; not every system forgets a peak."""

from __future__ import annotations

import pytest

from kvp import cost, provenance
from kvp.store import fingerprint

CPU = "processor\t: 0\nmodel name\t: {} \ncache size\t: 512 KB\n\nprocessor\t: 1\nmodel name\t: {} \n"


def cpu(monkeypatch, tmp_path, text):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cost, "CPU_INFO", tmp_path / "cpuinfo")


def test_a_cpu_is_called_by_its_model(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, CPU.format("AMD EPYC", "AMD EPYC"))
    assert cost.device_name("cpu") == "AMD EPYC"
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert cost.device_kind("cpu") == "cpu (arm64)"
    cpu(monkeypatch, tmp_path, "processor\t: 0\n")
    assert cost.device_name("cpu") == "arm64"
    (tmp_path / "cpuinfo").unlink()
    assert cost.device_name("cpu") == "arm64"


def test_speed_is_measured_anew_on_another_cpu(monkeypatch, tmp_path):
    """A store carried to another CPU of the same architecture; records of both stay comparable."""
    seen = []
    for name in ("AMD EPYC", "Intel Xeon", "AMD EPYC"):
        cpu(monkeypatch, tmp_path, CPU.format(name, name))
        device = provenance.hardware("cpu")
        seen.append((fingerprint("measure", 1, device), provenance.provenance("cpu")["device"]))
    assert seen[0] == seen[2]
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] == seen[1][1]


def test_other_systems_have_the_peak_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "STATUS", tmp_path / "nowhere")
    assert cost.resident_peak_bytes() > 2**20
    with pytest.raises(OSError, match="nowhere"):
        cost.resident_bytes()
