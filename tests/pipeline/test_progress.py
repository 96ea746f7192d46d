"""Lines of a run, and forecasts of its time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.forecast import Forecast, duration, kind_of_work
from kvp.pipeline.foretell import foretell
from kvp.pipeline.progress import Progress
from kvp.pipeline.run import run
from kvp.store import Store
from tests.helpers.runs import LIGHT, compose_here

QUICK = ("strategy=magnitude", "recovery=none", "evaluation.perplexity.corpora=[squad]", *LIGHT)
LINE = re.compile(r"\[ ?\d+/6\] (dense|pruned) · [\w/]+  (found|computed) \(\d+\.\d s\)(, .* left)?")
DENSE, OTHER, CUT, TUNED = ("0" * 64, "1" * 64, "2" * 64, "3" * 64)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.6, "60 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (3600, "60 min"),
        (5969, "99 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words


def work(inputs, stage="evaluate/perplexity/squad", version=1, dense=DENSE):
    return kind_of_work(stage, version, inputs, dense)


@pytest.mark.parametrize(
    "other",
    [
        {"inputs": {"model": CUT, "protocol": {"window": 64}, "seed": 0}},  # the sibling
        {"inputs": {"model": DENSE, "protocol": {"window": 64}, "seed": 1}},
        {"inputs": {"model": DENSE, "protocol": {"window": 64}, "seed": 0, "score": TUNED}},
        {"inputs": {"model": DENSE, "protocol": {"window": 64}, "budget": {"value": 0.5}}},
    ],
)
def test_work_is_alike_whatever_the_model_the_seed_and_the_ratio(other):
    inputs = {
        "model": DENSE,
        "protocol": {"window": 64},
        **({"budget": {}} if "budget" in other["inputs"] else {}),
    }
    assert work(inputs) == work(**other)


@pytest.mark.parametrize(
    "other",
    [
        {"inputs": {"model": DENSE, "protocol": {"window": 65}}},
        {"inputs": {"model": DENSE, "protocol": {"window": 64}, "dtype": "float16"}},
        {"inputs": {"model": DENSE, "protocol": {"window": 64}}, "dense": OTHER},
        {"inputs": {"model": DENSE, "protocol": {"window": 64}}, "version": 2},
        {"inputs": {"model": DENSE, "protocol": {"window": 64}}, "stage": "evaluate/perplexity/drop"},
    ],
)
def test_other_options_another_model_or_version_are_other_work(other):
    assert work({"model": DENSE, "protocol": {"window": 64}}) != work(**other)


def stored(store, stage, inputs):
    return store.once(stage, inputs, lambda directory: {})


@pytest.fixture
def chain(tmp_path):
    """A store with a dense model, a cut and a tuned one, the tuned one looked at, and each one's fingerprint."""
    store = Store(tmp_path)
    dense = stored(store, "model", {"name": "a"}).fingerprint
    cut = stored(store, "prune", {"model": dense, "plan": "p"}).fingerprint
    tuned = stored(store, "recover", {"model": cut, "recovery": {"steps": 4}}).fingerprint
    stored(store, "measure", {"model": tuned, "protocol": {"runs": 3}})
    return store, dense


def test_time_comes_from_any_model_of_the_same_dense_one_and_from_no_other(chain):
    store, dense = chain
    forecast = Forecast(store, "cpu")
    forecast.learn(["measure", "recover", "never"])
    measured = kind_of_work("measure", 1, {"model": dense, "protocol": {"runs": 3}}, dense)
    tuned = kind_of_work("recover", 1, {"model": dense, "recovery": {"steps": 4}}, dense)
    assert re.fullmatch(r"about \d+ s left", forecast.left([measured, tuned]))
    unknown = [
        kind_of_work("measure", 1, {"model": OTHER, "protocol": {"runs": 3}}, OTHER),
        kind_of_work("measure", 1, {"model": dense, "protocol": {"runs": 30}}, dense),
    ]
    assert forecast.left(unknown) == "2 stages of unknown time left"
    assert re.fullmatch(
        r"about \d+ s and 1 stage of unknown time left", forecast.left([measured, unknown[0]])
    )
    assert forecast.left([]) == ""


