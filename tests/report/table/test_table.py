from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvp.identity import chosen_options, named
from kvp.record import RunRecord
from kvp.report import studies
from kvp.report.__main__ import main
from kvp.report.plots.points import find_points
from kvp.report.records.keys import matches
from kvp.report.records.runs import Run
from kvp.report.table import references
from kvp.report.table.build import build
from kvp.report.table.render import comma_separated, latex, markdown, sources
from kvp.report.table.spec import ColumnSpec, Spec, load_spec
from kvp.report.table.table import Cell, Row, Table
from kvp.report.track import track
from tests.helpers.tracking import PNG, records
from tests.report.sample_records import (
    as_runs,
    make_failed,
    make_record,
    needles,
    perplexity,
    write,
    zero_shot,
)

ROOT = Path(__file__).parents[3]
PPL = ColumnSpec(title="{}", metric="pruned.evaluation.perplexity.*.value", better="lower", decimals=1)
TUNED = ColumnSpec(
    title="tuned {}", metric="recovered.evaluation.perplexity.*.value", better="lower", decimals=1
)


def spec(*columns: ColumnSpec, **options) -> Spec:
    rows = {"Removed": "ratio", "Strategy": "strategy"}
    return Spec(
        **{"name": "mine", "title": "T", "rows": rows, "group": ["Removed"], "columns": columns, **options}
    )


def table(*records: dict, of: Spec | None = None, **options) -> Table:
    return build(of or spec(PPL), as_runs(*records), **options)


def row(table: Table, *labels: str) -> Row:
    (found,) = (row for row in table.rows if set(labels) <= set(row.labels))
    return found


def texts(table: Table) -> dict[str, list[str]]:
    return {" ".join(row.labels): [cell.text for cell in row.cells] for row in table.rows}


def remarks(table: Table, cell: Cell) -> list[str]:
    return [table.footnotes[i] for i in cell.footnotes]


def test_rows_are_dense_then_the_control_then_the_combinations():
    made = table(
        make_record("magnitude", ratio=0.5, ppl=90.0),
        make_record("kvpruner", ratio=0.25, steps=60, ppl=40.0, recovered=30.0),
        make_record("none", steps=60, recovered=18.0),
        make_record("kvpruner", ratio=0.5, ppl=70.0),
        of=spec(PPL, TUNED),
    )
    assert texts(made) == {
        "— dense": ["20.0", "—"],
        "— dense, tuned alike": ["20.0", "18.0"],
        "25 % of kv_cache kvpruner": ["40.0", "30.0"],
        "50 % of kv_cache kvpruner": ["70.0", "—"],
        "50 % of kv_cache magnitude": ["90.0", "—"],
    }
    assert [row.section for row in made.rows] == [0, 0, 1, 2, 2]


def test_seeds_become_mean_and_sample_deviation_and_a_lonely_seed_is_said():
    made = table(
        make_record(seed=0, ppl=40.0), make_record(seed=1, ppl=44.0), make_record("random", seed=1, ppl=99.0)
    )
    cell = row(made, "kvpruner").cells[0]
    assert (cell.value, cell.std, cell.text) == (42.0, pytest.approx(8**0.5), "42.0 ± 2.8")
    assert len(cell.runs) == 2
    assert remarks(made, row(made, "random").cells[0]) == ["seed 1 only"]
    assert row(made, "dense").cells[0].text == "20.0"


def test_a_pruned_model_counts_once_however_it_is_tuned():
    made = table(
        make_record(seed=0, ppl=40.0),
        make_record(seed=1, ppl=44.0),
        make_record(seed=0, ppl=40.0, steps=60),
        make_record(seed=0, ppl=40.0, steps=120),
        of=spec(PPL, TUNED, rows={"Strategy": "strategy", "steps": "recovery.max_steps"}, group=[]),
    )
    assert texts(made) == {
        "dense —": ["20.0", "—"],
        "kvpruner 60": ["42.0 ± 2.8", "30.0"],
        "kvpruner 120": ["42.0 ± 2.8", "30.0"],
    }


