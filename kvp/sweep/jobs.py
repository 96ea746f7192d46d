"""The jobs of a sweep: rows of an experiment, times the comma-separated values of a command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from kvp.pipeline.experiment import Experiment


def expand(rows: Sequence[str] | None, words: Sequence[str]) -> list[list[str]]:
    """The options of each job; one given on the command line wins over a row's.

    Args:
        rows: Each the options of one job, or of several ("strategy=kvpruner ratio.value=0.2,0.5").
        words: The options of all.
    """
    if isinstance(rows, str) or not all(isinstance(row, str) for row in rows or ()):
        raise ValueError(f"rows must be a list of options such as [strategy=none seed=0,1], got {rows}")
    parser = OverridesParser.create()
    jobs: list[list[str]] = []
    for row in rows or ("",):
        given = [*shlex.split(row), *words, *(["rows=null"] if rows else [])]
        jobs += BasicSweeper.split_arguments(parser.parse_overrides(given), None)[0]
    return [list(job) for job in dict.fromkeys(map(tuple, jobs))]


def compose(loader: ConfigLoader, sweep: DictConfig, job: list[str]) -> Experiment:
    """The experiment of a job; fails on an option that is not to be had, before anything is launched."""
    config = loader.load_sweep_config(sweep, job)
    OmegaConf.set_readonly(config, False)
    x = Experiment.compose(config, job)
    if x.force:
        from kvp.pipeline.stages import (
            check_force,  # modelling code, which other sweeps need not wait for yet
        )

        check_force(x)
    return x
