from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvp.report.records import runs as module
from kvp.report.records.runs import collect, read_runs
from tests.report.sample_records import make_failed, make_record, write


def test_a_file_a_directory_and_an_experiment_give_the_same_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "outputs", make_record(seed=1), make_record(seed=0))
    runs = read_runs([tmp_path / "outputs"])
    assert [run.record.config["seed"] for run in runs] == [0, 1]
    assert read_runs([run.path for run in reversed(runs)]) == runs
    collect(runs, tmp_path / "experiments" / "study" / "results.jsonl")
    for name in ("study", "experiments/study", "experiments/study/results.jsonl"):
        again = read_runs([name])
        assert [run.hash for run in again] == [run.hash for run in runs]
        assert again[1].place == "experiments/study/results.jsonl:2"


def test_of_one_configuration_the_newest_finished_run_counts(tmp_path):
    old, new = make_record(ppl=50.0), make_record(provenance__started="2026-12-01T00:00:00+00:00", ppl=40.0)
    failed = make_failed("RuntimeError", "no", provenance__started="2027-01-01T00:00:00+00:00")
    for folder, record in (("a", new), ("b", old), ("c", failed)):
        write(tmp_path / folder, record)
    (run,) = read_runs([tmp_path])
    assert run.record.pruned.evaluation.perplexity["squad"].value == 40.0


def test_a_record_of_schema_1_is_finished(tmp_path):
    record = make_record(schema=1)
    del record["status"]
    (run,) = read_runs([write(tmp_path, record)])
    assert run.status == "finished"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json is corrupt .*: delete it and repeat its command"),
        ("[]", "run.json is not the record of a run"),
        (json.dumps(make_record(schema=7)), "run.json has schema 7, this kvp reads 1, 2, 3, 4"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path])


def test_a_corrupt_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(make_record()) + "\n{\n")
    with pytest.raises(ValueError, match=r"results.jsonl:2 is corrupt"):
        read_runs([tmp_path / "results.jsonl"])


def test_an_empty_directory_and_an_unknown_name_tell_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXPERIMENTS", (tmp_path / "experiments",))
    write(tmp_path / "runs", make_record())
    collect(read_runs([tmp_path / "runs"]), tmp_path / "experiments" / "study" / "results.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no run.json below .*empty: run `python -m kvp` first"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"ratio_swep is neither .* experiment \(study\)"):
        read_runs(["ratio_swep"])


def test_collected_records_name_no_machine_and_are_stable(tmp_path):
    record = make_record(steps=60)
    failed = make_failed("RuntimeError", f"cannot write {record['stages'][0]['path']}/x", ratio=0.5)
    running = make_record(seed=5, status="running")
    runs = read_runs([write(tmp_path / "runs", record, failed, running)])
    collect(runs, tmp_path / "results.jsonl")
    text = (tmp_path / "results.jsonl").read_text()
    assert not any(word in text for word in ("/home", "someone", "box7", "traceback", "wandb"))
    first, second = (json.loads(line) for line in text.splitlines())
    assert first["pruned"]["checkpoint"] == f"prune/{'0' * 16}/model"
    assert first["stages"][0]["path"] == f"prune/{'0' * 16}"
    assert first["provenance"]["command"] == "python -m kvp corpora.text.path=my.txt"
    assert first["pruned"]["evaluation"] == record["pruned"]["evaluation"]
    assert second["error"] == {"type": "RuntimeError", "message": f"cannot write prune/{'0' * 16}/x"}
    collect(read_runs([tmp_path / "results.jsonl"]), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == text


def test_web_addresses_and_relative_paths_stay(tmp_path):
    kept = {"a": "https://host.org/a/b", "b": "outputs/store", "c": "tokens/s", "d": str(Path("x/y.parquet"))}
    (run,) = read_runs([write(tmp_path, make_record(provenance__model=kept))])
    collect([run], tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "results.jsonl").read_text())["provenance"]["model"] == kept
