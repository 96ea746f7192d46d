"""The configuration of conf/, composed in this process; what its interpolations mean."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvp.hints import CONF

ERRORS = (HydraException, OmegaConfBaseException)  # of options that are wrong; `kvp.hints.words` says them


def _compute_dtype(dtype: str, device: str) -> str:
    from kvp.models.load import resolve_device, resolve_dtype

    return str(resolve_dtype(dtype, resolve_device(device))).removeprefix("torch.")


def _options_of(group: str) -> str:
    """Return the options of a group for --help, in lines of 80 characters."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.endswith("_shape"))
    indent = " " * 13
    return textwrap.fill(" ".join(names), 80, initial_indent=indent, subsequent_indent=indent).strip()


OmegaConf.register_new_resolver("options_of", _options_of, replace=True)
OmegaConf.register_new_resolver("compute_dtype", _compute_dtype, replace=True)


def composed(words: Sequence[str]) -> DictConfig:
    """Return the configuration that options such as "model=tiny" describe, with Hydra's own node.

    Raises:
        HydraException, OmegaConfBaseException: An option is wrong.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(words), return_hydra_config=True)
