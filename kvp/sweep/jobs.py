"""The jobs of a sweep: rows of an experiment, times the comma-separated values of a command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvp.hints import words
from kvp.pipeline.experiment import Experiment
from kvp.sweep.words import apart, gathered


def expand(rows: Sequence[str] | None, words: Sequence[str]) -> list[list[str]]:
    """The options of each job; one given on the command line wins over a row's.

    Args:
        rows: Each the options of one job, or of several ("strategy=kvpruner ratio.value=0.2,0.5").
        words: The options of all.
    """
    if not (rows is None or OmegaConf.is_list(rows) or isinstance(rows, list)) or not all(
        isinstance(row, str) for row in rows or ()
    ):
        raise ValueError(f"rows must be a list of options such as [strategy=none seed=0,1], got {rows}")
    if trusting := [row for row in rows or () if "trusted=" in row]:
        raise ValueError(
            f"rows may not say trusted=, because a file may not trust itself; got {trusting[0]!r}"
        )
    parser = OverridesParser.create()
    jobs: list[list[str]] = []
    for row in rows or ("",):
        given = [*shlex.split(row), *words, *(["rows=null"] if rows else [])]
        jobs += BasicSweeper.split_arguments(parser.parse_overrides(given), None)[0]
    return [list(job) for job in dict.fromkeys(map(tuple, jobs))]


def compose(loader: ConfigLoader, sweep: DictConfig, jobs: Sequence[list[str]]) -> list[Experiment]:
    """Return the experiments of jobs; an option that is not to be had fails before anything is launched.

    Raises:
        ValueError: Jobs whose options are wrong; one message for all that fail alike.
    """
    experiments, refused = [], []
    for job, own in zip(jobs, apart(jobs), strict=True):
        try:
            config = loader.load_sweep_config(sweep, job)
            OmegaConf.set_readonly(config, False)
            experiments.append(Experiment.compose(config, job))
        except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
            refused.append((own, words(error)))
    if refused:
        raise ValueError(" | ".join(gathered(refused, len(jobs))))
    return experiments