def test_what_else_varies_is_shown():
    made = table(
        make_record(ppl=40.0),
        make_record(ppl=50.0, config__strategy__grouping="coupled"),
        make_record("random"),
    )
    assert made.keys == ("Removed", "Strategy", "strategy.grouping")
    assert (
        row(made, "coupled").cells[0].value == 50.0
        and row(made, "kvpruner", "separate").cells[0].value == 40.0
    )
    assert any("strategy.grouping" in note for note in made.notes)


def test_options_are_called_as_conf_calls_them():
    compensation = {"class": "LeastSquares"}
    made = table(make_record(), make_record(ppl=39.0, config__strategy__compensation=compensation))
    assert row(made, "least_squares").cells[0].value == 39.0


def test_a_sparse_cache_is_a_row_of_its_own_and_never_the_dense_one():
    cache = {"class": "Mustafar", "key_sparsity": 0.5, "window": 32}
    records = [
        make_record(ppl=40.0),
        make_record(ppl=50.0, config__cache=cache),
        make_record("none", config__cache=cache, pruned__evaluation__perplexity__squad__value=21.0),
    ]
    assert texts(table(*records)) == {
        "— dense —": ["20.0"],
        "25 % of kv_cache kvpruner —": ["40.0"],
        "25 % of kv_cache kvpruner mustafar": ["50.0"],
        "— none mustafar": ["21.0"],
    }
    points = find_points(as_runs(*records))
    assert [point.label for point in points if point.state == "pruned"] == [
        "dense + mustafar key_sparsity=0.5 window=32 0 %",
        "kvpruner 25 %",
        "kvpruner + mustafar key_sparsity=0.5 window=32 25 %",
    ]


def test_two_models_never_share_a_row():
    made = table(
        make_record(),
        make_record(config__model__name="tiny", dense__evaluation__perplexity__squad__value=9.0),
    )
    assert [r.cells[0].value for r in made.rows if r.kind == "dense"] == [20.0, 9.0]
    assert "smollm2_135m, tiny" in made.title


def test_unused_corpora_and_protocol_options_are_no_difference():
    made = table(
        make_record(seed=0),
        make_record(seed=1, config__corpora__new={"source": "new"}, config__measure=None),
    )
    assert len(made.rows) == 2


def test_best_and_second_are_marked_within_a_section():
    made = table(
        *(
            make_record(name, ppl=value)
            for name, value in (("kvpruner", 40.0), ("magnitude", 41.0), ("random", 50.0))
        ),
        make_record("kvpruner", ratio=0.5, ppl=70.0),
        make_record("magnitude", ratio=0.5, ppl=60.0),
    )
    assert [cell.best for r in made.rows for cell in r.cells] == [0, 1, 2, 0, 0, 1]


def test_sections_hold_together_wherever_their_key_stands():
    rows = {"Strategy": "strategy", "Removed": "ratio"}
    runs = [make_record(name, ratio=ratio) for name in ("kvpruner", "random") for ratio in (0.5, 0.25)]
    made = table(*runs, of=spec(PPL, rows=rows))
    assert [r.labels[1][:2] for r in made.rows] == ["—", "25", "25", "50", "50"]
    assert [r.section for r in made.rows] == [0, 1, 1, 2, 2]


def test_the_best_is_not_told_where_only_some_read_the_evaluated_corpus():
    read = {"calibration": "same corpus", "recovery": "none"}
    made = table(
        make_record("kvpruner", pruned__evaluation__perplexity__squad__overlap=read),
        make_record("magnitude", ppl=90.0),
    )
    assert not any(cell.best for r in made.rows for cell in r.cells)
    assert remarks(made, row(made, "kvpruner").cells[0]) == ["calibration read the same corpus"]


def test_deltas_are_to_dense_and_for_recovered_to_the_dense_model_tuned_alike():
    delta = [ColumnSpec(title=c.title, metric=c.metric, decimals=1, delta=True) for c in (PPL, TUNED)]
    runs = [make_record(steps=60, ppl=40.0, recovered=30.0), make_record("none", steps=60, recovered=18.0)]
    assert texts(table(*runs, of=spec(*delta)))["25 % of kv_cache kvpruner"] == [
        "40.0 (+20.0)",
        "30.0 (+12.0)",
    ]
    alone = table(runs[0], of=spec(*delta))
    assert row(alone, "kvpruner").cells[1].text == "30.0"
    assert any("no dense model tuned by the same recipe" in note for note in alone.notes)


