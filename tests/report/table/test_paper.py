"""The specs `paper` and `paper_recovered`: a column a task with its standard error, and LaTeX that compiles."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvp.report.records.runs import read_runs
from kvp.report.table.build import build
from kvp.report.table.render import latex, markdown
from kvp.report.table.spec import ColumnSpec, load_spec, stderr_of

STUDY = Path(__file__).parents[3] / "experiments" / "rivals_recovered" / "results.jsonl"
ACC = ("boolq", "piqa", "winogrande", "arc_easy")
NORM = ("hellaswag", "arc_challenge", "openbookqa")
TITLES = [*(f"{task} acc (%)" for task in ACC), *(f"{task} acc_norm (%)" for task in NORM), "average (%)"]
PAGE = r"""
\documentclass{article}
\usepackage[a3paper,landscape,margin=1cm]{geometry}
\usepackage{booktabs}
\begin{document}
\begin{table}\centering\scriptsize\setlength{\tabcolsep}{3pt}
\input{table}
\end{table}
\end{document}
"""


@pytest.fixture(scope="module")
def tables():
    runs = [run for run in read_runs([STUDY]) if run.status == "finished"]
    return {name: build(load_spec(name), runs) for name in ("paper", "paper_recovered")}


@pytest.mark.parametrize("name", ["paper", "paper_recovered"])
def test_every_task_has_its_column_with_its_metric_and_its_error(tables, name):
    table = tables[name]
    assert [column.title for column in table.columns[-8:]] == TITLES
    model = {"paper": "pruned", "paper_recovered": "recovered"}[name]
    (row,) = [row for row in table.rows if row.labels[:2] == ("35 % of kv_cache", "llm_pruner")]
    for task, cell in zip((*ACC, *NORM), row.cells[-8:-1], strict=True):
        result = cell.runs[0].record.models()[model].evaluation.zero_shot.tasks[task].metrics
        metric = "acc_norm" if task in NORM else "acc"
        error = 100 * result[f"{metric}_stderr"]
        assert cell.text == f"{100 * result[metric]:.1f}" + (f" ± {error:.1f}" if error else "")
    assert "± of a task in one run is the standard error over its documents" in table.notes
    assert any("boolq acc (task version 2), piqa acc (task version 1)" in note for note in table.notes)


def test_the_control_stands_beside_recovered_numbers(tables):
    assert "dense, tuned alike" in markdown(tables["paper_recovered"])


def test_the_error_stands_beside_the_number():
    assert stderr_of("pruned.evaluation.zero_shot.piqa.acc") == "pruned.evaluation.zero_shot.piqa.acc_stderr"
    assert (
        stderr_of("dense.evaluation.zero_shot.average.value") == "dense.evaluation.zero_shot.average.stderr"
    )


def test_a_difference_has_no_error():
    with pytest.raises(ValueError, match="stderr: a difference of two numbers has none"):
        ColumnSpec(title="x", metric="pruned.a.value - dense.a.value", stderr=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "paper_recovered"])
def test_latex_compiles_and_fits_the_page(tables, name, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex")
    (tmp_path / "table.tex").write_text(latex(tables[name]))
    (tmp_path / "page.tex").write_text(PAGE)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