def test_time_is_the_median_and_adds_up(tmp_path):
    forecast = Forecast(Store(tmp_path), "cpu")
    for seconds in (100, 130, 10_000):
        forecast.add("a", seconds)
    forecast.add("b", 230)
    assert forecast.left(["a", "b"]) == "about 6 min left"
    assert forecast.left(["a", "a", "c"]) == "about 4 min and 1 stage of unknown time left"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"stage": "measure"}', '{"stage": "measure", "version": 1, "inputs": 3}'],
)
def test_a_manifest_that_cannot_be_read_teaches_nothing(chain, text):
    store, dense = chain
    (manifest,) = store.root.glob("measure/[!.]*/manifest.json")
    manifest.write_text(text)
    forecast = Forecast(store, "cpu")
    forecast.learn(["measure"])
    kind = kind_of_work("measure", 1, {"model": dense, "protocol": {"runs": 3}}, dense)
    assert forecast.left([kind]) == "1 stage of unknown time left"


@pytest.mark.parametrize(
    ("origins", "tells"),
    [
        ([], True),
        ([{"device_name": "cpu"}], True),
        ([{"device_name": "H100"}], False),
        ([{"device_name": "cpu"}, {"device_name": "cpu"}], False),  # the second went on with the first's work
    ],
)
def test_only_whole_work_on_this_device_teaches(chain, origins, tells):
    store, dense = chain
    (manifest,) = store.root.glob("measure/[!.]*/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "origins": origins}))
    forecast = Forecast(store, "cpu")
    forecast.learn(["measure"])
    kind = kind_of_work("measure", 1, {"model": dense, "protocol": {"runs": 3}}, dense)
    assert ("unknown" not in forecast.left([kind])) == tells


def lines(caplog, x) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO", logger="kvp.pipeline.progress"):
        run(x)
    return [each.getMessage() for each in caplog.records if each.name == "kvp.pipeline.progress"]


def head_of(caplog, x) -> str:
    """The first line of a run, which is not run."""
    caplog.clear()
    with caplog.at_level("INFO", logger="kvp.pipeline.progress"):
        Progress(x)
    (line,) = [each.getMessage() for each in caplog.records if each.name == "kvp.pipeline.progress"]
    return line


def test_a_run_says_model_stage_and_time_as_far_as_they_are_known(tmp_path, caplog):
    x = Experiment.compose(compose_here(tmp_path, *QUICK))
    head, *first = lines(caplog, x)
    assert head == "6 stages: 0 stand, 6 to compute, 6 stages of unknown time left"
    assert all(LINE.fullmatch(line) for line in first)
    assert [line.split("  ")[0] for line in first] == [
        "[1/6] dense · model",
        "[2/6] dense · evaluate/perplexity/squad",
        "[3/6] pruned · score",
        "[4/6] pruned · plan",
        "[5/6] pruned · prune",
        "[6/6] pruned · evaluate/perplexity/squad",
    ]
    assert re.search(r"about \d+ s and 3 stages of unknown time left$", first[1])  # the dense model's sibling
    assert re.search(r"computed \(\d+\.\d s\)$", first[-1])

    head, *again = lines(caplog, x)
    assert head == "6 stages: 6 stand, 0 to compute"
    assert all(re.search(r"  found \(\d+\.\d s\)$", line) for line in again)

    other = Experiment.compose(compose_here(tmp_path, *QUICK, "ratio.value=0.5"))
    head = head_of(caplog, other)
    assert re.fullmatch(r"6 stages: 3 stand, 3 to compute, about \d+ s left", head)
    forced = replace(x, force=("prune",), since=x.since + 1e6)
    head = head_of(caplog, forced)
    assert re.fullmatch(r"6 stages: 4 stand, 2 to compute, about \d+ s left", head)
    assert {stage.model for stage in foretell(x)[0]} == {"dense", "pruned"}


@pytest.mark.slow
def test_a_run_that_finds_everything_imports_no_modelling_code():
    """Seconds of imports are for runs that compute; a fresh process, because this one has imported all."""
    script = (
        "import sys; sys.argv[:] = ['kvp']; import kvp.pipeline.run, kvp.models.configs, kvp.sweep.census, "
        "kvp.strategies.methods.kvpruner_plus; print(*sys.modules)"
    )
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"transformers.modeling_utils", "kvp.models.pruned", "peft", "lm_eval", "wandb", "datasets"}
    assert not heavy & {*imported.stdout.split()}