def test_deltas_of_packed_caches_are_to_the_dense_model_too():
    """A dense model's own cache is never packed, so it is the base of rows with any cache."""
    delta = ColumnSpec(title=PPL.title, metric=PPL.metric, decimals=1, delta=True)
    cache = {"class": "Mustafar", "key_sparsity": 0.5, "window": 32}
    rows = {"Removed": "ratio", "Strategy": "strategy", "Cache": "cache"}
    made = table(make_record(ppl=40.0), make_record(ppl=50.0, config__cache=cache), of=spec(delta, rows=rows))
    assert [r.cells[0].text for r in made.rows] == ["20.0", "40.0 (+20.0)", "50.0 (+30.0)"]


def test_missing_is_a_dash_and_failed_its_reason():
    made = table(
        make_record(),
        make_failed("torch.OutOfMemoryError", "CUDA out of memory", ratio=0.5),
        make_failed("FloatingPointError", "loss is nan", strategy="random"),
        make_failed("RuntimeError", "CUDA error: out of memory", seed=1),
        make_record("magnitude", seed=2, status="running"),
    )
    assert row(made, "50 % of kv_cache").cells[0].text == "OOM"
    assert row(made, "random").cells[0].text == "NaN"
    assert row(made, "25 % of kv_cache", "kvpruner").cells[0].text == "40.0"
    assert remarks(made, row(made, "25 % of kv_cache", "kvpruner").cells[0]) == ["seed 1: OOM"]
    assert any("running or killed, left out: smollm2_135m-magnitude" in note for note in made.notes)


def test_a_run_that_failed_in_recovery_still_shows_what_it_pruned():
    record = make_record(steps=60, status="failed", error={"type": "MemoryError", "message": ""})
    del record["recovered"]
    assert texts(table(record, of=spec(PPL, TUNED)))["25 % of kv_cache kvpruner"] == ["40.0", "OOM"]


def test_what_failed_later_does_not_hide_what_stands():
    failed = make_failed("MemoryError", "", steps=60)
    assert remarks(table(make_record(), failed), row(table(make_record(), failed), "kvpruner").cells[0]) == []


def test_nothing_but_failures_says_why():
    failed = make_failed(
        "MemoryError", "", dense__evaluation={"perplexity": {}, "zero_shot": {"average": None}}
    )
    with pytest.raises(ValueError, match=r"mine has no number to show; smollm2_135m-kvpruner.* failed: OOM"):
        table(failed)


WINDOW = {"pruned__evaluation__perplexity": {"squad": perplexity("squad", 30.0, window=2048, stride=2048)}}


def test_different_windows_are_refused_or_footnoted():
    runs = [
        make_record(),
        make_record("magnitude"),
        make_record("random", config__evaluation__perplexity__window=2048, **WINDOW),
    ]
    message = (
        r"squad: smollm2_135m-magnitude\S* \(window 128\) and smollm2_135m-random\S* \(window 2048\) must not stand "
        r"in one column; --where evaluation.perplexity.window=128 or --allow-mixed"
    )
    with pytest.raises(ValueError, match=message):
        table(*runs[1:], runs[0])  # the dense row and magnitude against random
    mixed = table(*runs, allow_mixed=True)
    assert remarks(mixed, row(mixed, "random").cells[0])[0] == "window 2048, most are window 128"
    assert not any(cell.best for r in mixed.rows for cell in r.cells)


