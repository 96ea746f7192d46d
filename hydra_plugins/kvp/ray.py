"""Jobs of a sweep as Ray tasks, chosen by conf/hydra/launcher/ray.yaml.

Plain `ray`, because Hydra's own Ray launcher cannot be installed beside the pinned packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class RayLauncher(Launcher):
    """Starts or joins a cluster, and waits for all jobs; a task that dies fails alone."""

    hydra_context: HydraContext
    config: DictConfig
    task_function: TaskFunction

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init, self.remote = init, remote

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives.

        Raises:
            HydraException: Ray is not installed.
        """
        if not find_spec("ray"):
            raise HydraException("launcher=ray needs another package: pip install 'kvp[ray]'")
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One task per job."""
        import ray
        from ray.exceptions import RayError

        def result(task: Any) -> JobReturn:
            try:
                return ray.get(task)
            except RayError as error:
                return JobReturn(status=JobStatus.FAILED, _return_value=error)

        ray.init(**OmegaConf.to_container(self.init, resolve=True))  # type: ignore[arg-type]
        try:
            options = OmegaConf.to_container(self.remote, resolve=True)
            remote = ray.remote(**options)(job)  # type: ignore[arg-type]
            tasks = [
                remote.remote(
                    self.hydra_context,
                    self.config,
                    self.task_function,
                    list(words),
                    n,
                    Singleton.get_state(),
                )
                for n, words in enumerate(job_overrides, start=initial_job_idx)
            ]
            return [result(task) for task in tasks]
        finally:
            ray.shutdown()


def job(
    hydra_context: HydraContext,
    sweep: DictConfig,
    task_function: TaskFunction,
    options: list[str],
    number: int,
    singletons: Any,
) -> JobReturn:
    """Do the work of a task; Ray puts its name before each line."""
    setup_globals()
    Singleton.set_state(singletons)
    config = hydra_context.config_loader.load_sweep_config(sweep, options)
    with open_dict(config):
        config.hydra.job.id, config.hydra.job.num = f"job {number}", number
    return run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
