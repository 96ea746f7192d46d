"""The study on a GPU, rehearsed on the tiny shape: cells are done once, and none is lost or half."""

from __future__ import annotations

import json
import subprocess

import pytest

from experiments.scripts import gpu
from experiments.scripts.gpu_cells import OTHERS, PRUNED


@pytest.fixture
def groups(monkeypatch) -> list[str]:
    """Names of the groups that were measured: in this process, which is faster."""
    seen: list[str] = []

    def run(command, **given):
        assert command[1:3] == ["-m", "experiments.scripts.gpu"] and given["timeout"] <= gpu.CELL_SECONDS
        options = gpu.parser().parse_args(command[3:])
        seen.append(options.group)
        gpu.work(options)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu.children, "run", run)
    return seen


def study(out, only: str, *words: str) -> dict:
    command = ["--rehearse", "--out", str(out), "--only", only, *words]
    record = gpu.study(gpu.parser().parse_args(command))
    assert json.loads((out / "results.json").read_text()) == record
    return record


def test_every_kind_of_cell_is_measured_once(groups, tmp_path):
    for only in ("kernel", "static", "prune", "sparse"):
        record = study(tmp_path, only)
    assert not [cell["failed"] for cell in record["cells"].values() if cell["failed"]]
    wanted = [cell for cell in gpu.cells(True) if cell.kind != "tests" and cell.path in ("", "static")]
    assert record["cells"].keys() == {cell.name for cell in wanted} and record["rehearsal"]
    others = {cell.model for cell in wanted if cell.kind == "decode"}
    assert others == {*OTHERS} and {cell.model for cell in wanted if cell.kind == "prune"} == {*PRUNED}
    cell = record["cells"]["decode/tiny/KVPruner 50%/static/2x32"]
    dense, half = (sizes["kv_bytes_per_token"] for sizes in cell["sizes"].values())
    assert half * 2 == dense and [row["failed"] for row in cell["rows"]] == [None, None]
    assert record["ratios"]["KVPruner 50% / tiny, static, batch 2, 32 + 4 tokens: decode"]["median"] > 0
    assert max(record["cells"]["kernel/tiny/2x32"]["max_difference"].values()) < 1e-5
    assert record["cells"]["prune/tiny/kvpruner_plus"]["steps"]["refit"]["peak_bytes"] > 0
    assert "| decode/tiny/MLA-shaped/static/2x32" in (tmp_path / "table.md").read_text()
    groups.clear()
    assert study(tmp_path, "static")["cells"] == record["cells"] and not groups


def test_a_crash_is_a_failed_cell_and_the_end_of_the_time_is_none(groups, tmp_path, monkeypatch):
    whole = gpu.children.run
    monkeypatch.setattr(
        gpu.children, "run", lambda command, **given: subprocess.CompletedProcess(command, -11)
    )
    (name, cell), *_ = study(tmp_path, "kernel/tiny/2x32")["cells"].items()
    assert name == "kernel/tiny/2x32" and cell["failed"] == "its process ended with signal 11"
    monkeypatch.setattr(gpu.children, "run", whole)
    assert study(tmp_path, "kernel/tiny/2x32")["cells"][name]["failed"] and not groups
    assert not study(tmp_path, "kernel/tiny/2x32", "--minutes", "0", "--retry")["cells"]
    assert not study(tmp_path, "kernel/tiny/2x32")["cells"][name]["failed"] and groups == ["kernel/tiny"]

    def slow(command, timeout):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.children, "run", slow)
    monkeypatch.setattr(gpu, "CELL_SECONDS", 1)
    said = study(tmp_path, "kernel/tiny/1x48")["cells"]["kernel/tiny/1x48"]["failed"]
    assert said == "its process took longer than 1 s"


def test_results_of_another_device_are_refused(tmp_path):
    study(tmp_path, "nothing")
    record = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**record, "device": "another"}))
    with pytest.raises(ValueError, match=r"has another device \(another\): give another --out"):
        study(tmp_path, "nothing")


def test_the_most_telling_cells_come_first_and_all_fit_the_shapes():
    cells = gpu.cells(False)
    assert cells[0].kind == "tests" and len({cell.name for cell in cells}) == len(cells)
    assert {cell.shape for cell in cells[1:]} == {*gpu.SHAPES}
    assert {cell.batch for cell in cells if cell.kind == "decode"} == {1, 8, 64}
    assert {cell.tokens for cell in cells if cell.kind == "decode"} == {512, 2048, 8192}
    assert {cell.path for cell in cells if cell.kind == "decode"} == {"static", "eager", "compiled"}