def test_an_accuracy_that_guessing_reaches_is_no_number():
    """Show "at chance" in the place of digits below a bound of its own or of the dense model."""

    def record(strategy: str, dense: float, pruned: float, **options):
        return make_record(
            strategy,
            dense__evaluation__needles={"single_512": needles(dense), "variables_512": needles(0.26)},
            pruned__evaluation__needles={"single_512": needles(pruned), "variables_512": needles(0.6)},
            config__cache=None,
            **options,
        )

    made = table(
        record("kvpruner", 1.0, 0.9),
        record("magnitude", 1.0, 0.37),
        record("random", 1.0, 0.38),
        of=load_spec("needles"),
    )
    found = texts(made)
    assert [column.title for column in made.columns[1:]] == [
        "single_512, pruned (%)",
        "variables_512, pruned (%)",
    ]
    assert found["— dense"][1:] == ["100.0 ± 5.0", "at chance"]
    assert found["25 % of kv_cache kvpruner"][1:] == ["90.0 ± 5.0 (-10.0)", "at chance"]
    assert found["25 % of kv_cache magnitude"][1:] == ["at chance", "at chance"]
    assert found["25 % of kv_cache random"][1:] == ["38.0 ± 5.0 (-62.0)", "at chance"]
    assert [cell.best for cell in row(made, "magnitude").cells[1:]] == [0, 0]
    assert row(made, "kvpruner").cells[1].best == 1
    assert any(note.startswith("at chance: guessing") for note in made.notes)
    assert any("needles single_512" in note and "accuracy of 0.38 on" in note for note in made.notes)
    other = {"single_512": needles(0.9, choices=8)}
    harder = make_record("random", pruned__evaluation__needles=other, dense__evaluation__needles=other)
    with pytest.raises(ValueError, match="one of 8 numbers"):
        table(record("kvpruner", 1.0, 0.9), harder, of=load_spec("needles"))


def test_different_protocols_are_never_averaged():
    other = make_record(seed=1, pruned__evaluation__perplexity__squad__protocol__max_tokens=None)
    with pytest.raises(
        ValueError, match=r"first 4096 tokens\) and .*all tokens\) must not be averaged in one cell"
    ):
        table(make_record(seed=0), other, allow_mixed=True)


def test_other_differences_get_a_footnote_each():
    shown = spec(PPL, ColumnSpec(title="acc", metric="pruned.evaluation.zero_shot.average.value", unit="%"))
    made = table(
        make_record(),
        make_record("magnitude"),
        make_record(
            "random",
            pruned__evaluation__perplexity__squad__protocol__max_tokens=16384,
            pruned__evaluation__perplexity__squad__dtype="torch.bfloat16",
            pruned__evaluation__zero_shot=zero_shot({"piqa": 0.5, "hellaswag": 0.5}, version=2.0, limit=None),
            provenance__origins__0__device="NVIDIA H200",
            provenance__origins__0__dirty=True,
        ),
        of=shown,
    )
    squad, acc = row(made, "random").cells
    device = "NVIDIA H200, most are cpu (x86_64)"
    assert set(remarks(made, squad)) == {
        "first 16384 tokens, most are first 4096 tokens",
        "bfloat16, most are float32",
        device,
        "uncommitted code",
    }
    limit = "all documents, most are first 20 documents"
    assert set(remarks(made, acc)) == {
        limit,
        "task version 2, most are task version 1",
        device,
        "uncommitted code",
    }
    assert any("first 20 documents" in note for note in made.notes)


def test_the_dense_row_is_of_the_protocol_that_most_runs_have():
    short = {
        f"{stage}__evaluation__perplexity__squad": perplexity("squad", value, max_tokens=512)
        for stage, value in (("dense", 9.0), ("pruned", 50.0))
    }
    made = table(make_record("random", **short), make_record(), make_record("magnitude"))
    assert row(made, "dense").cells[0].value == 20.0
    assert remarks(made, row(made, "random").cells[0]) == ["first 512 tokens, most are first 4096 tokens"]


def test_what_holds_for_every_run_is_a_note():
    made = table(
        make_record(provenance__origins__0__dirty=True),
        make_record("random", provenance__origins__0__dirty=True),
    )
    assert made.footnotes == () and "all numbers: uncommitted code" in made.notes


def test_other_tasks_in_an_average_are_refused():
    acc = ColumnSpec(title="acc", metric="pruned.evaluation.zero_shot.average.value")
    with pytest.raises(ValueError, match=r"acc: .*\(piqa acc, hellaswag acc_norm\) and .*\(piqa acc\)"):
        table(
            make_record(),
            make_record("magnitude"),
            make_record("random", pruned__evaluation__zero_shot=zero_shot({"piqa": 0.5})),
            of=spec(acc),
        )


