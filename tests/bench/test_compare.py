"""Two records: which ratio moved, the exit code, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvp.bench import __main__ as command
from kvp.bench.ratios import Ratio, read_ratios, verdict


def ratio(median: float, spread: float = 0.05) -> dict:
    return {"median": median, "iqr": [median - spread, median + spread]}


@pytest.fixture
def write(tmp_path):
    def write(name: str, ratios: dict, **more) -> str:
        (tmp_path / name).write_text(json.dumps({"device": "a CPU", "ratios": ratios, **more}))
        return str(tmp_path / name)

    return write


@pytest.fixture
def compare(monkeypatch, capsys):
    """Exit code, output and errors of the command."""

    def compare(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kvp bench", "compare", *words])
        monkeypatch.setenv("COLUMNS", "120")
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return compare


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((1.0, 0.9, 1.1), (1.15, 1.05, 1.2), "as before"),  # the quartiles overlap
        ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "better"),
        ((1.0, 0.9, 1.1), (0.7, 0.6, 0.8), "worse"),
        ((1.0, 1.0, 1.0), (0.99, 0.99, 0.99), "as before"),  # within the tolerance
        ((1.0, 1.0, 1.0), (0.97, 0.97, 0.97), "worse"),
        (None, (1.0, 1.0, 1.0), "missing"),
    ],
)
def test_a_ratio_moves_by_more_than_its_spread_and_the_tolerance(before, after, said):
    assert verdict(before and Ratio(*before), after and Ratio(*after), 0.02) == said


def test_the_exit_code_is_1_only_if_asked_and_worse(write, compare):
    before = write("a.json", {"half / dense": ratio(1.5), "packed / dense": ratio(1.2), "old": ratio(1)})
    after = write("b.json", {"half / dense": ratio(1.2), "packed / dense": ratio(1.5), "new": ratio(1)})
    code, out, _ = compare(before, after)
    assert code == 0 and "1 worse, 1 better, 2 missing, 0 as before" in out and "devices" not in out
    worse = next(line for line in out.splitlines() if "half / dense" in line)
    assert "1.500 (1.450-1.550)" in worse and "1.200 (1.150-1.250)" in worse and "worse" in worse
    assert compare(before, after, "--fail-if-worse")[0] == 1
    assert compare(before, after, "--fail-if-worse", "--tolerance", "0.5")[0] == 1  # "old" is gone
    kept = write("f.json", json.loads(Path(after).read_text())["ratios"] | {"old": ratio(1)})
    assert compare(before, kept, "--fail-if-worse", "--tolerance", "0.5")[0] == 0
    assert compare(before, before, "--fail-if-worse")[0] == 0
    more = write("d.json", {**json.loads(Path(before).read_text())["ratios"], "new": ratio(1)})
    assert compare(before, more, "--fail-if-worse")[0] == 0
    assert compare(more, before, "--fail-if-worse")[0] == 1  # one is gone, as after a failure
    other = write("c.json", {"half / dense": ratio(1.5)}, device="a GPU")
    assert "differ, and ratios with them: a CPU before, a GPU after" in compare(before, other)[1]
    half = write("e.json", {"half / dense": ratio(1.5)}, dtype="bfloat16", threads=4)
    assert "a CPU before, a CPU, bfloat16, 4 threads after" in compare(before, half)[1]


def test_the_first_of_json_lines_is_a_record(write, tmp_path):
    record = write("a.json", {"half / dense": ratio(1.5)})
    lines = tmp_path / "results.jsonl"
    lines.write_text((tmp_path / "a.json").read_text() + '\n{"model": "dense"}\n')
    assert (
        read_ratios(lines)
        == read_ratios(tmp_path / "a.json")
        == ({"half / dense": Ratio(1.5, 1.45, 1.55)}, "a CPU")
    )
    assert record


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "cannot be read as JSON"),
        ("[]", "holds no ratios: give a bench.json"),
        ('{"rows": []}', "must be measured again"),
        ('{"ratios": {}}', "holds no ratios"),
        ('{"ratios": {"a": 1}}', "the ratio 'a' must have a median between"),
        ('{"ratios": {"a": {"median": 2, "iqr": [0.5, 1]}}}', "the ratio 'a' must have a median between"),
        ('{"ratios": {"a": {"median": NaN, "iqr": [NaN, NaN]}}}', "the ratio 'a' must have a median between"),
        ('{"ratios": {"b": {"median": 1, "iqr": [1, 1]}}}', "have no ratio in common"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(write, compare, tmp_path, text, said):
    before, after = write("a.json", {"half / dense": ratio(1.5)}), tmp_path / "b.json"
    after.write_text(text)
    code, out, error = compare(before, str(after))
    assert code == 1 and not out and error.startswith("kvp.bench.compare: error: ") and str(after) in error
    assert said in error


def test_a_missing_file_and_a_tolerance_below_0_are_refused(write, compare, tmp_path):
    before = write("a.json", {"half / dense": ratio(1.5)})
    assert "absent.json cannot be read" in compare(before, str(tmp_path / "absent.json"))[2]
    assert "--tolerance must be at least 0, got -1" in compare(before, before, "--tolerance", "-1")[2]
