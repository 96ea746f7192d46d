"""The configuration in Python, composed as the command line composes it.

config = compose(["strategy=flap", "ratio.value=0.2"])
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.kvp import register
from kvp.choices import choices
from kvp.hints import CONF, words

_ALONE = RLock()  # Hydra has one state for all threads


def _options_of(group: str) -> str:
    """Return the options of a group for --help, in lines of 80 characters."""
    names = [name for name in choices(group) if not name.endswith("_shape")]
    indent = " " * 13
    return textwrap.fill(" ".join(names), 80, initial_indent=indent, subsequent_indent=indent).strip()


def _compute_dtype(dtype: str, device: str) -> str:
    from kvp.models.load import resolve_device, resolve_dtype

    return str(resolve_dtype(dtype, resolve_device(device))).removeprefix("torch.")


OmegaConf.register_new_resolver("options_of", _options_of, replace=True)
OmegaConf.register_new_resolver("compute_dtype", _compute_dtype, replace=True)


@contextmanager
def _hydra() -> Iterator[None]:
    """Let Hydra read conf/ in the block, also inside an application of the caller's that uses Hydra itself."""
    with _ALONE:
        outside = Singleton.get_state()
        GlobalHydra.instance().clear()
        register()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                yield
        finally:
            Singleton.set_state(outside)


def compose(overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> DictConfig:
    """Return the configuration of a run with these options, its hydra node included.

    Args:
        overrides: Words of the command line.
        values: Values by key that are no words, such as {"strategy.allocator": {"multiple_of": 4}}; None: unchanged.

    Raises:
        ValueError: An option does not exist, or has a value that no configuration holds.
    """
    with in_words(overrides):
        with _hydra():
            config = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
        OmegaConf.set_struct(config, False)
        for key, value in (values or {}).items():
            if value is not None:
                OmegaConf.update(config, key, _plain(value), force_add=True)
    return config


def _plain(value: Any) -> Any:
    """Return a value as a configuration holds it: numbers of numpy and torch as Python's, a dtype as its name."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return value.tolist() if hasattr(value, "tolist") else value


@contextmanager
def in_words(overrides: Sequence[str]) -> Iterator[None]:
    """Turn an error of Hydra or OmegaConf into a ValueError in the words of the command line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(words(error, overrides)) from error


def target_of(group: str, name: str) -> str:
    """Return the class that an option of a group names: "kvp.strategies.methods.flap.FLAP"."""
    with _hydra():
        node = hydra_compose(f"{group}/{name}")
    return str(OmegaConf.select(node, f"{group.replace('/', '.')}._target_"))