def test_a_protocol_that_names_its_rows_may_differ():
    made = table(
        make_record(),
        make_record(
            config__evaluation__perplexity__window=2048,
            dense__evaluation__perplexity={"squad": perplexity("squad", 10.0, window=2048)},
            pruned__evaluation__perplexity={"squad": perplexity("squad", 30.0, window=2048)},
        ),
        of=spec(
            PPL, rows={"Strategy": "strategy", "window": "evaluation.perplexity.window"}, group=["window"]
        ),
    )
    assert texts(made) == {
        "dense 128": ["20.0"],
        "dense 2048": ["10.0"],
        "kvpruner 128": ["40.0"],
        "kvpruner 2048": ["30.0"],
    }


def test_columns_across_a_key():
    made = table(
        make_record(ppl=40.0),
        make_record(ratio=0.5, ppl=70.0),
        make_record("random", ratio=0.5, ppl=60.0),
        of=spec(PPL, rows={"Strategy": "strategy"}, group=[], across="ratio.value"),
    )
    assert [column.title for column in made.columns] == ["squad, 25 %", "squad, 50 %"]
    assert texts(made) == {"dense": ["20.0", "20.0"], "kvpruner": ["40.0", "70.0"], "random": ["—", "60.0"]}
    assert row(made, "random").cells[1].best == 1


def llama(**protocol) -> dict:
    full = {
        f"{stage}__evaluation__perplexity": {"wikitext2": perplexity("wikitext2", value, **protocol)}
        for stage, value in (("dense", 12.65), ("pruned", 22.0))
    }
    return make_record("random", config__model__name="llama_7b", **full)


def test_published_lines_stand_beside_ours_with_the_difference():
    shown = spec(ColumnSpec(title="{}", metric=PPL.metric), published=True)
    papers = references.load_published(["llama_7b", "no_such_model"])
    made = table(llama(max_tokens=None), of=shown, published=papers)
    lines = {r.labels[1]: r.cells[0].text for r in made.rows if r.kind == "published"}
    assert lines["dense (LLM-Pruner)"] == "12.62 (ours +0.03)"
    assert lines["element¹ (LLM-Pruner)"] == "19.09"
    assert any(note.startswith("published, LLM-Pruner: LLM-Pruner (arXiv:2305.11627)") for note in made.notes)
    other = table(llama(max_tokens=None, window=2048), of=shown, published=papers)
    cell = row(other, "dense (LLM-Pruner)").cells[0]
    assert (cell.text, cell.delta) == ("12.62", None)
    assert "window 128, ours window 2048" in remarks(other, cell)


def test_a_published_line_finds_our_row_of_the_same_method(tmp_path, monkeypatch):
    ours = "{strategy: random, ratio.value: 0.25}"
    row_of_paper = f"{{method: random, pruned: {{wikitext2: 20.0}}, ours: {ours}}}"
    paper = f"P: {{source: somewhere, rows: [{row_of_paper}]}}"
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "llama_7b.yaml").write_text(paper)
    monkeypatch.setattr(references, "EXPERIMENTS", (tmp_path,))
    shown = spec(ColumnSpec(title="{}", metric=PPL.metric), published=True)
    made = table(llama(max_tokens=None), of=shown, published=references.load_published(["llama_7b"]))
    assert row(made, "random (P)").cells[0].text == "20.00 (ours +2.00)"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "references").glob("*.yaml")), ids=lambda path: path.stem
)
def test_published_averages_are_those_of_their_tasks(path):
    entries = references.load_published([path.stem])
    assert entries and (ROOT / "conf" / "model" / path.name).exists()
    for entry in entries:
        for stage in ("pruned", "recovered"):
            tasks = {k: v for k, v in entry.numbers.items() if k.startswith(f"{stage}.evaluation.zero_shot")}
            average = tasks.pop(f"{stage}.evaluation.zero_shot.average.value", None)
            assert average is None or sum(tasks.values()) / 7 == pytest.approx(average, abs=1.1e-4), entry


