"""The experiment that the options of a command choose, as `python -m kvp` would compose it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir

from kvp.__main__ import CONF
from kvp.pipeline.experiment import Experiment


def chosen(words: Sequence[str]) -> Experiment:
    """Compose it from options such as "strategy=flap"; later ones win."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return Experiment.compose(compose("config", overrides=list(words), return_hydra_config=True))
