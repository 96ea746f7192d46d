"""`kvp fit`: the question of a command line, its answer from a config alone, and its errors."""

from __future__ import annotations

import json
import re

import pytest

from kvp.fit.__main__ import main
from kvp.fit.answer import answer
from kvp.fit.check import CASES, Row, check
from kvp.fit.words import question
from kvp.models.published import PUBLISHED, config_of
from kvp.models.shapes import layer_shapes, size
from kvp.models.sources import HubModel

BILLIONS = {  # of the models' own cards, by hub path
    "baffo32/decapoda-research-llama-7B-hf": 6.738,
    "lmsys/vicuna-7b-v1.3": 6.738,
    "meta-llama/Llama-2-7b-hf": 6.738,
    "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Meta-Llama-3-8B": 8.030,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1.100,
    "mistralai/Mistral-7B-v0.1": 7.242,
    "Qwen/Qwen2-7B": 7.616,
    "Qwen/Qwen3-8B": 8.191,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_shapes_have_the_parameters_of_their_cards(path):
    config, _ = config_of(HubModel(name="x", dtype="auto", path=path, revision=None))
    assert size(config, layer_shapes(config)).params / 1e9 == pytest.approx(BILLIONS[path], abs=0.0006)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fit"))
        words = "model=llama3_8b memory=24GiB context=8192 batch=16 device=cuda tflops=100"
        yield answer(question(words.split()))


def test_an_8b_model_is_answered_without_network_and_weights(llama3):
    rows = {(row.model, row.cache_type): row for row in llama3.serving}
    dense = rows["dense", "16-bit"]
    assert dense.bytes_per_token == 32 * 8 * 2 * 128 * 2
    assert dense.cache == 16 * 8192 * dense.bytes_per_token == 16 * 2**30
    assert dense.weights == 2 * llama3.params == 2 * 8_030_261_248
    assert not dense.fits and dense.batch == 8
    assert rows["-25% kv_cache", "16-bit"].cache == 12 * 2**30
    assert rows["-50% kv_cache", "16-bit"].fits
    assert rows["dense", "q4_0"].cache / dense.cache == 18 / 64


def serving(batch, context):
    words = f"model=llama3_8b memory=24GiB context={context} batch={batch} device=cuda tflops=100 ratio=0.25"
    return {(row.model, row.cache_type): row for row in answer(question(words.split())).serving}


@pytest.mark.parametrize(("batch", "context"), [(1, 128), (16, 8192)])
def test_what_is_said_to_fit_fits_when_it_is_asked_and_no_more_does(batch, context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, key = serving(batch, context)["dense", "16-bit"], ("dense", "16-bit")
    assert serving(said.batch, context)[key].fits
    assert not serving(said.batch + 1, context)[key].fits
    assert serving(batch, said.context)[key].fits
    assert said.context == 8192 or not serving(batch, said.context + 16)[key].fits


def test_phases_have_peaks_and_times(llama3):
    phases = {phase.phase: phase for phase in llama3.phases}
    assert {"score", "perplexity", "zero_shot", "measure", "recover"} == {*phases}
    assert phases["score"].total < 24 * 2**30 and phases["recover"].total > llama3.params * 2
    # 32 windows of 128 tokens, a forward and a backward pass, and a sensitivity of half the layers per removal
    assert phases["score"].seconds == pytest.approx(
        2 * (2 + 1 + 16) * 32 * 128 * 7.6e9 / (0.5 * 100e12), rel=0.1
    )
    assert phases["measure"].seconds is None
    assert json.loads(json.dumps(llama3.data()))["memory"] == 24 * 2**30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("memory=24", "memory must be a number > 0 with a unit"),
        ("memory=24 GB;context=0", "context must be a whole number >= 1, got '0'"),
        ("batch=1.5", "batch must be a whole number"),
        ("ratio=1.5", "ratio must be fractions in [0, 1)"),
        ("ratio=0.25,", "ratio must be fractions in [0, 1)"),
        ("tflops=fast", "tflops must be a number > 0"),
        ("model", "'model' is no option"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        question(words.split(";"))


def test_units_and_names_are_read():
    asked = question(
        ["memory=24 GB", "model=owner/name", "ratio=params", "ratio.value=.1,.2", "dtype=float16"]
    )
    assert asked.memory == 24 * 10**9 and asked.ratios == (0.1, 0.2)
    assert asked.options == (
        "model=local", "model.path=owner/name", "model.name=name", "ratio=params", "model.dtype=float16",
    )  # fmt: skip


def test_a_dtype_that_was_chosen_stays(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert question(["device=cuda", "model.dtype=float32"]).options == ("device=cuda", "model.dtype=float32")
    assert question(["device=cuda"]).options[-1] == "model.dtype=bfloat16"


def test_ratios_that_round_alike_keep_their_own_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=llama3_8b", "memory=24GiB", "ratio=0.121,0.124,0.25", "tflops=1", "measure=none"]
    found = list(dict.fromkeys(row.model for row in answer(question(words)).serving))
    assert found == ["dense", "-12.1% kv_cache", "-12.4% kv_cache", "-25% kv_cache"]


def test_a_check_that_fails_shows_what_it_measured(capsys, monkeypatch):
    def failing(words):
        yield Row(work="decode", size="small", estimate=2**20, measured=2**20)
        raise RuntimeError("killed")

    monkeypatch.setattr("kvp.fit.check.check", failing)
    with pytest.raises(SystemExit):
        main(["model=tiny", "--check"])
    out, err = capsys.readouterr()
    assert "| decode |" in out and "killed" in err


def test_a_case_longer_than_the_positions_is_left_out(capsys):
    words = ["model=tiny", "model.config.max_position_embeddings=1024"]
    assert not list(check(words, [case for case in CASES if "2048" in " ".join(case[2])]))
    assert (
        "LoRA, checkpointing of 2,048 tokens is left out: the model has 1,024 positions"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model=tiny context=4096", "context must be <= 2048 (max_position_embeddings of tiny), got 4096"),
        ("model=llama3_9b", "there is no model=llama3_9b. Did you mean llama3_8b?"),
        ("model=tiny ratio=0.99", "ratio"),
        ("model=tiny --jsn", "there is no --jsn"),
        ("model=tiny --check --json", "--check prints a table, and --json is for an answer"),
        ("model=tiny --check context=64", "--check measures fixed cases, got context=64: leave context= out"),
        ("model=tiny --check ratio=0.5", "leave ratio= out"),
        ("model=tiny device=cuda", "memory is not set, and there is no GPU here"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words.split())
    out, err = capsys.readouterr()
    assert end.value.code == 1 and message in err and "Traceback" not in err and not out
    assert not [*tmp_path.iterdir()]


def test_the_command_prints_tables_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["model=tiny", "memory=1GiB", "ratio=0.5", "tflops=1", "measure=none"])
    shown = capsys.readouterr().out
    assert "32-bit" in shown and "-50% kv_cache" in shown and "LoRA" not in shown
    main(["model=tiny", "memory=1GiB", "ratio=0.5", "tflops=1", "measure=none", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in data["serving"]} == {"dense", "-50% kv_cache"}
    assert not [*tmp_path.iterdir()]
    main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 25


def test_a_strategy_that_must_see_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=tiny", "memory=1GiB", "strategy=wanda", "ratio=sparsity", "measure=none", "tflops=1"]
    found = answer(question(words))
    assert {row.model for row in found.serving} == {"dense"}
    assert any("strategy=wanda" in note for note in found.notes)


def test_a_cache_that_rows_leave_out_is_named():
    words = ["model=tiny", "memory=1GiB", "tflops=1", "cache=kivi4"]
    assert any("cache=kivi4 is not counted here" in note for note in answer(question(words)).notes)
    assert not any("not counted here" in note for note in answer(question(words[:3])).notes)