def test_published_lines_name_the_strategies_that_repeat_them():
    def configured(experiment: str, **more: str) -> Run:
        changes = [f"experiment={experiment}", *(f"{key}={value}" for key, value in more.items())]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose("config", overrides=changes, return_hydra_config=True)
        choices = chosen_options(composed.hydra.runtime.choices, composed)
        config = named(
            OmegaConf.to_container(
                OmegaConf.masked_copy(
                    composed, ["strategy", "ratio", "recovery", "model", "calibration", "evaluation"]
                )
            )
        )
        return Run(Path("run.json"), None, RunRecord.model_construct(config=config, choices=choices))

    for model in ("llama_7b", "llama3_8b"):
        run = configured(f"llm_pruner_{model}")
        found = [
            f"{entry.paper} {entry.method}"
            for entry in references.load_published([model])
            if entry.ours and all(matches(run, *its) for its in {**entry.ours, **entry.recipe}.items())
        ]
        assert found and all("LLM-Pruner" in name and "element¹" in name for name in found)


@pytest.fixture
def sweep() -> Table:
    return table(
        make_record(ppl={"squad": 40.0, "a_b": 1234.5}),
        make_record(seed=1, ppl={"squad": 44.0, "a_b": 1234.5}),
        make_failed("MemoryError", "", strategy="random", ppl={"squad": 1.0, "a_b": 1.0}),
        make_record("magnitude", ppl={"squad": 50.0, "a_b": 1300.0}, provenance__origins__0__dirty=True),
    )


def test_markdown(sweep):
    lines = markdown(sweep).splitlines()
    assert lines[0] == "**T, smollm2_135m**"
    assert re.sub(" +", " ", lines[2]) == "| Removed | Strategy | squad ↓ | a_b ↓ |"
    assert re.sub(" +", " ", lines[5]) == "| 25 % of kv_cache | kvpruner | **42.0 ± 2.8** | **1,234.5** |"
    assert (
        re.sub(" +", " ", lines[6])
        == "| 25 % of kv_cache | magnitude | 50.0<sup>a,b</sup> | 1,300.0<sup>a</sup> |"
    )
    assert re.sub(" +", " ", lines[7]) == "| 25 % of kv_cache | random | OOM | OOM |"
    assert len({len(line) for line in lines[2:8]}) == 1
    assert "<sup>a</sup> uncommitted code  " in lines and "<sup>b</sup> seed 0 only  " in lines


def test_csv_holds_the_numbers_as_they_are(sweep):
    rows = list(csv.DictReader(io.StringIO(comma_separated(sweep))))
    assert [r["row"] for r in rows] == ["dense", "run", "run", "run"]
    assert (rows[1]["squad"], float(rows[1]["squad: std"]), rows[1]["squad: runs"]) == ("42.0", 8**0.5, "2")
    assert rows[3]["squad"] == "OOM" and rows[0]["a_b"] == "20.0"


def test_latex_is_balanced_and_escaped(sweep):
    text = latex(sweep)
    assert r"25 \% of kv\_cache & kvpruner & \textbf{42.0 $\pm$ 2.8} & \textbf{1,234.5} \\" in text
    assert text.count("{") == text.count("}") and text.count(r"\midrule") == 2
    assert text.count(" & ") == 5 * 3
    assert not re.search(r"[↓↑±—]", text)


def test_sources_name_the_runs_behind_each_cell(sweep):
    found = sources(sweep)
    cells = found["rows"][1]["cells"]
    assert len(cells["squad"]) == 2 and all(
        found["runs"][key]["path"].endswith("/run.json") for key in cells["squad"]
    )
    assert len(found["rows"][3]["cells"]["squad"]) == 1


