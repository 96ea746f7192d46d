"""The benchmark of llama.cpp compares like with like, goes on where it was, and writes what it measured."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from kvp.bench.llama_cpp import compare
from kvp.bench.llama_cpp.__main__ import find_models, run
from kvp.bench.llama_cpp.compare import PROMPTS, Model, _perplexity, compare_speed
from kvp.bench.llama_cpp.engine import time_once
from kvp.bench.llama_cpp.table import table
from kvp.data.corpora import PackagedCorpus
from kvp.evaluation.perplexity import Perplexity
from kvp.models.load import load_model, load_tokenizer
from kvp.record import RunRecord
from kvp.store import Store
from tests.report.sample_records import make_failed, make_record
from tests.report.sample_records import perplexity as perplexity_record
from tests.serving.test_gguf import saved


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (make_failed("ValueError", "why"), "is failed: finish the run first"),
        (make_record("none"), "name runs that prune"),
        (make_record(pruned__evaluation__perplexity={}), "use evaluation=packaged"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(record, message, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        find_models([tmp_path / "run.json"], tmp_path)


def test_models_of_one_ratio_keep_their_own_name_and_gguf(tmp_path):
    runs = []
    for name in ("one", "other"):
        record = make_record() | {"name": name}
        for part in ("dense", "pruned"):
            place = tmp_path / ("dense" if part == "dense" else name)
            place.mkdir(exist_ok=True)
            (place / "config.json").write_text(place.name)
            record[part]["checkpoint"] = str(place)
        runs.append(tmp_path / f"{name}.json")
        runs[-1].write_text(json.dumps(record))
    models = find_models(runs, tmp_path)
    cut = "pruned 25% of kv_cache"
    assert [model.name for model in models] == ["dense", f"{cut} (one)", f"{cut} (other)"]
    assert len({model.gguf for model in models}) == 3
    alone = find_models(runs[:1], tmp_path)[1]
    assert alone.name == find_models([runs[0]] * 2, tmp_path)[1].name == cut
    (tmp_path / "one" / "config.json").write_text("another")
    assert find_models(runs[:1], tmp_path)[1].gguf != alone.gguf


@pytest.mark.parametrize("changed", [{"stride": 64}, {"bos": "window"}])
def test_windows_that_llama_cpp_does_not_read_are_refused(changed, tmp_path):
    known = RunRecord.model_validate(make_record()).models()["pruned"].evaluation.perplexity["squad"]
    known = known.model_copy(update={"protocol": known.protocol.model_copy(update=changed)})
    with pytest.raises(ValueError, match=r"windows that do not overlap.*stride=null"):
        _perplexity(SimpleNamespace(name="mine"), "squad", known, None, Store(tmp_path))


def test_the_table_has_medians_and_ratios_of_rounds():
    text = {
        "prompt": "One",
        "transformers": "two",
        "llama_cpp": " two\nthree",
        "tokens": 2,
        "equal_tokens": 1,
    }
    perplexity = {"squad": {"transformers": 7.389, "llama_cpp": 7.4, "nll": 2.0, "window_nll": [1.9, 2.11]}}
    model = {"gguf_bytes": 2**20, "perplexity": perplexity, "texts": [text]}
    seconds = {"dense": [1.0, 2.0, 4.0], "pruned": [0.5, 1.0, 1.0]}
    point = {
        "clock": "cpu",
        "threads": 1,
        "cache_bytes_per_token": {"dense": 200.0, "pruned": 100.0},
        "seconds": {name: {"prefill": times, "decode": times} for name, times in seconds.items()},
    }
    said = re.sub(" +", " ", table({"models": {"dense": model, "pruned": model}, "speed": {"8+4": point}}))
    assert "| dense | 1.0 | 7.389 / 7.400 | 0.0050 |" in said
    assert "| pruned | 100 | 8.0 [8.0, 12.0] | 2.00 | 4.0 [4.0, 6.0] | 2.00 |" in said
    assert "**pruned**, 1 of 2 tokens as in transformers: One *two three*" in said


def test_as_many_steps_are_timed_as_were_asked_for():
    read = []
    engine = SimpleNamespace(reset=lambda: None, eval=lambda ids: read.append(list(ids)))
    assert time_once(engine, [4, 5], 5, lambda: float(len(read))) == (1.0, 5.0)
    assert read == [[4, 5], [4], [5], [4], [5], [4]]


def test_a_stopped_comparison_goes_on_after_its_last_round(tmp_path, monkeypatch):
    """Six turns of three rounds; the second round is stopped and begins anew, the first stays."""
    models = [Model(name, tmp_path, {}, tmp_path / name) for name in ("dense", "pruned")]
    for model in models:
        model.gguf.mkdir()
        (model.gguf / "model.gguf").write_text(model.name)
    engine = Namespace(n_vocab=lambda: 10)
    opened, turns = [], []

    def time_once(*args):
        turns.append(len(turns))
        if len(turns) == 4:
            raise KeyboardInterrupt
        return 1.0, float(len(turns))

    monkeypatch.setattr(compare, "version", lambda name: "1.0")
    monkeypatch.setattr(compare, "open_gguf", lambda *args, **kwargs: opened.append(args) or engine)
    monkeypatch.setattr(compare, "cache_bytes_per_token", lambda engine, ids: 24.0)
    monkeypatch.setattr(compare, "time_once", time_once)
    options = Namespace(steps=4, rounds=3, threads=1, clock="cpu")
    with pytest.raises(KeyboardInterrupt):
        compare_speed(models, 8, options, Store(tmp_path / "steps"))
    for _ in range(2):  # the second time everything is found, and no engine is opened
        result = compare_speed(models, 8, options, Store(tmp_path / "steps"))
        decode = {name: seconds["decode"] for name, seconds in result["seconds"].items()}
        assert decode == {"dense": [1.0, 5.0, 7.0], "pruned": [2.0, 6.0, 8.0]}
        assert result["cache_bytes_per_token"] == {"dense": 24.0, "pruned": 24.0}
    assert len(opened) == 4
    (models[0].gguf / "model.gguf").write_text("another")
    compare_speed(models, 8, options, Store(tmp_path / "steps"))
    assert len(opened) == 6, "another GGUF is measured anew"


@pytest.mark.slow
def test_a_tiny_model_from_run_to_table(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    checkpoint = saved(tmp_path / "model")
    perplexity = Perplexity(corpora=["squad"], window=32, max_tokens=128)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    known = perplexity.evaluate(model, load_tokenizer(checkpoint), PackagedCorpus(source="squad"))
    squad = {**perplexity_record("squad", 1.0), **known, "dtype": "torch.float32"}
    record = make_record()
    for part in (record["dense"], record["pruned"]):
        part |= {"checkpoint": str(checkpoint)}
        part["evaluation"]["perplexity"] = {"squad": squad}
    (tmp_path / "run.json").write_text(json.dumps(record))
    options = Namespace(
        runs=[tmp_path / "run.json"], out=tmp_path, prompt=[80], steps=4, rounds=2, threads=1, clock="cpu"
    )
    run(options)
    record = json.loads((tmp_path / "results.json").read_text())
    for one in record["models"].values():
        squad = one["perplexity"]["squad"]
        assert squad["llama_cpp"] == pytest.approx(known["value"], rel=1e-3)  # whose cache has 16 bits
        assert [text["prompt"] for text in one["texts"]] == list(PROMPTS)
    point = record["speed"]["80+4"]
    assert point["cache_bytes_per_token"]["dense"] == 3 * 2 * (6 + 6) * 2  # layers, groups, channels, bytes
    assert len(point["seconds"]["pruned 25% of kv_cache"]["decode"]) == 2
    before = (tmp_path / "results.json").read_text()
    monkeypatch.setattr(compare, "open_gguf", lambda *args, **kwargs: 1 / 0)  # all of it is found
    run(options)
    assert json.loads((tmp_path / "results.json").read_text())["speed"] == json.loads(before)["speed"]
