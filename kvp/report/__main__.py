"""Make tables, plots and a page from the records of runs; no model, no GPU, no network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvp.commands import called
from kvp.report.records.keys import where
from kvp.report.records.runs import collect, collected, read_runs
from kvp.report.studies import write_studies
from kvp.report.table.build import build
from kvp.report.table.references import load_published
from kvp.report.table.render import write_table
from kvp.report.table.show import show
from kvp.report.table.spec import SPECS, load_spec
from kvp.report.whole import whole
from kvp.tables import NOTE, plain


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error that a user can mend is one line and exit code 1."""
    try:
        for path in report(_parser().parse_args(arguments)):
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"kvp.report: error: {plain(' '.join(str(error).split()), NOTE)}")


def report(options: argparse.Namespace) -> list[Path | str]:
    """Print the tables and write everything; return the paths and the place of the tracker's run."""
    if options.committed:
        return [*write_studies()]
    out: Path = options.out
    specs = [load_spec(name) for name in options.spec or ["main"]]
    runs = where(read_runs(options.paths), options.where)
    if options.collect:
        runs = collected(runs, out / "results.jsonl")
    published = load_published(run.model for run in runs)
    tables = [build(spec, runs, published=published, allow_mixed=options.allow_mixed) for spec in specs]
    with whole(out) as partial:
        files = [collect(runs, partial / "results.jsonl")] if options.collect else []
        for table in tables:
            files += write_table(table, partial if len(tables) == 1 else partial / table.name)
        plots: list[Path] = []
        if not options.no_plots:
            from kvp.report.plots.write import write_plots

            plots = write_plots(runs, partial)
        from kvp.report.page.html import write_html

        files += [*plots, write_html(runs, tables, plots, partial, home=out)]
        plots, files = ([out / path.relative_to(partial) for path in paths] for paths in (plots, files))
    for table in tables:
        show(table)
    if options.wandb:
        from kvp.report.track import track

        return [*files, track(runs, tables, plots, out, mode=options.wandb, group=options.group)]
    return [*files]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=called("report"), description=__doc__)
    shipped = ", ".join(sorted(path.stem for path in SPECS.glob("*.yaml")))
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        default=["outputs/runs"],
        metavar="PATH",
        help="run.json files, directories of them, results.jsonl, names of experiments (default: outputs/runs)",
    )
    add(
        "--spec",
        action="append",
        metavar="NAME",
        help=f"what a table shows: {shipped}, or a YAML file (default: main); several go to a folder each",
    )
    add(
        "--out",
        type=Path,
        default=Path("outputs/report"),
        metavar="DIR",
        help="where the files go (default: %(default)s)",
    )
    add(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE[,VALUE]",
        help="only runs with this in their configuration, such as ratio.value=0.25; repeatable",
    )
    add(
        "--collect",
        action="store_true",
        help="also write results.jsonl, the runs in a form to commit, and report on that",
    )
    add(
        "--allow-mixed",
        action="store_true",
        help="footnote numbers of different protocols in one column instead of refusing them",
    )
    add(
        "--committed",
        action="store_true",
        help="make the tables of all studies in experiments/ again, each beside its results, and nothing else",
    )
    add("--no-plots", action="store_true", help="tables and page only")
    add(
        "--wandb",
        choices=("offline", "online"),
        help="log tables and plots to a summary run of the group in Weights & Biases",
    )
    add("--group", help="that group (default: the runs')")
    return parser


if __name__ == "__main__":
    main()
