"""One list of facts decides for tables and plots alike: what the table footnotes, the plot separates, and no more."""

from __future__ import annotations

from functools import partial

import pytest

from kvp.report.plots import panels, quality
from kvp.report.plots.means import means
from kvp.report.plots.points import find_points
from kvp.report.plots.style import style
from kvp.report.records.facts import facts
from kvp.report.table.build import build
from kvp.report.table.spec import ColumnSpec, Spec
from tests.report.sample_records import as_runs, make_record

SQUAD, TASKS, TIMED = "evaluation__perplexity__squad", "evaluation__zero_shot", "measure"
METRIC = "pruned.evaluation.perplexity.squad.value"
DEVICE = {"provenance__origins__0__device": "NVIDIA H200"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"column": "text"}, {"column": "answer"}),
        ({"half": "train"}, {"half": "test"}),
        ({"commit": "a" * 40}, {"commit": "b" * 40}),
        ({"file": "valid.txt"}, {"file": "test.txt"}),
        ({"repo": "one/ptb"}, {"repo": "other/ptb"}),
        ({"max_documents": None}, {"max_documents": 10}),
        ({"read": "rows without text are left out"}, {}),
    ],
)
def test_another_text_is_another_corpus(one, other):
    at = f"pruned__{SQUAD}__protocol__corpus"
    told = [
        facts(as_runs(make_record(**{at: {"name": "mine", "sha256": "c" * 64, **more}}))[0].record, METRIC)[
            "corpus"
        ]
        for more in (one, other)
    ]
    assert told[0] != told[1] and all(each.startswith("mine (") for each in told)


def of_tasks(name, value):
    return {f"pruned__{TASKS}__{task}__{name}": value for task in ("piqa", "hellaswag")}


CHANGES = {  # metric of a model -> fact -> the change of a record that changes it
    "evaluation.perplexity.squad.value": {
        "corpus": {f"pruned__{SQUAD}__protocol__corpus": {"name": "squad", "distribution": "another==1"}},
        "part": {f"pruned__{SQUAD}__protocol__part": "validation"},
        "window": {f"pruned__{SQUAD}__protocol__window": 256},
        "stride": {f"pruned__{SQUAD}__protocol__stride": 64},
        "join": {f"pruned__{SQUAD}__protocol__join": " "},
        "bos": {f"pruned__{SQUAD}__protocol__bos": "start"},
        "max_tokens": {f"pruned__{SQUAD}__protocol__max_tokens": None},
        "dtype": {f"pruned__{SQUAD}__dtype": "torch.bfloat16"},
        "device": DEVICE,
    },
    "evaluation.zero_shot.average.value": {
        "metrics": {f"pruned__{TASKS}__average__metrics__piqa": "acc_norm"},
        "limit": of_tasks("limit", None),
        "num_fewshot": of_tasks("num_fewshot", 5),
        "add_bos_token": of_tasks("add_bos_token", True),
        "version": of_tasks("version", 2.0),
        "lm_eval": of_tasks("lm_eval", "0.5"),
        "source": of_tasks("source", "hub"),
        "split": of_tasks("split", "test"),
        "data_hash": of_tasks("data_hash", "0123456789"),
        "dtype": of_tasks("dtype", "torch.bfloat16"),
        "device": DEVICE,
    },
    "measure.decode.tokens_per_second": {
        "batch_size": {f"pruned__{TIMED}__protocol__batch_size": 8},
        "prompt_length": {f"pruned__{TIMED}__protocol__prompt_length": 64},
        "new_tokens": {f"pruned__{TIMED}__protocol__new_tokens": 64},
        "warmup": {f"pruned__{TIMED}__protocol__warmup": 0},
        "runs": {f"pruned__{TIMED}__protocol__runs": 9},
        "dtype": {f"pruned__{TIMED}__dtype": "bfloat16"},
        "method": {f"pruned__{TIMED}__memory__method": "cuda"},
        "device": {f"pruned__{TIMED}__device": "NVIDIA H200"},
        "threads": {f"pruned__{TIMED}__threads": 64},
        "attention": {f"pruned__{TIMED}__attention": "eager"},
    },
    "size.kv_bytes_per_token": {"kv_bytes": {"pruned__size__kv_bytes_per_token": 2 * 3 * 2 * 48}},
}
NO_FACTS = [  # changes that touch no number's meaning
    ("evaluation.perplexity.squad.value", {f"pruned__{SQUAD}__protocol__asked_window": 4096}),
    ("evaluation.perplexity.squad.value", {"provenance__origins__0__python": "3.12.0"}),
    ("evaluation.zero_shot.average.value", of_tasks("n", 19)),
    ("measure.decode.tokens_per_second", {f"pruned__{TIMED}__protocol__seed": 1}),
    ("measure.decode.tokens_per_second", DEVICE),
    ("size.kv_bytes_per_token", {"pruned__size__params": 7}),
]
READ = {
    "evaluation.perplexity.squad.value": [panels.perplexity],
    "evaluation.zero_shot.average.value": [panels.zero_shot],
    "measure.decode.tokens_per_second": [panels.decode_speed, panels.peak_memory],
    "size.kv_bytes_per_token": [partial(panels.size, key="kv_bytes_per_token")],
}


def compared(metric, change):
    """Whether the table footnotes a changed record among unchanged ones, and whether each plot separates it."""
    runs = as_runs(make_record(), make_record("magnitude"), make_record("random", **change))
    column = ColumnSpec(title="x", metric=f"pruned.{metric}")
    table = build(Spec(name="x", title="x", rows={"S": "strategy"}, columns=[column]), runs, allow_mixed=True)
    (changed,) = (row for row in table.rows if "random" in row.labels)
    pruned = [point for point in find_points(runs) if point.state == "pruned"]
    return bool(changed.cells[0].footnotes), [len(means(pruned, read)) == 2 for read in READ[metric]]


@pytest.mark.parametrize(
    ("metric", "fact"), [(metric, fact) for metric, changes in CHANGES.items() for fact in changes]
)
def test_what_the_table_footnotes_the_plot_separates(metric, fact):
    footnoted, separated = compared(metric, CHANGES[metric][fact])
    assert footnoted
    assert all(separated)


@pytest.mark.parametrize(("metric", "change"), NO_FACTS)
def test_what_the_table_does_not_footnote_the_plot_does_not_separate(metric, change):
    footnoted, separated = compared(metric, change)
    assert not footnoted
    assert not any(separated)


@pytest.mark.parametrize("metric", CHANGES)
def test_every_fact_is_tried(metric):
    (run,) = as_runs(make_record())
    assert facts(run.record, f"pruned.{metric}").keys() == CHANGES[metric].keys()


def test_a_cache_of_other_bytes_is_in_another_panel_of_the_front():
    halved = CHANGES["size.kv_bytes_per_token"]["kv_bytes"]
    dense = {"dense__size__kv_bytes_per_token": 2 * 3 * 2 * 64}
    points = find_points(as_runs(make_record(), make_record("random", **halved, **dense)))
    with style():
        by_cache = quality.pareto(points, "kv_bytes", panels.perplexity, "perplexity")
        by_params = quality.pareto(points, "params", panels.perplexity, "perplexity")
    assert [len(figure.axes) for figure in (by_cache, by_params)] == [2, 1]
