"""The sweeper of `python -m kvp -m`, chosen by conf/hydra/sweeper/kvp.yaml.

Hydra imports it at every start, so it imports nothing heavy.
"""

from __future__ import annotations

import os

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kvp.hints import DRY_RUN

ELSEWHERE = ("SlurmLauncher", "RayLauncher")  # launchers whose jobs compute on other machines


class KvpSweeper(Sweeper):
    """Rows times comma-separated values; header, progress and table are `kvp.sweep`'s."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives, and the launcher that the configuration names."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that the command line and the experiment's rows make."""
        from kvp.sweep.jobs import compose, expand
        from kvp.sweep.sweep import sweep

        jobs = expand(self.config.rows, arguments)
        experiments = compose(self.hydra_context.config_loader, self.config, jobs)
        here = type(self.launcher).__name__ not in ELSEWHERE
        if os.environ.get(DRY_RUN):
            from kvp.sweep.dry import dry_run

            dry_run(jobs, experiments, here=here)
            return
        sweep(jobs, experiments, self.launcher.launch, here=here)
