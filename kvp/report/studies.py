"""The committed studies: `experiments/specs.yaml` names the spec that makes the table of each."""

from __future__ import annotations

from pathlib import Path

import yaml

from kvp.report.records.runs import EXPERIMENTS, read_runs
from kvp.report.table.build import build
from kvp.report.table.references import load_published
from kvp.report.table.render import write_table
from kvp.report.table.spec import load_spec
from kvp.report.table.table import Table
from kvp.report.whole import whole


def find_studies() -> dict[Path, str]:
    """Return the directory of each study and the name of its spec.

    Raises:
        ValueError: There are no committed studies here.
    """
    root = next((root for root in EXPERIMENTS if (root / "specs.yaml").is_file()), None)
    if root is None:
        raise ValueError(f"no {EXPERIMENTS[0]}/specs.yaml: --committed works in a checkout of the repository")
    specs = yaml.safe_load((root / "specs.yaml").read_text(encoding="utf-8"))
    return {root / study: spec for study, spec in specs.items()}


def study_table(study: Path, spec: str) -> Table:
    """Return the table of a study."""
    runs = read_runs([study / "results.jsonl"])
    return build(load_spec(spec), runs, published=load_published(run.model for run in runs))


def write_studies() -> list[Path]:
    """Write table.md, table.csv, table.tex and sources.json beside the results of each study."""
    written = []
    for study, spec in find_studies().items():
        table = study_table(study, spec)
        with whole(study) as partial:
            written += [study / path.name for path in write_table(table, partial)]
    return written
