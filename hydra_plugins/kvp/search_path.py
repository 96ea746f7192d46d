"""Options of installed plugins, for everything that composes a configuration: command, sweep, Python."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from kvp.plugins import CONF, sound


class InstalledOptions(SearchPathPlugin):
    """Adds the folder `conf` of every sound plugin, after kvp's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders, if kvp's options are searched; other Hydra applications stay as they are."""
        if any(element.path.removeprefix("file://") == str(CONF) for element in search_path.get_path()):
            for plugin in sound():
                search_path.append(plugin.distribution, f"file://{plugin.conf}")
