"""Hydra takes plugins from this namespace only; `kvp.sweep` and `kvp.plugins` do their work."""

from hydra.core.plugins import Plugins


def register() -> None:
    """Make the plugins of kvp known to Hydra, which overlooks those of an editable install."""
    from hydra_plugins.kvp.ray import RayLauncher
    from hydra_plugins.kvp.search_path import InstalledOptions
    from hydra_plugins.kvp.sweeper import KvpSweeper

    plugins = Plugins.instance()
    for plugin in (InstalledOptions, KvpSweeper, RayLauncher):
        if f"{plugin.__module__}.{plugin.__name__}" not in plugins.class_name_to_class:
            plugins.register(plugin)
