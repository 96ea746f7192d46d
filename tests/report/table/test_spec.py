from __future__ import annotations

import pytest

from kvp.report.records.keys import label, where
from kvp.report.table.spec import SPECS, ColumnSpec, expand, load_spec, read
from tests.report.sample_records import as_runs, make_record, stage

RUNS = as_runs(
    make_record("kvpruner", 0.25),
    make_record("magnitude", 0.5, steps=60),
    make_record("none", 0.25, steps=60),
)


@pytest.mark.parametrize("name", sorted(path.stem for path in SPECS.glob("*.yaml")))
def test_every_shipped_spec_fits_records(name):
    assert expand(load_spec(name).columns, RUNS)


def columns(*metrics: str) -> list[str]:
    return [c.title for c in expand([ColumnSpec(title="{}", metric=metric) for metric in metrics], RUNS)]


def test_a_pattern_is_a_column_per_match_in_the_order_it_names():
    assert columns("pruned.evaluation.perplexity.*.value") == ["squad"]
    assert columns("dense.evaluation.zero_shot.*.acc") == ["piqa", "hellaswag"]
    assert columns("dense.evaluation.zero_shot.boolq|hellaswag|piqa.acc") == ["hellaswag", "piqa"]


def test_a_difference_of_two_metrics():
    metric = "pruned.measure.memory.peak_bytes - pruned.measure.memory.baseline_bytes"
    assert read(RUNS[0].record, metric) == 3 << 20


def test_pruning_costs_what_its_stages_cost():
    stages = [
        stage("score", 30.0, 3 << 20),
        stage("search", 5.0, 2 << 20),
        stage("prune", 1.5, 1 << 20),
        stage("recover", 100.0, 9 << 20),
    ]
    whole, silent, unpruned = as_runs(
        make_record(stages=stages), make_record(), make_record(stages=stages[3:])
    )
    assert read(whole.record, "pruning.seconds") == 36.5
    assert read(whole.record, "pruning.peak_bytes") == 3 << 20
    assert read(silent.record, "pruning.peak_bytes") is None  # a stage that did not say
    assert read(unpruned.record, "pruning.seconds") is None


def test_an_unknown_metric_is_refused_with_names_near_it():
    with pytest.raises(ValueError, match=r"pruned\.size\.parms; near it: .*pruned\.size\.params"):
        columns("pruned.size.parms")


def test_a_metric_that_these_runs_did_not_measure_has_no_column():
    without = as_runs(make_record(dense__measure=None, pruned__measure=None))
    speed = ColumnSpec(title="speed", metric="pruned.measure.decode.tokens_per_second")
    recovered = ColumnSpec(title="after", metric="recovered.size.params")
    assert expand([speed, recovered], without) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {S: strategy}\ncolums: []", "colums.*near it: columns"),
        ("title: t\nrows: {S: strategy}\ncolumns: [{title: x, metric: y, unit: GB}]", "unit must be one of"),
        ("title: t\nrows: {S: strategy}\ncolumns: [{title: x, metric: y, better: more}]", "better must be"),
        ("title: t\nrows: {S: strategy}\ncolumns: []\ngroup: [Ratio]", "group names 'Ratio'"),
        ("title: [", "while parsing"),
        ("- 1", "spec"),
    ],
)
def test_a_bad_spec_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)spec .*mine.yaml: .*{message}|spec .*mine.yaml"):
        load_spec(str(path))


def test_an_unknown_spec_names_the_shipped_ones():
    with pytest.raises(ValueError, match=r"no spec man: name a YAML file or one of bytes, .*main"):
        load_spec("man")


def test_labels_are_what_a_reader_calls_a_value():
    kvpruner, magnitude, none = RUNS
    assert [label(run, "strategy") for run in RUNS] == ["kvpruner", "magnitude", "none"]
    assert (label(magnitude, "ratio"), label(magnitude, "ratio.value")) == ("50 % of kv_cache", "50 %")
    assert (label(none, "ratio"), label(none, "recovery")) == ("—", "lora")
    assert (label(kvpruner, "recovery"), label(kvpruner, "recovery.rank")) == ("none", "—")
    assert (label(kvpruner, "model"), label(kvpruner, "calibration.corpora")) == ("smollm2_135m", "drop")


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (["strategy=kvpruner,magnitude"], [0, 1]),
        (["ratio.value=0.25"], [0, 2]),  # a control stays: its ratio has no effect
        (["ratio.value=0.5", "recovery=lora"], [1, 2]),
        (["strategy.grouping=separate", "strategy=kvpruner"], [0]),
    ],
)
def test_filters(filters, left):
    assert where(RUNS, filters) == [RUNS[i] for i in left]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strategy", "write key=value"),
        ("stratgy=kvpruner", "no run has the key 'stratgy' .* near it: strategy"),
        ("grouping=separate", "near it: strategy.grouping"),
        ("strategy=flap", "no run is left; strategy is kvpruner, magnitude, none"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        where(RUNS, [text])