def test_the_command_writes_the_same_bytes_again_and_from_the_committed_form(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = [
        make_record(name, seed=seed, ppl=40.0 + seed, steps=60)
        for name in ("kvpruner", "none")
        for seed in (0, 1)
    ]
    write(tmp_path / "outputs" / "runs", *records)
    main(["--out", "experiments/study", "--collect", "--no-plots"])
    printed = capsys.readouterr().out
    assert "dense, tuned alike" in printed and "experiments/study/table.tex" in printed
    main(["study", "--out", "again", "--no-plots"])
    names = ("table.md", "table.csv", "table.tex", "sources.json")
    for name in names:
        assert Path("again", name).read_bytes() == Path("experiments/study", name).read_bytes()
    assert "experiments/study/results.jsonl:1" in Path("again/sources.json").read_text()
    main(["study", "--out", "both", "--no-plots", "--spec", "main", "--spec", "efficiency"])
    assert Path("both/main/table.md").read_bytes() == Path("again/table.md").read_bytes()
    assert "prefill tokens/s" in Path("both/efficiency/table.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run.json below .*runs"),
        (["nothing"], "nothing is neither a path nor an experiment"),
        (["--spec", "nope"], "no spec nope"),
        (["--spec", "bad.yaml"], "spec bad.yaml: while parsing"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_1(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "runs").mkdir(parents=True)
    (tmp_path / "bad.yaml").write_text("title: [")
    with pytest.raises(SystemExit) as left:
        main(words)
    assert re.match(f"kvp.report: error: .*{message}", str(left.value.code)) and "\n" not in str(
        left.value.code
    )


def test_reports_need_neither_torch_nor_the_hub(tmp_path):
    write(tmp_path / "runs", make_record())
    words = ["-m", "kvp.report", "runs", "--no-plots", "--out", "report"]
    python = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(
        python, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    heavy = {"torch", "transformers", "datasets", "lm_eval", "peft", "wandb", "hydra"}
    assert not heavy & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_wandb_has_the_table_and_the_plots_in_a_summary_run_of_the_group(tmp_path, monkeypatch, sweep):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "ratio.png").write_bytes(PNG)
    (tmp_path / "ratio.svg").write_text("<svg/>")
    runs = [
        Run(run.path, None, run.record.model_copy(update={"group": "the-sweep"}))
        for row in sweep.rows
        for run in row.cells[0].runs
    ]
    plots = [tmp_path / "ratio.png", tmp_path / "ratio.svg"]
    place = Path(track(runs, [sweep], plots, tmp_path, mode="offline", group=None))
    wandb.teardown()  # its service writes the last of the file as it ends
    (logged,) = place.glob("files/media/table/mine*")
    content = json.loads(logged.read_text())
    assert content["columns"] == ["Removed", "Strategy", "squad", "a_b"]
    assert content["data"][1][1:] == ["kvpruner", 42.0, 1234.5] and content["data"][3][2] == "OOM"
    assert [path.read_bytes() for path in place.glob("files/media/images/*")] == [PNG]
    (about,) = (record.run for record in records(tmp_path) if record.HasField("run"))
    assert (about.run_group, about.job_type) == ("the-sweep", "report")


@pytest.mark.parametrize(("study", "of"), studies.find_studies().items(), ids=str)
def test_the_committed_tables_come_from_the_committed_results(study, of, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert markdown(studies.study_table(study, of)).encode() == (study / "table.md").read_bytes()


def test_every_study_with_a_table_of_runs_has_a_spec():
    tables = {path.parent for path in (ROOT / "experiments").glob("*/table.md")}
    runs = {path.parent for path in (ROOT / "experiments").glob("*/results.jsonl")}
    of_benchmarks = {ROOT / "experiments" / "speed"}
    assert {study.resolve() for study in studies.find_studies()} == (tables & runs) - of_benchmarks


def test_the_committed_tables_can_be_made_again(tmp_path, monkeypatch, capsys):
    study = tmp_path / "experiments" / "sparse"
    study.mkdir(parents=True)
    (study / "results.jsonl").write_bytes((ROOT / "experiments/sparse/results.jsonl").read_bytes())
    (study.parent / "specs.yaml").write_text("sparse: sparse")
    monkeypatch.chdir(tmp_path)
    main(["--committed"])
    names = ["table.md", "table.csv", "table.tex", "sources.json"]
    assert capsys.readouterr().out.split() == [f"experiments/sparse/{name}" for name in names]
    assert (study / "table.md").read_bytes() == (ROOT / "experiments/sparse/table.md").read_bytes()
    assert "experiments/sparse/results.jsonl:1" in (study / "sources.json").read_text()
